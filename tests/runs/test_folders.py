"""Two folders of videos are a run like others: a plan, a page with clips, and they can be scored again."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import dcbench
from dcbench import video
from dcbench.catalogue import find_dataset, find_model
from dcbench.errors import UserError
from dcbench.metrics.pixels import ssim_of
from dcbench.pictures import read_image
from dcbench.protocol import find_protocol, make_case
from dcbench.record import Case, Record, read_manifest, read_record
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.folders import plan_folders, score_folders
from dcbench.runs.inputs import write_inputs
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
    made = run.generated(by_id["a"])
    expected = ssim_of(made, run.image(by_id["a"]).expand_as(made)).mean()
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


@pytest.mark.parametrize(
    ("made", "real", "pairs"),
    [
        (["a", "b"], ["a", "b"], 2),
        (["model/a", "model/b"], ["a", "b"], 2),  # other folders, names that are unique
        (["x/a", "y/a"], ["x/a", "y/a"], 2),  # the same paths
        (["x/a", "y/a"], ["a", "b"], 0),  # which of them is a?
        (["x/a", "z/a"], ["x/a", "y/a"], 1),
        (["model/a", "c"], ["a", "model/c"], 2),
    ],
)
def test_videos_are_paired_by_path_and_else_by_a_unique_name(made, real, pairs, tmp_path, capsys):
    for folder, paths in (("made", made), ("real", real)):
        for k, path in enumerate(paths):
            make_clips((tmp_path / folder / path).parent, Path(path).name, k)
    run = plan_folders(tmp_path / "made", tmp_path / "real", find_protocol("folders"), tmp_path / "run")
    assert sum(run.has_reference(case) and run.has_generated(case) for case in run.cases) == pairs
    assert len(run.cases) == len(made) + len(real) - pairs
    assert f"{pairs} of {len(made)} generated videos have a partner" in capsys.readouterr().err
    again = planning.reopen(tmp_path / "run")
    assert {i: item.path for i, (item, _) in again.folder.items()} == {
        i: item.path for i, (item, _) in run.folder.items()
    }
    for case in run.cases:  # a clip is read from its own file, whatever its id
        if case.id in run.folder:
            assert torch.equal(again.clip(case), run.clip(case))


def test_a_limit_takes_pairs_first(tmp_path):
    make_clips(tmp_path / "made", "abxyz", 0)
    make_clips(tmp_path / "real", "uvwyz", 10)
    run = plan_folders(tmp_path / "made", tmp_path / "real", find_protocol("folders"), tmp_path / "run", True, limit=2)
    assert [case.id for case in run.cases] == ["y", "z"]
    with pytest.raises(UserError, match="--limit 0"):
        plan_folders(tmp_path / "made", tmp_path / "real", find_protocol("folders"), limit=0)


def test_what_one_metric_cannot_observe_the_others_can(tmp_path, cheap_metric):
    """A pair without a caption, and clips without a partner: nothing is lost, and the reasons are said."""
    make_clips(tmp_path / "made", "abc", 0)
    make_clips(tmp_path / "real", "abd", 10)
    (tmp_path / "real" / "captions.csv").write_text("file,caption\na.mp4,a b c\n")
    card = tmp_path / "words.toml"
    card.write_text(
        'name = "words"\ntitle = "Words"\nsummary = "s"\nkind = "per_clip"\nentry_point = "words.py:build"\n'
        'needs = ["prompt"]\n'
    )
    (tmp_path / "words.py").write_text(
        "from dcbench.errors import UserError\n"
        "from dcbench.metrics.base import ClipMetric, NoNetwork\n"
        "class Words(ClipMetric):\n"
        "    def observe(self, view):\n"
        '        return {"value": float(len(view.need("prompt").split()))}\n'
        "class Picky(Words):\n"
        "    def observe(self, view):\n"
        '        raise UserError("the clip is too dark")\n'
        'def build(card, runtime): return Words(card, NoNetwork("words", "none"))\n'
        'def picky(card, runtime): return Picky(card, NoNetwork("words", "none"))\n'
    )
    picky = tmp_path / "picky.toml"
    picky.write_text(card.read_text().replace("words", "picky").replace('"picky.py:build"', '"words.py:picky"'))
    found = score_folders(
        tmp_path / "made", tmp_path / "real", "folders", QUIET, [cheap_metric, str(card), str(picky)], tmp_path / "run"
    )
    scores = read_record(found).scores
    assert (scores["corners"].n_reference, scores["corners"].n_generated) == (3, 3)
    assert (scores["words"].value, scores["words"].n_generated) == (3, 1)
    assert scores["words"].warnings == [
        "2 clips do not count: no caption: words needs a caption, which this clip does not have"
    ]
    assert (scores["picky"].value, scores["picky"].reason) == (None, "the clip is too dark")


def at_rate(folder: Path, name: str, fps: float, seconds: float = 6) -> None:
    """A video whose grey level tells the time."""
    count = round(seconds * fps)
    clip = torch.stack([torch.full((3, 48, 64), round(40 * k / fps), dtype=torch.uint8) for k in range(count)])
    video.write_lossless(folder / f"{name}.mkv", clip, fps)


@pytest.mark.parametrize("fps", [8, 12.5, 25])
def test_two_folders_of_other_rates_are_compared_by_time_when_asked(fps, tmp_path, capsys):
    at_rate(tmp_path / "made", "a", 8)
    at_rate(tmp_path / "real", "a", 25)
    where = tmp_path / "made", tmp_path / "real", "folders", Options(device="cpu"), ["ssim_image"]
    plain = score_folders(*where, tmp_path / "plain")
    said = "generated videos have 8 frames per second, the reference videos 25"
    assert said in capsys.readouterr().err
    assert said in read_record(plain).warnings[0]
    timed = score_folders(*where, tmp_path / "timed", fps=fps)
    assert read_record(timed).warnings == []
    assert read_record(timed).plan.fingerprint != read_record(plain).plan.fingerprint
    run = planning.reopen(timed)
    (case,) = run.cases
    assert case.fps == fps
    times = {"made": run.folder[case.id][1].frames, "real": case.frames}
    for name, rate in (("made", 8), ("real", 25)):
        for k, frame in enumerate(times[name]):
            assert abs(frame / rate - k / fps) <= 0.5 / rate + 1e-9  # the frame that is nearest in time


def test_a_protocol_may_read_any_data_set_by_time(tmp_path):
    base = find_protocol("folders").model_copy(update={"num_clips": 1, "frame_stride": 2})
    assert "fps" not in base.identity()
    at_rate(tmp_path, "a", 30, seconds=2)
    (item,) = planning.folder_items(tmp_path, base).values()
    case = make_case(base.model_copy(update={"fps": 16.0}), item, item.video.info(), 1)
    assert case is not None and (case.fps, case.frames[:4], case.frames[-1]) == (8, [0, 4, 8, 11], 56)
    assert make_case(base.model_copy(update={"fps": 15.0}), item, item.video.info(), 1) is None  # 30 frames, 31 needed


def test_clips_that_do_not_begin_with_the_input_image_are_marked(tmp_path, in_tmp):
    data = find_dataset("shapes")
    protocol = find_protocol("smoke").model_copy(update={"height": 64, "width": 64, "datasets": {}})
    count = write_inputs(data, protocol, tmp_path / "inputs", limit=3, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "inputs" / "inputs.jsonl").read_text().splitlines()]
    assert count == len(lines) == 3 and all(line["prompt"] and line["num_frames"] == 16 for line in lines)
    for k, line in enumerate(lines):
        image = read_image(tmp_path / "inputs" / line["image"])
        other = read_image(tmp_path / "inputs" / lines[1]["image"]) if k == 0 else image
        clip = torch.stack([other.roll(step, 2) for step in range(16)])
        video.write_mp4(tmp_path / "clips" / f"{line['clip_id']}.mp4", clip, line["fps"])
    manifest = tmp_path / "inputs" / "manifest.jsonl"
    run = planning.plan(
        find_model(str(tmp_path / "clips")), data, protocol, out=tmp_path / "run", manifest=manifest, quiet=True
    )
    sampling.sample(run, QUIET)
    record = scoring.score(run, QUIET, ["motion"])
    (warning,) = record.warnings
    assert "1 of 3 clips do not begin with the input image" in warning and lines[0]["clip_id"] in warning
    assert "do not begin with the input image" in dcbench.report([run.directory.path], tmp_path / "report")
    with pytest.raises(UserError, match="exists and is not empty"):
        write_inputs(data, protocol, tmp_path / "inputs", limit=3, quiet=True)
