"""The runner: resume, order, ranks, failures, traps. Real models, real clips, a cheap metric."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dcbench import record
from dcbench.catalogue import find_dataset, find_model, with_overrides
from dcbench.datasets.base import VideoError
from dcbench.errors import UserError
from dcbench.models.base import Request
from dcbench.protocol import find_protocol
from dcbench.runs import making, planning, sampling, scoring
from dcbench.runs.directory import RunDirectory
from dcbench.runs.run import Options, Run

QUIET = Options(device="cpu", quiet=True)


def make_job(out: Path, model: str = "zoom", limit: int = 4, seed: int = 123, **protocol) -> Run:
    chosen = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}, **protocol})
    return planning.plan(find_model(model), find_dataset("shapes"), chosen, out=out, limit=limit, seed=seed, quiet=True)


def finish(job: Run, metric: str, options: Options = QUIET) -> record.Record:
    sampling.sample(job, options)
    return scoring.score(job, options, [metric])


def kept(path: Path) -> dict[str, bytes]:
    """Everything of a run that must not depend on how it was executed."""
    names = ["plan.json", "manifest.jsonl", "record.json", "per_clip.jsonl"]
    clips = sorted((path / "clips").iterdir())
    return {p.name: p.read_bytes() for p in [*(path / name for name in names), *clips]}


def test_a_run_ends_in_a_record_and_the_same_command_changes_nothing(tmp_path, cheap_metric):
    job = make_job(tmp_path / "run")
    result = finish(job, cheap_metric)
    score = result.scores["corners"]
    assert score.value is not None
    assert score.value > 0
    assert (score.n_reference, score.n_generated) == (4, 4)
    assert score.fingerprint == job.plan.fingerprint
    before = kept(tmp_path / "run")
    finish(make_job(tmp_path / "run"), cheap_metric)
    assert kept(tmp_path / "run") == before


def test_values_that_were_kept_give_the_same_record(tmp_path):
    found = []
    for _ in range(2):  # computed, then read from per_clip.jsonl
        assert "top5" in finish(make_job(tmp_path / "run"), "motion").scores["motion"].details
        found.append(kept(tmp_path / "run"))
    assert found[0] == found[1]


def test_the_bounds_rank_as_they_must(tmp_path, cheap_metric):
    values = {}
    for model in ("real", "zoom", "still", "noise"):
        values[model] = finish(make_job(tmp_path / model, model, limit=8), cheap_metric).scores["corners"].value
    assert values["real"] == pytest.approx(0, abs=1e-6)
    assert 0 < values["zoom"] < values["noise"]
    assert 0 < values["still"] < values["noise"]


def test_a_clip_depends_neither_on_order_nor_batch_nor_limit(tmp_path, cheap_metric):
    finish(make_job(tmp_path / "a", "noise", limit=6), cheap_metric)
    finish(make_job(tmp_path / "b", "noise", limit=6), cheap_metric, replace(QUIET, batch_size=4))
    assert kept(tmp_path / "a") == kept(tmp_path / "b")
    job = make_job(tmp_path / "c", "noise", limit=3)
    job.cases.reverse()
    sampling.sample(job, QUIET)
    for path in (tmp_path / "c" / "clips").iterdir():
        assert path.read_bytes() == (tmp_path / "a" / "clips" / path.name).read_bytes()


def test_a_torn_line_a_lost_clip_and_leftovers_are_mended(tmp_path, cheap_metric):
    job = make_job(tmp_path / "run")
    finish(job, cheap_metric)
    before = kept(tmp_path / "run")
    samples = tmp_path / "run" / "samples.jsonl"
    samples.write_text(samples.read_text()[:-20])  # killed while writing the last line
    (tmp_path / "run" / "clips" / ".test-000001-abcd1234.mkv").touch()  # and while writing a clip
    (tmp_path / "run" / ".record.json-abcd1234").touch()
    job.directory.clip(job.cases[0].id).unlink()
    (tmp_path / "run" / "record.json").unlink()
    finish(make_job(tmp_path / "run"), cheap_metric)
    assert kept(tmp_path / "run") == before
    assert not [path for path in (tmp_path / "run").rglob(".*-abcd1234*")]


def test_another_run_in_the_directory_is_refused_and_the_difference_named(tmp_path):
    make_job(tmp_path / "run")
    with pytest.raises(UserError, match="differs in seed"):
        make_job(tmp_path / "run", seed=1)
    with pytest.raises(UserError, match="differs in model, limit"):
        make_job(tmp_path / "run", "still", limit=2)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UserError, match="holds other files"):
        make_job(tmp_path / "photos")


def test_a_manifest_replays_somebody_else_s_clips(tmp_path, cheap_metric):
    job = make_job(tmp_path / "theirs", limit=3)
    path = tmp_path / "theirs" / "manifest.jsonl"
    smoke = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}, "selection_seed": 9})
    ours = planning.plan(
        find_model("zoom"), find_dataset("shapes"), smoke, out=tmp_path / "ours", manifest=path, quiet=True
    )
    assert ours.cases == job.cases
    rows = [json.loads(line) | {"id": "test-999999"} for line in path.read_text().splitlines()[:1]]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="1 of 1 clips are not in this dataset"):
        planning.plan(find_model("zoom"), find_dataset("shapes"), smoke, out=tmp_path / "bad", manifest=bad, quiet=True)


def test_two_processes_on_one_directory_refuse_each_other(tmp_path):
    job = make_job(tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from dcbench.runs.directory import RunDirectory\n"
        f"with RunDirectory(Path({str(tmp_path / 'run')!r})).locked():\n print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert other.stdout.readline().strip() == "held"
        with pytest.raises(UserError, match=f"in use by process {other.pid}"):
            sampling.sample(job, QUIET)
    finally:
        other.communicate()
    sampling.sample(job, QUIET)


class Misbehaves:
    """A model that does `wrong` on one clip."""

    conditions_on = frozenset({"image"})

    def __init__(self, wrong, clip_id: str):
        self.wrong, self.clip_id = wrong, clip_id

    def generate(self, requests: list[Request]):
        return [self.wrong(r) if r.clip_id == self.clip_id else r.image.expand(16, -1, -1, -1) for r in requests]


WRONG = {
    "too few frames": (lambda r: r.image.expand(15, -1, -1, -1), r"returned 15 frames for clip .*; 16 were asked for"),
    "wrong shape": (lambda r: r.image, r"returned uint8 \[3, 32, 32\]"),
    "NaN": (lambda r: torch.full((16, 3, 32, 32), float("nan")), "returned NaN or infinity"),
    "float": (lambda r: torch.zeros(16, 3, 32, 32), "returned float32"),
    "no tensor": (lambda r: "clip", "returned str"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_model_that_misbehaves_is_named_with_its_clip_and_nothing_is_lost(tmp_path, monkeypatch, fault):
    wrong, message = WRONG[fault]
    job = make_job(tmp_path / "run")
    model = Misbehaves(wrong, job.cases[2].id)
    monkeypatch.setattr(making, "load_entry_point", lambda card: lambda card, runtime: model)
    with pytest.raises(UserError, match=message) as error:
        sampling.sample(job, QUIET)
    assert job.cases[2].id in str(error.value)
    assert set(job.directory.finished_samples()) == {job.cases[0].id, job.cases[1].id}
    model.clip_id = ""  # the fault is mended
    sampling.sample(job, QUIET)
    assert len(job.directory.finished_samples()) == 4


def test_trap_11_a_video_that_fails_is_named_and_counts(tmp_path, cheap_metric, capsys):
    job = make_job(tmp_path / "run")
    broken = job.cases[1].id

    class Broken:
        def info(self):
            return job.items[broken].video.info()

        def read(self, indices):
            raise VideoError("broken.avi: frame 3 cannot be decoded")

    job.items[broken] = replace(job.items[broken], video=Broken())
    result = finish(job, cheap_metric)
    assert "frame 3 cannot be decoded" in capsys.readouterr().err
    assert (result.n_planned, result.n_scored) == (4, 3)
    assert result.failures[0].id == broken
    assert result.scores["corners"].n_reference == 3


def test_trap_06_generated_clips_are_stored_without_loss(tmp_path):
    job = make_job(tmp_path / "run", "noise", limit=1)
    sampling.sample(job, QUIET)
    entry = job.cases[0]
    request = job.request(entry, with_reference=False)
    assert job.model is not None
    made = making.load_entry_point(job.model)(job.model, QUIET.runtime()).generate([request])[0]
    assert torch.equal(job.generated(entry), made)


def test_trap_05_and_08_a_request_carries_rate_and_stride_as_two_fields(tmp_path):
    job = make_job(tmp_path / "run", limit=1, frame_stride=3)
    request = job.request(job.cases[0], with_reference=True)
    assert (request.fps, request.frame_stride) == (pytest.approx(25 / 3), 3)
    assert request.reference is not None
    assert torch.equal(request.image, request.reference[0])


def test_trap_10_reference_and_generated_are_not_swapped(tmp_path, cheap_metric):
    seen = {}

    def spy(real, generated, groups=None):
        seen.update(real=real, generated=generated)
        from dcbench.metrics.distances import score_frechet

        return score_frechet(real, generated, groups)

    job = make_job(tmp_path / "run", "noise")
    sampling.sample(job, QUIET)
    built = scoring.build_metrics(scoring.choose_metrics([cheap_metric]), QUIET.runtime(), explicit=True)
    built.built["corners"]._score = spy  # type: ignore[attr-defined]
    observed = scoring.observe_all(job, list(built.built.values()), QUIET, None)
    scoring.score_all(observed, built, job.cases, "")
    assert (seen["generated"] - 127.5).abs().max() < 3  # noise averages to grey; the world does not
    assert (seen["real"] - 127.5).abs().max() > 20


def test_the_condition_frame_is_the_image(tmp_path):
    job = make_job(tmp_path / "run", limit=4, condition="random", frame_stride=3)
    assert len({entry.condition_frame for entry in job.cases}) > 1
    for entry in job.cases:
        request = job.request(entry, with_reference=True)
        assert request.reference is not None
        assert torch.equal(request.image, request.reference[entry.condition_frame])


def test_metrics_scored_later_join_the_record(tmp_path, cheap_metric):
    job = make_job(tmp_path / "run")
    finish(job, cheap_metric)
    again = Path(cheap_metric).with_name("again.toml")
    again.write_text(Path(cheap_metric).read_text().replace('name = "corners"', 'name = "again"'))
    result = scoring.score(planning.reopen(tmp_path / "run"), QUIET, [str(again)])
    assert set(result.scores) == {"corners", "again"}
    assert result.scores["corners"].value == result.scores["again"].value


def test_a_full_disk_is_found_before_the_model_loads(tmp_path, monkeypatch):
    job = make_job(tmp_path / "run")
    monkeypatch.setattr(sampling.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="Free some room"):
        sampling.sample(job, QUIET)


def test_overrides_make_another_run(tmp_path, in_tmp):
    card = with_overrides(find_model("zoom"), ["options.factor=2"])
    smoke = find_protocol("smoke")
    first = planning.plan(find_model("zoom"), find_dataset("shapes"), smoke, limit=1, quiet=True)
    second = planning.plan(card, find_dataset("shapes"), smoke, limit=1, quiet=True)
    assert first.directory.path != second.directory.path
    assert first.plan.fingerprint == second.plan.fingerprint


# --- whole processes, interrupted ---


def command(out: Path, metric: str, limit: int) -> list[str]:
    program = "from dcbench.cli import main; main()"
    options = ["--model", "noise", "--dataset", "shapes", "--limit", str(limit), "--out", str(out), "--metrics", metric]
    return [sys.executable, "-c", program, "run", *options]


def killed_runs_equal_an_undisturbed_one(tmp_path: Path, metric: str, kills: int, limit: int) -> None:
    """Each kill comes a few clips further on, or while the plan is made or the clips are scored."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "calm", metric, limit), check=True, capture_output=True, env=environment)
    samples, record_file = tmp_path / "shaken" / "samples.jsonl", tmp_path / "shaken" / "record.json"
    dice = random.Random(0)
    killed = 0

    def finished() -> int:
        return len(samples.read_bytes().splitlines()) if samples.is_file() else 0

    for attempt in range(kills):
        if record_file.is_file() or attempt % 7 == 6:
            shutil.rmtree(tmp_path / "shaken")
        target, delay = finished() + dice.randint(0, limit // 3), dice.choice([0, dice.uniform(0, 0.3)])
        process = subprocess.Popen(
            command(tmp_path / "shaken", metric, limit),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment | {"DCBENCH_CACHE": str(tmp_path / f"cache{attempt // 4}")},
            start_new_session=True,
        )
        while process.poll() is None and (finished() < target or not samples.parent.is_dir()):
            time.sleep(0.005)
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= kills // 2
    done = subprocess.run(command(tmp_path / "shaken", metric, limit), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert kept(tmp_path / "shaken") == kept(tmp_path / "calm")


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes(tmp_path, cheap_metric):
    killed_runs_equal_an_undisturbed_one(tmp_path, cheap_metric, kills=2, limit=24)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_continues_to_the_same_bytes(tmp_path, cheap_metric):
    killed_runs_equal_an_undisturbed_one(tmp_path, cheap_metric, kills=20, limit=24)


def test_ctrl_c_says_that_the_same_command_continues(tmp_path, cheap_metric):
    process = subprocess.Popen(
        command(tmp_path / "run", cheap_metric, 200),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    samples = tmp_path / "run" / "samples.jsonl"
    while process.poll() is None and not samples.is_file():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to decoders and to us
    said = process.communicate()[1]
    assert process.returncode == 130
    assert "The same command continues" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_trap_10_one_or_two_processes_give_the_same_record(tmp_path, cheap_metric):
    program = tmp_path / "program.py"
    program.write_text("from dcbench.cli import main\nmain()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    for ranks in (1, 2):
        whole = command(tmp_path / f"ranks{ranks}", cheap_metric, 5)
        done = subprocess.run(
            whole if ranks == 1 else [*torchrun, *whole[3:]],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DCBENCH_CACHE": str(tmp_path / f"cache{ranks}")},
        )
        assert done.returncode == 0, done.stderr
    assert kept(tmp_path / "ranks1") == kept(tmp_path / "ranks2")


def test_the_lock_is_freed_when_a_process_dies(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    code = (
        "import os, signal; from pathlib import Path; from dcbench.runs.directory import RunDirectory\n"
        f"with RunDirectory(Path({str(tmp_path / 'run')!r})).locked():\n os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code])
    with directory.locked():
        assert len(list(directory.members.glob("*.alone-*"))) == 1
