"""`dcbench submit slurm` on a real Slurm of three nodes, which this machine runs if Slurm is installed."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_here  # of tools/
from small_runs import kept, world

from dcbench.cli.app import main

pytest.importorskip("submitit", reason="submitit is not installed: uv sync --extra slurm")

RUN = ["--model", "model.py:Slow", "--dataset", "shapes", "--limit", "18", "--protocol", "small.toml"]


def dcbench(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dcbench", *arguments],
        cwd=folder,
        env=(environment or dict(os.environ)) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_scripts_can_be_shown_without_slurm(tmp_path):
    shown = dcbench(
        world(tmp_path / "w"),
        *("submit", "slurm", "--array", "6", "--time", "1-02:30:00", "--partition", "gpu", "--gres", "gpu:1"),
        *("--sbatch", "account=vision", "--print", *RUN, "--out", "run"),
    )
    for line in (
        "#SBATCH --array=0-5%6",
        "#SBATCH --time=1590",
        "#SBATCH --partition=gpu",
        "#SBATCH --gres=gpu:1",
        "#SBATCH --account=vision",
        "#SBATCH --requeue",
        "#SBATCH --dependency='afterany:<the array>'",
    ):
        assert line in shown.splitlines()
    assert "clips        18 of 16 frames" in shown  # the plan comes first
    assert not (tmp_path / "w" / "run").exists()


WRONG = {
    "a shard": (["--shard", "1/2"], "it decides itself which job makes which clips"),
    "an unknown option": (["--modle", "zoom"], "No such option: --modle"),
    "an unknown model": (["--model", "zooom"], 'Did you mean "zoom"?'),
    "a time": (["--time", "soon"], "expected hours, HH:MM:SS or D-HH:MM:SS"),
    "an sbatch option": (["--sbatch", "x;y=1"], "expected an option of sbatch and its value"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_told_before_anything_is_submitted(case, tmp_path, monkeypatch, capsys):
    given, message = WRONG[case]
    run = [] if "--model" in given else ["--model", "zoom"]
    command = ["submit", "slurm", "--array", "2", "--print", "--dataset", "shapes", *run, *given, "--out", "run"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dcbench", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(bool(slurm_here.missing()), reason=f"Slurm is not installed: {', '.join(slurm_here.missing())}")
@pytest.mark.skipif(os.geteuid() != 0, reason="slurmd must run as root")
def test_an_array_with_a_killed_task_a_preempted_one_and_a_drained_node(tmp_path):
    """The final record is that of one process to the byte."""
    here = world(tmp_path / "w")
    dcbench(here, "run", *RUN, "--metrics", "motion", "--out", "one")
    cluster = tmp_path / "cluster"
    environment = slurm_here.start(cluster, nodes=3) | {"SLOW": "6", "SUBMITIT_PREEMPT_SIGNAL": "USR1"}

    def slurm(*command: str) -> str:
        for _ in range(20):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if "try again later" not in done.stderr:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def running() -> dict[str, str]:
        """The node of each running task of the array."""
        lines = [line.split() for line in slurm("squeue", "-h", "-t", "R", "-o", "%i %N").splitlines()]
        return dict(line for line in lines if len(line) == 2)

    def wait(what, seconds: float):
        until = time.monotonic() + seconds
        while not (got := what()):
            assert time.monotonic() < until, (slurm("squeue"), [p.read_text()[-800:] for p in here.glob("slurm/*.err")])
            time.sleep(0.5)
        return got

    try:
        said = dcbench(
            here,
            *("submit", "slurm", "--array", "6", "--cpus-per-task", "1", "--sbatch", "mem=100M"),
            *(*RUN, "--metrics", "motion", "--out", "several"),
            environment=environment,
        )
        assert "6 jobs make clips" in said
        wait(lambda: list(here.glob("several/clips/*.mkv")), 200)
        tasks = wait(lambda: running() if len(running()) == 3 else {}, 60)
        (killed, _), (preempted, _), (_, node) = sorted(tasks.items())
        slurm("scancel", "--signal=KILL", killed)
        slurm("scancel", "--signal=USR1", preempted)
        slurm("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
        wait(lambda: not slurm("squeue", "-h"), 600)
        states = slurm("scontrol", "show", "job", "-o")
        assert re.search(r"Restarts=[1-9]", states)  # the preempted task
        assert kept(here / "several") == kept(here / "one")
        made = (here / "made").read_text().split()
        assert len(made) <= 18 + len(set(made)) + 3  # those of `one`, and at most what the three tasks were making
    finally:
        slurm_here.stop(cluster)
