"""Suites: arms become cards, layers have groups, errors name what is allowed."""

import csv
import re

import pytest
from markdown_it import MarkdownIt

from dcbench.analysis.lambda_probe import profile, published_profile, sweep, table, write_profile
from dcbench.analysis.suite import Arm, Suite, arm_card, find_suite, suites
from dcbench.analysis.suite_table import ArmScores, show, write_table
from dcbench.catalogue import ModelCard, find_model, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.statistics import wilson
from dcbench.models.base import Runtime
from dcbench.models.dynamicrafter.image_scale import layer_group
from dcbench.models.dynamicrafter.load import load
from dcbench.training.arms import arm_recipe
from dcbench.training.recipe import find_recipe

CARD = ModelCard(
    name="gates",
    title="",
    summary="",
    entry_point="dcbench.models.dynamicrafter.load:load",
    options={"variant": "tiny", "random_seed": 0},
    sampling={"steps": 2},
)


def test_every_shipped_suite_is_valid_and_has_the_papers_arms():
    for name in suites():
        assert find_suite(name).name == name
    published = {arm.name: arm.published["fvd"] for arm in find_suite("table3-training").arms if arm.published}
    assert len(published) == 7 and published["ours"] == 234.66 and published["fine-tune entire"] == 364.11
    assert {arm.name for arm in find_suite("table3-knockout").arms} < set(published)
    with pytest.raises(UserError, match="sampling"):
        find_suite("sampeling")


def test_the_papers_layers():
    assert layer_group("intermediate", 16) == (3, 4, 5, 6, 10, 11)
    assert layer_group("ends", 16) == (1, 2, 7, 8, 9, 12, 13, 14, 15, 16)
    for layers in (4, 7, 16):
        both = layer_group("ends", layers) + layer_group("intermediate", layers)
        assert sorted(both) == list(layer_group("all", layers))
        assert layer_group("intermediate", layers)
    assert layer_group("2,3", 7) == (2, 3)
    for wrong, message in (("8", "layers 1 to 7"), ("middel", "intermediate"), ("0", "1 to 7")):
        with pytest.raises(UserError, match=message):
            layer_group(wrong, 7)


def test_an_arm_scales_the_learned_gates_and_nothing_else():
    learned = load(CARD, Runtime()).image_scale.values()
    card = arm_card(CARD, Arm(name="x", image_scale={"intermediate": 0.5}))
    assert CARD.options == {"variant": "tiny", "random_seed": 0}
    assert card.entry_point == CARD.entry_point
    assert card.options == {**CARD.options, "image_scale_factors": {"intermediate": 0.5}}
    found = load_entry_point(card)(card, Runtime()).image_scale.values()
    middle = layer_group("intermediate", len(learned))
    for layer, (before, after) in enumerate(zip(learned, found, strict=True), 1):
        assert after == before * (0.5 if layer in middle else 1)
    assert arm_card(CARD, Arm(name="x", image_scale={"all": 1.0})) == CARD


def test_factors_multiply_what_the_options_set_and_the_later_group_counts():
    options = {**CARD.options, "image_scale": 0.5, "image_scale_factors": {"all": 3, "2": 0.0}}
    values = load(CARD.model_copy(update={"options": options}), Runtime()).image_scale.values()
    assert values == [1.5, 0.0, *[1.5] * (len(values) - 2)]


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({"middel": 0.5}, "options.image_scale_factors: layers 'middel': give all, ends, intermediate, or numbers"),
        ({"99": 0.5}, "options.image_scale_factors: layer 99: this network has layers 1 to 16"),
        ({"all": "half"}, "options.image_scale_factors: all = 'half'; give a number"),
        ({"all": True}, "options.image_scale_factors: all = True; give a number"),
        (0.5, "options.image_scale_factors = 0.5: expected dict"),
    ],
)
def test_wrong_factors_are_told_before_weights_are_read(factors, said):
    options = {"variant": "256", "image_scale_factors": factors}
    with pytest.raises(UserError) as error:
        load(CARD.model_copy(update={"options": options}), Runtime())
    assert str(error.value).startswith(said)


def test_a_model_without_gates_refuses_factors():
    arm = Arm(name="x", image_scale={"all": 0.5})
    with pytest.raises(UserError, match="zoom has no λ to change: it is not a DynamiCrafter"):
        arm_card(find_model("zoom"), arm)
    assert arm_card(find_model("zoom"), Arm(name="x", image_scale={"all": 1.0})) == find_model("zoom")


def test_a_trained_arm_has_no_factors(tmp_path):
    (tmp_path / "own.toml").write_text(
        'name = "own"\ntitle = "Own"\nkind = "training"\nrecipe = "tiny"\n'
        '[[arms]]\nname = "weak"\nimage_scale = { all = 0.5 }\n'
    )
    with pytest.raises(UserError, match="'weak' is trained"):
        find_suite(str(tmp_path / "own.toml"))


def test_knock_outs_change_the_card(tmp_path):
    for arm in find_suite("table3-knockout").arms:
        card = arm_card(CARD, arm)
        assert {**CARD.options, **arm.options} == card.options
        load(card, Runtime())


def test_the_profile_stands_beside_the_papers(tmp_path):
    model = load(CARD, Runtime())
    model.image_scale[2] = 0.25
    found = profile(model)
    assert found.values[1] == 0.25 and found.stages.count("middle") == 1
    paper = published_profile()
    assert len(paper.values) == 16 and paper.values[5] == 0.655 and paper.stages.count("input") == 6
    lines = table([found, paper]).splitlines()
    assert len(lines) == 18
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    middle = next(line for line in cells if line[2] == "middle")  # of the same depth, whatever its number
    assert middle[0] == "0.50" and middle[5] == "middle" and middle[1] != middle[4] == "7"
    assert [line[0] for line in (cells[0], cells[-1])] == ["0.00", "1.00"]
    assert cells[0][1] == "1" and cells[-1][1] == str(len(found.values)) and cells[-1][4] == "16"
    assert [line[1] for line in cells if line[1]] == [str(n + 1) for n in range(len(found.values))]  # all, in order
    text = write_profile(model, tmp_path)
    assert "0.250" in text and (tmp_path / "profile.png").stat().st_size > 5000
    assert (tmp_path / "profile.csv").read_text().splitlines()[2].endswith(",0.250000")


def test_a_sweep_of_own_layers():
    model = load(CARD, Runtime())
    made = sweep(["ends", "1,2"], [0, 2], ("motion",), model)
    assert [arm.name for arm in made.arms] == ["ends x 0", "ends x 2", "1,2 x 0", "1,2 x 2"]
    assert made.baseline_arm == "ends x 0" and sweep(["all"], [0, 1], ("motion",), model).baseline_arm == "all x 1"
    with pytest.raises(UserError, match="layers 1 to"):
        sweep(["99"], [1], ("motion",), model)
    with pytest.raises(UserError, match="factors"):
        sweep(["all"], [-1], ("motion",), model)


def test_intervals_of_shares():
    share, interval = wilson(8, 10)
    assert share == 0.8 and interval == pytest.approx((0.490, 0.943), abs=2e-3)
    assert wilson(0, 20)[1] == pytest.approx((0, 0.161), abs=2e-3)


def test_the_table_shows_seeds_intervals_and_the_papers_column(tmp_path):
    suite = find_suite("table3-knockout")
    row = ArmScores(suite.arms[0], clips=24)
    row.add("fvd", 10.0, (8.0, 12.0))
    row.add("fvd", 14.0, (11.0, 17.0))
    row.reasons["pic"] = "its weights are missing"
    assert show(row.summary("fvd")) == "12 [1.74, 22.3]"  # clips and seeds, not the span of their intervals
    other = ArmScores(suite.arms[1], clips=24)
    other.add("fvd", 20.0, (18.0, 22.0))
    stored = {
        "fvd": {"difference": 6.0, "ci95": [1.0, 11.0], "p_value": 0.03},
        "motion": {"difference": 1.0, "ci95": [-1.0, 3.0], "p_value": 0.4},
    }
    other.add_gaps({"reason": "", "gaps": stored})
    text = write_table(suite, [row, other], tmp_path, (1, 2))
    assert "after Holm's correction for the 2 differences" in text
    assert "Difference from *ours*" in text and "| without ctx | 6 [1, 11] | 1 [-1, 3] |" in text  # 0.03 · 2 > 0.05
    assert "234.66" in text and "12 [1.74, 22.3]" in text and "its weights are missing" in text
    assert "intervals over clips and seeds" in text
    stored["fvd"]["p_value"] = 0.01
    other.gaps.clear()
    other.add_gaps({"reason": "", "gaps": stored})
    assert "| without ctx | **6 [1, 11]** | 1 [-1, 3] |" in write_table(suite, [row, other], tmp_path, (1, 2))
    sheet = (tmp_path / "table.csv").read_text()
    assert sheet.count(",fvd,") == 3 and sheet.count(",fvd_gap,") == 1


def test_texts_of_a_suite_stay_text(tmp_path):
    """Titles, notes, arms and reasons: a folder of a suite may come from a stranger."""
    snare = "[x](javascript:1) ![y](http://e.org/y.png) <b> | \x1b[2J"
    arms = (Arm(name=snare, group="=1+1", meaning=snare), Arm(name="=2+2", group="g"))
    suite = Suite(name="s", title=snare, note=snare, arms=arms, published=snare)
    rows = [ArmScores(arm, clips=1, reasons={"pic": f"{snare}\n  more"}, no_gap=snare) for arm in arms]
    for row in rows:
        row.add("fvd", -1.0, None)
    text = write_table(suite, rows, tmp_path, (1,))
    shown = MarkdownIt("commonmark").enable("table").render(text)
    assert set(re.findall(r"<(\w+)", shown)) <= {"h1", "p", "table", "thead", "tbody", "tr", "th", "td"}
    assert "\x1b" not in text and not re.search(r"(?<!\\)://", text) and "Not computed: pic:" in text
    sheet = list(csv.reader((tmp_path / "table.csv").read_text().splitlines()))
    assert [line[1] for line in sheet[1:]] == ["'=1+1", "g"] and sheet[2][0] == "'=2+2" and sheet[1][5] == "-1.0"


def test_training_arms_change_their_stages_only():
    suite = find_suite("table3-training")
    whole = find_recipe(suite.recipe)
    for arm in suite.arms:
        recipe = arm_recipe(whole.varied(suite.stages), arm.stages, arm.without, 3)
        names = [stage.name for stage in recipe.stages]
        assert recipe.start == whole.start and names[-1] == "joint" and not set(names) & set(arm.without)
        for name, changes in arm.stages.items():
            for field, value in changes.items():
                found = getattr(recipe.stage(name), field)
                assert (list(found) if isinstance(found, tuple) else found) == value
