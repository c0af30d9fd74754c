"""The command-line program: commands, errors, signals. Commands import what they need, so `--help` imports no torch."""

import os
import signal
import sys
from typing import Annotated

import typer

from dcbench.cli import evaluate, model, probe, tools, weights
from dcbench.errors import UserError
from dcbench.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Reproducible, explainable evaluation of image-to-video models. Start with: "
    "dcbench run --model dynamicrafter-tiny --dataset shapes",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"dcbench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    pass


app.command()(evaluate.run)
app.command()(evaluate.sample)
app.command()(evaluate.score)
app.command()(evaluate.report)
app.command("list")(evaluate.list_)
app.command()(probe.ablate)
app.command()(model.animate)
app.command()(model.train)
app.add_typer(tools.data, name="data")
app.add_typer(tools.cache, name="cache")
app.add_typer(tools.doctor, name="doctor")
app.add_typer(weights.weights, name="weights")
app.add_typer(probe.probe, name="probe")


class _Stopped(BaseException):
    """SIGINT (Ctrl-C) or SIGTERM. Not KeyboardInterrupt, because the argument parser catches that."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped(number)


def main() -> None:
    """Entry point. A UserError or Ctrl-C prints a message without a traceback."""
    # Set before torch is imported: idle threads spin about 0.1 ms, then sleep. Without spinning, small networks run at
    # half speed; longer spinning slows decoding and other processes (benchmarks/waiting.py).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        app()
    except UserError as error:
        print(f"dcbench: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except _Stopped as stopped:
        print("\ndcbench: stopped. The same command continues where it was.", file=sys.stderr)
        raise SystemExit(128 + int(str(stopped))) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
