"""Pictures with prompts: folders, lists, what a list may get wrong, and runs without a film."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import dcbench
from dcbench import video
from dcbench.catalogue import find_dataset, find_model
from dcbench.datasets.base import VideoError
from dcbench.datasets.images import Images, Picture
from dcbench.errors import UserError
from dcbench.protocol import find_protocol
from dcbench.record import Score
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.run import Options, Run

QUIET = Options(device="cpu", quiet=True)


def picture(seed: int) -> Tensor:
    coarse = torch.randint(0, 256, (1, 3, 4, 4), generator=torch.Generator().manual_seed(seed)).float()
    return torch.nn.functional.interpolate(coarse, (40, 52), mode="bilinear")[0].to(torch.uint8)


def write(root: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed).permute(1, 2, 0).numpy()).save(root / name)


def plan(root: Path, out: Path, model: str = "zoom", protocol: str = "images", **changes) -> Run:
    chosen = find_protocol(protocol).model_copy(update={"height": 32, "width": 32, **changes})
    return planning.plan(find_model(model), find_dataset("images"), chosen, root, out, quiet=True)


def finish(run: Run, *metrics: str) -> dict[str, Score]:
    sampling.sample(run, QUIET)
    return scoring.score(run, QUIET, metrics).scores


def test_a_folder_with_and_without_prompts(tmp_path: Path):
    write(tmp_path, "b.png", "a/x.jpg", "c.webp", ".hidden.png")
    (tmp_path / "prompts.csv").write_text('file,prompt\nb.png,"a cat, asleep"\na/x,a dog\n')
    (tmp_path / "notes.txt").write_text("no list")
    items = Images(tmp_path).items("all")
    assert [(item.id, item.captions) for item in items] == [
        ("a__x", ("a dog",)), ("b", ("a cat, asleep",)), ("c", ()),
    ]  # fmt: skip
    assert torch.equal(items[1].video.read([0, 0])[1], picture(0))
    assert (items[1].video.info().num_frames, items[1].video.info().height) == (1, 40)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", 'b.png\tsays "hello"\nb.png\twith\ttab\n\n./a/x.jpg\tthe last\n'),
        ("list.tsv", 'image\tcaption\nb\tsays "hello"\nb\twith\ttab\na/x\tthe last\n'),
        (
            "list.jsonl",
            '{"file": "b.png", "prompt": "says \\"hello\\""}\n{"image": "b.png", "caption": "with"}\n'
            '{"file": "a/x.jpg", "prompt": "the last"}\n',
        ),
        ("list.csv", 'image,prompt\nb.png,"says ""hello"""\nb.png,with\na/x.jpg,the last\n'),
    ],
)
def test_a_list_chooses_pictures_and_may_name_one_twice(tmp_path: Path, name: str, text: str):
    write(tmp_path, "b.png", "a/x.jpg", "c.png")
    (tmp_path / name).write_text(text)
    items = Images(tmp_path / name).items("all")
    assert [(item.id, item.captions, item.group) for item in items] == [
        ("a__x", ("the last",), "a__x"), ("b", ('says "hello"',), "b"), ("b-prompt2", ("with",), "b"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("list.txt", "b.png\tone\nd.png\ttwo\n", r"list.txt, line 2: there is no picture 'd.png'"),
        ("list.txt", "b.png\n", r"line 1: expected a picture and its prompt"),
        ("list.csv", "name,text\nb.png,x\n", r"has the columns name, text; expected file, prompt"),
        ("list.jsonl", '{"file": "b.png"}\n', r"line 1: expected"),
        ("list.jsonl", '{"file": ["b.png"], "prompt": "x"}\n', "line 1: expected"),
        ("list.txt", "\n", "lists no picture"),
    ],
)
def test_what_a_list_may_get_wrong(tmp_path: Path, name: str, text: str, message: str):
    write(tmp_path, "b.png", "c.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        Images(tmp_path / name)


def test_no_picture_and_a_damaged_one(tmp_path: Path):
    with pytest.raises(UserError, match="holds no picture"):
        Images(tmp_path)
    write(tmp_path, "a.png", "b.png")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(VideoError, match=r"a\.png"):
        Picture(tmp_path / "a.png").info()
    run = plan(tmp_path, tmp_path / "run")
    assert [case.id for case in run.cases] == ["b"] and [entry.id for entry in run.plan.excluded] == ["a"]


def test_a_run_without_films(tmp_path: Path):
    write(tmp_path / "data", *(f"{k}.png" for k in range(6)))
    (tmp_path / "data" / "prompts.txt").write_text("".join(f"{k}.png\tprompt {k}\n" for k in range(6)))
    run = plan(tmp_path / "data", tmp_path / "run")
    assert run.protocol.compared == "without reference clips"
    assert (run.cases[2].prompt, run.cases[2].frames, run.cases[2].fps) == ("prompt 2", [0], 8)
    scores = finish(run, "ssim_image", "first_frame_psnr", "motion", "psnr", "fvd")
    assert scores["first_frame_psnr"].value == 100 and scores["ssim_image"].n_generated == 6
    assert scores["motion"].value and "reference_value" not in scores["motion"].details
    assert scores["psnr"].value is None and "needs a reference clip" in str(scores["psnr"].reason)
    assert scores["fvd"].value is None and "0 reference and 6 generated clips" in str(scores["fvd"].reason)
    dcbench.report([tmp_path / "run"], tmp_path / "report")
    assert "prompt 2" in (tmp_path / "report" / "index.html").read_text()
    with pytest.raises(UserError, match="real is given the reference clip, and protocol images has none"):
        plan(tmp_path / "data", tmp_path / "real", "real")


def test_films_of_another_data_set_are_the_reference_of_set_metrics(tmp_path: Path, cheap_metric: str):
    data = tmp_path / "data"
    write(data, *(f"{k}.png" for k in range(4)))
    for k in range(5):
        film = torch.stack([picture(100 * k + t) for t in range(18)])
        video.write_lossless(data / "reference" / f"film{k}.mkv", film, 8)
    run = plan(data, tmp_path / "run", protocol="images-films")
    assert len(run.cases) == 4 and all(case.apart and len(case.apart.frames) == 16 for case in run.cases)
    scores = finish(run, cheap_metric, "ssim_image", "psnr")
    assert (scores["corners"].n_reference, scores["corners"].n_generated) == (4, 4)
    assert scores["ssim_image"].n_generated == 4 and scores["psnr"].value is None
    assert run.protocol.compared == "with videos that are not animated"
    again = dcbench.score(tmp_path / "run", ["motion"], data=data)
    assert again.scores["motion"].n_generated == 4
    with pytest.raises(UserError, match="compares 4 animated videos with as many others"):
        (data / "reference" / "film0.mkv").unlink()
        (data / "reference" / "film1.mkv").unlink()
        plan(data, tmp_path / "other", protocol="images-films")
