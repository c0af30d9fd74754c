"""The options that several commands share, and how they are read."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dcbench.errors import UserError

if TYPE_CHECKING:
    from dcbench.runs.run import OnRay, Options


def completes(kind: str) -> Callable[[str], list[str]]:
    """For the shell's completion: the names of this kind that begin as the word does. Other words are files."""

    def begin(incomplete: str) -> list[str]:
        from dcbench.catalogue import cards
        from dcbench.protocol import protocols

        return [name for name in (protocols() if kind == "protocols" else cards(kind)) if name.startswith(incomplete)]

    return begin


MODEL_HELP = "A name, alias, card.toml, file.py:Class or folder of clips."
DATASET_HELP = "A name, alias or card.toml."
Model = Annotated[str, typer.Option("--model", help=MODEL_HELP, autocompletion=completes("models"))]
DatasetName = Annotated[str, typer.Option("--dataset", help=DATASET_HELP, autocompletion=completes("datasets"))]
Models = Annotated[
    list[str],
    typer.Option("--model", help=f"{MODEL_HELP} Repeat it for a grid.", autocompletion=completes("models")),
]
Datasets = Annotated[
    list[str],
    typer.Option("--dataset", help=f"{DATASET_HELP} Repeat it for a grid.", autocompletion=completes("datasets")),
]
Roots = Annotated[
    list[str] | None, typer.Option("--data", help="Folder of the dataset's files; in a grid NAME=DIR for each dataset.")
]
ProtocolName = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        help="A name or protocol.toml; default: the dataset's own.",
        autocompletion=completes("protocols"),
    ),
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of the dataset's files.")]
Out = Annotated[Path | None, typer.Option("--out", help="The run directory; default: runs/<names>-<hash>.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Maximum number of inputs (of clips, if each has one).")]
MetricNames = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        help="Comma-separated; name(option=value) for another option. Default: the protocol's, or the usual ones.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Autocast dtype on a GPU: float16 or bfloat16.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Clips per batch.")]
Samples = Annotated[
    int | None,
    typer.Option("--samples", help="Clips of each input, each with its own seed; default: the protocol's."),
]
Seed = Annotated[int, typer.Option("--seed", help="The run's seed. Each clip's seed is derived from it.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Change a card value: sampling.steps=25.")]
Manifest = Annotated[Path | None, typer.Option("--manifest", help="Use the clips of an existing manifest.jsonl.")]
Download = Annotated[
    bool, typer.Option("--download/--offline", help="Fetch missing weights first; otherwise nothing is downloaded.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it will cost, and stop.")]
Calibrate = Annotated[
    int | None,
    typer.Option("--calibrate", min=1, help="With --dry-run: make and score so many clips first, and measure."),
]


Shard = Annotated[
    str | None,
    typer.Option(
        "--shard",
        help='Make one part of the clips, such as 3/16, beside processes with the other parts; "slurm": of an array.',
    ),
]
Join = Annotated[
    bool,
    typer.Option("--join", help="Make clips that no other process makes: start the same command as often as you like."),
]

Engine = Annotated[
    str | None,
    typer.Option("--engine", help="ray: workers on a Ray cluster make the clips. Default: this machine makes them."),
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Of the Ray cluster: auto, host:6379. Default: RAY_ADDRESS, or a Ray started here."),
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Of Ray. Default: as many as the cluster has room for.")
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option("--gpus-per-worker", min=0, help="Default: 1, or 0 for a cluster without GPUs and --device cpu."),
]


def on_ray(engine: str | None, address: str | None, workers: int | None, gpus: float | None) -> "OnRay | None":
    """The options of --engine ray; None without it. UserError for options that would change nothing."""
    from dcbench.runs.run import OnRay

    if engine == "ray":
        return OnRay(address, workers, gpus)
    if engine is not None:
        raise UserError(f"--engine {engine}: expected ray; without --engine, this machine makes the clips")
    given = {"--address": address, "--workers": workers, "--gpus-per-worker": gpus}
    if wrong := [name for name, value in given.items() if value is not None]:
        raise UserError(f"{', '.join(wrong)} is of --engine ray; give --engine ray, or leave it out")
    return None


def run_options(
    device: str,
    dtype: str | None,
    batch_size: int,
    download: bool,
    shard: str | None = None,
    join: bool = False,
    ray: "OnRay | None" = None,
) -> "Options":
    if not download:
        os.environ["HF_HUB_OFFLINE"] = "1"  # set before huggingface_hub is imported, which reads it once
    from dcbench.runs.sampling import Options

    if dtype not in (None, "float16", "bfloat16", "float32"):
        raise UserError(f'--dtype "{dtype}": expected float16, bfloat16 or float32')
    if shard and join:
        raise UserError("--shard says which clips to make, --join takes any that are left; give one of the two")
    if ray and (shard or join):
        raise UserError("--engine ray gives each worker its clips; leave out --shard and --join")
    if ray and device.startswith("cuda:"):
        raise UserError(f"--device {device}: Ray chooses the GPU of each worker; give --device cuda")
    if ray and ray.gpus is not None and device != "auto" and (device == "cpu") == (ray.gpus > 0):
        raise UserError(f"--device {device} and --gpus-per-worker {ray.gpus:g} contradict each other; leave one out")
    part = _part(shard) if shard else None
    chosen = None if dtype == "float32" else dtype
    return Options(device, chosen, batch_size, offline=not download, shard=part, join=join, ray=ray)


def _part(text: str) -> tuple[int, int]:
    """(3, 16) of "3/16"; of "slurm", this task's place in its array. UserError for anything else."""
    if text == "slurm":
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
        try:
            task, first, count = (int(os.environ[name]) for name in names)
            step = int(os.environ.get("SLURM_ARRAY_TASK_STEP") or 1)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"--shard slurm: {', '.join(names)} are not set to numbers; start the job as an array: sbatch --array"
            ) from error
        return (task - first) // step + 1, count
    number, slash, whole = text.partition("/")
    if not (slash and number.isdecimal() and whole.isdecimal() and 1 <= int(number) <= int(whole)):
        raise UserError(f'--shard {text}: expected a part and the number of parts, such as 3/16, or "slurm"')
    return int(number), int(whole)


def names(text: str | None) -> list[str] | None:
    """The names in a comma-separated list. A comma in brackets does not separate: "fvd,lpips(net=vgg, frames=all)"."""
    parts = re.findall(r"(?:[^,()]|\([^()]*\)?|\))+", text or "")
    return [part.strip() for part in parts if part.strip()] or None
