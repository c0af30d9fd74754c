"""`dcbench probe lambda`: a table and bars of every layer's λ, next to those of the paper's Fig. 2 (left).

The sweep (Fig. 2, right) is the suite `lambda`: `dcbench ablate lambda`. `sweep` makes others.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment

from dcbench.analysis.suite import Arm, Suite
from dcbench.errors import UserError
from dcbench.escape import csv_cell, markdown, plain
from dcbench.files import atomic_write
from dcbench.models.dynamicrafter.image_scale import layer_group

PUBLISHED = Path(__file__).with_name("published_lambda.csv")


class Gated(Protocol):
    """An object with gates: `values` returns λ of layers 1, 2, ..."""

    def values(self) -> list[float]: ...


@dataclass(frozen=True)
class Profile:
    """λ of each layer, and its stage in the U-Net: "input", "middle" or "output"."""

    name: str
    stages: tuple[str, ...]
    values: tuple[float, ...]


def published_profile() -> Profile:
    """The 16 bars of the paper's Fig. 2, read from the picture to ±0.005."""
    with PUBLISHED.open() as file:
        rows = list(csv.DictReader(file))
    return Profile(
        "paper, Fig. 2 (read from the picture, ±0.005)",
        tuple(row["stage"] for row in rows),
        tuple(float(row["lambda"]) for row in rows),
    )


def profile(model: Any) -> Profile:
    """The current λ of a model's layers. UserError for a model without learned gates."""
    scale: Gated | None = getattr(model, "image_scale", None)
    if scale is None:
        raise UserError(f"{model.card.name} has no λ: only DynamiCrafter models have gates")
    cfg = model.cfg.unet
    if not cfg.learnable_image_scale:
        raise UserError(f"{model.card.name} has no learned gates (λ = 1 everywhere); dynamicrafter (256) has them")
    inputs = cfg.num_res_blocks * sum(2**n in cfg.attention_resolutions for n in range(len(cfg.channel_mult)))
    values = tuple(scale.values())
    stages = ("input",) * inputs + ("middle",) + ("output",) * (len(values) - inputs - 1)
    return Profile(model.card.name, stages, values)


def depths(shown: Profile) -> list[float]:
    """How deep each layer lies in the U-Net: 0 for the first input layer, 0.5 for the middle, 1 for the last output.

    A tiny network has fewer layers than the paper's, so a layer is compared with that of the same depth.
    """
    middle, last = shown.stages.index("middle"), len(shown.stages) - 1
    return [
        0.5 * layer / max(middle, 1) if layer <= middle else 0.5 + 0.5 * (layer - middle) / (last - middle)
        for layer in range(last + 1)
    ]


def table(profiles: list[Profile]) -> str:
    """A Markdown table: three columns per profile, a row per layer of the deepest profile.

    The layers of a shallower one stand in the rows that are closest in depth, with their own numbers.
    """
    deepest = max(profiles, key=lambda shown: len(shown.values))
    rows: list[list[str]] = [[] for _ in deepest.values]
    for shown in profiles:
        places = _rows(depths(shown), depths(deepest))
        for row, line in enumerate(rows):
            layer = places.index(row) if row in places else None
            cells = ("", "", "") if layer is None else (layer + 1, shown.stages[layer], f"{shown.values[layer]:.3f}")
            line += map(str, cells)
    head = " | ".join(f"layer | stage | λ, {markdown(shown.name)}" for shown in profiles)
    lines = [f"| depth | {head} |", "|" + "---|" * (1 + 3 * len(profiles))]
    lines += [f"| {d:.2f} | " + " | ".join(line) + " |" for d, line in zip(depths(deepest), rows, strict=True)]
    return "\n".join(lines) + "\n"


def _rows(own: list[float], places: list[float]) -> list[int]:
    """A place for each layer, in their order, each as close in depth as can be: the least sum of squared distances."""
    costs = np.subtract.outer(own, places) ** 2
    _, chosen = linear_sum_assignment(costs)  # of points on a line, the best assignment keeps their order
    return [int(row) for row in chosen]


def draw(profiles: list[Profile], path: Path) -> None:
    """Draw bars into `path`, one plot per profile. The dashed line is λ = 1, the value before training."""
    deepest = max(profiles, key=lambda shown: len(shown.values))
    figure = Figure(figsize=(6, 2.1 * len(profiles)), dpi=150, layout="constrained")
    axes = figure.subplots(len(profiles), squeeze=False)[:, 0]
    colours = {"input": "#4c78a8", "middle": "#e45756", "output": "#54a24b"}
    for axis, shown in zip(axes, profiles, strict=True):
        places = depths(shown)
        axis.bar(places, shown.values, 0.8 / len(deepest.values), color=[colours[stage] for stage in shown.stages])
        axis.axhline(1, lw=0.8, ls="--", color="0.4")
        axis.set_xlim(-0.05, 1.05)
        axis.set_xticks(places, [str(layer) for layer in range(1, len(places) + 1)])
        axis.set_ylabel("λ")
        axis.set_title(plain(shown.name).replace("$", r"\$"), fontsize=8, loc="left")
    axes[-1].set_xlabel("layer, by its depth in the U-Net (blue: input, red: middle, green: output)")
    figure.savefig(path)


def write_profile(model: Any, out: Path) -> str:
    """Write profile.md, profile.csv and profile.png into `out`. Returns the table."""
    profiles = [profile(model), published_profile()]
    out.mkdir(parents=True, exist_ok=True)
    text = table(profiles)
    with atomic_write(out / "profile.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    rows = zip(profiles[0].stages, profiles[0].values, strict=True)
    with atomic_write(out / "profile.csv") as temporary:
        lines = [f"{layer},{csv_cell(stage)},{value:.6f}" for layer, (stage, value) in enumerate(rows, 1)]
        temporary.write_text("\n".join(["layer,stage,lambda", *lines]) + "\n")
    draw(profiles, out / "profile.png")
    return text


def sweep(layers: list[str], factors: list[float], metrics: tuple[str, ...], model: Any) -> Suite:
    """A suite with an arm per layer group ("ends", "intermediate", "all" or "3,4,5") and factor on its λ."""
    count = len(profile(model).values)
    for group in layers:
        layer_group(group, count)
    if not factors or min(factors) < 0:
        raise UserError(f"factors {factors}: give numbers of at least 0, for example 0,0.5,1,2")
    arms = tuple(
        Arm(name=f"{group} x {factor:g}", group=group, x=factor, image_scale={group: factor})
        for group in layers
        for factor in factors
    )
    return Suite(
        name="lambda",
        title=f"λ sweep of {model.card.name}",
        x_label="factor on λ",
        metrics=metrics,
        arms=arms,
        baseline=next((arm.name for arm in arms if arm.x == 1), ""),
    )
