"""The commands clean, push and pull: what a run takes on the disk, and runs at a URL."""

from pathlib import Path
from typing import Annotated, get_args

import typer

from dcbench.errors import UserError
from dcbench.escape import screen


def clean(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    keep: Annotated[
        str, typer.Option("--keep", help="record: the clips go too; clips: only work folders and incomplete files go.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also if the clips of a run are not all scored.")] = False,
) -> None:
    """Remove what finished runs do not need any more. `dcbench run` makes the clips again, with the same bytes."""
    from dcbench.runs import storage

    if keep == "features":
        raise UserError(
            "--keep features: a run has no features. They are in the cache, for all runs, and stay after a clean: "
            "`dcbench cache list`, `dcbench cache prune`. Give --keep record or --keep clips"
        )
    if keep not in get_args(storage.Keep):
        raise UserError(f'--keep "{keep}": expected record or clips')
    chosen: storage.Keep = "record" if keep == "record" else "clips"
    for path in runs:  # all of them, before anything is removed
        storage.clean(path, chosen, force, dry_run=True)
    total = 0
    for path in runs:
        parts = storage.clean(path, chosen, force, dry_run)
        total += sum(part.size for part in parts)
        said = [f"{part.name}: {len(part.files)} files, {part.size / 1e6:.2f} MB" for part in parts]
        print(screen(f"{path}: {'; '.join(said) or 'nothing to remove'}"))
    print(f"{'would free' if dry_run else 'freed'} {total / 1e6:.2f} MB ({total} bytes)")


def push(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    url: Annotated[str, typer.Argument(help="A folder that fsspec can write: s3://bucket/name, gs://..., a path.")],
) -> None:
    """Copy a run to a URL: what is missing there or differs. The report is not copied. The same command continues."""
    from dcbench.runs.transfer import push as push_run

    moved = push_run(run, url)
    print(f"pushed {moved.files} files, {moved.size / 1e6:.2f} MB; {moved.equal} were there")


def pull(
    url: Annotated[str, typer.Argument(help="Where `dcbench push` copied a run to.")],
    run: Annotated[Path, typer.Argument(help="A new directory, or the run's own: what is missing there is brought.")],
) -> None:
    """Bring a run from a URL, and check each file. Nothing in it is executed. The same command continues."""
    from dcbench.runs.transfer import pull as pull_run

    moved = pull_run(url, run)
    print(f"pulled {moved.files} files, {moved.size / 1e6:.2f} MB; {moved.equal} were there")
    print(screen(f"next: dcbench report {run}"))
