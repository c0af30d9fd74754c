"""The command-line program: commands, errors, signals. Commands import what they need, so `--help` imports no torch."""

import errno
import io
import os
import signal
import sys
import time
import traceback
from typing import Annotated

import typer

from dcbench.cli import evaluate, model, probe, storage, submit, tools, weights
from dcbench.errors import SharedError, UserError, first_line
from dcbench.escape import screen
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
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Show also what log.txt in a run's directory notes.")
    ] = False,
) -> None:
    if verbose:
        os.environ["DCBENCH_VERBOSE"] = "1"


app.command()(evaluate.run)
app.command()(evaluate.sample)
app.command()(evaluate.score)
app.command()(evaluate.status)
app.command()(evaluate.report)
app.command("list")(evaluate.list_)
app.command()(storage.clean)
app.command()(storage.push)
app.command()(storage.pull)
app.command()(probe.ablate)
app.command()(model.animate)
app.command()(model.train)
app.add_typer(submit.submit, name="submit")
app.add_typer(tools.data, name="data")
app.add_typer(tools.cache, name="cache")
app.add_typer(tools.doctor, name="doctor")
app.add_typer(weights.weights, name="weights")
app.add_typer(probe.probe, name="probe")


# commands that go on where they were stopped
CONTINUED = ("run", "sample", "score", "ablate", "train", "weights", "push", "pull")
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class _Stopped(BaseException):
    """A signal, such as Ctrl-C. Not KeyboardInterrupt, because the argument parser catches that."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped(number)


def main() -> None:
    """Entry point. Whatever goes wrong is one message; DCBENCH_TRACEBACK=1 adds the traceback."""
    # Set before torch is imported: idle threads spin about 0.1 ms, then sleep. Without spinning, small networks run at
    # half speed; longer spinning slows decoding and other processes (benchmarks/waiting.py).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding, a file name of no encoding
            stream.reconfigure(errors="backslashreplace")
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        if before[number] != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _stop)
    try:
        app()
    except _Stopped as stopped:
        number = int(str(stopped))
        goes_on = " The same command continues where it was." if sys.argv[1:2] and sys.argv[1] in CONTINUED else ""
        print(f"\ndcbench: stopped.{goes_on}", file=sys.stderr)
        raise SystemExit(128 + number) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if os.environ.get("DCBENCH_TRACEBACK"):
            traceback.print_exc()
        if message := explain(error):
            brief = message if len(message) < 6000 else f"{message[:3000]} [...] {message[-1000:]}"
            print(f"dcbench: {screen(brief)}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def explain(error: Exception) -> str:
    """The message of an error. "" if another process of the same run shows it."""
    if isinstance(error, SharedError) and os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # torchrun stops the first process when another one ends, and that one must speak first
        return ""
    if isinstance(error, UserError):
        return str(error)
    if "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        return f"the disk is full{where}. Free some room; the same command continues. Caches: DCBENCH_CACHE, HF_HOME"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror or error}"
    if isinstance(error, MemoryError):
        return "there is not enough memory. Try smaller clips, or a smaller --batch-size"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {first_line(error)} ({place.filename}, line {place.lineno}). This was not expected: "
        "DCBENCH_TRACEBACK=1 shows where it comes from. If it is not in code of your own, please report it"
    )
