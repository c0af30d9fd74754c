"""UCF-101: folders, lists with CR LF, the class spelt two ways, prompts."""

import hashlib
from pathlib import Path

import pytest

from dcbench.catalogue import find_dataset, load_entry_point
from dcbench.datasets.base import find_root
from dcbench.datasets.ucf101 import SENTENCES, UCF101, class_prompt, tfds_order
from dcbench.errors import UserError
from dcbench.protocol import find_protocol, ordered
from dcbench.video import VideoError


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    touch(
        tmp_path / "UCF-101",
        "PlayingGuitar/v_PlayingGuitar_g01_c01.avi",
        "PlayingGuitar/v_PlayingGuitar_g08_c02.avi",
        "HandstandPushups/v_HandStandPushups_g01_c01.avi",
        "YoYo/v_YoYo_g25_c10.avi",
        "YoYo/notes.avi",
        "YoYo/._v_YoYo_g25_c10.avi",
    )
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes(b"1 HandstandPushups\r\n2 PlayingGuitar\r\n3 YoYo\r\n")
    (lists / "testlist01.txt").write_bytes(
        b"PlayingGuitar/v_PlayingGuitar_g01_c01.avi\r\nHandstandPushups/v_HandStandPushups_g01_c01.avi\r\n\r\n"
    )
    (lists / "trainlist01.txt").write_bytes(
        b"PlayingGuitar/v_PlayingGuitar_g08_c02.avi 2\nYoYo/v_YoYo_g25_c10.avi 3\nYoYo/v_YoYo_g09_c01.avi 3\n"
    )
    return tmp_path


def test_items_of_a_split_with_crlf_lists(root):
    items = UCF101(root).items("test01")
    assert [item.id for item in items] == ["v_HandStandPushups_g01_c01", "v_PlayingGuitar_g01_c01"]
    guitar = items[1]
    assert guitar.path == "PlayingGuitar/v_PlayingGuitar_g01_c01.avi"
    assert (guitar.label, guitar.group, guitar.split) == ("PlayingGuitar", "PlayingGuitar_g01", "test01")
    assert guitar.captions == ("playing guitar",)
    assert items[0].label == "HandstandPushups" and items[0].captions == ("handstand pushups",)


@pytest.mark.parametrize("folder", ["HandstandPushups", "HandStandPushups"])
@pytest.mark.parametrize("stem", ["v_HandstandPushups_g01_c01", "v_HandStandPushups_g01_c01"])
def test_handstand_case_trap(root, folder, stem):
    """However a copy spells it, the file is found and the id and class are the official ones."""
    for path in (root / "UCF-101" / "HandstandPushups").iterdir():
        path.unlink()
    (root / "UCF-101" / "HandstandPushups").rmdir()
    touch(root / "UCF-101", f"{folder}/{stem}.avi")
    for split in ("test01", "all"):
        item = UCF101(root).items(split)[0]
        assert (item.id, item.label) == ("v_HandStandPushups_g01_c01", "HandstandPushups")
        assert item.video.path.is_file()  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["UCF-101", "UCF-101/train", "train", "test"])
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_copies_in_other_formats_and_folders_have_the_same_items(root, tmp_path, place, suffix):
    official = {split: UCF101(root).items(split) for split in ("test01", "train01", "all")}
    (root / "UCF-101").rename(root / "old")
    for path in sorted((root / "old").glob("*/v_*.avi")):
        touch(root / place, f"{path.parent.name}/{path.stem}{suffix}")
    for path in sorted((root / "old").rglob("*.avi")):
        path.unlink()
    copy = UCF101(root)
    for split, items in official.items():
        found = copy.items(split)
        assert [(item.id, item.label, item.group) for item in found] == [(i.id, i.label, i.group) for i in items]
        there = [item.id for item in found if item.video.path.suffix == suffix]  # type: ignore[attr-defined]
        assert there == [item.id for item in found if item.id != "v_YoYo_g09_c01"]


def test_of_two_formats_the_official_one_is_read(root):
    touch(root / "UCF-101", "PlayingGuitar/v_PlayingGuitar_g01_c01.mp4", "PlayingGuitar/v_PlayingGuitar_g02_c01.mp4")
    paths = [item.path for item in UCF101(root).items("all") if item.label == "PlayingGuitar"]
    assert [path.split("_", 2)[2] for path in paths] == ["g01_c01.avi", "g02_c01.mp4", "g08_c02.avi"]


def test_listed_but_missing_video_is_kept_and_fails_when_read(root):
    items = {item.id: item for item in UCF101(root).items("train01")}
    assert len(items) == 3
    with pytest.raises(VideoError, match=r"v_YoYo_g09_c01.avi: No such file"):
        items["v_YoYo_g09_c01"].video.info()


def test_all_takes_every_video_and_no_stray_file(root):
    assert len(UCF101(root).items("all")) == 4


def test_lists_may_be_absent_for_all_but_not_for_a_split(root):
    for path in (root / "ucfTrainTestlist").iterdir():
        path.unlink()
    assert {item.label for item in UCF101(root).items("all")} == {"HandstandPushups", "PlayingGuitar", "YoYo"}
    with pytest.raises(UserError, match=r"test01 needs testlist01\.txt.*UCF101TrainTestSplits"):
        UCF101(root).items("test01")


def test_root_may_be_the_video_folder_itself(root):
    (root / "ucfTrainTestlist").rename(root / "UCF-101" / "ucfTrainTestlist")
    assert len(UCF101(root / "UCF-101").items("test01")) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../../etc/passwd", "no path of the form"),
        ("/etc/v_YoYo_g01_c01.avi", "no path of the form"),
        ("YoYo/clip.avi", "is no UCF-101 video"),
        ("", "is empty"),
    ],
)
def test_bad_lists_are_named(root, line, message):
    (root / "ucfTrainTestlist" / "testlist01.txt").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        UCF101(root).items("test01")


def test_prompts(root, tmp_path):
    assert class_prompt("HandstandPushups") == "handstand pushups"
    assert [class_prompt(c) for c in ("YoYo", "TaiChi", "Archery")] == ["yo yo", "tai chi", "archery"]
    by_id = {item.label: item.captions[0] for item in UCF101(root, "sentence").items("all")}
    assert by_id["PlayingGuitar"] == "a musician playing the guitar"
    own = tmp_path / "own.tsv"
    own.write_text("class\tprompt\nPlayingGuitar\tone\nHandStandPushups\ttwo\nYoYo\tthree\n")
    assert UCF101(root, str(own)).items("test01")[0].captions == ("two",)
    own.write_text("PlayingGuitar\tone\nYoYo\tthree\n")
    with pytest.raises(UserError, match="no sentence for 1 classes, for example HandstandPushups"):
        UCF101(root, str(own))
    own.write_text("PlayingGuitar one\n")
    with pytest.raises(UserError, match="line 1"):
        UCF101(root, str(own))
    with pytest.raises(UserError, match='Did you mean "sentence"'):
        UCF101(root, "sentences")


def test_shipped_sentences_cover_the_101_classes():
    rows = [line.split("\t") for line in SENTENCES.read_text().splitlines()[1:]]
    assert len({label for label, _ in rows}) == 101 and all(sentence.strip() for _, sentence in rows)


def test_unknown_split_gets_a_near_match(root):
    with pytest.raises(UserError, match='Did you mean "test01"'):
        UCF101(root).items("test1")


def test_folder_without_videos_says_what_is_expected(tmp_path):
    card = find_dataset("ucf101")
    with pytest.raises(UserError, match=r"no video v_<Class>_gXX_cYY.avi below .*(.|\n)*ucfTrainTestlist/classInd.txt"):
        load_entry_point(card)(card, tmp_path, card.options)


def test_missing_data_says_where_to_get_it(tmp_path, monkeypatch):
    card = find_dataset("ucf101")
    monkeypatch.delenv("DCBENCH_DATA", raising=False)
    with pytest.raises(UserError) as caught:
        find_root(card, None)
    for part in ("crcv.ucf.edu", "6.5 GB", "--data DIR", "DCBENCH_DATA/ucf101", "classInd.txt"):
        assert part in str(caught.value)
    monkeypatch.setenv("DCBENCH_DATA", str(tmp_path))
    (tmp_path / "ucf101").mkdir()
    assert find_root(card, None) == tmp_path / "ucf101"
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_root(card, tmp_path / "nowhere")


def test_trap_01_a_choice_is_not_the_first_in_sorted_order(tmp_path):
    """A limited choice covers the classes, not the first of them, and does not depend on what else lies there."""
    names = [f"C{c:02d}/v_C{c:02d}_g{g:02d}_c01.avi" for c in range(40) for g in range(1, 6)]
    touch(tmp_path / "UCF-101", *names)
    items = UCF101(tmp_path).items("all")
    protocol = find_protocol("consisti2v").resolved("ucf101")
    chosen = ordered(items, protocol)[:40]
    assert len({item.label for item in chosen}) == 40
    random = ordered(items, find_protocol("dynamicrafter-paper"))
    assert len({item.label for item in random[:20]}) > 10
    touch(tmp_path / "UCF-101", "C99/v_C99_g01_c01.avi")
    again = [item.id for item in ordered(UCF101(tmp_path).items("all"), find_protocol("dynamicrafter-paper"))]
    assert [name for name in again if "C99" not in name] == [item.id for item in random]


@pytest.mark.parametrize(
    ("videos", "files", "digest", "first", "later"),
    [
        (3783, 16, "e39becf1568ed705", "v_Class060_g04_c01", "v_Class033_g04_c02"),
        (3783, 32, "1acfda0e7b6017ca", "v_Class060_g04_c01", "v_Class006_g06_c03"),
        (700, 32, "ef441b9f5a57821d", "v_Class013_g01_c02", "v_Class013_g07_c03"),
        (1536, 32, "99aeaf38c9633651", "v_Class030_g02_c05", "v_Class018_g02_c04"),
        (150, 20, "65add89c2b97cb3d", "v_Class003_g04_c04", "v_Class001_g01_c06"),
    ],
)
def test_the_order_of_tensorflow_datasets(videos, files, digest, first, later):
    """Recorded from tensorflow-datasets 4.9.10: a split `test` with these keys, written to so many files and read."""
    ids = [f"v_Class{k // 38:03d}_g{k % 38 // 6 + 1:02d}_c{k % 6 + 1:02d}" for k in range(videos)]
    order = tfds_order(ids[::-1], "test", files)
    assert (order[0], order[16]) == (first, later)
    assert hashlib.sha256("\n".join(order).encode()).hexdigest()[:16] == digest


def test_videos_of_the_first_test_split_have_a_place_in_that_order(root):
    places = {item.id: item.place for item in UCF101(root).items("test01")}
    # md5 of "testv_HandstandPushups_g01_c01.avi", as the package spells it: 46ea...; of the other one: c97a...
    assert places == {"v_HandStandPushups_g01_c01": 0, "v_PlayingGuitar_g01_c01": 1}
    assert {item.place for item in UCF101(root).items("all")} == {None}
