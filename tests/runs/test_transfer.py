"""`dcbench push` and `dcbench pull`: only what differs is copied, and an interrupted push is not whole.

What comes from a stranger is checked, and leads nowhere else.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from small_runs import kept, plan
from test_storage import QUIET, command, make

from dcbench.errors import UserError
from dcbench.record import read_record
from dcbench.runs import storage, transfer
from dcbench.runs.sampling import sample
from dcbench.runs.scoring import score
from dcbench.runs.transfer import pull, push

URL = "memory://bucket/run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "run").directory.path


@pytest.fixture
def run(whole, tmp_path) -> Path:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "report").mkdir()
    (out / "report" / "index.html").write_text("<script></script>")
    (out / "work").mkdir()
    (out / "work" / "a.png").write_bytes(b"1")
    (out / "notes.txt").write_text("mine")
    (out / "clips" / ".a.mkv-abcdef-1-xxxxxxxx.mkv").write_bytes(b"123")
    return out


@pytest.fixture(autouse=True)
def empty_memory():
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def copied(monkeypatch) -> list[str]:
    """The names of the files that were put at a URL."""
    names: list[str] = []
    put = transfer._Place.put

    def noted(self, file, name):
        put(self, file, name)
        names.append(name)

    monkeypatch.setattr(transfer._Place, "put", noted)
    return names


def files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and ".members" not in file.parts
    }


def remote(url: str) -> dict[str, bytes]:
    place, root = fsspec.core.url_to_fs(url)
    return {name.removeprefix(root).lstrip("/"): place.cat_file(name) for name in place.find(root)}


@pytest.mark.parametrize("kind", ["memory", "file", "folder"])
def test_a_run_comes_back_as_it_was(kind, run, whole, tmp_path, copied):
    url = {"memory": URL, "file": f"file://{tmp_path}/there/run", "folder": f"{tmp_path}/there/run"}[kind]
    moved = push(run, url, quiet=True)
    assert set(copied) == set(files(whole)) and moved.files == len(copied)
    assert set(remote(url)) == {*files(whole), "index.json"}
    assert pull(url, tmp_path / "back", quiet=True).files == moved.files
    assert files(tmp_path / "back") == files(whole)
    assert read_record(tmp_path / "back") == read_record(whole)
    copied.clear()
    assert push(run, url, quiet=True) == transfer.Moved(0, 0, moved.files)
    assert pull(url, tmp_path / "back", quiet=True) == transfer.Moved(0, 0, moved.files)
    assert copied == []


def test_only_what_differs_is_copied(run, copied):
    push(run, URL, quiet=True)
    copied.clear()
    again = plan(run)
    score(again, QUIET, ["camera_motion_flow"])
    push(run, URL, quiet=True)
    assert set(copied) == {"record.json", "per_clip.jsonl", "cost.json", "log.txt"}
    first = next(name for name in remote(URL) if name.startswith("clips/"))
    MemoryFileSystem.store.pop(f"/bucket/run/{first}")  # somebody removed it there
    copied.clear()
    push(run, URL, quiet=True)
    assert copied == [first]


def test_an_interrupted_push_is_not_whole_and_goes_on(run, whole, tmp_path, copied, monkeypatch):
    put = transfer._Place.put

    def breaks(self, file, name):
        if name == "samples.jsonl":  # the last one, so that the index has plan.json
            raise UserError("the network is gone")
        put(self, file, name)

    monkeypatch.setattr(transfer, "WORKERS", 1)
    monkeypatch.setattr(transfer._Place, "put", breaks)
    with pytest.raises(UserError, match="the network is gone"):
        push(run, URL, quiet=True)
    there = list(copied)
    assert len(there) == 11 and "plan.json" in json.loads(remote(URL)["index.json"])["files"]
    with pytest.raises(UserError, match="a push to it was not finished"):
        pull(URL, tmp_path / "back", quiet=True)
    assert not (tmp_path / "back").exists()
    copied.clear()
    monkeypatch.setattr(transfer._Place, "put", put)
    push(run, URL, quiet=True)
    assert set(copied) == set(files(whole)) - set(there)
    pull(URL, tmp_path / "back", quiet=True)
    assert files(tmp_path / "back") == files(whole)


def test_a_push_that_was_killed_is_not_whole(run, whole, tmp_path):
    """No code runs after the kill, so the index is the one that was written before the first file."""
    program = (
        "import os, sys; from pathlib import Path; from dcbench.runs import transfer\n"
        "transfer.WORKERS, put = 1, transfer._Place.put\n"
        "def killed(self, file, name):\n"
        "    if name == 'plan.json': os._exit(9)\n"
        "    put(self, file, name)\n"
        "transfer._Place.put = killed\n"
        "transfer.push(Path(sys.argv[1]), sys.argv[2], quiet=True)\n"
    )
    url = str(tmp_path / "there")
    assert subprocess.run([sys.executable, "-c", program, str(run), url]).returncode == 9
    assert len(remote(url)) > 4
    with pytest.raises(UserError, match="a push to it was not finished"):
        pull(url, tmp_path / "back", quiet=True)
    push(run, url, quiet=True)
    pull(url, tmp_path / "back", quiet=True)
    assert files(tmp_path / "back") == files(whole)


def test_an_index_that_was_cut_off_is_written_again(run, whole, tmp_path, copied):
    push(run, URL, quiet=True)
    fsspec.filesystem("memory").pipe_file("/bucket/run/index.json", remote(URL)["index.json"][:100])
    with pytest.raises(UserError, match="is not the index of a push"):
        pull(URL, tmp_path / "back", quiet=True)
    copied.clear()
    push(run, URL, quiet=True)
    assert set(copied) == set(files(whole))
    pull(URL, tmp_path / "back", quiet=True)


def test_a_pull_goes_on_and_the_directory_is_a_run_only_in_the_end(run, whole, tmp_path, monkeypatch):
    push(run, URL, quiet=True)
    get, back, got = transfer._Place.get, tmp_path / "back", []

    def breaks(self, name, entry, to):
        if len(got) == 5:
            raise UserError("the network is gone")
        get(self, name, entry, to)
        got.append(name)

    monkeypatch.setattr(transfer, "WORKERS", 1)
    monkeypatch.setattr(transfer._Place, "get", breaks)
    with pytest.raises(UserError, match="the network is gone"):
        pull(URL, back, quiet=True)
    assert not (back / "plan.json").exists()
    monkeypatch.setattr(transfer._Place, "get", get)
    assert pull(URL, back, quiet=True).equal == 5
    assert files(back) == files(whole)


def test_clips_that_were_removed_here_stay_there_and_come_back(run, whole, copied):
    push(run, URL, quiet=True)
    storage.clean(run, "record")
    copied.clear()
    push(run, URL, quiet=True)
    assert copied == ["log.txt"]
    with pytest.raises(UserError, match="cannot be scored"):
        score(plan(run), QUIET, ["motion"])
    assert pull(URL, run, quiet=True).files == 4
    assert kept(run) == kept(whole)
    score(plan(run), QUIET, ["motion"])
    assert kept(run) == kept(whole)


def test_an_unfinished_run_goes_on_elsewhere(whole, tmp_path):
    begun = plan(tmp_path / "begun")
    sample(begun, QUIET)
    push(begun.directory.path, URL, quiet=True)
    pull(URL, tmp_path / "elsewhere", quiet=True)
    score(plan(tmp_path / "elsewhere"), QUIET, ["motion"])
    assert kept(tmp_path / "elsewhere") == kept(whole)


@pytest.mark.parametrize("file", ["record.json", "clips"])
def test_a_tampered_file_is_named_and_not_kept(file, run, tmp_path):
    push(run, URL, quiet=True)
    name = min(name for name in remote(URL) if name.startswith(file))
    stored = MemoryFileSystem.store[f"/bucket/run/{name}"]
    data = stored.getvalue()
    for other in (data[:-1] + bytes([data[-1] ^ 1]), data[:-5], data + b"x" * 10_000_000):
        fsspec.filesystem("memory").pipe_file(f"/bucket/run/{name}", other)
        back = tmp_path / f"back-{len(other)}-{other[-1]}"
        with pytest.raises(UserError, match=rf"{name} is not what index.json says"):
            pull(URL, back, quiet=True)
        assert not (back / name).exists() and not (back / "plan.json").exists()
        assert not list(back.rglob(".*.json*-*"))


HOSTILE = [
    "/etc/passwd", "../plan.json", "clips/../../x.mkv", "clips/..mkv", "clips//x.mkv", "clips/a/b.mkv", "clips\\x.mkv",
    "./plan.json", "plan.json/", "Plan.json", "report/index.html", "evil.py", "clips/x.py", ".bashrc", ".members/a",
    "clips/.x.mkv", "plan.json\n", "clips/x\x00.mkv", "C:\\x", "~/x", "index.json", "", "samples-../x.jsonl",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_no_run_has_is_refused_before_anything_is_written(name, run, tmp_path):
    assert not transfer.is_name(name)
    push(run, URL, quiet=True)
    index = json.loads(remote(URL)["index.json"])
    index["files"][name] = index["files"]["plan.json"]
    fsspec.filesystem("memory").pipe_file("/bucket/run/index.json", json.dumps(index).encode())
    with pytest.raises(UserError, match="is no file of a run"):
        pull(URL, tmp_path / "back", quiet=True)
    assert not (tmp_path / "back").exists()


INDICES = {
    "no JSON": b"{",
    "a list": b"[]",
    "another version": b'{"schema_version": 2, "whole": true, "files": {}}',
    "a size below 0": b'{"whole": true, "files": {"plan.json": {"size": -1, "sha256": "%s"}}}' % (b"0" * 64),
    "no hash": b'{"whole": true, "files": {"plan.json": {"size": 1, "sha256": "x"}}}',
    "no plan": b'{"whole": true, "files": {}}',
    "deep": b"[" * 100_000,
    "more than the disk": b'{"whole": true, "files": {"plan.json": {"size": 1%s, "sha256": "%s"}}}'
    % (b"0" * 17, b"0" * 64),
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_that_is_none(kind, tmp_path):
    fsspec.filesystem("memory").pipe_file("/bucket/run/index.json", INDICES[kind])
    with pytest.raises(UserError):
        pull(URL, tmp_path / "back", quiet=True)
    assert not files(tmp_path / "back")


def test_nothing_is_written_through_a_link_and_no_link_is_followed(run, tmp_path):
    push(run, URL, quiet=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "clips").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link"):
        pull(URL, tmp_path / "back", quiet=True)
    assert not list(elsewhere.iterdir())
    (tmp_path / "secret").write_text("secret")
    (run / "log.txt").unlink()
    (run / "log.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link"):
        push(run, "memory://other", quiet=True)
    assert remote("memory://other") == {}


def test_what_holds_something_else_is_left_alone(run, whole, tmp_path):
    push(run, URL, quiet=True)
    other = make(tmp_path / "other", "still").directory.path
    with pytest.raises(UserError, match="holds another run"):
        push(other, URL, quiet=True)
    with pytest.raises(
        UserError, match=r"plan.json differs|record.json differs|jsonl differs|json differs|mkv differs"
    ):
        pull(URL, other, quiet=True)
    fsspec.filesystem("memory").pipe_file("/mine/a.txt", b"mine")
    with pytest.raises(UserError, match=r"holds other files \(a.txt ...\)"):
        push(run, "memory://mine", quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(a.txt ...\)"):
        pull(URL, tmp_path / "mine", quiet=True)
    with pytest.raises(UserError, match="holds no run"):
        pull("memory://nothing", tmp_path / "new", quiet=True)
    with pytest.raises(UserError, match="not a run directory"):
        push(tmp_path / "mine", "memory://new", quiet=True)


def test_clips_of_another_machine_are_not_forgotten(run, tmp_path):
    push(run, URL, quiet=True)
    rows = (run / "samples.jsonl").read_text().splitlines(keepends=True)
    (run / "samples.jsonl").write_text("".join(rows[1:]))
    for file in run.glob(f"clips/{json.loads(rows[0])['id']}.mkv"):
        file.unlink()
    with pytest.raises(UserError, match=r"which .* has not made"):
        push(run, URL, quiet=True)


def test_the_commands(run, tmp_path, monkeypatch, capsys):
    url = str(tmp_path / "there")
    code, said = command(monkeypatch, capsys, "push", run, url)
    assert code == 0 and "pushed 12 files" in said and "0 were there" in said, said
    code, said = command(monkeypatch, capsys, "pull", url, tmp_path / "back")
    assert code == 0 and "pulled 12 files" in said
    code, said = command(monkeypatch, capsys, "report", tmp_path / "back", "--out", tmp_path / "report")
    assert code == 0
    for wrong in ("nothing://bucket", "s3://bucket/run"):
        code, said = command(monkeypatch, capsys, "push", run, wrong)
        assert code == 2 and wrong in said and "Traceback" not in said, said
