"""The command submit: a run as jobs of a cluster's scheduler (Slurm, through submitit)."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcbench.errors import UserError

if TYPE_CHECKING:
    from submitit import SlurmExecutor
    from submitit.helpers import DelayedSubmission

submit = typer.Typer(no_args_is_help=True, help="Give a run to a cluster's scheduler.")
REQUEUES = 1000  # how often a job may be queued again after its time limit or after it was preempted
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+)(?::(?P<minutes>\d\d))?(?::(?P<seconds>\d\d))?")


@submit.callback()
def _kinds() -> None:
    pass


class Job:
    """dcbench with these arguments. If Slurm preempts it, the same command is queued again, and goes on."""

    def __call__(self, arguments: Sequence[str]) -> None:
        from dcbench.cli.app import main

        sys.argv = ["dcbench", *arguments]
        main()

    def checkpoint(self, arguments: Sequence[str]) -> "DelayedSubmission":
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, arguments)


@submit.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def slurm(
    context: typer.Context,
    array: Annotated[int, typer.Option("--array", min=1, help="Number of jobs that make clips.")],
    time: Annotated[str, typer.Option("--time", help="Limit of each job: hours, HH:MM:SS or D-HH:MM:SS.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option("--partition")] = None,
    gres: Annotated[str | None, typer.Option("--gres", help="For example gpu:1.")] = None,
    cpus: Annotated[int, typer.Option("--cpus-per-task", min=1)] = 4,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", help="Any other option of sbatch, as key=value: account=x, mem=32G. Repeat it."),
    ] = None,
    requeue: Annotated[
        bool, typer.Option("--requeue/--no-requeue", help="Queue a job again if it is preempted or its node fails.")
    ] = True,
    logs: Annotated[Path, typer.Option("--logs", help="Folder, shared by all nodes, for scripts and logs.")] = Path(
        "slurm"
    ),
    show: Annotated[bool, typer.Option("--print", help="Show the scripts and submit nothing.")] = False,
) -> None:
    """Submit `dcbench run OPTIONS` to Slurm: an array of jobs that make clips, then one that scores.

    All other options are those of `dcbench run`. The run is planned here first, so that a wrong option is told at once.
    """
    arguments = list(context.args)
    _plan(arguments)
    making, scoring = ["sample", *_without_metrics(arguments), "--join"], ["run", *arguments]
    if arguments.count("--model") > 1 or arguments.count("--dataset") > 1:
        raise UserError("--array takes one model and one data set; give one command for each of a grid")
    more = dict(_setting(text) for text in sbatch or ()) | ({"requeue": True} if requeue else {"no-requeue": True})
    options: dict[str, Any] = {
        "time": _minutes(time),
        "cpus_per_task": cpus,
        "job_name": "dcbench",
        "array_parallelism": array,
    }
    options |= {name: value for name, value in (("partition", partition), ("gres", gres)) if value}
    executor = _executor(logs, REQUEUES if requeue else 0, show)
    executor.update_parameters(**options, additional_parameters=more)
    if show:
        print(_script(executor, array))
        executor.update_parameters(dependency="afterany:<the array>")
        print(_script(executor))
        return
    first = executor.map_array(Job(), [making] * array)[0].job_id.split("_")[0]
    executor.update_parameters(dependency=f"afterany:{first}")
    last = executor.submit(Job(), scoring)
    print(f"array {first}: {array} jobs make clips. Job {last.job_id} scores them. Logs: {logs}")
    print("How far it is: dcbench status RUN, and squeue")


def _without_metrics(arguments: Sequence[str]) -> list[str]:
    """The options of `dcbench sample`: those of `run` but --metrics."""
    kept = list(arguments)
    while "--metrics" in kept:
        place = kept.index("--metrics")
        del kept[place : place + 2]
    return [given for given in kept if not given.startswith("--metrics=")]


def _plan(arguments: Sequence[str]) -> None:
    """Plan the run without writing. UserError, or the message of the option parser, if an option is wrong."""
    from dcbench.cli.app import app

    for name in ("--shard", "--join", "--engine", "--dry-run"):
        if any(given.split("=")[0] == name for given in arguments):
            raise UserError(f"{name} cannot be given to submit: it decides itself which job makes which clips")
    command: Any = typer.main.get_command(app)
    command.main(args=["run", *arguments, "--dry-run"], prog_name="dcbench", standalone_mode=False)


def _executor(logs: Path, requeues: int, show: bool) -> "SlurmExecutor":
    try:
        from submitit import SlurmExecutor
    except ImportError as error:
        raise UserError("submitit is not installed: uv sync --extra slurm, or pip install submitit") from error

    class Shown(SlurmExecutor):
        """For a machine without Slurm: its scripts can be looked at."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    if not show and SlurmExecutor.affinity() < 0:
        raise UserError("this machine has no srun: submit from a login node of the cluster, or look: --print")
    return (Shown if show else SlurmExecutor)(logs, max_num_timeout=requeues)


def _script(executor: "SlurmExecutor", jobs: int = 1) -> str:
    """The script that is given to sbatch."""
    executor.parameters.pop("map_count", None)
    if jobs > 1:
        executor.parameters["map_count"] = jobs
    text = executor._make_submission_file_text(executor._submitit_command_str, "")
    executor.parameters.pop("map_count", None)
    return text


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = name.lstrip("-")
    if not name or re.fullmatch(r"[a-z][a-z-]*", name) is None or "\n" in value:
        raise UserError(f"--sbatch {text}: expected an option of sbatch and its value, such as account=vision")
    return name, value if equals else True


def _minutes(text: str) -> int:
    """Minutes of Slurm's D-HH:MM:SS, HH:MM:SS or of a number of hours."""
    found = TIME.fullmatch(text)
    parts = {name: int(value or 0) for name, value in found.groupdict().items()} if found else {}
    minutes = parts.get("days", 0) * 1440 + parts.get("hours", 0) * 60 + parts.get("minutes", 0)
    minutes += -(-parts.get("seconds", 0) // 60)
    if not minutes:
        raise UserError(f"--time {text}: expected hours, HH:MM:SS or D-HH:MM:SS")
    return minutes
