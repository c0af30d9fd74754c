"""MSR-VTT: official and merged JSON, the 1k-A list, both folder layouts, missing files."""

import json
from pathlib import Path

import pytest

from dcbench.catalogue import find_dataset, load_entry_point
from dcbench.datasets.msrvtt import MSRVTT
from dcbench.errors import UserError
from dcbench.video import VideoError

NUMBERS = (0, 6512, 6513, 7009, 7010, 7011, 9999)


def annotate(file: Path, numbers, split: str = "test") -> None:
    videos = [{"video_id": f"video{n}", "id": n, "split": split, "category": 3, "url": f"u{n // 2}"} for n in numbers]
    sentences = [
        {"video_id": f"video{n}", "caption": f"caption  {i} of {n}\n", "sen_id": 20 * n + i}
        for n in reversed(numbers)
        for i in (2, 0, 1)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"info": {}, "videos": videos, "sentences": sentences}))


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def ids(root: Path, split: str) -> list[str]:
    return [item.id for item in MSRVTT(root).items(split)]


@pytest.fixture
def official(tmp_path: Path) -> Path:
    annotate(tmp_path / "test_videodatainfo.json", [n for n in NUMBERS if n >= 7010])
    annotate(tmp_path / "train_val_videodatainfo.json", [n for n in NUMBERS if n < 7010], "train")
    touch(tmp_path, *(f"{'TestVideo' if n >= 7010 else 'TrainValVideo'}/video{n}.mp4" for n in NUMBERS))
    return tmp_path


def test_official_files(official):
    assert ids(official, "test") == ["video7010", "video7011", "video9999"]
    assert ids(official, "train") == ["video0", "video6512"]
    assert ids(official, "val") == ["video6513", "video7009"]
    assert len(ids(official, "all")) == 7
    item = MSRVTT(official).items("test")[0]
    assert item.captions == ("caption 0 of 7010", "caption 1 of 7010", "caption 2 of 7010")
    assert (item.path, item.group) == ("TestVideo/video7010.mp4", "u3505")


@pytest.mark.parametrize("name", ["MSRVTT_data.json", "videodatainfo_2017.json", "annotation/MSRVTT_data.json"])
def test_merged_file_has_wrong_splits_the_range_decides(tmp_path, name):
    annotate(tmp_path / name, NUMBERS, split="train")
    touch(tmp_path, *(f"videos/all/video{n}.mp4" for n in NUMBERS))
    assert ids(tmp_path, "test") == ["video7010", "video7011", "video9999"]
    assert MSRVTT(tmp_path).items("test")[0].path == "videos/all/video7010.mp4"


@pytest.mark.parametrize("separator", [",", ";"])
@pytest.mark.parametrize("column", ["sentence", "sentences"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_1k_a_list_variants(tmp_path, separator, column, start):
    rows = [
        ["key", "vid_key", "video_id", column],
        ["ret0", "msr9770", "video9770", '"a person, connecting; something"'],
    ]
    text = start + "".join(separator.join(row) + "\r\n" for row in rows)
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text(text, encoding="utf-8")
    touch(tmp_path, "video9770.webm")
    (item,) = MSRVTT(tmp_path).items("1k-A")
    assert (item.id, item.captions) == ("video9770", ("a person, connecting; something",))
    assert item.path == "video9770.webm"
    with pytest.raises(UserError, match=r"split test .* needs test_videodatainfo\.json"):
        MSRVTT(tmp_path).items("test")


def test_missing_videos_are_kept_and_fail_when_read(official):
    (official / "TestVideo" / "video7011.mp4").unlink()
    items = MSRVTT(official).items("test")
    assert [item.path for item in items] == [f"TestVideo/video{n}.mp4" for n in (7010, 7011, 9999)]
    with pytest.raises(VideoError, match=r"video7011\.mp4: No such file"):
        items[1].video.info()
    with pytest.raises(VideoError, match=r"video7010\.mp4: the file is empty"):
        items[0].video.info()


def test_of_two_files_for_one_video_the_choice_is_fixed(official):
    touch(official, "a/video7010.webm", "b/video7010.mp4")
    assert MSRVTT(official).items("test")[0].path == "TestVideo/video7010.mp4"


def test_linked_folders_are_followed_and_loops_end(official, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk")
    (official / "TestVideo").rename(elsewhere / "TestVideo")
    (official / "videos").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(official)
    assert MSRVTT(official).items("test")[0].path == "videos/TestVideo/video7010.mp4"


def test_only_the_training_file_is_here(official):
    (official / "test_videodatainfo.json").unlink()
    assert ids(official, "train") == ["video0", "video6512"]
    with pytest.raises(UserError, match=r"needs test_videodatainfo\.json .* has train_val_videodatainfo\.json"):
        MSRVTT(official).items("test")
    with pytest.raises(UserError, match=r"1k-A needs MSRVTT_JSFUSION_test\.csv"):
        MSRVTT(official).items("1k-A")
    with pytest.raises(UserError, match="expected one of train, val, test, all, 1k-A"):
        MSRVTT(official).items("1ka")


def test_annotations_under_another_name(official, tmp_path):
    other = tmp_path / "elsewhere" / "mine.json"
    annotate(other, [7012])
    assert [item.id for item in MSRVTT(official, str(other)).items("test")] == ["video7012"]
    with pytest.raises(UserError, match=r"'nothing.json' is no file"):
        MSRVTT(official, "nothing.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "lists 'videos' and 'sentences'"),
        ('{"videos": ["video1"], "sentences": []}', "lists 'videos' and 'sentences'"),
        ('{"videos": [{"video_id": "../../x"}], "sentences": []}', "expected video0"),
    ],
)
def test_bad_annotations_are_named(official, content, message):
    (official / "test_videodatainfo.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        MSRVTT(official).items("test")
    assert "test_videodatainfo.json" in str(caught.value)


def test_bad_list_is_named(tmp_path):
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text("key,video\nret0,video1\n")
    touch(tmp_path, "video1.mp4")
    with pytest.raises(UserError, match="has the columns key, video; expected video_id and sentence"):
        MSRVTT(tmp_path).items("1k-A")


def test_a_sentence_is_not_cut_at_a_comma(tmp_path):
    touch(tmp_path, "video1.mp4")
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text("key,video_id,sentence\nret0,video1,a dog, running\n")
    with pytest.raises(UserError, match=r"JSFUSION_test\.csv, line 2: 4 fields, but the table has the 3 columns key"):
        MSRVTT(tmp_path).items("1k-A")


def test_nothing_here_says_what_is_expected(tmp_path):
    card = find_dataset("msrvtt")
    with pytest.raises(UserError, match=r"no annotations in .*(.|\n)*TestVideo/video7010.mp4"):
        load_entry_point(card)(card, tmp_path, card.options)
    annotate(tmp_path / "test_videodatainfo.json", [7010])
    with pytest.raises(UserError, match=r"no video0.mp4 ... below"):
        load_entry_point(card)(card, tmp_path, card.options)
