"""Quality on the shapes world: what a model that only repeats its input gets."""

from dcbench.analysis.quality import draw_curve, grid, measure
from dcbench.catalogue import find_model, load_entry_point
from dcbench.datasets.shapes import Shapes
from dcbench.models.base import Runtime


def test_still_keeps_everything_but_the_motion(tmp_path):
    card = find_model("still")
    items = Shapes(size=32, test_videos=40).items("test")
    table, cases = measure(load_entry_point(card)(card, Runtime()), items, 32)
    assert table["clips"] == 40 and table["first_frame_psnr"] == 100
    assert min(table[aspect] for aspect in ("background", "colour", "shape")) >= 0.97
    assert table["motion"] == sum(item.label == "stays still" for item in items) / 40
    grid(cases[:2], tmp_path / "cases.png")
    assert (tmp_path / "cases.png").stat().st_size > 5000


def test_the_curve_of_a_training_is_drawn(tmp_path):
    source = tmp_path / "core-hours.csv"
    source.write_text("core_hours,clips,shape,motion\n0.4,48,0.5,0.25\n1,48,,0.5\n1.1,48,0.7,0.98\n")
    assert draw_curve(source).stat().st_size > 5000
