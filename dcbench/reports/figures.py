"""Figures: frames next to their input, quality against cost, curves. No display, no global state of matplotlib."""

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from dcbench.clips import check_clip
from dcbench.escape import plain
from dcbench.files import atomic_write

# Okabe and Ito's colours: distinct for colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Curve:
    """A line, with an optional band around it."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def frame_grid(
    path: Path, rows: Sequence[tuple[str, Tensor]], image: Tensor | None, title: str, frames: int = 6
) -> None:
    """Draw one clip of several models. `rows`: (label, uint8 [t 3 h w]); `image`: the input, uint8 [3 h w].

    One column per frame, evenly spaced from first to last. The input is at the left of every row.
    """
    clips = [(label, check_clip(clip, label)) for label, clip in rows]
    columns = frames + (image is not None)
    aspect = clips[0][1].shape[2] / clips[0][1].shape[3]
    side = 1.25
    figure = Figure(figsize=(side * columns + 1.3, (side * aspect + 0.06) * len(clips) + 0.55), dpi=150)
    axes = figure.subplots(len(clips), columns, squeeze=False)
    for row, ((label, clip), line) in enumerate(zip(clips, axes, strict=True)):
        chosen = np.linspace(0, clip.shape[0] - 1, frames).round().astype(int)
        pictures = [(f"frame {i}", clip[i]) for i in chosen]
        if image is not None:
            pictures.insert(0, ("input", image))
        for (name, picture), axis in zip(pictures, line, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if row == 0:
                axis.set_title(name, fontsize=7, pad=3)
        line[0].set_ylabel(_text(label, 14), fontsize=7, rotation=0, ha="right", va="center", labelpad=4)
    figure.suptitle(_text(title, 110), fontsize=8)
    figure.subplots_adjust(left=0.95 / figure.get_figwidth(), right=0.995, bottom=0.01, wspace=0.03, hspace=0.04)
    figure.subplots_adjust(top=1 - 0.5 / figure.get_figheight())
    _save(figure, path)


def cost_plot(path: Path, points: Sequence[tuple[str, float, float, tuple[float, float] | None]], quality: str) -> None:
    """`points`: (label, seconds per clip, value, its 95 % interval or None). `quality` labels the value axis."""
    figure = Figure(figsize=(5.2, 3.4), dpi=150, layout="constrained")
    axis = figure.subplots()
    for n, (label, seconds, value, interval) in enumerate(points):
        colour = COLOURS[n % len(COLOURS)]
        error = None if interval is None else [[max(0, value - interval[0])], [max(0, interval[1] - value)]]
        axis.errorbar(
            seconds,
            value,
            error,
            fmt=MARKERS[n % len(MARKERS)],
            color=colour,
            capsize=2,
            lw=0.8,
            ms=5,
            label=_text(label, 28),
        )
    axis.set_xscale("log")
    seconds = [point[1] for point in points]
    axis.xaxis.set_major_locator(LogLocator(subs=(1,) if max(seconds) > 50 * min(seconds) else (1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("seconds a clip")
    axis.set_ylabel(_text(quality))
    axis.grid(True, lw=0.3, alpha=0.6)
    axis.margins(x=0.15)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    _save(figure, path)


def curves(
    path: Path,
    lines: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    title: str = "",
) -> None:
    """Lines with a legend: training logs, sweeps, FVD against N."""
    figure = Figure(figsize=(5.2, 3.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    for n, (label, curve) in enumerate(lines.items()):
        colour = COLOURS[n % len(COLOURS)]
        marker = MARKERS[n % len(MARKERS)] if len(curve.x) <= 30 else ""
        axis.plot(curve.x, curve.y, color=colour, marker=marker, ms=3.5, lw=1.2, label=_text(label, 28))
        if curve.low is not None and curve.high is not None:
            axis.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, lw=0)
    axis.set_xscale("log" if log_x else "linear")
    axis.set_yscale("log" if log_y else "linear")
    axis.set_xlabel(_text(x_label))
    axis.set_ylabel(_text(y_label))
    axis.set_title(_text(title), fontsize=9)
    axis.grid(True, lw=0.3, alpha=0.6)
    if len(lines) > 1:
        axis.legend(fontsize=7, frameon=False)
    _save(figure, path)


def _text(text: str, width: int = 200) -> str:
    """Wrap to at most three lines of `width` letters, and escape $, which starts a formula in matplotlib."""
    lines = textwrap.wrap(plain(text), width, break_long_words=True, max_lines=3, placeholder=" …")
    return "\n".join(lines).replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # letters that the font lacks are drawn as boxes
        with atomic_write(path) as temporary:
            figure.savefig(
                temporary, format=path.suffix[1:], metadata={"Software": None} if path.suffix == ".png" else {}
            )
