"""Quality on the shapes world: what a model that only repeats its input gets."""

import torch

from dcbench.analysis.quality import draw_curve, grid, measure
from dcbench.datasets.shapes import Shapes


def test_still_keeps_everything_but_the_motion(tmp_path):
    items = Shapes(test_videos=40).items("test")
    table, cases = measure("still", (), items)
    assert table["clips"] == 40 and table["first_frame_psnr"] == 100
    assert min(table[aspect] for aspect in ("background", "colour", "shape")) >= 0.97
    assert table["motion"] == sum(item.label == "stays still" for item in items) / 40
    grid(cases[:2], tmp_path / "cases.png")
    assert (tmp_path / "cases.png").stat().st_size > 5000


def test_the_number_of_processes_changes_nothing():
    items = Shapes(test_videos=20).items("test")
    (one, first), (two, second) = (measure("noise", (), items, jobs=jobs) for jobs in (1, 2))
    assert [item.id for item, *_ in second] == [item.id for item in items]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(first, second, strict=True))
    assert one.pop("cpu_seconds_per_clip") >= 0 <= two.pop("cpu_seconds_per_clip") and one == two


def test_the_curve_of_a_training_is_drawn(tmp_path):
    source = tmp_path / "core-hours.csv"
    source.write_text("core_hours,clips,shape,motion\n0.4,48,0.5,0.25\n1,48,,0.5\n1.1,48,0.7,0.98\n")
    assert draw_curve(source).stat().st_size > 5000
