"""Where weights lie, who may change them, and what archives may hold."""

import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dcbench import trust, weights
from dcbench.catalogue import WeightSource, find_model, load_entry_point, with_overrides
from dcbench.errors import UserError
from dcbench.models.base import Runtime
from dcbench.models.baselines import diffusers
from dcbench.weights import fetch, find, unpack, weights_dir


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(tmp_path / "weights"))
    return weights_dir()


@pytest.mark.parametrize("name", ["../other/w.bin", "/etc/hostname", "~/w.bin", "a/../../w.bin", ""])
def test_a_card_cannot_name_a_file_outside_the_folder_of_weights(name: str, folder: Path, monkeypatch, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "w.bin").write_bytes(b"")
    for ask in (find, fetch):
        with pytest.raises(UserError, match=r"does not lie below .*weights.*--set options\.checkpoint=PATH"):
            ask(WeightSource(name=name))
    monkeypatch.chdir(tmp_path / "other")
    assert find(WeightSource(name="w.bin")) is None  # nor does the folder where the command runs count


def test_a_file_elsewhere_is_given_on_the_command_line(tmp_path: Path):
    (tmp_path / "mine.ckpt").write_bytes(b"<html>")
    card = with_overrides(find_model("dynamicrafter"), [f"options.checkpoint={tmp_path}/mine.ckpt"])
    with pytest.raises(UserError, match=r"mine\.ckpt is a web page"):
        load_entry_point(card)(card, Runtime())


def test_a_file_is_trusted_at_its_first_use_and_a_change_is_refused_until_it_is_accepted(folder: Path):
    source, path = WeightSource(name="w.bin"), folder / "w.bin"
    path.write_bytes(b"first")
    assert fetch(source) == path == fetch(source)
    os.utime(path, (1, 1))  # touched, but the same
    assert fetch(source) == path
    path.write_bytes(b"other")
    with pytest.raises(UserError, match=r"was changed: .*Bring the first file back.*verify NAME --accept"):
        fetch(source)
    trust.write(folder, "w.bin", None)
    assert fetch(source) == path


def test_a_pinned_file_is_read_once_and_another_one_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = folder / "w.bin"
    path.write_bytes(b"first")
    source = WeightSource(name="w.bin", sha256=trust.sha256_file(path))
    assert fetch(source) == path
    with monkeypatch.context() as patch:
        patch.setattr(trust, "sha256_file", lambda path: pytest.fail("read again"))
        assert fetch(source) == path
    path.write_bytes(b"other")
    with pytest.raises(UserError, match="which its card pins"):
        fetch(source)


def test_a_repository_stays_at_the_commit_of_its_first_use(folder: Path, tmp_path: Path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    card, home = find_model("sparsectrl"), tmp_path / "hub" / "models--stabilityai--sd-vae-ft-mse"
    source = diffusers._part_source(card, "vae")
    (home / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (home / "snapshots" / commit).mkdir(parents=True)
        (home / "snapshots" / commit / "config.json").write_text("{}")
        (home / "refs" / "main").write_text(commit)  # the publisher moves it
        assert diffusers.fetch_repository(source, card, offline=True).name == "a" * 40
    trust.write(folder, source.name, None)
    assert diffusers.fetch_repository(source, card, offline=True).name == "b" * 40


def test_two_processes_fetch_a_file_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Two threads here: each opens the lock anew, as two processes do."""
    downloads = []

    def slowly(source: WeightSource, to: Path) -> Path:
        downloads.append(source.name)
        time.sleep(0.3)
        (to / "part").write_bytes(b"weights")
        return to / "part"

    monkeypatch.setattr(weights, "_download", slowly)
    source = WeightSource(name="w.bin", url="http://example.invalid/w")
    with ThreadPoolExecutor(2) as both:
        assert list(both.map(fetch, [source, source])) == [folder / "w.bin"] * 2
    assert downloads == ["w.bin"] and (folder / "w.bin").read_bytes() == b"weights"


def archive(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as zipped:
        for name, content in members:
            zipped.writestr(name, content)
    return path


def marked(path: Path, offset: int, value: int) -> Path:
    """The archive with one number of its directory changed: 8 is where flags are, 10 the method."""
    data = bytearray(path.read_bytes())
    for mark, start in ((b"PK\x01\x02", offset), (b"PK\x03\x04", offset - 2)):
        data[data.index(mark) + start] = value
    path.write_bytes(data)
    return path


def test_what_is_wrong_with_an_archive_is_said(tmp_path: Path):
    path, into = tmp_path / "a.zip", tmp_path / "into"
    with pytest.warns(UserWarning, match="Duplicate"):
        archive(path, ("w", b"1"), ("w", b"2"))
    large = [("w", bytes(200_000_000))]
    cases = [
        (path, "holds 'w' twice"),
        (archive(tmp_path / "b.zip", ("w", b"1"), ("w/x", b"2")), "below a file"),
        (archive(tmp_path / "c.zip", ("../w", b"1")), "leads out of its folder"),
        (archive(tmp_path / "d.zip", ("/w", b"1")), "leads out of its folder"),
        (archive(tmp_path / "e.zip", ("w" * 300, b"1")), "cannot be unpacked into .*: File name too long"),
        (marked(archive(tmp_path / "f.zip", ("w", b"1")), 8, 1), "is encrypted"),
        (marked(archive(tmp_path / "g.zip", ("w", b"1")), 10, 77), "compressed in a way that Python does not unpack"),
        (archive(tmp_path / "h.zip", *large, method=zipfile.ZIP_DEFLATED), r"would unpack to 200\.0 MB"),
    ]
    (tmp_path / "i.zip").write_bytes(b"PK no archive")
    cases.append((tmp_path / "i.zip", "is damaged"))
    for number, (odd, said) in enumerate(cases):
        with pytest.raises(UserError, match=said):
            unpack(odd, into / str(number))
    unpack(archive(tmp_path / "right.zip", ("folder/", b""), ("folder/w", b"1")), into)
    assert (into / "folder" / "w").read_bytes() == b"1"
