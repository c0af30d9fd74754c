"""`dcbench ablate` and the λ sweep: every arm of a suite through the ordinary run, then one table.

<out>/<arm>/seed-<s>/     an ordinary run directory: plan, clips, record; resumable, shared by later calls; gap.json
                          an arm whose request is an earlier one's (steps 25 = eta 1) has copies of its clips
<out>/<arm>/training-<s>/ training suites: the arm's own stages, from <out>/shared
<out>/stages/             stages that several arms have in common, trained once
<out>/suite.json, table.{md,csv}, curves-<metric>.png   `rebuild` makes the last ones from the records alone
<out>/frames-<group>-<n>.png   two clips as every arm made them
"""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dcbench import planning, run
from dcbench.analysis.compare import compare_runs
from dcbench.analysis.judge import ASPECTS, judge
from dcbench.analysis.statistics import Comparison, wilson
from dcbench.analysis.suite import Arm, Suite, arm_card
from dcbench.analysis.suite_table import Interval, Row, write_table
from dcbench.analysis.trained_arms import held_out_of, train_arm
from dcbench.catalogue import DatasetCard, ModelCard, find_model
from dcbench.clips import resize
from dcbench.datasets.shapes import ShapesVideo
from dcbench.errors import UserError
from dcbench.protocol import Protocol
from dcbench.ranks import on_first_rank
from dcbench.record import read_record, write_text
from dcbench.reports import write_frames
from dcbench.reports.tables import load_runs
from dcbench.training.held_out import HeldOut
from dcbench.weights import sha256_file


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
    """Run what is missing, score it, compare it with the baseline arm, and write the table into `out`."""
    write_text(out / "suite.json", json.dumps({"suite": suite.model_dump(), "seeds": list(seeds)}, indent=1) + "\n")
    begun: list[planning.Job] = []
    for count, arm in enumerate(suite.arms, 1):
        for seed in seeds:
            folder = out / _folder(arm.name)
            card = arm_card(model, arm)
            if arm.clips:
                videos = find_model("videos")
                card = videos.model_copy(update={"options": {**videos.options, "folder": arm.clips}})
            if suite.kind == "training":
                trained = train_arm(suite, arm, out, folder, seed, data)
                card = card.model_copy(update={"options": {**arm.options, "folder": str(trained)}})
                held_out_of(suite, arm, trained, seed, data)
            chosen = protocol
            if arm.frame_stride:  # beats the protocol's own value for this dataset too
                chosen = protocol.resolved(dataset.name).model_copy(update={"frame_stride": arm.frame_stride})
            job = planning.plan(card, dataset, chosen, data, folder / f"seed-{seed}", seed, limit, quiet=options.quiet)
            on_first_rank(partial(_share_clips, job, begun))
            begun.append(job)
            run.sample(job, options)
            run.score(job, options, metrics or suite.metrics, strict=bool(metrics))
            write_text(job.directory.path / "judge.json", json.dumps(judged(job), indent=1) + "\n")
        write_table(suite, [_row(suite, done, out, seeds) for done in suite.arms[:count]], out, seeds)
    for arm in suite.arms:
        for seed in seeds:
            if arm.name != suite.baseline_arm:
                _compare(_run_folder(out, arm.name, seed), _run_folder(out, suite.baseline_arm, seed), options)
    rows = [_row(suite, arm, out, seeds) for arm in suite.arms]
    write_table(suite, rows, out, seeds)
    draw_frames(suite, out, seeds[0])
    return rows


def rebuild(out: Path) -> str:
    """Write a suite's table and curves again from the records in its folder alone; returns the table.

    Needed of each arm and seed: record.json and judge.json, of trained arms held_out.json; no clips, no weights. Gaps
    to the baseline are of gap.json, where it is there.
    """
    kept = json.loads((out / "suite.json").read_text(encoding="utf-8"))
    suite, seeds = Suite.model_validate(kept["suite"]), kept["seeds"]
    return write_table(suite, [_row(suite, arm, out, seeds) for arm in suite.arms], out, seeds)


def _share_clips(job: planning.Job, begun: Sequence[planning.Job]) -> None:
    """Copy the clips of an earlier arm that asks for exactly the same, unless this one has some of its own."""
    own = job.directory
    if own.samples.is_file():
        return
    wanted = (own.path / "request.json").read_bytes()
    for done in (other.directory for other in begun):
        if done.samples.is_file() and (done.path / "request.json").read_bytes() == wanted:
            with own.locked():
                shutil.copytree(done.path / "clips", own.path / "clips", dirs_exist_ok=True)
                write_text(own.samples, done.samples.read_text(encoding="utf-8"))  # last: it says what is there
            return


def _row(suite: Suite, arm: Arm, out: Path, seeds: Sequence[int]) -> Row:
    """A finished arm's numbers, from its records."""
    row, is_baseline = Row(arm), arm.name == suite.baseline_arm
    for seed in seeds:
        folder = _run_folder(out, arm.name, seed)
        for name in ("record.json", "judge.json"):
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is not there: arm {arm.name!r}, seed {seed} is not finished")
        if suite.kind == "training":
            measured = _held_out(out, arm.name, seed)
            if measured is None:
                raise UserError(f"{out}: arm {arm.name!r}, seed {seed} has no held_out.json: it is not trained yet")
            row.add_held_out(measured, None if is_baseline else _held_out(out, suite.baseline_arm, seed))
        row.add_scores(read_record(folder), json.loads((folder / "judge.json").read_text(encoding="utf-8")))
        if (folder / "gap.json").is_file() and not is_baseline:
            row.add_gaps(json.loads((folder / "gap.json").read_text(encoding="utf-8")))
    return row


def _held_out(out: Path, arm: str, seed: int) -> HeldOut | None:
    path = out / _folder(arm) / f"training-{seed}" / "held_out.json"
    return HeldOut(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _compare(folder: Path, baseline: Path, options: run.Options) -> None:
    """Write gap.json, this run minus the baseline's on the same clips, unless it is of these two records already."""
    records = [path / "record.json" for path in (folder, baseline)]
    of, path = [sha256_file(record) for record in records], folder / "gap.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["of"] == of:
        return
    found: dict[str, Comparison] = {}
    reason = ""
    if read_record(folder).plan.fingerprint != read_record(baseline).plan.fingerprint:
        reason = "other clips than the baseline's"
    else:
        try:
            found, _ = compare_runs(folder, baseline, options)
        except UserError as error:  # too few clips, no metric in common: the table says so and is still made
            reason = str(error)
    gaps = {name: vars(comparison) for name, comparison in found.items()}
    write_text(path, json.dumps({"of": of, "reason": reason, "gaps": gaps}, indent=1) + "\n")


def _run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / _folder(arm) / f"seed-{seed}"


def _folder(name: str) -> str:
    plain = name.lower().replace("λ", "lambda")
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in plain).strip("-")


def draw_frames(suite: Suite, out: Path, seed: int) -> None:
    """Two clips as the arms made them, as in the paper's Fig. 2 (right); a picture for each group of a sweep."""
    groups: dict[str, list[Arm]] = {}
    for arm in suite.arms:
        groups.setdefault(arm.group if arm.x is not None else suite.name, []).append(arm)
    for group, arms in groups.items():
        labels = {_run_folder(out, arm.name, seed): arm.name for arm in arms}
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
