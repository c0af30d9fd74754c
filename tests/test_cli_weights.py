"""`dcbench weights`: what is needed, what it costs, and whether it is right."""

import hashlib
import http.server
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from dcbench.cli import main
from dcbench.weights import weights_dir

BODY = b"weights" * 1000


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path):
    """The address of a web server on this machine that serves one weight file."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "w.bin").write_bytes(BODY)
    handler = partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/w.bin"
        running.shutdown()
        thread.join()


@pytest.fixture
def card(tmp_path: Path, server: str) -> str:
    path = tmp_path / "model.toml"
    path.write_text(
        'name = "mine"\ntitle = "Mine"\nsummary = "x"\nlicence = "for tests"\n[[weights]]\nname = "mine.bin"\n'
        f'url = "{server}"\nsha256 = "{hashlib.sha256(BODY).hexdigest()}"\nsize = {len(BODY)}\nlicence = "BSD"\n'
    )
    return str(path)


def dcbench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dcbench", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_fetch_shows_size_and_licence_first_and_verify_tells_right_from_wrong(card, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(tmp_path / "weights"))
    assert dcbench(monkeypatch, "weights", "verify", card) == 1
    assert "missing" in capsys.readouterr().out
    assert dcbench(monkeypatch, "weights", "fetch", card) == 0
    said = capsys.readouterr().out
    assert said.index("Mine: for tests") < said.index("licence: BSD") < said.index("lies at")
    assert (weights_dir() / "mine.bin").read_bytes() == BODY
    assert dcbench(monkeypatch, "weights", "verify", card) == 0
    assert "pinned" in capsys.readouterr().out
    (weights_dir() / "mine.bin").write_bytes(BODY[:-1])
    assert dcbench(monkeypatch, "weights", "verify", card) == 1
    assert "WRONG" in capsys.readouterr().out


def test_verify_tells_pinned_trusted_and_changed_and_accepts_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(tmp_path / "weights"))
    card = tmp_path / "free.toml"
    card.write_text('name = "free"\ntitle = "F"\nsummary = "x"\n[[weights]]\nname = "free.bin"\n')

    def verify(*arguments: str) -> tuple[int, str]:
        code = dcbench(monkeypatch, "weights", "verify", *arguments)
        return code, capsys.readouterr().out.split()[0]

    file = weights_dir() / "free.bin"
    file.write_bytes(BODY)
    assert verify(str(card)) == (0, "new") and verify(str(card)) == (0, "trusted")
    file.write_bytes(BODY[1:])
    assert verify(str(card)) == (1, "CHANGED") and verify(str(card)) == (1, "CHANGED")
    assert verify(str(card), "--accept") == (0, "new") and verify(str(card)) == (0, "trusted")
    assert dcbench(monkeypatch, "weights", "verify", "--accept") == 2
    assert "needs the name" in capsys.readouterr().err
    (weights_dir() / "vith16.pth.tar").write_bytes(BODY)  # of the metric jedi; without a name all that is here
    assert dcbench(monkeypatch, "weights", "verify") == 0
    assert "vith16.pth.tar" in capsys.readouterr().out


def test_fetch_to_a_folder_says_where_to_put_it(card, monkeypatch, capsys, tmp_path):
    assert dcbench(monkeypatch, "weights", "fetch", card, "--to", str(tmp_path / "stick")) == 0
    assert (tmp_path / "stick" / "mine.bin").read_bytes() == BODY
    assert f"elsewhere, put it at {weights_dir() / 'mine.bin'}" in capsys.readouterr().out


def test_offline_nothing_is_fetched_and_the_gate_is_explained(card, monkeypatch, capsys, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("DCBENCH_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert dcbench(monkeypatch, "weights", "fetch", card, "--offline") == 2
    assert not list((tmp_path / "weights").iterdir())
    capsys.readouterr()
    assert dcbench(monkeypatch, "weights", "fetch", "svd", "--offline") == 2
    said = capsys.readouterr()
    assert "4.50 GB" in said.out
    assert "accept its terms on stabilityai/stable-video-diffusion-img2vid" in said.out


def test_a_full_disk_is_found_before_the_download(card, monkeypatch, capsys, tmp_path):
    from dcbench import weights

    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    assert dcbench(monkeypatch, "weights", "fetch", card, "--to", str(tmp_path / "full")) == 2
    assert "only 0.0 MB are free" in capsys.readouterr().err


def test_list_names_every_source_once_with_who_needs_it(monkeypatch, capsys):
    assert dcbench(monkeypatch, "weights", "list") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "i3d-kinetics-400.ckpt" in line]
    assert len(lines) == 1
    assert "fvd" in lines[0] and "kvd" in lines[0]
    assert dcbench(monkeypatch, "weights", "fetch", "zoom") == 2
    assert "zoom has no weights" in capsys.readouterr().err
