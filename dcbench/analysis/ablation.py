"""`dcbench ablate` and the λ sweep: run the arms of a suite on the same clips, and make a table of their records.

<out>/<arm>/seed-<s>/     an ordinary run directory (plan, clips, record), and gap.json. Later calls continue it.
                          Arms with the same settings (steps 25 = eta 1) share the run directory of the first arm
<out>/<arm>/training-<s>/ training suites: the training of the arm; it starts from <out>/shared
<out>/stages/             stages that several arms have in common, trained once
<out>/suite.json, table.{md,csv}, curves-<metric>.png   `rebuild` makes table and curves from the records alone
<out>/frames-<group>-<n>.png   two clips of every arm
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dcbench.analysis.compare import Compared, compare_runs
from dcbench.analysis.suite import Arm, Suite, arm_card
from dcbench.analysis.suite_table import ArmScores, draw_curves, write_table
from dcbench.catalogue import DatasetCard, ModelCard, find_model
from dcbench.errors import UserError
from dcbench.facts import Facts, validate
from dcbench.files import digest, read_json, sha256_file, write_json
from dcbench.protocol import Protocol
from dcbench.record import read_record
from dcbench.reports import write_frames
from dcbench.reports.results import load_results
from dcbench.runs import planning
from dcbench.runs.run import Options, Run
from dcbench.runs.sampling import sample
from dcbench.runs.scoring import score
from dcbench.training.arms import arm_recipe, held_out_of, train_arm
from dcbench.training.directory import Training
from dcbench.training.held_out import read_held_out
from dcbench.training.recipe import find_recipe


class Kept(Facts):
    """suite.json."""

    suite: Suite
    seeds: list[int]
    runs: dict[str, dict[str, str]] = {}  # arm -> seed -> run directory below the suite's folder


@dataclass(frozen=True)
class ArmRun:
    """An arm with one seed. `training`: the directory of its training, None for arms that are not trained."""

    arm: Arm
    seed: int
    run: Run
    training: Training | None = None


def run_suite(
    suite: Suite,
    model: ModelCard,
    dataset: DatasetCard,
    protocol: Protocol,
    out: Path,
    options: Options,
    seeds: Sequence[int] = (123,),
    limit: int | None = None,
    metrics: Sequence[str] | None = None,
    data: Path | None = None,
) -> list[ArmScores]:
    """Sample and score what is missing, compare it with the baseline arm, and write the table. Returns its rows."""
    arm_runs = plan_arms(suite, model, dataset, protocol, out, seeds, limit, data, options.quiet)
    places = {arm.name: {} for arm in suite.arms}
    for planned in arm_runs:
        places[planned.arm.name][str(planned.seed)] = planned.run.directory.path.relative_to(out).as_posix()
    write_json(out / "suite.json", {"suite": suite.model_dump(mode="json"), "seeds": list(seeds), "runs": places})
    chosen = [*(metrics or suite.metrics), *dataset.metrics]
    for count, arm in enumerate(suite.arms, 1):
        for planned in (planned for planned in arm_runs if planned.arm is arm):
            if planned.training:
                _train(suite, planned, out, planned.training.path, data)
            sample(planned.run, options)
            score(planned.run, options, chosen, strict=bool(metrics))
        write_table(suite, [_scores(suite, done, out, seeds, places) for done in suite.arms[:count]], out, seeds)
    for arm in suite.arms:
        for seed in seeds:
            folders = [out / places[name][str(seed)] for name in (arm.name, suite.baseline_arm)]
            if folders[0] != folders[1]:
                _compare(folders[0], folders[1], options)
    rows = [_scores(suite, arm, out, seeds, places) for arm in suite.arms]
    write_table(suite, rows, out, seeds)
    draw_curves(suite, rows, out)
    draw_frames(suite, out, seeds[0], places)
    return rows


def plan_arms(
    suite: Suite,
    model: ModelCard,
    dataset: DatasetCard,
    protocol: Protocol,
    out: Path,
    seeds: Sequence[int],
    limit: int | None = None,
    data: Path | None = None,
    quiet: bool = False,
) -> list[ArmRun]:
    """A planned run for every arm and seed. Arms that request the same share one run."""
    arm_runs, places = [], dict[str, Path]()
    for arm in suite.arms:
        card, chosen = arm_card(model, arm), protocol
        if arm.clips:
            videos = find_model("videos")
            card = videos.model_copy(update={"options": {**videos.options, "folder": arm.clips}})
        if arm.frame_stride:  # also replaces a value of the protocol for this dataset
            chosen = protocol.resolved(dataset.name).model_copy(update={"frame_stride": arm.frame_stride})
        for seed in seeds:
            folder, training = out / _folder(arm.name), None
            if suite.kind == "training":
                training = Training(folder / f"training-{seed}")
                card = card.model_copy(update={"options": {**arm.options, "folder": str(training.path)}})
            request = planning.request_of(card, dataset, chosen, data, seed, limit)
            place = places.setdefault(digest(request), folder / f"seed-{seed}")
            run = planning.plan(card, dataset, chosen, data, place, seed, limit, quiet=quiet)
            arm_runs.append(ArmRun(arm, seed, run, training))
    return arm_runs


def _train(suite: Suite, planned: ArmRun, out: Path, target: Path, data: Path | None) -> None:
    """Train an arm and measure its held-out loss. What is already done is not repeated."""
    arm, whole = planned.arm, find_recipe(suite.recipe).varied(suite.stages)
    try:
        recipe = arm_recipe(whole, arm.stages, arm.without, planned.seed)
    except UserError as error:
        raise UserError(f"suite {suite.name}, arm {arm.name!r}: {error}") from error
    trained = train_arm(whole, recipe, out, target, suite.shared, data)
    held_out_of(recipe, trained, suite.held_out_clips, data)


def rebuild(out: Path) -> str:
    """Write a suite's table and curves again from the records in its folder. Returns the table.

    Each arm and seed needs record.json, and held_out.json if it is trained. Clips and weights are not needed. The
    differences from the baseline come from gap.json, if it exists.
    """
    kept: Kept = validate(read_json(out / "suite.json"), Kept, f"{out / 'suite.json'}")
    suite, seeds = kept.suite, kept.seeds
    places = kept.runs or {  # a suite of dcbench 0.1: every arm has its own directory
        arm.name: {str(seed): f"{_folder(arm.name)}/seed-{seed}" for seed in seeds} for arm in suite.arms
    }
    rows = [_scores(suite, arm, out, seeds, places) for arm in suite.arms]
    draw_curves(suite, rows, out)
    return write_table(suite, rows, out, seeds)


Places = dict[str, dict[str, str]]  # arm -> seed -> run directory below the suite's folder


def _scores(suite: Suite, arm: Arm, out: Path, seeds: Sequence[int], places: Places) -> ArmScores:
    """The numbers of an arm, from its records. UserError if the arm is not finished."""
    row, is_baseline = ArmScores(arm), arm.name == suite.baseline_arm
    for seed in seeds:
        try:
            folder, baseline = (out / places[name][str(seed)] for name in (arm.name, suite.baseline_arm))
        except KeyError as error:
            raise UserError(f"{out / 'suite.json'} names no run for {error}") from error
        if not (folder / "record.json").is_file():
            raise UserError(f"{folder / 'record.json'} does not exist: arm {arm.name!r}, seed {seed} is not finished")
        if suite.kind == "training":
            names = (arm.name, suite.baseline_arm)
            measured, of_baseline = (read_held_out(Training(out / _folder(n) / f"training-{seed}")) for n in names)
            if measured is None:
                raise UserError(f"{out}: arm {arm.name!r}, seed {seed} has no held_out.json: it is not trained yet")
            row.add_held_out(measured, None if is_baseline else of_baseline)
        row.add_scores(read_record(folder))
        judge = folder / "judge.json"  # dcbench 0.1 stored the judge's shares for `shapes` in this file
        for name, (value, interval) in read_json(judge).items() if judge.is_file() else ():
            row.add(name, value, interval, is_share=True)
        if is_baseline:
            continue
        if folder == baseline:
            row.add_no_difference()
        elif (folder / "gap.json").is_file():
            row.add_gaps(read_json(folder / "gap.json"), [read_record(folder), read_record(baseline)])
    return row


def _compare(folder: Path, baseline: Path, options: Options) -> None:
    """Write gap.json, this run minus the baseline's on the same clips, unless these two records already have one."""
    of, path = [sha256_file(place / "record.json") for place in (folder, baseline)], folder / "gap.json"
    if path.is_file() and read_json(path)["of"] == of:
        return
    compared, reason = Compared(), ""
    if read_record(folder).plan.fingerprint != read_record(baseline).plan.fingerprint:
        reason = "other clips than the baseline's"
    else:
        try:
            compared = compare_runs(folder, baseline, options)
            reason = "; ".join(dict.fromkeys(compared.reasons.values()))
        except UserError as error:  # no metric in common: the table is still made, and gives the reason
            reason = str(error)
    gaps = {name: vars(comparison) for name, comparison in compared.found.items()}
    write_json(path, {"of": of, "reason": reason, "gaps": gaps})


def _folder(name: str) -> str:
    plain = name.lower().replace("λ", "lambda")
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in plain).strip("-")


def draw_frames(suite: Suite, out: Path, seed: int, places: Places) -> None:
    """Draw two clips of all arms, as in the paper's Fig. 2 (right). Each group of a sweep has its own picture."""
    groups: dict[str, dict[Path, list[str]]] = {}
    for arm in suite.arms:
        names = groups.setdefault(arm.group if arm.x is not None else suite.name, {})
        names.setdefault(out / places[arm.name][str(seed)], []).append(arm.name)
    for group, names in groups.items():
        labels = {path: " = ".join(arms) for path, arms in names.items()}
        write_frames(load_results(list(labels)), labels, out, f"frames-{_folder(group)}")
