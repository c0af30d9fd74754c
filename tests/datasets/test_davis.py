"""DAVIS and the protocols of VIDIM-Bench, on small folders of pictures that the tests make."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from dcbench.catalogue import cards, find_dataset, find_model
from dcbench.clips import resize
from dcbench.datasets.base import VideoError, load_dataset
from dcbench.datasets.davis import SEQUENCES_2016, Davis
from dcbench.datasets.images import Pictures
from dcbench.errors import UserError
from dcbench.models.base import Request, Runtime
from dcbench.models.baselines.trivial import blend, hold
from dcbench.protocol import find_protocol
from dcbench.record import read_manifest
from dcbench.reports.notations import to_markdown
from dcbench.reports.results import load_results
from dcbench.reports.tables import layout, numbers
from dcbench.runs import inputs, planning, sampling, scoring
from dcbench.runs.folders import plan_folders
from dcbench.runs.run import Options, Run

QUIET = Options(device="cpu", quiet=True)
HEIGHT, WIDTH = 48, 86


def write(root: Path, lengths: dict[str, int], first: int = 0) -> Path:
    """A DAVIS folder. In each sequence a bright square moves to the right over a rising grey."""
    for seed, (name, length) in enumerate(lengths.items()):
        folder = root / "JPEGImages" / "480p" / name
        folder.mkdir(parents=True)
        for k in range(length):
            frame = torch.full((HEIGHT, WIDTH, 3), 40 + 10 * seed + 2 * k, dtype=torch.uint8)
            frame[10:30, 20 + k : 40 + k] = 220
            Image.fromarray(frame.numpy()).save(folder / f"{first + k:05d}.jpg", quality=95)
    return root


def plan(root: Path, out: Path, model: str = "blend", **changes) -> Run:
    chosen = find_protocol("vidim-davis-7").model_copy(update={"height": 32, "width": 32, **changes})
    return planning.plan(find_model(model), find_dataset("davis"), chosen, root, out, quiet=True)


def test_the_fifty_sequences_of_2016():
    assert len(SEQUENCES_2016) == len(set(SEQUENCES_2016)) == 50
    assert list(SEQUENCES_2016) == sorted(SEQUENCES_2016)


def test_splits(tmp_path: Path):
    write(tmp_path / "DAVIS", {"bear": 2, "bike-packing": 2})
    data = Davis(tmp_path)
    assert [item.id for item in data.items("2016")] == list(SEQUENCES_2016)
    assert [item.id for item in data.items("all")] == ["bear", "bike-packing"]
    with pytest.raises(UserError, match=r"split val needs .*val\.txt"):
        data.items("val")
    lists = tmp_path / "DAVIS" / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("bike-packing\r\nblackswan\r\n")
    items = data.items("val")
    assert [(item.id, item.group, item.captions) for item in items] == [
        ("bike-packing", "bike-packing", ()), ("blackswan", "blackswan", ()),
    ]  # fmt: skip
    assert items[0].video.info().fps == 24
    with pytest.raises(VideoError, match="blackswan holds no picture"):
        items[1].video.info()
    (lists / "val.txt").write_text("../secrets\n")
    with pytest.raises(UserError, match="no name of a sequence"):
        data.items("val")


def test_a_folder_that_is_no_davis_and_a_sequence_with_a_gap(tmp_path: Path):
    with pytest.raises(UserError, match=r"no folder JPEGImages/480p in .*\n.*JPEGImages/480p/<sequence>"):
        load_dataset(find_dataset("davis"), tmp_path)
    write(tmp_path, {"bear": 4})
    (tmp_path / "JPEGImages/480p/bear/00001.jpg").unlink()
    with pytest.raises(VideoError, match=r"00001\.jpg is missing"):
        Davis(tmp_path).items("all")[0].video.info()


def test_pictures_are_frames(tmp_path: Path):
    write(tmp_path, {"bear": 3})
    files = sorted((tmp_path / "JPEGImages/480p/bear").iterdir())
    video = Pictures(tuple(files), 24.0)
    assert (video.info().num_frames, video.info().height, video.info().width) == (3, HEIGHT, WIDTH)
    frames = video.read([2, 0, 2])
    assert torch.equal(frames[0], frames[2]) and not torch.equal(frames[0], frames[1])
    with pytest.raises(VideoError, match="frame 3 was asked for, of 3 pictures"):
        video.read([3])
    Image.new("RGB", (20, 20)).save(files[1])
    with pytest.raises(VideoError, match="has 20x20 pixels"):
        video.read([0, 1])


def test_every_complete_chunk_of_nine_frames_is_a_clip(tmp_path: Path):
    run = plan(write(tmp_path / "data", {"bear": 28, "camel": 9, "train": 8}), tmp_path / "run")
    assert [case.id for case in run.cases] == ["bear-00000", "bear-00009", "bear-00018", "camel-00000"]
    assert run.cases[1].frames == list(range(9, 18))
    assert {case.cluster for case in run.cases} == {"bear", "camel"}
    assert len({case.seed for case in run.cases}) == 4
    reasons = {entry.id: (entry.rule, entry.reason) for entry in run.plan.excluded}
    assert reasons["train"] == ("short", "8 frames; 9 are needed")
    assert reasons["lucia"][0] == "unreadable" and len(reasons) == 48  # sequences that are not there are named
    assert read_manifest(run.directory.manifest) == run.cases
    again = planning.reopen(run.directory.path)
    assert torch.equal(again.reference(again.cases[1])[0], run.reference(run.cases[1])[0])


def test_the_request_has_both_ends_of_the_chunk(tmp_path: Path):
    run = plan(write(tmp_path / "data", {"bear": 18}), tmp_path / "run")
    frames = run.items["bear"].video.read(list(range(9, 18)))
    request = run.request(run.cases[1])
    expected = resize(frames, 32, 32, "crop", "area_linear_light")
    assert request.end_image is not None
    assert torch.equal(request.image, expected[0]) and torch.equal(request.end_image, expected[-1])
    assert torch.equal(run.reference(run.cases[1])[0], expected)


def test_blend_is_better_than_hold_and_both_show_the_ends(tmp_path: Path):
    root = write(tmp_path / "data", {"bear": 27, "camel": 27, "train": 27, "boat": 27})
    metrics = ["psnr(frames=between)", "psnr_middle", "psnr", "st_lpips_image"]
    scores = {}
    for name in ("hold", "blend"):
        run = plan(root, tmp_path / name, name)
        sampling.sample(run, QUIET)
        scores[name] = scoring.score(run, QUIET, metrics[:3]).scores
        reference, clip = run.reference(run.cases[0])[0], run.generated(run.cases[0])
        assert torch.equal(clip[[0, -1]], reference[[0, -1]])
    for metric in metrics[:2]:
        assert scores["blend"][metric].value > scores["hold"][metric].value + 1
    assert scores["hold"]["psnr"].value > scores["hold"]["psnr(frames=between)"].value  # two equal frames count 100 dB
    results = load_results([tmp_path / "hold", tmp_path / "blend"])
    found = numbers(results)
    shown = {(number.model, number.block, number.value) for number in found if number.published}
    assert ("FILM", "published, framer", 21.67) in shown and ("VIDIM", "published, vidim", 199.32) in shown
    assert {number.dataset for number in found} == {"davis"}
    text = to_markdown(layout(results, found))
    assert "published, framer" in text and "LDMVFI" in text


def test_a_model_without_an_end_image_is_refused_before_a_clip_is_made(tmp_path: Path):
    root = write(tmp_path / "data", {"bear": 9})
    able = [
        card.name
        for card in cards("models").values()
        if card.available and "end_image" in getattr(card, "conditions_on", ())
    ]
    assert {"hold", "blend", "dynamicrafter-512-interp", "dynamicrafter-tiny-interp"} <= set(able)
    with pytest.raises(UserError, match=r"vidim-davis-7 .*zoom does not\. Models that can: " + ", ".join(able)):
        plan(root, tmp_path / "run", "zoom")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match='blend fills in between two pictures: take a protocol with condition = "ends"'):
        plan(root, tmp_path / "run", "blend", condition="first")
    assert plan(root, tmp_path / "real", "real").cases  # it returns the reference clip
    (tmp_path / "mine").mkdir()
    assert plan(root, tmp_path / "folder", str(tmp_path / "mine")).cases  # clips that were made elsewhere
    own = tmp_path / "own.py"
    text = "class {}:\n    conditions_on = frozenset({})\n    def __init__(self, card, runtime): pass\n"
    own.write_text(text.format("Both", '{"image", "end_image"}') + text.format("One", '{"image"}'))
    assert plan(root, tmp_path / "own", f"{own}:Both").cases
    with pytest.raises(UserError, match="which one does not"):
        plan(root, tmp_path / "one", f"{own}:One")


def request(image: Tensor, end: Tensor | None) -> Request:
    return Request("c", image, "", 9, 24.0, 1, 0, end)


def test_blend_and_hold():
    image, end = torch.full((3, 4, 4), 100, dtype=torch.uint8), torch.full((3, 4, 4), 20, dtype=torch.uint8)
    card, runtime = find_model("blend"), Runtime()
    (mixed,) = blend(card, runtime).generate([request(image, end)])
    assert mixed[:, 0, 0, 0].tolist() == [100, 90, 80, 70, 60, 50, 40, 30, 20]
    (odd,) = blend(card, runtime).generate([request(image, image + 3)])
    assert odd[:, 0, 0, 0].tolist() == [100, 100, 101, 101, 102, 102, 102, 103, 103]  # 100 + 3 k / 8, rounded
    (held,) = hold(find_model("hold"), runtime).generate([request(image, end)])
    assert held[:, 0, 0, 0].tolist() == [100] * 8 + [20]
    (held,) = hold(find_model("hold"), runtime).generate([request(image, None)])
    assert held[:, 0, 0, 0].tolist() == [100] * 9
    with pytest.raises(UserError, match="needs an end image; hold needs none"):
        blend(card, runtime).generate([request(image, None)])


def test_inputs_for_other_programs_have_both_pictures(tmp_path: Path):
    root = write(tmp_path / "data", {"bear": 9})
    chosen = find_protocol("vidim-davis-7").model_copy(update={"height": 32, "width": 32})
    assert inputs.write_inputs(find_dataset("davis"), chosen, tmp_path / "inputs", root, quiet=True) == 1
    assert '"end_image":"images/bear-00000-end.png"' in (tmp_path / "inputs" / "inputs.jsonl").read_text()
    assert len(list((tmp_path / "inputs" / "images").iterdir())) == 2


def test_two_folders_have_no_chunks(tmp_path: Path):
    with pytest.raises(UserError, match='chunks = "all" makes several clips of a video, but here a file is a clip'):
        plan_folders(tmp_path, tmp_path, find_protocol("vidim-davis-7"))
