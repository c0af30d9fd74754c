"""`dcbench animate`: every application writes a playable file, every mistake is told."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcbench import animate, video, weights
from dcbench.catalogue import Condition, ModelCard, find_model
from dcbench.errors import UserError
from dcbench.models.base import Runtime
from dcbench.models.dynamicrafter.config import VARIANTS, Config
from dcbench.models.dynamicrafter.networks import Networks

TINY = VARIANTS["tiny"]
FEW_FRAMES = dataclasses.replace(TINY.query_transformer, num_frames=4)
SMALL = dataclasses.replace(TINY, height=16, width=16, query_transformer=FEW_FRAMES)


@pytest.fixture
def card(tmp_path: Path) -> ModelCard:
    """The card of a model that makes 4 frames of 16x16, in a folder."""
    return folder_card("small", SMALL, ("image", "prompt", "frame_stride"), tmp_path / "model")


@pytest.fixture
def both_ends(tmp_path: Path) -> ModelCard:
    cfg = dataclasses.replace(SMALL, interpolates=True)
    return folder_card("small-interp", cfg, ("image", "prompt", "end_image"), tmp_path / "interp")


def folder_card(name: str, cfg: Config, conditions_on: tuple[Condition, ...], folder: Path) -> ModelCard:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(cfg.to_dict()))
    weights.save_tensors(Networks.random(cfg).state_dict(), folder / "weights.safetensors")
    return ModelCard(
        name=name,
        title="",
        summary="",
        entry_point="dcbench.models.dynamicrafter.load:load",
        conditions_on=conditions_on,
        options={"folder": str(folder)},
        sampling={"steps": 2},
    )


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (33, 41, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif", "mkv"])
def test_a_picture_becomes_a_video(card: ModelCard, picture: Path, tmp_path: Path, suffix: str):
    (out,) = animate.animate(card, picture, "a boat sails", tmp_path / f"boat.{suffix}", quiet=True, fps=5)
    frames, _ = video.read_clip(out)
    assert frames.shape == (4, 3, 16, 16) and frames.float().std() > 1


def test_num_makes_different_videos_and_the_first_stays_the_same(card: ModelCard, picture: Path, tmp_path: Path):
    several = animate.animate(card, picture, "a boat", tmp_path / "boat.mkv", num=2, seed=5, quiet=True)
    assert [path.name for path in several] == ["boat-1.mkv", "boat-2.mkv"]
    one = animate.animate(card, picture, "a boat", tmp_path / "again.mkv", seed=5, quiet=True)
    clips = [video.read_clip(path)[0] for path in (*several, *one)]
    assert torch.equal(clips[0], clips[2]) and not torch.equal(clips[0], clips[1])


def test_interpolation_and_loop(both_ends: ModelCard, picture: Path, tmp_path: Path):
    other = tmp_path / "other.jpg"
    Image.new("RGB", (50, 20), "red").save(other)
    (out,) = animate.animate(both_ends, picture, "", tmp_path / "between.mkv", end_image=other, quiet=True)
    assert video.read_clip(out)[0].shape[0] == 4
    (out,) = animate.animate(both_ends, picture, "", tmp_path / "loop.mkv", loop=True, quiet=True)
    assert video.read_clip(out)[0].shape[0] == 3  # the last frame is the first again


def test_a_story_joins_its_scenes(card: ModelCard, picture: Path, tmp_path: Path):
    story = tmp_path / "story.yaml"
    story.write_text("fps: 6\nscenes:\n- {image: photo.png, prompt: a boat}\n- prompt: it sails away\n  seed: 3\n")
    out = animate.tell(card, story, tmp_path / "story.mkv", quiet=True)
    frames, fps = video.read_clip(out)
    assert frames.shape[0] == 8 and fps == pytest.approx(6)
    assert not torch.equal(frames[:4], frames[4:])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scenes: []", "expected 'scenes:'"),
        ("- a", "expected 'scenes:'"),
        ("scenes:\n- promt: x", 'Did you mean "prompt"'),
        ("scenes:\n- prompt: x", "the first scene needs an image"),
        ("scenes:\n- {image: nowhere.png, prompt: x}", "nowhere.png: No such file"),
        ("scenes:\n- {image: photo.png, prompt: 5}", "put it in quotes"),
        ("scenes:\n- {image: photo.png, seed: x}", "whole number"),
        ("fps: fast\nscenes:\n- {image: photo.png}", "fps is 'fast'"),
        ("scenes: [", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_mistakes_in_a_story(picture: Path, tmp_path: Path, text: str, said: str):
    (tmp_path / "story.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        animate.read_story(tmp_path / "story.yaml")
    assert said in str(error.value)


def test_the_wrong_variant_names_the_right_one(card: ModelCard, both_ends: ModelCard, picture: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"a loop needs a model .* dynamicrafter-512-interp"):
        animate.animate(card, picture, "", tmp_path / "a.mp4", loop=True)
    with pytest.raises(UserError, match=r"between two pictures: give --end-image or --loop.*dynamicrafter-512\b"):
        animate.animate(both_ends, picture, "", tmp_path / "a.mp4")


def test_mistakes_are_told_before_the_model_is_loaded(card: ModelCard, picture: Path, tmp_path: Path):
    nowhere = card.model_copy(update={"entry_point": "nowhere:load"})
    with pytest.raises(UserError, match=r"cannot write \.avo"):
        animate.animate(nowhere, picture, "", tmp_path / "a.avo")
    with pytest.raises(UserError, match=r"b\.png: No such file"):
        animate.animate(nowhere, tmp_path / "b.png", "", tmp_path / "a.mp4")
    with pytest.raises(UserError, match="--fps 0"):
        animate.animate(nowhere, picture, "", tmp_path / "a.mp4", fps=0)
    with pytest.raises(UserError, match="--num 0"):
        animate.animate(nowhere, picture, "", tmp_path / "a.mp4", num=0)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="no picture that can be read"):
        animate.animate(nowhere, tmp_path / "text.png", "", tmp_path / "a.mp4")
    (Path(card.options["folder"]) / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"--motion asks for a frame_stride of 60: small was trained with .* 1 to 6"):
        animate.animate(card, picture, "", tmp_path / "a.mp4", motion=60)


OWN = """
import torch
from dcbench.models.base import checks_with

def check(card, wanted):
    if [one.fps for one in wanted] != [25.0]:
        raise ValueError(f"fps of {wanted}")

class Model:
    conditions_on = frozenset({"image", "prompt"})
    def __init__(self, card, runtime):
        self.card = card
    def generate(self, requests):
        assert [request.fps for request in requests] == [25.0]
        return [torch.zeros(request.num_frames, 3, 16, 16, dtype=torch.uint8) for request in requests]

load = checks_with(check)(Model)
"""


def test_a_video_plays_at_the_rate_of_the_models_card(picture: Path, tmp_path: Path):
    """LTX-Video asks for 25 fps: at another rate its frames do not hold what is wanted."""
    (tmp_path / "own.py").write_text(OWN)
    own = {"entry_point": f"{tmp_path / 'own.py'}:load"}
    card = find_model("ltx-video").model_copy(update=own)
    card = card.model_copy(update={"clip": card.clip.model_copy(update={"frames": 9})})
    (out,) = animate.animate(card, picture, "", tmp_path / "a.mkv", quiet=True)
    assert video.read_clip(out)[1] == pytest.approx(25)
    (tmp_path / "story.yaml").write_text("scenes:\n- {image: photo.png}\n")
    assert video.read_clip(animate.tell(card, tmp_path / "story.yaml", tmp_path / "b.mkv", quiet=True))[1] == 25


@pytest.mark.parametrize("name", ["ltx-video", "wan2.1-i2v-480p", "hunyuanvideo-i2v", "skyreels-v2-i2v"])
def test_a_rate_that_the_model_cannot_make_is_refused_before_the_weights(name: str, picture: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"do not hold .* at 8 fps"):
        animate.animate(find_model(name), picture, "", tmp_path / "a.mp4", fps=8, runtime=Runtime(offline=True))
    with pytest.raises(UserError, match=r"--motion: .* has no such condition"):
        animate.animate(find_model(name), picture, "", tmp_path / "a.mp4", motion=3)


def test_pictures_of_every_kind(tmp_path: Path):
    """Transparency goes over white, grey and 16 bits become RGB, the camera's turn is made."""
    rgba = Image.new("RGBA", (2, 3), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.save(tmp_path / "a.png")
    read = animate.read_image(tmp_path / "a.png")
    assert read.shape == (3, 3, 2) and read[:, 0, 0].tolist() == [255, 0, 0] and read[:, 2, 1].tolist() == [255] * 3
    Image.new("L", (1, 1), 100).save(tmp_path / "b.png")
    assert animate.read_image(tmp_path / "b.png").flatten().tolist() == [100] * 3
    Image.fromarray(np.full((2, 2), 128 * 257, dtype=np.uint16)).save(tmp_path / "c.png")
    assert animate.read_image(tmp_path / "c.png").unique().tolist() == [128]
    turned = Image.new("RGB", (5, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "d.jpg", exif=exif)
    assert animate.read_image(tmp_path / "d.jpg").shape == (3, 5, 2)


def test_models_of_other_kinds_animate_too(picture: Path, tmp_path: Path):
    (out,) = animate.animate(find_model("zoom"), picture, "", tmp_path / "zoom.mkv", quiet=True)
    assert video.read_clip(out)[0].shape[0] == 16
    with pytest.raises(UserError, match="zoom has no such condition"):
        animate.animate(find_model("zoom"), picture, "", tmp_path / "zoom.mkv", motion=3)


def test_a_model_shows_its_steps(card: ModelCard, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    animate.animate(card, picture, "", tmp_path / "boat.mkv")
    assert "boat.mkv: 2/2" in capsys.readouterr().err
