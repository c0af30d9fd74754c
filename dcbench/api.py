"""The front door for Python programs and notebooks: evaluate, score, compare, and the result that they give.

`dcbench/__init__.py` names these functions and imports this module when one is called.
"""

import base64
import html
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dcbench import ranks, video
from dcbench.analysis.compare import compare_runs, verdict
from dcbench.catalogue import find_model, with_overrides
from dcbench.models.live import card_of
from dcbench.record import Record, Score, read_per_clip, read_record
from dcbench.runs import planning
from dcbench.runs.folders import score_folders
from dcbench.runs.grid import free_memory
from dcbench.runs.run import Options
from dcbench.runs.sampling import sample
from dcbench.runs.scoring import score as score_run

SHOWN = 3  # clips in a notebook


@dataclass(frozen=True)
class Result:
    """A scored run: its directory and its record. A notebook shows its table and a few clips."""

    path: Path
    record: Record

    @property
    def scores(self) -> dict[str, Score]:
        """A score for each metric: `scores["fvd"].value`, `.ci95`, `.n_generated`, `.reason`."""
        return self.record.scores

    @property
    def fingerprint(self) -> str:
        """Numbers may be compared if their fingerprints are equal."""
        return self.record.plan.fingerprint

    def to_frame(self) -> pd.DataFrame:
        """A row for each metric: value, low and high end of its 95 % interval, clips, independent videos, reason."""
        rows = [
            {
                "metric": name,
                "value": score.value,
                "low": score.ci95[0] if score.ci95 else None,
                "high": score.ci95[1] if score.ci95 else None,
                "clips": score.n_generated,
                "videos": score.n_groups,
                "higher_is_better": score.higher_is_better,
                "reason": score.reason or "",
            }
            for name, score in self.scores.items()
        ]
        return pd.DataFrame(rows).set_index("metric")

    def per_clip(self) -> pd.DataFrame:
        """A row for each clip, a column for each metric that has a value of each clip."""
        rows = read_per_clip(self.path)
        values = {
            clip_id: {name: seen["value"] for name, seen in row.items() if name != "reference" and "value" in seen}
            for clip_id, row in rows.items()
        }
        return pd.DataFrame.from_dict(values, orient="index").rename_axis("clip")

    def _repr_html_(self) -> str:
        title = f"{self.record.plan.model['name']} on {self.record.plan.dataset['name']}"
        shown = self.to_frame().drop(columns=["higher_is_better"]).to_html(escape=True, na_rep="")
        head = (
            f"<p><b>{html.escape(title)}</b>, {html.escape(self.record.plan.protocol['name'])} {self.fingerprint}</p>"
        )
        return head + shown + "".join(_player(clip) for clip in sorted((self.path / "clips").glob("*.mkv"))[:SHOWN])


def _player(file: Path) -> str:
    """A clip as HTML, with its data inside."""
    clip, fps = video.read_clip(file)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "clip.mp4"
        video.write_mp4(target, clip, fps)
        data = base64.b64encode(target.read_bytes()).decode()
    return (
        f'<video src="data:video/mp4;base64,{data}" title="{html.escape(file.stem)}" width="192" autoplay loop muted>'
    )


def evaluate(
    model: Any,
    dataset: str,
    data: Path | str | None = None,
    *,
    protocol: str | None = None,
    metrics: Sequence[str] | None = None,
    limit: int | None = None,
    samples: int | None = None,
    seed: int = 123,
    name: str | None = None,
    settings: Sequence[str] = (),
    manifest: Path | str | None = None,
    out: Path | str | None = None,
    fresh: bool = False,
    all_ranks: bool = True,
    device: str = "auto",
    dtype: str | None = None,
    batch_size: int = 1,
    download: bool = False,
    quiet: bool = False,
) -> Result:
    """Make clips with a model, score them and return the result: `dcbench run` for Python.

    `model`: a name, a card.toml, file.py:Class or a folder of clips; an object with `generate` (see
    `dcbench.models.base.ImageToVideo`); or a function (image uint8 [3 h w], prompt, num_frames, fps, seed) -> clip
    uint8 [t 3 h w]. The clips of objects and functions are always made again, because dcbench cannot know whether
    the weights are the same; those of names are kept, and the same call continues, unless `fresh`.
    `all_ranks`: in an initialised process group, all processes call this and share the work. False: this process alone.
    UserError for what cannot be done. The other arguments are the options of `dcbench run`.
    """
    options = Options(device, None if dtype == "float32" else dtype, batch_size, offline=not download, quiet=quiet)
    is_named = isinstance(model, str | Path)
    card = with_overrides(find_model(str(model)), list(settings)) if is_named else card_of(model, name)
    folder, where, given = (Path(path).expanduser() if path else None for path in (data, out, manifest))
    how = {"data": folder, "out": where, "seed": seed, "limit": limit, "manifest": given}
    with nullcontext() if all_ranks else ranks.alone():
        fresh = fresh or not is_named
        run = planning.plan_named(card, dataset, protocol, samples, options, fresh=fresh, **how)
        sample(run, options)
        try:
            record = score_run(run, options, metrics)
        finally:
            free_memory()
    return Result(run.directory.path, record)


def score(
    clips: Path | str,
    metrics: Sequence[str] | None = None,
    data: Path | str | None = None,
    *,
    reference: Path | str | None = None,
    protocol: str = "folders",
    groups: Path | str | None = None,
    out: Path | str | None = None,
    limit: int | None = None,
    fps: float | None = None,
    all_ranks: bool = True,
    device: str = "auto",
    download: bool = False,
    quiet: bool = False,
) -> Result:
    """Score the clips of a run directory again, or a folder of videos against the folder `reference`.

    `data`: for a run, the folder of its data set if it was moved. `protocol`, `groups`, `limit` and `fps` are for two
    folders. UserError if something is missing.
    """
    options = Options(device, offline=not download, quiet=quiet)
    path = Path(clips).expanduser()
    with nullcontext() if all_ranks else ranks.alone():
        if reference is None:
            run = planning.reopen(path, Path(data) if data else None)
            return Result(path, score_run(run, options, metrics))
        where, grouped = (Path(given) if given else None for given in (out, groups))
        found = score_folders(path, Path(reference), protocol, options, metrics, where, grouped, limit, fps)
        return Result(found, read_record(found))


def compare(first: Result | Path | str, second: Result | Path | str, metrics: Sequence[str] = ()) -> pd.DataFrame:
    """First minus second on the same clips: a row for each metric, with interval, p value (Holm) and which is better.

    UserError if their clips differ. Metrics that cannot be compared have a reason.
    """
    paths = [given.path if isinstance(given, Result) else Path(given) for given in (first, second)]
    compared = compare_runs(paths[0], paths[1], Options(), metrics)
    names = [str(read_record(path).plan.model["name"]) for path in paths]
    rows: list[dict[str, Any]] = []
    for metric, one in compared.found.items():
        p_value = compared.adjusted[metric]
        rows.append(
            {
                "metric": metric,
                "difference": one.difference,
                "low": one.ci95[0] if one.ci95 else None,
                "high": one.ci95[1] if one.ci95 else None,
                "p": p_value,
                "better": verdict(one, p_value, compared.higher_is_better[metric], names),
                "clips": one.n,
                "reason": "",
            }
        )
    rows += [{"metric": metric, "reason": reason} for metric, reason in compared.reasons.items()]
    return pd.DataFrame(rows).set_index("metric")
