import subprocess
import sys
import time

import pytest

from dcbench.catalogue import DatasetCard, MetricCard, ModelCard, cards, find_model, load_entry_point, with_overrides
from dcbench.errors import UserError
from dcbench.facts import read_facts, validate

ISSUE_MODELS = {
    "videocomposer", "i2vgen-xl", "dynamicrafter", "dynamicrafter-512", "dynamicrafter-1024",
    "dynamicrafter-512-interp", "svd", "pikalabs", "gen-2", "still", "zoom", "noise", "real", "videos",
}  # fmt: skip


def test_every_card_is_valid_and_every_available_one_loads():
    assert set(cards("models")) >= ISSUE_MODELS
    for kind in ("models", "datasets", "metrics"):
        for card in cards(kind).values():
            if card.available:
                assert callable(load_entry_point(card)), card.name
            else:
                assert card.unavailable, f"{card.name} must say why it is not available"


def test_a_card_is_found_by_name_alias_and_path(tmp_path):
    assert find_model("DynamiCrafter-256").name == "dynamicrafter"
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\ntitle = "Mine"\nsummary = "s"\nentry_point = "a:b"\n')
    assert find_model(str(path)).title == "Mine"


def test_an_unknown_key_is_an_error_that_names_the_nearest_key(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('name = "x"\ntitle = "X"\nsummary = "s"\nlicense = "MIT"\n[clip]\nheigth = 3\n')
    with pytest.raises(UserError) as error:
        read_facts(path, ModelCard)
    assert 'Did you mean "licence"?' in str(error.value)
    assert 'Did you mean "height"?' in str(error.value)


def test_overrides_change_only_keys_that_the_card_has():
    card = find_model("dynamicrafter")
    changed = with_overrides(card, ["sampling.steps=25", "options.variant=512"])
    assert (changed.sampling["steps"], card.sampling["steps"]) == (25, 50)
    with pytest.raises(UserError, match=r'Did you mean "sampling\.steps"'):
        with_overrides(card, ["sampling.step=25"])
    assert with_overrides(card, ["options.variant=512"]).options["variant"] == "512"
    assert with_overrides(card, ["sampling.eta=0"]).sampling["eta"] == 0.0
    with pytest.raises(UserError, match="expected int, such as 50"):
        with_overrides(card, ["sampling.steps=2.5"])
    with pytest.raises(UserError, match="key=value"):
        with_overrides(card, ["sampling.steps"])


def test_published_numbers_carry_their_protocol_and_source():
    models = [card for card in cards("models").values() if isinstance(card, ModelCard)]
    rows = [(card.name, row) for card in models for row in card.published if row.dataset == "msrvtt"]
    rows = [(name, row) for name, row in rows if row.metric == "fvd"]
    paper = [row for name, row in rows if name == "dynamicrafter" and row.protocol == "dynamicrafter-paper"]
    assert [row.value for row in paper] == [234.66]
    groups = {row.value for name, row in rows if name == "dynamicrafter"}
    assert {234.66, 219.31, 271.63, 486.37, 328.0} <= groups  # the five that nobody could reconcile
    assert all(row.source for _, row in rows)


def test_names_and_folders_and_files_make_cards(tmp_path):
    folder = tmp_path / "Gen 2 clips"
    folder.mkdir()
    card = find_model(str(folder))
    assert (card.name, card.options["folder"]) == ("gen-2-clips", str(folder))
    own = tmp_path / "my_model.py"
    own.write_text("class MyModel:\n    pass\n")
    card = find_model(f"{own}:MyModel")
    assert load_entry_point(card).__name__ == "MyModel"
    with pytest.raises(UserError, match="no such file"):
        find_model(f"{tmp_path}/none.py:MyModel")


def test_validation_says_what_was_given():
    with pytest.raises(UserError, match="given: 'both'"):
        validate({"name": "x", "title": "X", "summary": "s", "kind": "both", "higher_is_better": True}, MetricCard, "f")
    with pytest.raises(UserError, match="problem"):
        validate({"name": "../x", "title": "X", "summary": "s"}, DatasetCard, "f")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["list", "protocols"]])
def test_help_and_list_import_no_torch(arguments):
    code = f"""
import sys
sys.argv = ["dcbench", *{arguments!r}]
from dcbench.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "pandas", "matplotlib", "scipy", "av", "decord"}} & set(sys.modules)
assert not heavy, heavy
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert time.perf_counter() - start < 30  # a hang, not a benchmark: benchmarks/startup.py measures
