"""Two folders of videos are a run like others: a plan, a page with clips, and they can be scored again."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import dcbench
from dcbench import video
from dcbench.errors import UserError
from dcbench.metrics.ssim import ssim
from dcbench.record import Case, Record, read_manifest, read_record
from dcbench.runs import planning
from dcbench.runs.folders import score_folders
from dcbench.runs.run import Options

QUIET = Options(device="cpu", quiet=True)


def make_clips(folder: Path, names: str, seed: int) -> None:
    for k, name in enumerate(names):
        dice = torch.Generator().manual_seed(seed + k)
        coarse = torch.randint(0, 256, (18, 3, 4, 4), dtype=torch.uint8, generator=dice).float()
        clip = torch.nn.functional.interpolate(coarse, (48, 64), mode="bilinear").to(torch.uint8)
        video.write_mp4(folder / f"{name}.mp4", clip, 8)


@pytest.fixture
def scored(tmp_path: Path, cheap_metric: str) -> Path:
    make_clips(tmp_path / "made", "abc", 0)
    make_clips(tmp_path / "real", "abd", 10)
    return score_folders(
        tmp_path / "made", tmp_path / "real", "folders", QUIET, [cheap_metric, "ssim_image"], tmp_path / "run"
    )


def test_the_page_shows_both_sides(scored: Path, tmp_path: Path):
    table = dcbench.report([scored], tmp_path / "report")
    assert "3 [" in table or "| 3 vs 3" in table
    page = (tmp_path / "report" / "index.html").read_text()
    shown = {path.name for path in (tmp_path / "report" / "media").glob("*.mp4")}
    assert page.count("<video") == len(shown) == 3 + 2  # three clips, and the references of two of them
    assert "<code>c</code>" in page and "<code>d</code>" not in page


def test_it_can_be_scored_again_with_other_metrics(scored: Path, tmp_path: Path, cheap_metric: str):
    kept = (scored / "record.json").read_bytes()
    record = dcbench.score(scored, ["motion"])
    assert set(record.scores) == {"corners", "ssim_image", "motion"}
    assert (record.scores["corners"].n_reference, record.scores["corners"].n_generated) == (3, 3)
    assert (record.scores["ssim_image"].n_generated, record.scores["motion"].n_generated) == (2, 3)
    shutil.rmtree(scored)
    score_folders(
        tmp_path / "made", tmp_path / "real", "folders", QUIET, [cheap_metric, "ssim_image"], tmp_path / "run"
    )
    assert (scored / "record.json").read_bytes() == kept


def test_clips_of_any_name_and_kind_are_scored(tmp_path: Path, cheap_metric: str):
    """Names and folders that are not UTF-8, and several kinds of files; all that is written is UTF-8."""
    made, real = (Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/m\xe9de", b"/r\xe9al"))
    make_clips(made, "abc", 0)
    make_clips(real, "abc", 10)
    for folder in (made, real):
        (folder / "a.mp4").rename(Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4")))
    clip = video.read(video.VideoFile(made / "b.mp4"))[0]
    video.write_gif(made / "b.gif", clip, 8)
    (made / "b.mp4").unlink()
    out = score_folders(made, real, "folders", QUIET, [cheap_metric], tmp_path / "run")
    record = read_record(out)
    assert (record.n_planned, record.n_scored, record.scores["corners"].n_generated) == (3, 3, 3)
    assert planning.reopen(out).items.keys() == {case.id for case in read_manifest(out / "manifest.jsonl")}
    texts = {path.name: path.read_text("utf-8") for path in out.glob("*.json*")}  # all of it UTF-8
    assert "caf\\\\udce9.mp4" in texts["manifest.jsonl"] and "m\\\\udce9de" in texts["plan.json"]


def test_the_values_are_those_of_the_files(scored: Path, tmp_path: Path):
    run = planning.reopen(scored)
    by_id = {case.id: case for case in run.cases}
    frames = video.read(video.VideoFile(tmp_path / "made" / "a.mp4"), range(16))[0]
    assert torch.equal(run.generated(by_id["a"]), run.to_size(frames))
    image = video.read(video.VideoFile(tmp_path / "real" / "a.mp4"), [0])[0]
    assert torch.equal(run.image(by_id["a"]), run.to_size(image)[0])
    assert not run.has_reference(by_id["c"]) and not run.has_generated(by_id["d"])
    expected = ssim(
        run.generated(by_id["a"]).double(), run.image(by_id["a"]).double().expand(16, -1, -1, -1), data_range=255.0
    )
    assert isinstance(expected, torch.Tensor)
    first = json.loads((scored / "per_clip.jsonl").read_text().splitlines()[0])
    assert first["id"] == "a" and first["ssim_image"]["value"] == pytest.approx(float(expected), abs=1e-9)


def test_a_folder_that_is_gone_is_named(scored: Path, tmp_path: Path):
    (tmp_path / "made").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="made is no folder"):
        dcbench.score(scored)


def test_groups_of_folders_widen_the_interval(tmp_path: Path, cheap_metric: str):
    """Twelve clips of four inputs: named in a file of both folders, or in groups.csv of each. A typo is an error."""
    names = [f"{image}{k}" for image in "abcd" for k in range(3)]
    for side, seed in (("made", 0), ("real", 50)):
        for name in names:
            make_clips(tmp_path / side, "x", seed + 5 * "abcd".index(name[0]))  # the clips of one input are equal
            (tmp_path / side / "x.mp4").rename(tmp_path / side / f"{name}.mp4")
    rows = "file,group\n" + "".join(f"{name}.mp4,{name[0]}\n" for name in names)

    def scored(out: str, groups: Path | None = None) -> tuple[Record, list[Case]]:
        sides = tmp_path / "made", tmp_path / "real"
        run = score_folders(*sides, "folders", QUIET, [cheap_metric, "ssim_image"], tmp_path / out, groups)
        return read_record(run), read_manifest(run / "generated.jsonl")

    alone = scored("alone")[0].scores
    (tmp_path / "groups.csv").write_text(rows)
    record, cases = scored("given", tmp_path / "groups.csv")
    assert {case.id: case.group for case in cases} == {name: name[0] for name in names}
    for name in ("corners", "ssim_image"):
        assert record.scores[name].n_groups == 4 and alone[name].n_groups == 12
        wide, narrow = record.scores[name].ci95, alone[name].ci95
        assert wide and narrow and wide[1] - wide[0] > narrow[1] - narrow[0]
    assert "jackknife over 4 blocks of source videos" in record.scores["corners"].ci_method
    for side in ("made", "real"):
        (tmp_path / side / "groups.csv").write_text(rows)
    assert scored("own")[0].scores == record.scores
    (tmp_path / "typo.csv").write_text("file,group\nelsewhere,a\n")
    with pytest.raises(UserError, match="none of its 1 rows names a video"):
        scored("typo", tmp_path / "typo.csv")
    (tmp_path / "two.csv").write_text("file,group\na0,a\na0,b\n")
    with pytest.raises(UserError, match=r"a0.mp4 is in two groups, a, b"):
        scored("two", tmp_path / "two.csv")
