import errno
import json
import os

import pytest

from dcbench.errors import UserError
from dcbench.files import MODE, canonical, read_jsonl, write_text
from dcbench.record import Case, check_clip_id, read_manifest, read_record, write_manifest

ITEM = Case(id="a", video="a.avi", frames=[0, 3], fps=8.0, frame_stride=3, prompt="λ", caption_index=0, seed=1)


def test_a_manifest_survives_a_round_trip_to_the_byte(tmp_path):
    path = tmp_path / "manifest.jsonl"
    write_manifest(path, [ITEM])
    first = path.read_bytes()
    write_manifest(path, read_manifest(path))
    assert path.read_bytes() == first


def test_a_clip_apart_survives_too_and_older_lines_keep_their_bytes(tmp_path):
    path = tmp_path / "manifest.jsonl"
    both = ITEM.model_copy(update={"apart": ITEM.model_copy(update={"id": "b", "condition_frame": 1})})
    write_manifest(path, [both])
    assert read_manifest(path) == [both]
    write_manifest(path, [ITEM])
    assert path.read_text() == (
        '{"caption_index":0,"condition_frame":0,"fps":8.0,"frame_stride":3,"frames":[0,3],"group":null,"id":"a",'
        '"label":null,"prompt":"λ","seed":1,"video":"a.avi"}\n'
    )
    for wrong, message in (("a", "appears twice"), ("a/b", "cannot be a file name")):
        write_manifest(path, [ITEM.model_copy(update={"apart": ITEM.model_copy(update={"id": wrong})})])
        with pytest.raises(UserError, match=message):
            read_manifest(path)
    path.write_text(canonical(ITEM.model_dump() | {"apart": ITEM.model_dump() | {"frame": 1}}) + "\n")
    with pytest.raises(UserError, match='Did you mean "frames"'):
        read_manifest(path)


@pytest.mark.parametrize("bad", ["", "a/b", "..", ".hidden", "a\\b", "a\0b", "x" * 200, "a\nb"])
def test_a_clip_id_cannot_leave_its_folder(bad):
    with pytest.raises(UserError, match="cannot be a file name"):
        check_clip_id(bad)


def test_a_bad_manifest_names_the_line(tmp_path):
    path = tmp_path / "manifest.jsonl"
    path.write_text(canonical(ITEM.model_dump()) + "\n{broken\n")
    with pytest.raises(UserError, match="line 2"):
        read_manifest(path)
    path.write_text((canonical(ITEM.model_dump()) + "\n") * 2)
    with pytest.raises(UserError, match="appears twice"):
        read_manifest(path)
    path.write_text("")
    with pytest.raises(UserError, match="lists no clips"):
        read_manifest(path)
    path.write_text(canonical(ITEM.model_dump() | {"frame": 1}) + "\n")
    with pytest.raises(UserError, match='Did you mean "frames"'):
        read_manifest(path)


def test_lines_that_a_crash_damaged_are_left_out_only_where_that_is_allowed(tmp_path):
    path = tmp_path / "samples.jsonl"
    for damaged in (b'{"id":', b'{"id":"\xe6\xbc', b"\x00\x00", b'{"id":NaN}', b"[" * 5000, b"1" * 5000):
        path.write_bytes(b'{"id":"a"}\n' + damaged)
        assert read_jsonl(path, torn=True) == [{"id": "a"}]
        with pytest.raises(UserError, match="line 2: not a JSON object"):
            read_jsonl(path)


def test_a_record_of_another_version_is_refused(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        read_record(tmp_path)
    with pytest.raises(UserError, match="not finished"):
        read_record(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_files_have_the_modes_of_the_umask_and_writing_never_changes_it(tmp_path, monkeypatch):
    """The umask belongs to the whole process: changing it for a moment gives other threads' files other modes."""

    def changed(mask: int) -> int:
        raise AssertionError("the umask was changed")

    monkeypatch.setattr(os, "umask", changed)
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == MODE
