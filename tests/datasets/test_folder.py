"""Any folder of videos, and WebVid's lists."""

import json
from pathlib import Path

import pytest

from dcbench.catalogue import find_dataset, load_entry_point
from dcbench.datasets.folder import Folder, make_ids
from dcbench.datasets.text import read_lines
from dcbench.datasets.webvid import WebVid
from dcbench.errors import UserError
from dcbench.record import check_clip_id


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_every_video_however_deep_sorted_by_id(tmp_path):
    touch(tmp_path, "b.MP4", "a/x.webm", "a/b/y.avi", "notes.txt", ".hidden.mp4", ".cache/z.mp4")
    items = Folder(tmp_path).items("all")
    assert [(item.id, item.path) for item in items] == [("a__b__y", "a/b/y.avi"), ("a__x", "a/x.webm"), ("b", "b.MP4")]


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    touch(tmp_path, "elsewhere/b.mp4", "root/a.mp4")
    (tmp_path / "root" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    assert [item.path for item in Folder(tmp_path / "root").items("all")] == ["a.mp4", "more/b.mp4"]


def test_ids_are_unique_safe_and_do_not_depend_on_the_order():
    paths = ["a/b.mp4", "a__b.mp4", "c.mp4", "c.webm", "D.mp4", "d.mp4", 'we"ird?.mp4', "x" * 200 + ".mp4", "..odd.mp4"]
    ids = make_ids(paths)
    assert len({name.lower() for name in ids.values()}) == len(paths)
    for name in ids.values():
        check_clip_id(name)
    assert make_ids(paths[::-1]) == ids
    assert make_ids(["c.mp4", "é ü.mp4"]) == {"c.mp4": "c", "é ü.mp4": "é ü"}


def test_subfolders_are_splits(tmp_path):
    touch(tmp_path, "train/a.mp4", "test/b.mp4")
    folder = Folder(tmp_path)
    assert [item.path for item in folder.items("test")] == ["test/b.mp4"]
    assert len(folder.items("val")) == len(folder.items("all")) == 2
    with pytest.raises(UserError, match='Did you mean "test"'):
        folder.items("tset")


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "own.tsv"])
def test_captions(tmp_path, name):
    touch(tmp_path, "a/x.mp4", "b.mp4", "c.mp4")
    rows = [("a/x.mp4", "first, of x"), ("b", "by stem"), ("./a/x.mp4", "second of x"), ("../gone.mp4", "elsewhere")]
    if name.endswith("jsonl"):
        text = "".join(json.dumps({"file": file, "caption": caption}) + "\n" for file, caption in rows)
        text += json.dumps({"file": "c.mp4", "caption": ["one", "two"]}) + "\n"
    else:
        separator = "\t" if name.endswith("tsv") else ","
        text = f"file{separator}caption\n" + "".join(f'{file}{separator}"{caption}"\n' for file, caption in rows)
    (tmp_path / name).write_text(text)
    items = {item.id: item.captions for item in Folder(tmp_path, name if name == "own.tsv" else "").items("all")}
    assert items["a__x"] == ("first, of x", "second of x") and items["b"] == ("by stem",)
    assert items["c"] == (("one", "two") if name.endswith("jsonl") else ())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.csv", "name,text\na.mp4,x\n", "has the columns name, text; expected file, caption"),
        ("captions.csv", "file,caption\nother.mp4,x\n", "none of its 1 rows names a video"),
        ("captions.jsonl", '{"file": "a.mp4"}\n', "line 1: expected"),
        ("captions.jsonl", "nonsense\n", "line 1: expected"),
        (
            "captions.csv",
            'file,caption\n\nb.mp4,"two, quoted"\na.mp4,a dog, running fast\n',
            r'line 4: 3 fields, but the table has the 2 columns file, caption\. .* in quotes, for example "a dog, ..."',
        ),
        ("groups.csv", "file,group\na.mp4,one,two\n", "groups.csv, line 2: 3 fields, but the table has the 2 columns"),
    ],
)
def test_bad_captions_are_named(tmp_path, name, text, message):
    touch(tmp_path, "a.mp4")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        Folder(tmp_path)


LINE_ENDS = "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1d \x1e"


def test_what_unicode_calls_a_line_end_is_text(tmp_path):
    """JSON allows them within a string. Line ends are LF and CR LF, in every list that is read."""
    touch(tmp_path, "a.mp4", "b.mp4")
    rows = [{"file": "a.mp4", "caption": "a dog\u2028runs\u2029over\x85a fence"}, {"file": "b", "caption": "a cat"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "captions.jsonl").write_text(text, encoding="utf-8", newline="")
    assert [item.captions for item in Folder(tmp_path).items("all")] == [(rows[0]["caption"],), ("a cat",)]
    lines = tmp_path / "lines.txt"
    lines.write_text(f"one{LINE_ENDS}\r\n\r\ntwo\n three", encoding="utf-8-sig", newline="")
    assert read_lines(lines) == [f"one{LINE_ENDS}", "", "two", " three"]
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "captions.csv").write_text(f"file,caption\na,one{LINE_ENDS}two\n", encoding="utf-8", newline="")
    assert Folder(tmp_path).items("all")[0].captions == (f"one{LINE_ENDS}two",)


def test_captions_in_another_encoding(tmp_path):
    touch(tmp_path, "a.mp4")
    (tmp_path / "captions.csv").write_bytes("file,caption\na.mp4,größer\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"captions\.csv is not UTF-8 text \(byte 0xf6\); save it as UTF-8"):
        Folder(tmp_path)
    (tmp_path / "captions.csv").write_text("file,caption\r\na.mp4,größer\r\n", encoding="utf-8-sig", newline="")
    assert Folder(tmp_path).items("all")[0].captions == ("größer",)


def test_empty_folder_and_missing_caption_file(tmp_path):
    card = find_dataset("folder")
    with pytest.raises(UserError, match=r"holds no video; looked for \.mp4"):
        load_entry_point(card)(card, tmp_path, card.options)
    touch(tmp_path, "a.mp4")
    with pytest.raises(UserError, match=r"'gone.csv' is no file"):
        load_entry_point(card)(card, tmp_path, {"captions": "gone.csv"})


# --- WebVid -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def webvid(tmp_path: Path) -> Path:
    (tmp_path / "results_2M_val.csv").write_text(
        'videoid,contentUrl,duration,page_dir,name\n21,http://x,PT00H00M05S,000001_000050,"A cat,  asleep"\n'
    )
    (tmp_path / "results_2M_train.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name,dynamic_confidence,dynamic_wording,dynamic_source_category\n"
        "9,u,d,000001_000050,A man walks on a beach,88,man walks,human\n"
        "10,u,d,000001_000050,Still life,10,,still\n"
    )
    return tmp_path


def test_webvid_lists(webvid):
    (item,) = WebVid(webvid).items("val")
    assert (item.id, item.captions, item.path) == ("21", ("A cat, asleep",), "videos/000001_000050/21.mp4")
    assert [item.id for item in WebVid(webvid).items("train")] == ["10", "9"]
    (moving,) = WebVid(webvid, min_dynamic_confidence=50, prompt="dynamic_wording").items("train")
    assert (moving.id, moving.captions, moving.label) == ("9", ("man walks",), "human")
    card = find_dataset("webvid")
    assert list(load_entry_point(card)(card, webvid, card.options).items("val")) == [item]


def test_webvid_reads_a_video_from_its_place_in_the_list(tmp_path):
    """Byte-order mark, umlauts, line ends within a caption, empty lines; of two rows of a video the later counts."""
    first = b'\xef\xbb\xbfvideoid,page_dir,name\r\n3,a,"F\xc3\xbcnf \n ""Katzen"""\r\n\r\n1,a,one\r\n2,b\r\n'
    (tmp_path / "one_train.csv").write_bytes(first)
    (tmp_path / "two_train.csv").write_bytes(b"name,page_dir,videoid\nanew,c,1\nten,c,10\nlast,c,4")
    items = WebVid(tmp_path).items("train")
    assert [(item.id, item.captions, item.path) for item in items] == [
        ("1", ("anew",), "videos/c/1.mp4"),
        ("10", ("ten",), "videos/c/10.mp4"),
        ("2", (), "videos/b/2.mp4"),
        ("3", ('F\xfcnf "Katzen"',), "videos/a/3.mp4"),
        ("4", ("last",), "videos/c/4.mp4"),
    ]
    assert [item.id for item in items[1:3]] == ["10", "2"] and items[-1].id == "4" and len(items[:0]) == 0
    with pytest.raises(IndexError):
        items[5]
    (tmp_path / "two_train.csv").write_bytes(b"name,page_dir,videoid\n\xff,c,1\n")
    with pytest.raises(UserError, match=r"two_train.csv is not UTF-8 text"):
        WebVid(tmp_path).items("train")


def test_webvid_leaves_out_what_a_list_names(webvid):
    """By id or by path; names of other splits do no harm."""
    for line, left in (("9", ["10"]), ("videos/000001_000050/10.mp4", ["9"]), ("21\r\n\n9 ", ["10"])):
        (webvid / "bad.txt").write_text(f"{line}\n", newline="")
        assert [item.id for item in WebVid(webvid, exclude="bad.txt").items("train")] == left
    (webvid / "bad.txt").write_text("9\n10\n")
    with pytest.raises(UserError, match="no video of split train is left; exclude leaves videos out"):
        WebVid(webvid, exclude=str(webvid / "bad.txt")).items("train")
    with pytest.raises(UserError, match=r"exclude = 'worse.txt' is no file"):
        WebVid(webvid, exclude="worse.txt")


def test_webvid_s_captions_are_not_cut_at_a_comma(webvid):
    list_of = webvid / "results_2M_val.csv"
    list_of.write_text("videoid,page_dir,name\n1,a,whole,,\n2,a,a dog, running\n")
    with pytest.raises(UserError, match=r"results_2M_val\.csv, line 3: 4 fields, but the table has the 3 columns"):
        WebVid(webvid).items("val")
    list_of.write_text("videoid,page_dir,name\n1,a,whole,,\n")
    assert WebVid(webvid).items("val")[0].captions == ("whole",)


def test_webvid_errors(webvid, tmp_path):
    with pytest.raises(UserError, match="no column dynamic_confidence"):
        WebVid(webvid, min_dynamic_confidence=50).items("val")
    with pytest.raises(UserError, match="prompt = 'wording', expected"):
        WebVid(webvid, prompt="wording")
    with pytest.raises(UserError, match="no video of split train is left; min_dynamic_confidence is 99"):
        WebVid(webvid, min_dynamic_confidence=99).items("train")
    (webvid / "results_2M_val.csv").write_text("videoid,page_dir,name\n1,../../etc,x\n")
    with pytest.raises(UserError, match=r"line 2: .* is no plain name"):
        WebVid(webvid).items("val")
    (webvid / "results_2M_val.csv").unlink()
    with pytest.raises(UserError, match=r"no CSV file for split val .* results_2M_val.csv"):
        WebVid(webvid).items("val")
