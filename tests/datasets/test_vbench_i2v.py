"""VBench-I2V's files: its list, its pictures of four ratios, those that are cut from originals, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dcbench.catalogue import find_dataset
from dcbench.datasets.base import Shaped, load_dataset
from dcbench.datasets.images import Picture
from dcbench.datasets.made_pictures import SCENES, make_suite
from dcbench.datasets.vbench_i2v import BOXES, CROPS, DIMENSIONS, LIST, ORIGINS, Cut, VBenchI2V, choose_ratio, find_box
from dcbench.datasets.verify import verify
from dcbench.errors import UserError

CARD = find_dataset("vbench-i2v")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("suite")
    assert make_suite(out, 96, quiet=True) == 19
    return out


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    copy = tmp_path / "suite"
    for path in made.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return copy


def load(root: Path, **options: str) -> VBenchI2V:
    loaded = load_dataset(CARD, root, options)
    assert isinstance(loaded, VBenchI2V)
    return loaded


def change(root: Path, number: int, **values: Any) -> None:
    """Change an entry of the list."""
    rows = json.loads((root / LIST).read_text())
    rows[number] |= values
    (root / LIST).write_text(json.dumps(rows))


# --- items ---


def test_an_item_is_a_prompt_with_its_dimensions(made: Path):
    items = load(made).for_shape(320, 512).items("all")
    assert len(items) == 3 + 2 * 8 and [item.id for item in items] == sorted(item.id for item in items)
    by_id = {item.id: item for item in items}
    sea, pan = by_id["a calm sea under an evening sky"], by_id["a calm sea under an evening sky, camera pans left"]
    assert sea.captions == (sea.id,) and sea.group == pan.group == sea.id and sea.label == "scenery"
    assert sea.truth is not None and pan.truth is not None
    assert pan.truth["dimensions"] == ["camera_motion"] and pan.truth["camera_motion"] == "pan_left"
    assert "i2v_background" in sea.truth["dimensions"] and "i2v_subject" not in sea.truth["dimensions"]
    assert {name for item in items for name in (item.truth or {})["dimensions"]} == set(DIMENSIONS)
    assert by_id["a child's balloon in the sky"].path == "a child's balloon in the sky.jpg"


def test_the_same_suite_has_the_same_bytes(made: Path, tmp_path: Path):
    make_suite(tmp_path / "again", 96, quiet=True)
    files = [path for path in sorted(made.rglob("*")) if path.is_file()]
    assert len(files) == 3 + 5 * 5  # the list, the boxes, the mark; originals and four ratios
    assert all((tmp_path / "again" / path.relative_to(made)).read_bytes() == path.read_bytes() for path in files)


# --- ratios ---


@pytest.mark.parametrize(
    ("width", "height", "ratio"),
    [
        (256, 256, "1-1"), (512, 320, "8-5"), (1024, 576, "16-9"), (1280, 720, "16-9"), (832, 480, "7-4"),
        (720, 480, "8-5"), (1280, 704, "16-9"), (480, 832, "1-1"), (320, 256, "1-1"),
    ],
)  # fmt: skip
def test_the_nearest_of_four_ratios(width: int, height: int, ratio: str):
    assert choose_ratio("nearest", height, width) == ratio


def test_other_ratios_are_asked_for(made: Path):
    assert choose_ratio("own", 480, 832) == "26-15" and choose_ratio("own", 320, 512) == "8-5"
    assert choose_ratio("5-4", 320, 512) == "5-4"
    with pytest.raises(UserError, match='ratio "16:9"; expected nearest, own, or WIDTH-HEIGHT'):
        load(made, ratio="16:9")


def test_a_picture_has_the_ratio_of_the_clips(made: Path):
    for height, width, folder in ((256, 256, "1-1"), (320, 512, "8-5"), (576, 1024, "16-9")):
        item = load(made).for_shape(height, width).items("all")[0]
        assert isinstance(item.video, Picture) and item.video.path.parent == made / CROPS / folder
        info = item.video.info()
        assert info.width / info.height == pytest.approx(width / height, rel=0.02)
        assert item.path == load(made).for_shape(64, 64).items("all")[0].path  # models of all shapes share a table


# --- boxes: VBench's crop_to_diff_ratio.py gave the same box for 20000 random pairs of boxes, and refused the same
# 1816 of them; the files that it cut from 5 pictures of noise in 5 ratios were the same bytes ---

UPRIGHT = {  # two entries that VBench's README prints
    "first_crop": {"width": 4882, "height": 6102, "first_bbox": [0, 530, 4882, 4882]},
    "second_crop": {"width": 4882, "height": 4882, "second_bbox": [0, 1094, 4880, 2745]},
}
WIDE = {
    "first_crop": {"width": 3381, "height": 2254, "first_bbox": [0, 252, 3376, 1899]},
    "second_crop": {"width": 3376, "height": 1899, "second_bbox": [720, 0, 1899, 1899]},
}


@pytest.mark.parametrize(
    ("facts", "ratio", "box"),
    [
        (UPRIGHT, "8-5", (0, 1345, 4880, 3050)),
        (UPRIGHT, "7-4", (0, 1584, 4879, 2788)),
        (WIDE, "8-5", (26, 252, 3032, 1895)),
        (WIDE, "7-4", (3, 252, 3318, 1896)),
    ],
)
def test_boxes_are_the_published_ones(facts: dict[str, Any], ratio: str, box: tuple[int, ...]):
    assert find_box(facts, ratio) == box
    assert find_box({**facts, "diff_ratio_crop": {ratio: [1, 2, 3, 4]}}, ratio) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("change", "ratio", "message"),
    [
        ({}, "9-16", "the ratio 9-16 is not between 1-1 and 16-9"),
        ({}, "2-1", "the ratio 2-1 is not between"),
        ({"first_crop": []}, "5-4", "first_bbox is None"),
        ({"first_crop": "all"}, "5-4", "first_crop is 'all'; expected an object"),
        ({"first_crop": {"first_bbox": [0, 0, 1e999, 4]}}, "5-4", "first_bbox is"),
        ({"first_crop": {}}, "5-4", "first_bbox is None; expected four numbers"),
        ({"second_crop": {"width": 9, "height": 9, "second_bbox": [0, 0, 0, 4]}}, "5-4", "second_bbox is"),
        ({"second_crop": {"width": 90, "height": 90, "second_bbox": [0, 0, 90, 90]}}, "5-4", "leave no room"),
    ],
)
def test_boxes_that_fit_nothing_are_explained(change: dict[str, Any], ratio: str, message: str):
    with pytest.raises(UserError, match=message):
        find_box(UPRIGHT | change, ratio)


def test_without_published_pictures_they_are_cut_from_the_originals(made: Path, root: Path):
    for path in (root / CROPS / "8-5").iterdir():
        path.unlink()
    (root / CROPS / "8-5").rmdir()
    cut, whole = (load(folder).for_shape(320, 512).items("all") for folder in (root, made))
    for ours, theirs in zip(cut, whole, strict=True):
        assert isinstance(ours.video, Cut) and ours.path == theirs.path
        assert torch.equal(ours.video.read([0]), theirs.video.read([0]))


def test_a_cut_is_stored_as_pillow_stores_it(made: Path):
    item = load(made, ratio="own").for_shape(256, 320).items("all")[0]
    assert isinstance(item.video, Cut)
    left, top, width, height = item.video.box
    assert width / height == pytest.approx(5 / 4, abs=1e-12)
    stored = io.BytesIO()
    Image.open(item.video.path).crop((left, top, left + width, top + height)).save(stored, "JPEG")
    assert stored.getvalue() == item.video.data()
    assert np.array_equal(np.array(Image.open(stored)), item.video.read([0])[0].permute(1, 2, 0).numpy())


def test_a_box_outside_its_picture_is_refused(made: Path):
    """Pillow would fill it up with black."""
    picture = made / ORIGINS / "a calm sea under an evening sky.jpg"
    with pytest.raises(UserError, match=r"has 144x96 pixels, and its box .* is not inside"):
        Cut(picture, (100, 0, 45, 10)).data()


# --- what is refused ---


@pytest.mark.parametrize(
    ("number", "values", "message"),
    [
        (0, {"dimension": ["i2v_subjekt"]}, "1 entries have an unknown dimension: 'i2v_subjekt' .* Did you mean"),
        (0, {"prompt_en": SCENES[1].prompt}, "1 prompts are there more than once, and VBench names clips by prompts"),
        (0, {"prompt_en": "what is this?"}, "1 prompts cannot be a file name .*'what is this"),
        (0, {"prompt_en": "p" * 180}, "1 prompts cannot be a file name"),
        (0, {"image_name": "../secret.jpg"}, "1 picture names are paths"),
        (4, {"prompt_en": "a sea, camera dances"}, "1 prompts of camera_motion name no motion of the camera"),
        (3, {"dimension": []}, 'entry 4: expected "prompt_en"'),
        (3, {"image_name": None}, 'entry 4: expected "prompt_en"'),
    ],
)
def test_a_wrong_list_is_explained(root: Path, number: int, values: dict[str, Any], message: str):
    change(root, number, **values)
    with pytest.raises(UserError, match=message):
        load(root)


def test_all_that_is_wrong_with_a_list_is_said_at_once(root: Path):
    change(root, 0, dimension=["colour"])
    change(root, 1, prompt_en="a/b")
    with pytest.raises(UserError, match=r"(?s)unknown dimension: 'colour'.*cannot be a file name"):
        load(root)


def test_a_missing_list_says_where_it_is(tmp_path: Path):
    with pytest.raises(UserError, match=r"vbench2_i2v_full_info.json is missing. It lies in `vbench2_beta_i2v/`"):
        load(tmp_path)
    (tmp_path / LIST).write_text("{}")
    with pytest.raises(UserError, match="expected a list of"):
        load(tmp_path)


def test_a_missing_picture_is_counted_and_named(root: Path):
    (root / CROPS / "8-5" / "a calm sea under an evening sky.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 5 pictures for clips of 512x320 .ratio 8-5. are missing, for example"):
        load(root).for_shape(320, 512)
    assert load(root).for_shape(256, 256).items("all")


def test_without_any_pictures_it_is_said_what_to_unpack(root: Path):
    for path in sorted((root / "data").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="no pictures of the ratio 8-5: neither data/crop/8-5 is there, nor data/ori"):
        load(root).for_shape(320, 512)
    with pytest.raises(UserError, match="has neither data/crop/1-1 nor data/origin"):
        verify(load(root), "all", root, quiet=True)


def test_originals_need_their_boxes(root: Path):
    rows = json.loads((root / BOXES).read_text())
    (root / BOXES).write_text(json.dumps(rows[1:]))
    with pytest.raises(UserError, match=r"does not name 'an orange ball lies on the grass.jpg', so it cannot be cut"):
        load(root, ratio="5-4").for_shape(320, 512)
    (root / BOXES).unlink()
    with pytest.raises(UserError, match=r"i2v-bench-info.json is missing: it has the boxes"):
        load(root, ratio="5-4").for_shape(320, 512)


# --- verify ---


def test_verify_decodes_every_picture_of_every_ratio(root: Path):
    assert isinstance(load(root), Shaped)
    whole = verify(load(root), "all", root, quiet=True)
    assert whole.ok and whole.checked == 25 and whole.decoders == {"pillow": 25} and not whole.left_out
    (root / CROPS / "7-4" / "two plums on a wooden table.jpg").unlink()
    (root / ORIGINS / "two plums on a wooden table.jpg").write_bytes(b"no picture")
    found = verify(load(root), "all", root, quiet=True)
    assert not found.ok and found.missing == ["data/crop/7-4/two plums on a wooden table.jpg"]
    assert [line.partition(":")[0] for line in found.broken] == ["data/origin/two plums on a wooden table.jpg"]
