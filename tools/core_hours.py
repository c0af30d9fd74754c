"""Draw what was measured during a training: `python tools/core_hours.py reports/quality-tiny/core-hours.csv`.

The CSV has the columns core_hours, clips, shape and motion: shares of right clips. The picture is written beside it.
"""

import csv
import sys
from pathlib import Path

from dcbench.metrics.statistics import wilson
from dcbench.reports.figures import Curve, curves


def draw(source: Path) -> Path:
    """Shares with Wilson intervals against core-hours; returns the picture's path."""
    with source.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = {}
    for aspect in ("shape", "motion"):
        points = []
        for row in rows:
            if row[aspect]:  # not every aspect was measured every time
                count = int(row["clips"])
                points.append((float(row["core_hours"]), *wilson(round(float(row[aspect]) * count), count)))
        hours, shares, intervals = zip(*points, strict=True)
        lines[aspect] = Curve(hours, shares, [low for low, _ in intervals], [high for _, high in intervals])
    target = source.with_suffix(".png")
    curves(target, lines, "core-hours", "share of clips", title="Tiny weights: quality against training time")
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(draw(Path(sys.argv[1])))
