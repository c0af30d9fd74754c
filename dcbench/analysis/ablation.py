"""`dcbench ablate` and the λ sweep: every arm of a suite through the ordinary run, then one table.

<out>/<arm>/seed-<s>/     an ordinary run directory: plan, clips, record; resumable, shared by later calls
<out>/<arm>/training-<s>/ training suites: the arm's own stages, from <out>/shared
<out>/stages/             stages that several arms have in common, trained once
<out>/suite.json, table.{md,csv}, curves-<metric>.png   `rebuild` makes the last ones from the records alone
<out>/frames-<group>-<n>.png   two clips as every arm made them
"""

import json
from collections.abc import Sequence
from pathlib import Path

from dcbench import planning, run
from dcbench.analysis.judge import ASPECTS, judge
from dcbench.analysis.statistics import wilson
from dcbench.analysis.suite import Arm, Suite, arm_card
from dcbench.analysis.suite_table import Interval, Row, write_table
from dcbench.analysis.trained_arms import held_out_of, train_arm
from dcbench.catalogue import DatasetCard, ModelCard, find_model
from dcbench.clips import resize
from dcbench.datasets.shapes import ShapesVideo
from dcbench.errors import UserError
from dcbench.protocol import Protocol
from dcbench.record import read_record, write_text
from dcbench.reports import write_frames
from dcbench.reports.tables import load_runs
from dcbench.training.held_out import HeldOut


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
    rows: list[Row] = []
    first: dict[int, HeldOut] = {}  # by seed, of the suite's first arm
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
                row.add_held_out(measured, first.setdefault(seed, measured))
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
    first: dict[int, HeldOut] = {}
    for arm in suite.arms:
        row = Row(arm)
        for seed in seeds:
            folder = out / _folder(arm.name) / f"seed-{seed}"
            judge, trained = folder / "judge.json", folder.with_name(f"training-{seed}") / "held_out.json"
            for path in (folder / "record.json", judge, *([trained] if suite.kind == "training" else [])):
                if not path.is_file():
                    raise UserError(f"{path} is not there: arm {arm.name!r}, seed {seed} is not finished")
            if suite.kind == "training":
                measured = HeldOut(**json.loads(trained.read_text(encoding="utf-8")))
                row.add_held_out(measured, first.setdefault(seed, measured))
            row.add_scores(read_record(folder), json.loads(judge.read_text(encoding="utf-8")))
        rows.append(row)
    return write_table(suite, rows, out, seeds)


def _folder(name: str) -> str:
    plain = name.lower().replace("λ", "lambda")
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in plain).strip("-")


def draw_frames(suite: Suite, out: Path, seed: int) -> None:
    """Two clips as the arms made them, as in the paper's Fig. 2 (right); a picture for each group of a sweep."""
    groups: dict[str, list[Arm]] = {}
    for arm in suite.arms:
        groups.setdefault(arm.group if arm.x is not None else suite.name, []).append(arm)
    for group, arms in groups.items():
        labels = {out / _folder(arm.name) / f"seed-{seed}": arm.name for arm in arms}
        write_frames(load_runs(list(labels)), labels, out, f"frames-{_folder(group)}")


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
