"""dcbench: reproducible, explainable evaluation of image-to-video models.

Programs and notebooks use the functions below. They raise UserError for wrong names, settings and files. Each imports
its modules when it is called, so `import dcbench` takes a few milliseconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcbench.version import __version__ as __version__

if TYPE_CHECKING:
    from dcbench.api import Result as Result
    from dcbench.api import compare as compare
    from dcbench.api import evaluate as evaluate
    from dcbench.api import score as score
    from dcbench.datasets.base import Dataset
    from dcbench.metrics.base import Metric
    from dcbench.models.base import ImageToVideo
    from dcbench.runs.run import Run as Run


def load_model(name: str, settings: Sequence[str] = (), device: str = "auto", download: bool = False) -> "ImageToVideo":
    """A model by name, card.toml, file.py:Class or folder of clips. `settings`, as for --set: "sampling.steps=25"."""
    from dcbench.catalogue import find_model, load_entry_point, with_overrides
    from dcbench.runs.run import Options

    card = with_overrides(find_model(name), list(settings))
    return load_entry_point(card)(card, Options(device, offline=not download).runtime())


def load_dataset(name: str, data: Path | str | None = None, **options: Any) -> "Dataset":
    """A data set by name or card.toml; `data` is the folder of its files; `options` replace those of its card."""
    from dcbench.catalogue import find_dataset
    from dcbench.datasets.base import find_root, load_dataset

    card = find_dataset(name)
    return load_dataset(card, find_root(card, Path(data) if data else None), options)


def load_metric(name: str, settings: Sequence[str] = (), device: str = "auto", download: bool = False) -> "Metric":
    """A metric by name or card.toml. `settings`, as for --set: "options.degree=2"."""
    from dcbench.catalogue import find_metric, load_entry_point, with_overrides
    from dcbench.runs.run import Options

    card = with_overrides(find_metric(name), list(settings))
    return load_entry_point(card)(card, Options(device, offline=not download).runtime())


def report(runs: Sequence[Path | str], to: Path | str, **choices: Any) -> str:
    """Write tables, figures and a page of these runs into the folder `to`. Returns the table as Markdown.

    `choices`: what is shown, by the names of `dcbench.reports.Choices`, such as metrics=["fvd"], clips=40.
    """
    from dcbench.reports import Choices, write_report

    return write_report([Path(run) for run in runs], Path(to), Choices(**choices))


_FROM_API = ("Result", "compare", "evaluate", "score")
__all__ = [
    "Result", "Run", "compare", "evaluate", "load_dataset", "load_metric", "load_model", "report", "score",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _FROM_API:
        from dcbench import api

        return getattr(api, name)
    if name == "Run":
        from dcbench.runs.run import Run

        return Run
    raise AttributeError(f"module dcbench has no attribute {name!r}")
