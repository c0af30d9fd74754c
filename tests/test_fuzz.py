"""300 hostile inputs: each ends soon, with a message and without a traceback, and none is accepted without a word."""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcbench import cli, video
from dcbench.catalogue import find_dataset, find_model
from dcbench.protocol import FOLDER, find_protocol
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.run import Options

SECONDS = 20  # an input may take this long
RUN = ["run", "--limit", "1", "--metrics", "motion", "--device", "cpu"]
FOLDER_RUN = [*RUN, "--model", "still", "--dataset", "folder", "--data", "data", "--protocol", "small.toml"]
SMALL = [*RUN, "--model", "still", "--dataset", "shapes", "--protocol", "small.toml"]

CARD = 'name = "odd"\ntitle = "Odd"\nsummary = "s"\nentry_point = "no.such.room:load"\n'
TEXTS = {  # a valid file of each kind, and the command that reads it
    "model.toml": (CARD, [*RUN, "--model", "model.toml", "--dataset", "shapes", "--protocol", "small.toml"]),
    "dataset.toml": (CARD, [*RUN, "--model", "still", "--dataset", "dataset.toml", "--protocol", "small.toml"]),
    "metric.toml": (CARD + 'kind = "set"\n', [*SMALL, "--metrics", "metric.toml"]),
    "protocol.toml": ("", [*SMALL, "--protocol", "protocol.toml"]),
    "recipe.toml": ('name = "r"\nextends = "nothing"\n', ["train", "recipe.toml"]),
    "suite.toml": ('name = "s"\ntitle = "S"\n', ["ablate", "suite.toml", "--model", "still", "--dataset", "shapes"]),
    "story.yaml": ("scenes: [{image: gone.png}]\n", ["animate", "--story", "story.yaml", "--model", "still"]),
    "manifest.jsonl": ("", [*SMALL, "--manifest", "manifest.jsonl"]),
    "data/captions.csv": (
        "file,caption\nz.mkv,text\n",
        [*RUN, "--model", "still", "--dataset", "folder", "--data", "data"],
    ),
    "data/groups.csv": (
        "file,group\nz.mkv,text\n",
        [*RUN, "--model", "still", "--dataset", "folder", "--data", "data"],
    ),
    "run/plan.json": ("", ["score", "run", "--metrics", "motion"]),
    "run/manifest.jsonl": ("", ["score", "run", "--metrics", "motion"]),
    "run/record.json": ("", ["report", "run", "--out", "report"]),
    "picture.png": ("", ["animate", "picture.png", "text", "--model", "still", "--out", "new.mp4"]),
    "made/a.mkv": ("", ["score", "made", "--reference", "data", "--metrics", "motion", "--out", "folders"]),
}
DEEP = 100_000
MUTATIONS = {
    "empty": lambda base, dice: b"",
    "zeros": lambda base, dice: bytes(64),
    "random": lambda base, dice: dice.randbytes(300),
    "a page": lambda base, dice: b"<!DOCTYPE html>\n<html><body>404 not found</body></html>\n",
    "a pointer": lambda base, dice: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "no UTF-8": lambda base, dice: b"\xe9\xff\xfe" + base,
    "deep lists": lambda base, dice: b"a = " * 0 + b"[" * DEEP,
    "deep objects": lambda base, dice: b'{"a":' * DEEP,
    "deep TOML": lambda base, dice: b"a = " + b"[" * DEEP,
    "a huge integer": lambda base, dice: b"9" * 10_000,
    "a huge TOML integer": lambda base, dice: b"a = " + b"9" * 10_000,
    "not a number": lambda base, dice: b'{"id": NaN}\n',
    "a list": lambda base, dice: b"[1, 2]\n",
    "a long line": lambda base, dice: b"a" * 1_000_000,
    "aliases": lambda base, dice: b"a: &a [x]\n" + b"".join(b"b%d: &b%d [*a, *a]\n" % (k, k) for k in range(9)),
    "an object of Python": lambda base, dice: b"!!python/object/apply:os.system ['touch executed']\n",
}
ARGUMENTS = {
    "a disk as model": [*RUN, "--model", "/", "--dataset", "shapes"],
    "home as model": [*RUN, "--model", "~", "--dataset", "shapes"],
    "a disk as data": [*RUN, "--model", "still", "--dataset", "folder", "--data", "/"],
    "a disk to score": ["score", "/", "--reference", "/"],
    "a device as manifest": [*SMALL, "--manifest", "/dev/zero"],
    "a pipe as manifest": [*SMALL, "--manifest", "pipe"],
    "a device as card": [*RUN, "--model", "still", "--dataset", "shapes", "--protocol", "zero.toml"],
    "a device as picture": ["animate", "/dev/zero", "x", "--model", "still"],
    "a pipe as picture": ["animate", "pipe", "x", "--model", "still"],
    "a pipe as story": ["animate", "--story", "pipe", "--model", "still"],
    "a folder as picture": ["animate", ".", "x", "--model", "still"],
    "a folder as manifest": [*SMALL, "--manifest", "data"],
    "a folder as card": [*RUN, "--model", "folder.toml", "--dataset", "shapes"],
    "NUL in a path": [*SMALL, "--manifest", "a\0b"],
    "NUL in a model": [*RUN, "--model", "a\0b", "--dataset", "shapes"],
    "NUL in a card": [*RUN, "--model", "a\0b.toml", "--dataset", "shapes"],
    "a surrogate": [*RUN, "--model", "caf\udce9", "--dataset", "shapes"],
    "a long name": [*RUN, "--model", "m" * 5000, "--dataset", "shapes"],
    "a long path": [*SMALL, "--out", "o" * 5000],
    "an empty name": [*RUN, "--model", "", "--dataset", "shapes"],
    "an empty data set": [*RUN, "--model", "still", "--dataset", ""],
    "empty settings": [*SMALL, "--set", ""],
    "a setting of nothing": [*SMALL, "--set", "=1"],
    "a deep setting": [*SMALL, "--set", "a" + ".a" * 5000 + "=1"],
    "a huge setting": [*SMALL, "--set", "options.factor=" + "9" * 10_000],
    "a deep value": [*SMALL, "--model", "zoom", "--set", "options.factor=" + "[" * DEEP],
    "no frames": ["data", "make", "shapes", "--layout", "ucf101", "--videos", "0"],
    "huge frames": ["data", "make", "shapes", "--layout", "ucf101", "--videos", "2", "--size", "100000000"],
    "tiny frames": ["data", "make", "shapes", "--layout", "ucf101", "--videos", "2", "--size", "0"],
    "negative frames": ["data", "make", "shapes", "--layout", "ucf101", "--videos", "2", "--size", "-5"],
    "too many videos": ["data", "make", "shapes", "--layout", "ucf101", "--videos", "100000000000"],
    "a huge seed": [*SMALL, "--seed", "9" * 5000],
    "a negative limit": [*SMALL, "--limit", "-1"],
    "a huge batch": [*SMALL, "--batch-size", "0"],
    "a device of nothing": [*SMALL, "--device", ""],
    "a device of zeros": [*SMALL, "--device", "cpu:999999999999999999999"],
    "a rate of nothing": ["score", "made", "--reference", "data", "--fps", "0"],
    "an endless rate": ["score", "made", "--reference", "data", "--fps", "inf"],
    "no rate": ["score", "made", "--reference", "data", "--fps", "nan"],
    "no such speed": ["animate", "ok.png", "x", "--model", "still", "--fps", "nan"],
    "a huge number of videos": ["animate", "ok.png", "x", "--model", "still", "--num", "-3"],
    "a folder of output": ["animate", "ok.png", "x", "--model", "still", "--out", "data"],
    "an entry point of the system": [*RUN, "--model", "system.toml", "--dataset", "shapes"],
    "an entry point of nothing": [*RUN, "--model", "point.toml", "--dataset", "shapes"],
    "a file of no code": [*RUN, "--model", "picture.py:X", "--dataset", "shapes"],
    "an own class of nothing": [*RUN, "--model", "ok.py:", "--dataset", "shapes"],
    "an own class that fails": [*RUN, "--model", "ok.py:Fails", "--dataset", "shapes"],
    "an own class that exits": [*RUN, "--model", "ok.py:Exits", "--dataset", "shapes"],
    "a report of nothing": ["report", "gone"],
    "a report of a folder": ["report", "data"],
    "a comparison of one": ["report", "--compare", "run"],
    "a comparison with a folder": ["report", "--compare", "run", "data"],
    "a protocol of nothing": ["doctor", "protocol", "gone"],
    "weights of nothing": ["weights", "fetch", "gone"],
    "a list of nothing": ["list", "\0"],
}
VALUES = [None, -1, 1e308, "../../x", "\0\x1b[2J", [], {}, True, "x" * 10_000, {"a": {"a": {}}}]
FIELDS = [  # of a record; none of VALUES fits any of them
    ("n_scored",), ("failures",), ("clips_sha256",), ("plan", "model"), ("plan", "dataset", "name"),
    ("plan", "protocol", "name"), ("scores", "motion", "ci95"), ("scores", "motion", "n_generated"),
]  # fmt: skip
FITS = {
    ("n_scored", "True"), ("failures", "[]"), ("clips_sha256", "str"), ("name", "str"), ("ci95", "None"),
    ("n_generated", "True"),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The files that the commands name, as they should be."""
    folder = tmp_path_factory.mktemp("fuzz")
    smoke = (FOLDER / "smoke.toml").read_text().split("[datasets")[0]
    for side in ("height", "width"):
        smoke = smoke.replace(f"{side} = 256", f"{side} = 32")
    (folder / "small.toml").write_text(smoke)
    for name, (text, _) in TEXTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if text:
            (folder / name).write_text(text)
    (folder / "protocol.toml").write_text(smoke)
    run = planning.plan(
        find_model("still"), find_dataset("shapes"), find_protocol(str(folder / "small.toml")),
        out=folder / "run", limit=1, quiet=True,
    )  # fmt: skip
    options = Options(device="cpu", quiet=True)
    sampling.sample(run, options)
    scoring.score(run, options, ["motion"])
    shutil.copy(folder / "run" / "manifest.jsonl", folder / "manifest.jsonl")
    Image.fromarray(np.full((32, 32, 3), 9, np.uint8)).save(folder / "ok.png")
    shutil.copy(folder / "ok.png", folder / "picture.png")
    shutil.copy(folder / "ok.png", folder / "picture.py")
    clip = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    for name in ("data/z.mkv", "made/a.mkv"):
        video.write_lossless(folder / name, clip, 8)
    os.mkfifo(folder / "pipe")
    (folder / "folder.toml").mkdir()
    (folder / "zero.toml").symlink_to("/dev/zero")
    (folder / "system.toml").write_text(CARD.replace("no.such.room:load", "os:system"))
    (folder / "point.toml").write_text(CARD.replace("no.such.room:load", ".x:y"))
    (folder / "ok.py").write_text(
        "class Fails:\n def __init__(self, card, runtime):\n  raise KeyError('x')\n"
        "class Exits:\n def __init__(self, card, runtime):\n  raise SystemExit(0)\n"
    )
    return folder


@contextlib.contextmanager
def changed(path: Path, data: bytes) -> Iterator[None]:
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        yield
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


@pytest.fixture
def tried(world, monkeypatch, capsys):
    """Run a command in the world; it must refuse, in time, with a message."""
    monkeypatch.chdir(world)
    monkeypatch.delenv("DCBENCH_DATA", raising=False)
    monkeypatch.setenv("HOME", str(Path.home()))

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    def run(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["dcbench", *arguments])
        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(SECONDS)
        try:
            with pytest.raises(SystemExit) as stop:
                cli.main()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        said = capsys.readouterr()
        assert stop.value.code not in (0, None), f"accepted: {said.out[-300:]}"
        assert "Traceback" not in said.err
        assert "no end after" not in said.err
        assert "dcbench: " in said.err or "Error: " in said.err, said.err[-3000:]
        assert len(said.err) < 20_000
        assert "\x1b" not in said.err and "\0" not in said.err
        assert not (world / "executed").exists()
        return said.err

    return run


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_something_else(name, mutation, world, tried):
    base = (world / name).read_bytes() if (world / name).exists() else b""
    with changed(world / name, MUTATIONS[mutation](base, random.Random(mutation))):
        tried(TEXTS[name][1])


@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_argument_that_makes_no_sense(case, tried):
    tried(ARGUMENTS[case])


@pytest.mark.parametrize("field", FIELDS, ids=".".join)
def test_a_record_with_a_value_that_does_not_fit(field, world, tried):
    data = json.loads((world / "run" / "record.json").read_text())
    *parents, last = field
    table = data
    for parent in parents:
        table = table[parent]
    for value in VALUES:
        kind = (
            "None" if value is None else "[]" if value == [] else str(value) if value is True else type(value).__name__
        )
        if (last, kind) in FITS:
            continue
        table[last] = value
        with changed(world / "run" / "record.json", json.dumps(data).encode()):
            tried(["report", "run", "--out", "report"])


def test_there_are_300():
    assert len(MUTATIONS) * len(TEXTS) + len(ARGUMENTS) + len(FIELDS) * len(VALUES) - len(FITS) >= 300
