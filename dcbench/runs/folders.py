"""Scores one folder of videos against another. This is an ordinary run, but no clip is sampled."""

from collections.abc import Sequence
from pathlib import Path

from dcbench.protocol import find_protocol
from dcbench.runs.planning import plan_folders
from dcbench.runs.run import Options
from dcbench.runs.scoring import choose_metrics, score


def score_folders(
    generated: Path,
    reference: Path,
    protocol: str,
    options: Options,
    metrics: Sequence[str] | None = None,
    out: Path | None = None,
    groups: Path | None = None,
) -> Path:
    """Score every video of `generated` against those of `reference`. Returns the run's directory.

    Videos with the same name on both sides are a pair. Metrics that compare a clip with its input image need pairs.
    `groups`: a file of source videos or inputs (see `dcbench.datasets.folder`), for intervals and tests.
    """
    choose_metrics(metrics)  # before the videos are read, so that an unknown name fails early
    run = plan_folders(generated, reference, find_protocol(protocol), out, options.quiet, groups)
    score(run, options, metrics)
    return run.directory.path
