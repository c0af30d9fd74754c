"""Files of a run that a crash, a disk or an editor damaged: the same command mends them, or the message names them."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import small_runs
import torch

from dcbench import record, video
from dcbench.errors import UserError
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.run import Options

QUIET = Options(device="cpu", quiet=True)
plan = functools.partial(small_runs.plan, limit=3)


def finish(out: Path, metric: str) -> dict[str, bytes]:
    """Start or continue the run. Returns what must not depend on how it was executed."""
    run = plan(out)
    sampling.sample(run, QUIET)
    scoring.score(run, QUIET, [metric, "motion"])
    names = ["plan.json", "manifest.jsonl", "record.json", "per_clip.jsonl"]
    return {path.name: path.read_bytes() for path in [*map(out.joinpath, names), *sorted((out / "clips").iterdir())]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cheap_metric):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, finish(out, cheap_metric)


@pytest.fixture
def run(whole, tmp_path) -> Path:
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def clips(run: Path) -> list[Path]:
    return sorted((run / "clips").iterdir())


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))


def swap(run: Path) -> None:
    first, second, _ = clips(run)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)


def other_pixels(run: Path) -> None:
    video.write_lossless(clips(run)[0], torch.zeros(16, 3, 32, 32, dtype=torch.uint8), 8)


CLIPS = {
    "truncated": lambda run: clips(run)[0].write_bytes(clips(run)[0].read_bytes()[:-200]),
    "one bit": lambda run: flip_a_bit(clips(run)[1]),
    "emptied": lambda run: clips(run)[2].write_bytes(b""),
    "removed": lambda run: clips(run)[2].unlink(),
    "swapped": swap,
    "other pixels": other_pixels,
}


@pytest.mark.parametrize("kind", CLIPS)
def test_a_damaged_clip_is_named_by_score_and_made_again_by_run(kind, run, whole, cheap_metric):
    CLIPS[kind](run)
    before = (run / "record.json").read_bytes()
    with pytest.raises(UserError, match=r"[12] of 3 generated clips are damaged.*makes them again"):
        scoring.score(plan(run), QUIET, [cheap_metric])
    assert (run / "record.json").read_bytes() == before  # never replaced by a score of fewer clips
    assert finish(run, cheap_metric) == whole[1]


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def clear(path: Path, count: int) -> None:
    path.write_bytes(bytes(count) + path.read_bytes()[count:])


FILES = {
    "record cut": lambda run: cut(run / "record.json", 300),
    "record empty": lambda run: (run / "record.json").write_bytes(b""),
    "values per clip cut": lambda run: (run / "per_clip.jsonl").write_bytes(
        (run / "per_clip.jsonl").read_bytes()[:-30]
    ),
    "values per clip gone": lambda run: (run / "per_clip.jsonl").unlink(),
    "samples cut inside a character": lambda run: append(run / "samples.jsonl", b'{"id":"\xe6\xbc'),
    "samples with a bad block": lambda run: clear(run / "samples.jsonl", 100),
    "samples of other keys": lambda run: append(run / "samples.jsonl", b'{"id":"test-000000"}\n'),
    "samples gone": lambda run: (run / "samples.jsonl").unlink(),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_torn_file_is_made_again(kind, run, whole, cheap_metric):
    FILES[kind](run)
    assert finish(run, cheap_metric) == whole[1]


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


EDITED = {
    "another protocol": ("plan.json", '"height": 32', '"height": 64'),
    "another fingerprint": ("plan.json", '"fingerprint": "', '"fingerprint": "0'),
    "other frames": ("manifest.jsonl", '"frames":[', '"frames":[7,'),
    "another clip": ("manifest.jsonl", '"id":"test', '"id":"tset'),
}


@pytest.mark.parametrize("kind", EDITED)
def test_an_edited_plan_or_manifest_is_caught(kind, run):
    name, old, new = EDITED[kind]
    edit(run / name, old, new)
    for opened in (plan, planning.reopen):
        with pytest.raises(UserError, match=r"plan\.json or manifest\.jsonl was changed after the run began"):
            opened(run)


def change(run: Path, **changes) -> None:
    data = json.loads((run / "record.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        table = data
        for parent in parents:
            table = table[parent]
        table[last] = value
    (run / "record.json").write_text(json.dumps(data))


CONTRADICTIONS = {
    "value outside its interval": ({"scores__motion__ci95": [90, 91]}, r"scores\.motion: the value .* is not inside"),
    "more clips than planned": ({"n_scored": 4}, "4 clips are scored, but only 3 are planned"),
    "a negative count": ({"scores__motion__n_generated": -1}, r"n_generated: .*greater than or equal to 0"),
    "not a number": ({"scores__motion__value": float("nan")}, "NaN is no JSON number"),
    "another mean": (
        {"scores__motion__value": 1e4, "scores__motion__ci95": None},
        r"motion is 10000\.0 in record\.json, but",
    ),
    "another run's clips": ({"plan__fingerprint": "0" * 16}, "record.json is about the clips 0000"),
    "no model": ({"plan__model": {}}, "plan.model: it has no name"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_contradiction_in_a_record_is_named(kind, run):
    changes, message = CONTRADICTIONS[kind]
    change(run, **changes)
    with pytest.raises(UserError, match=message):
        record.read_record(run)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"motion": {"value": 1}}', "expected the id of another clip, got None"),
        ('{"id": "a"}\n{"id": "a"}', "line 2: expected the id of another clip, got 'a'"),
        ('{"id": "a", "motion": {"value": "1"}}', "a value of clip 'a' is not a finite number"),
    ],
)
def test_values_per_clip_are_checked(line, message, run):
    (run / "per_clip.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        record.read_record(run)
