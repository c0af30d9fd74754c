"""`dcbench ablate` and the λ sweep: every arm of a suite through the ordinary run, then one table.

<out>/<arm>/seed-<s>/     an ordinary run directory: plan, clips, record; resumable, shared by later calls
<out>/<arm>/training-<s>/ training suites: the arm's own stages, from <out>/shared
<out>/stages/             stages that several arms have in common, trained once
<out>/suite.json, table.{md,csv}, curves-<metric>.png   `rebuild` makes the last ones from the records alone
<out>/frames-<group>-<n>.png   two clips as every arm made them
"""

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dcbench import planning, run
from dcbench.analysis.judge import ASPECTS, judge
from dcbench.analysis.statistics import wilson
from dcbench.analysis.suite import Arm, Suite, arm_card
from dcbench.catalogue import DatasetCard, ModelCard, find_model
from dcbench.clips import resize
from dcbench.datasets.shapes import ShapesVideo
from dcbench.errors import UserError
from dcbench.models.dynamicrafter.load import read_config
from dcbench.protocol import Protocol
from dcbench.record import Record, digest, read_record, write_text
from dcbench.reports import write_frames
from dcbench.reports.figures import Curve, curves
from dcbench.reports.tables import load_runs
from dcbench.training.held_out import SWAPS, HeldOut, held_out
from dcbench.training.networks import PREFIXES, build
from dcbench.training.recipe import Recipe, find_recipe
from dcbench.training.run import run as train
from dcbench.training.start import begin
from dcbench.weights import atomic_write, load_tensors

Interval = tuple[float, float] | None


@dataclass
class Row:
    """An arm's numbers: by metric, a value and its interval for each seed."""

    arm: Arm
    scores: dict[str, list[tuple[float, Interval]]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # metrics that could not be computed
    clips: int = 0

    def add(self, metric: str, value: float, interval: Interval) -> None:
        self.scores.setdefault(metric, []).append((value, interval))

    def add_scores(self, record: Record, verdicts: Mapping[str, tuple[float, Interval]]) -> None:
        """A finished run's scores and what the judge says of its clips."""
        for name, score in record.scores.items():
            if score.value is None:
                self.reasons[name] = score.reason or "no reason given"
            else:
                self.add(name, score.value, score.ci95)
        for name, (value, interval) in verdicts.items():
            self.add(name, value, interval)
        self.clips = record.n_planned

    def add_held_out(self, measured: HeldOut) -> None:
        half = 1.96 * measured.error
        self.add("held_out_loss", measured.loss, (measured.loss - half, measured.loss + half))
        for swap in SWAPS:
            self.add(f"swap_{swap}", measured.reliance(swap), None)

    def summary(self, metric: str) -> tuple[float, Interval] | None:
        """Mean over seeds; the interval of a single seed, or the span of all seeds' intervals."""
        found = self.scores.get(metric)
        if not found:
            return None
        ends = [end for value, interval in found for end in (interval or (value, value))]
        interval = (min(ends), max(ends)) if len(found) > 1 or found[0][1] else None
        return sum(value for value, _ in found) / len(found), interval


def run_suite(
    suite: Suite,
    model: ModelCard,
    dataset: DatasetCard,
    protocol: Protocol,
    out: Path,
    options: run.Options,
    seeds: Sequence[int] = (123,),
    limit: int | None = None,
    metrics: Sequence[str] | None = None,
    data: Path | None = None,
) -> list[Row]:
    """Run what is missing, score it, and write the table into `out`."""
    rows = []
    write_text(out / "suite.json", json.dumps({"suite": suite.model_dump(), "seeds": list(seeds)}, indent=1) + "\n")
    for arm in suite.arms:
        row = Row(arm)
        for seed in seeds:
            folder = out / _folder(arm.name)
            card = arm_card(model, arm)
            if arm.clips:
                videos = find_model("videos")
                card = videos.model_copy(update={"options": {**videos.options, "folder": arm.clips}})
            if suite.kind == "training":
                trained = train_arm(suite, arm, out, folder, seed, data)
                card = card.model_copy(update={"options": {**arm.options, "folder": str(trained)}})
                measured = held_out_of(suite, arm, trained, seed, data)
                row.add_held_out(measured)
            chosen = protocol.model_copy(update={"frame_stride": arm.frame_stride}) if arm.frame_stride else protocol
            job = planning.plan(card, dataset, chosen, data, folder / f"seed-{seed}", seed, limit, quiet=options.quiet)
            run.sample(job, options)
            found = run.score(job, options, metrics or suite.metrics, strict=bool(metrics))
            verdicts = judged(job)
            write_text(job.directory.path / "judge.json", json.dumps(verdicts, indent=1) + "\n")
            row.add_scores(found, verdicts)
        rows.append(row)
        write_table(suite, rows, out, seeds)
    draw_frames(suite, out, seeds[0])
    return rows


def rebuild(out: Path) -> str:
    """Write a suite's table and curves again from the records in its folder alone; returns the table.

    Needed of each arm and seed: record.json and judge.json, of trained arms held_out.json; no clips, no weights.
    """
    kept = json.loads((out / "suite.json").read_text(encoding="utf-8"))
    suite, seeds, rows = Suite.model_validate(kept["suite"]), kept["seeds"], []
    for arm in suite.arms:
        row = Row(arm)
        for seed in seeds:
            folder = out / _folder(arm.name) / f"seed-{seed}"
            judge, trained = folder / "judge.json", folder.with_name(f"training-{seed}") / "held_out.json"
            for path in (folder / "record.json", judge, *([trained] if suite.kind == "training" else [])):
                if not path.is_file():
                    raise UserError(f"{path} is not there: arm {arm.name!r}, seed {seed} is not finished")
            if suite.kind == "training":
                row.add_held_out(HeldOut(**json.loads(trained.read_text(encoding="utf-8"))))
            row.add_scores(read_record(folder), json.loads(judge.read_text(encoding="utf-8")))
        rows.append(row)
    return write_table(suite, rows, out, seeds)


def _folder(name: str) -> str:
    plain = name.lower().replace("λ", "lambda")
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in plain).strip("-")


# ---- the shapes world: its own judge


def judged(job: planning.Job) -> dict[str, tuple[float, Interval]]:
    """Shares of clips that show what their scene says, with Wilson intervals; nothing for other datasets."""
    finished = job.directory.finished_samples()
    rows = []
    for entry in job.manifest:
        video = job.items[entry.id].video if entry.id in job.items else None
        if not isinstance(video, ShapesVideo) or entry.id not in finished:
            continue
        clip = run.generated_clip(job, entry, finished[entry.id])
        rows.append(judge(resize(clip, 64, 64), entry.fps).agrees(video.scene))
    return {f"judge_{aspect}": wilson(sum(row[aspect] for row in rows), len(rows)) for aspect in ASPECTS if rows}


# ---- arms that are trained


def arm_recipe(suite: Suite, arm: Arm, seed: int) -> Recipe:
    """The suite's recipe with the suite's and the arm's changes and this seed; unknown stages and fields are errors."""
    recipe = find_recipe(suite.recipe)
    return recipe.varied(suite.stages).varied(arm.stages, arm.without, seed=recipe.seed + seed)


def train_arm(suite: Suite, arm: Arm, out: Path, folder: Path, seed: int, data: Path | None) -> Path:
    """Train what all arms share once, then this arm's own stages from there; returns the trained folder.

    A stage that another arm has trained from the same beginning, with the same settings and seed, is taken over.
    """
    whole, recipe = find_recipe(suite.recipe), arm_recipe(suite, arm, seed)
    names = [stage.name for stage in whole.stages]
    shared = tuple(names[: names.index(whole.stage(suite.shared).name) + 1])
    common, target = out / "shared", folder / f"training-{seed}"
    train(whole, common, data, shared, device="cpu")
    for name in shared:
        _take_stage(common / name, target / name)
    if (common / "latents.safetensors").is_file() and not (target / "latents.safetensors").is_file():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(common / "latents.safetensors", target / "latents.safetensors")
    for count, stage in enumerate(recipe.stages, 1):
        if stage.name in shared:
            continue
        so_far = recipe.model_copy(update={"stages": recipe.stages[:count], "summary": ""})
        kept = out / "stages" / f"{stage.name}-{digest(so_far.model_dump(mode='json'))}"
        _take_stage(kept, target / stage.name)
        train(recipe, target, data, (stage.name,), device="cpu")
        _take_stage(target / stage.name, kept)
    train(recipe, target, data, device="cpu")  # writes the model's files
    return target


def _take_stage(source: Path, target: Path) -> None:
    """Copy a finished stage to where it is not finished yet; its weights last, for they say that it is finished."""
    if not (source / "weights.safetensors").is_file() or (target / "weights.safetensors").is_file():
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda path: path.name == "weights.safetensors"):
        if file.name != "state.pt":  # for resuming, and the largest
            with atomic_write(target / file.name) as temporary:
                shutil.copyfile(file, temporary)


def held_out_of(suite: Suite, arm: Arm, trained: Path, seed: int, data: Path | None) -> HeldOut:
    """Loss on held-out clips under the arm's own last conditions; kept beside the training."""
    path = trained / "held_out.json"
    if not path.is_file():
        recipe = arm_recipe(suite, arm, seed)
        networks = build(read_config(trained), 0)
        begin(networks, load_tensors(trained / "weights.safetensors"), tuple(PREFIXES), "dynamicrafter")
        measured = held_out(networks, recipe, recipe.stages[-1], clips=suite.held_out_clips, data_root=data)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(vars(measured), indent=1))
    return HeldOut(**json.loads(path.read_text()))


# ---- one table


def write_table(suite: Suite, rows: Sequence[Row], out: Path, seeds: Sequence[int]) -> str:
    """table.md, table.csv, arms.json and curves; returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    metrics = list(dict.fromkeys(name for row in rows for name in (*row.scores, *row.reasons)))
    paper = sorted({name for arm in suite.arms for name in arm.published})
    head = ["arm", "meaning", *metrics, *(f"{name} ({suite.published})" for name in paper)]
    body = []
    for row in rows:
        cells = [show(row.summary(name)) for name in metrics]
        body.append([row.arm.name, row.arm.meaning, *cells, *(f"{row.arm.published.get(n, '')}" for n in paper)])
    text = [f"# {suite.title}", "", suite.note, ""]
    many = "intervals span the seeds' own 95 % intervals" if len(seeds) > 1 else "95 % intervals"
    text += [f"{rows[0].clips if rows else 0} clips an arm, seeds {', '.join(map(str, seeds))}; {many}.", ""]
    text += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    text += ["| " + " | ".join(cells) + " |" for cells in body]
    reasons = {name: reason for row in rows for name, reason in row.reasons.items()}
    text += [f"\nNot computed: {name}: {reason}" for name, reason in reasons.items()]
    markdown = "\n".join(text) + "\n"
    with atomic_write(out / "table.md") as temporary:
        temporary.write_text(markdown)
    sheet = io.StringIO()
    writer = csv.writer(sheet)
    writer.writerow(["arm", "group", "x", "metric", "seed", "value", "low", "high"])
    for row in rows:
        for name, found in row.scores.items():
            for seed, (value, interval) in zip(seeds, found, strict=False):
                writer.writerow([row.arm.name, row.arm.group, row.arm.x, name, seed, value, *(interval or ("", ""))])
    with atomic_write(out / "table.csv") as temporary:
        temporary.write_text(sheet.getvalue())
    draw_curves(suite, rows, metrics, out)
    return markdown


def show(summary: tuple[float, Interval] | None) -> str:
    if summary is None:
        return ""
    value, interval = summary
    return f"{value:.4g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")


def draw_frames(suite: Suite, out: Path, seed: int) -> None:
    """Two clips as the arms made them, as in the paper's Fig. 2 (right); a picture for each group of a sweep."""
    groups: dict[str, list[Arm]] = {}
    for arm in suite.arms:
        groups.setdefault(arm.group if arm.x is not None else suite.name, []).append(arm)
    for group, arms in groups.items():
        labels = {out / _folder(arm.name) / f"seed-{seed}": arm.name for arm in arms}
        write_frames(load_runs(list(labels)), labels, out, f"frames-{_folder(group)}")


def draw_curves(suite: Suite, rows: Sequence[Row], metrics: Sequence[str], out: Path) -> None:
    """For arms with a place on an axis: one picture a metric, a line a group."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.arm.x is not None:
            groups.setdefault(row.arm.group, []).append(row)
    for metric in metrics:
        lines: dict[str, Curve] = {}
        for group, members in groups.items():
            points = [(row.arm.x, *s) for row in members if row.arm.x is not None and (s := row.summary(metric))]
            if len(points) < 2:
                continue
            band = [interval or (value, value) for _, value, interval in points]
            x, y = [point[0] for point in points], [point[1] for point in points]
            lines[group] = Curve(x, y, [low for low, _ in band], [high for _, high in band])
        if lines:
            curves(out / f"curves-{metric}.png", lines, suite.x_label, metric, title=suite.title)
