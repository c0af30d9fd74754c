"""Several clips of each input: seeds of their own, one cluster an input, references counted once, folders by name."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dcbench
from dcbench import video
from dcbench.analysis.compare import compare_runs
from dcbench.catalogue import find_dataset, find_model
from dcbench.errors import UserError
from dcbench.metrics.statistics import mean_interval
from dcbench.protocol import find_protocol
from dcbench.record import read_manifest, read_per_clip, read_record
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.folders import plan_folders, score_folders
from dcbench.runs.run import Options, Run

QUIET = Options(device="cpu", quiet=True)
COUNT = 3


def plan(out: Path, model: str = "noise", limit: int = 4, count: int = COUNT, manifest: Path | None = None, **fields):
    chosen = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, **fields}).with_samples(count)
    data = find_dataset("shapes")
    return planning.plan(find_model(model), data, chosen, out=out, limit=limit, manifest=manifest, quiet=True)


def finish(run: Run, *metrics: str) -> dict[str, dcbench.metrics.Score]:
    sampling.sample(run, QUIET)
    return scoring.score(run, QUIET, metrics).scores


def clip(seed: int, frames: int = 16) -> Tensor:
    coarse = torch.randint(0, 256, (frames, 3, 4, 4), generator=torch.Generator().manual_seed(seed)).float()
    return torch.nn.functional.interpolate(coarse, (48, 64), mode="bilinear").to(torch.uint8)


def test_each_clip_has_its_own_id_and_seed(tmp_path: Path):
    one, several = plan(tmp_path / "one", count=1), plan(tmp_path / "several")
    assert [case.id for case in several.cases[:4]] == [f"{one.cases[0].id}-{k}" for k in range(3)] + [
        f"{one.cases[1].id}-0"
    ]
    assert len({case.seed for case in several.cases}) == 4 * COUNT
    assert {case.item_id for case in several.cases} == {case.id for case in one.cases}
    assert "item" not in json.loads(one.directory.manifest.read_text().splitlines()[0])
    assert "samples_per_item" not in one.plan.protocol and several.plan.protocol["samples_per_item"] == COUNT
    assert one.plan.fingerprint != several.plan.fingerprint
    assert several.protocol.compared == "3 clips of each input"


def test_references_count_once_and_an_input_is_one_cluster(tmp_path: Path, cheap_metric: str):
    scores = finish(plan(tmp_path / "run", limit=8), cheap_metric, "motion", "psnr", "psnr(over_samples=best)")
    assert (scores["corners"].n_reference, scores["corners"].n_generated, scores["corners"].n_groups) == (8, 24, 8)
    assert (scores["motion"].n_generated, scores["motion"].n_groups) == (24, 8)
    one = finish(plan(tmp_path / "one", limit=8, count=1), "motion")["motion"]
    assert scores["motion"].details["reference_value"] == one.details["reference_value"]
    rows = read_per_clip(tmp_path / "run")
    items = {case.id: case.item_id for case in read_manifest(tmp_path / "run" / "manifest.jsonl")}
    values = [rows[case_id]["psnr"]["value"] for case_id in items]
    assert scores["psnr"].ci95 == mean_interval(values, list(items.values()))
    best = [max(values[3 * k : 3 * k + 3]) for k in range(8)]
    assert scores["psnr(over_samples=best)"].value == pytest.approx(math.fsum(best) / 8)
    assert scores["psnr(over_samples=best)"].n_generated == 8


def test_clips_that_are_alike_are_not_counted_as_independent(tmp_path: Path):
    """`zoom` makes the same clip for every seed: its interval is that of one clip an input, not of 3."""
    several = finish(plan(tmp_path / "several", "zoom", 8), "motion")["motion"]
    one = finish(plan(tmp_path / "one", "zoom", 8, 1), "motion")["motion"]
    assert several.value == pytest.approx(one.value) and several.ci95 and one.ci95
    assert several.ci95 == pytest.approx(one.ci95, rel=1e-6)
    rows = read_per_clip(tmp_path / "several")
    independent = mean_interval([row["motion"]["value"] for row in rows.values()])
    assert independent and several.ci95[1] - several.ci95[0] > 1.4 * (independent[1] - independent[0])


def test_it_resumes_to_the_same_bytes(tmp_path: Path, cheap_metric: str):
    whole, broken = plan(tmp_path / "whole"), plan(tmp_path / "broken")
    finish(whole, cheap_metric)
    broken.cases = broken.cases[:5]
    sampling.sample(broken, QUIET)
    next((tmp_path / "broken" / "clips").iterdir()).unlink()
    finish(plan(tmp_path / "broken"), cheap_metric)
    for name in ("manifest.jsonl", "record.json", "per_clip.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    clips = [sorted((run / "clips").iterdir()) for run in (tmp_path / "whole", tmp_path / "broken")]
    assert len(clips[0]) == 12 and [path.read_bytes() for path in clips[0]] == [path.read_bytes() for path in clips[1]]


def test_a_limit_counts_inputs_and_a_manifest_must_fit(tmp_path: Path):
    run = plan(tmp_path / "run")
    manifest = run.directory.manifest
    again = plan(tmp_path / "again", "zoom", 2, manifest=manifest)
    assert [case.id for case in again.cases] == [case.id for case in run.cases[:6]]
    with pytest.raises(UserError, match=r"3 clips of 'test-\d+', but the protocol asks for 2 .*Give --samples 3"):
        plan(tmp_path / "other", count=2, manifest=manifest)


def test_other_videos_as_reference_stay_with_the_first_clip(tmp_path: Path, cheap_metric: str):
    run = plan(tmp_path / "run", reference_videos="disjoint")
    assert [bool(case.apart) for case in run.cases] == [True, False, False] * 4
    score = finish(run, cheap_metric)["corners"]
    assert (score.n_reference, score.n_generated) == (4, 12)
    assert read_manifest(run.directory.manifest) == run.cases


def test_two_runs_are_compared_input_by_input(tmp_path: Path, cheap_metric: str):
    for model in ("noise", "zoom"):
        finish(plan(tmp_path / model, model, 6), cheap_metric, "psnr", "psnr(over_samples=best)")
    found = compare_runs(tmp_path / "noise", tmp_path / "zoom", QUIET).found
    assert (found["psnr"].n, found["psnr"].n_groups) == (18, 6)
    best = found["psnr(over_samples=best)"]
    assert (best.n, best.n_groups) == (6, 6)
    values = [read_record(tmp_path / m).scores["psnr(over_samples=best)"].value for m in ("noise", "zoom")]
    assert values[0] is not None and values[1] is not None
    assert best.difference == pytest.approx(values[0] - values[1])


def test_the_clips_of_a_folder_are_known_by_their_numbers(tmp_path: Path, cheap_metric: str):
    for number, name in enumerate(("a-1", "a-2", "b-1", "b-2", "c", "d-7-x")):
        video.write_lossless(tmp_path / "made" / f"{name}.mkv", clip(number), 8)
    for number, name in enumerate(("a", "b", "c", "e")):
        video.write_lossless(tmp_path / "real" / f"{name}.mkv", clip(10 + number), 8)
    out = score_folders(
        tmp_path / "made", tmp_path / "real", "folders", QUIET, [cheap_metric, "psnr"], tmp_path / "run"
    )
    run = planning.open_run(out, read_record(out).plan)
    assert [(case.id, case.item, case.sample) for case in run.cases] == [
        ("a-1", "a", 0), ("a-2", "a", 1), ("b-1", "b", 0), ("b-2", "b", 1),
        ("c", None, None), ("d-7-x", None, None), ("e", None, None),
    ]  # fmt: skip
    scores = read_record(out).scores
    assert (scores["corners"].n_reference, scores["corners"].n_generated) == (4, 6)
    assert (scores["psnr"].n_generated, scores["psnr"].n_groups) == (5, 3)
    dcbench.report([out], tmp_path / "report")
    assert "<code>a-2</code>" in (tmp_path / "report" / "index.html").read_text()
    again = dcbench.score(out, ["ssim"])  # from its files
    assert again.scores["ssim"].n_generated == 5
    assert compare_runs(out, out, QUIET).found["psnr"].n_groups == 3


def test_two_clips_of_one_number_are_an_error(tmp_path: Path):
    for name in ("x/a-1", "y/a-1"):
        video.write_lossless(tmp_path / "made" / f"{name}.mkv", clip(0), 8)
    video.write_lossless(tmp_path / "real" / "a.mkv", clip(1), 8)
    with pytest.raises(UserError, match=r"x/a-1.mkv and y/a-1.mkv are both clip 1 of a; rename or remove one"):
        plan_folders(tmp_path / "made", tmp_path / "real", find_protocol("folders"), tmp_path / "run", quiet=True)


def test_a_lost_first_clip_does_not_take_the_reference_with_it(tmp_path: Path, cheap_metric: str):
    for number in range(4):
        for sample in range(2):
            video.write_lossless(tmp_path / "made" / f"{number}-{sample}.mkv", clip(10 * number + sample), 8)
        video.write_lossless(tmp_path / "real" / f"{number}.mkv", clip(100 + number), 8)
    run = plan_folders(tmp_path / "made", tmp_path / "real", find_protocol("folders"), tmp_path / "run", quiet=True)
    shutil.copy(tmp_path / "real" / "0.mkv", tmp_path / "spare.mkv")
    (tmp_path / "made" / "0-0.mkv").write_bytes(b"no video")
    result = scoring.score(run, QUIET, [cheap_metric])
    assert [failure.id for failure in result.failures] == ["0-0"]
    assert (result.scores["corners"].n_reference, result.scores["corners"].n_generated) == (4, 7)
    assert result.n_scored == 7
