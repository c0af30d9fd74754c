"""`import dcbench` is quick, and its functions find what the command line finds."""

import subprocess
import sys

import pytest

import dcbench
from dcbench.errors import UserError


def test_importing_it_imports_nothing_heavy():
    code = "import sys, dcbench; sys.exit(bool({'torch', 'numpy', 'pandas', 'pydantic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_data_sets_and_metrics_are_found_by_name_with_their_settings():
    zoom = dcbench.load_model("zoom", ["options.factor=2"], device="cpu")
    assert zoom.card.options["factor"] == 2
    item = dcbench.load_dataset("shapes", size=32, test_videos=3).items("test")[2]
    assert (item.video.info().height, item.truth and item.truth["motion"]) == (32, item.label)
    kvd = dcbench.load_metric("kvd", ["options.degree=2"], device="cpu")
    assert kvd.identity["options"]["degree"] == 2
    assert kvd.identity != dcbench.load_metric("kvd", device="cpu").identity
    assert dcbench.Run.__module__ == "dcbench.runs.run"


def test_what_does_not_exist_is_named():
    for call, message in (
        (lambda: dcbench.load_model("zooom"), 'Did you mean "zoom"'),
        (lambda: dcbench.load_dataset("shapes", sise=3), 'Did you mean "size"'),
        (lambda: dcbench.load_metric("kvd", ["options.degre=2"]), "Did you mean"),
        (lambda: dcbench.score("nowhere"), "nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(AttributeError, match="no attribute 'evaluation'"):
        dcbench.evaluation  # noqa: B018
