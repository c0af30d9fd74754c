"""Every metric has a card that names its source; listing them imports no torch."""

import subprocess
import sys

import pytest

from dcbench.catalogue import MetricCard, cards, find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, SetMetric
from dcbench.models.base import Runtime
from dcbench.weights import MissingWeights

NAMES = list(cards("metrics"))


def test_the_papers_metrics_are_among_them() -> None:
    assert {"fvd", "kvd", "pic", "clip_text", "clip_frames", "clip_image", "motion", "warp_error"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_builds_its_metric_or_says_what_is_missing(name: str) -> None:
    card = find_metric(name)
    assert isinstance(card, MetricCard) and card.url.startswith("https://") and card.extractor and card.licence
    try:
        metric = load_entry_point(card)(card, Runtime(offline=True))
    except MissingWeights as missing:
        assert card.weights and any(source.name in str(missing) for source in card.weights)
        return
    assert isinstance(metric, SetMetric if card.kind == "set" else ClipMetric)
    assert set(metric.extractor.identity) == {"name", "weights_sha256", "preprocessing"}


def test_metrics_that_need_no_download_are_the_default_ones_here() -> None:
    here = {"fvd", "kvd", "st_lpips_image", "motion", "warp_error"}
    for name in here:
        assert find_metric(name).default
        load_entry_point(find_metric(name))(find_metric(name), Runtime(offline=True))


def test_listing_imports_no_torch() -> None:
    code = "import sys, dcbench.metrics, dcbench.catalogue as c; c.cards('metrics'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_are_checked() -> None:
    for name, options, message in (
        ("motion", {"kind": "speed"}, "allowed: motion, warp_error"),
        ("fvd", {"preprocessing": "stretch"}, 'preprocessing "stretch" is unknown'),
    ):
        card = find_metric(name).model_copy(update={"options": options})
        with pytest.raises(UserError, match=message):
            load_entry_point(card)(card, Runtime())
