"""A metric's identity, with its options and its code, is the key of its cache, its column and its comparisons."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dcbench import catalogue, load_metric, video
from dcbench.analysis.compare import compare_runs, to_markdown
from dcbench.catalogue import find_dataset, find_metric, find_model
from dcbench.errors import UserError
from dcbench.metrics import distances, inception_score
from dcbench.metrics import functional as fn
from dcbench.metrics.base import FeatureExtractor, SetDistance
from dcbench.metrics.cache import FeatureCache
from dcbench.metrics.distances import score_frechet
from dcbench.protocol import find_protocol
from dcbench.reports import write_report
from dcbench.runs import grid, planning, scoring
from dcbench.runs.folders import plan_folders
from dcbench.runs.run import Options, Run
from dcbench.runs.sampling import sample

QUIET = Options(device="cpu", quiet=True)
BRIGHT = """
from dcbench.metrics import ClipMetric

class Bright(ClipMetric):
    def observe(self, view):
        return {"value": float((view.clip > self.card.options["threshold"]).float().mean())}

def build(card, runtime):
    return Bright(card)
"""
BRIGHT_CARD = """
name = "bright"
title = "Bright"
summary = "Share of bright pixels"
kind = "per_clip"
higher_is_better = true
entry_point = "bright.py:build"
[options]
threshold = {threshold}
"""


def bright(folder: Path, threshold: int) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "bright.py").write_text(BRIGHT)
    (folder / "bright.toml").write_text(BRIGHT_CARD.format(threshold=threshold))
    return str(folder / "bright.toml")


def make_run(out: Path, model: str = "noise", limit: int = 4) -> Run:
    protocol = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}})
    run = planning.plan(find_model(model), find_dataset("shapes"), protocol, out=out, limit=limit, quiet=True)
    sample(run, QUIET)
    return run


def share(run: Run, threshold: int) -> float:
    clips = [video.read_clip(run.directory.clip(case.id))[0] for case in run.cases]
    return sum(float((clip > threshold).double().mean()) for clip in clips) / len(clips)


class Small(FeatureExtractor):
    """Twelve pixel means in place of I3D, so that the tests take no minutes."""

    name, weights_sha256, preprocessing, num_features = "small", "none", "mean of quarters", 12

    def forward(self, clips: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(clips.float().mean(1), 2).flatten(1)


@pytest.fixture
def small_i3d(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Small()
    for module in (distances, inception_score):
        monkeypatch.setattr(module, "i3d_extractor", lambda mode, device: small)


def test_a_changed_option_or_a_changed_line_of_code_is_never_answered_from_the_cache(tmp_path):
    run = make_run(tmp_path / "run")
    values = [scoring.score(run, QUIET, [bright(tmp_path / "own", t)]).scores["bright"].value for t in (50, 200, 50)]
    assert values == pytest.approx([share(run, 50), share(run, 200), share(run, 50)], abs=1e-6)
    card = bright(tmp_path / "own", 50)
    (tmp_path / "own" / "bright.py").write_text(BRIGHT.replace(".mean()", ".mean() / 2"))
    assert scoring.score(run, QUIET, [card]).scores["bright"].value == pytest.approx(share(run, 50) / 2, abs=1e-6)


def test_features_of_a_changed_extractor_of_ones_own_are_extracted_again(tmp_path, cheap_metric):
    run = make_run(tmp_path / "run")
    before = scoring.score(run, QUIET, [cheap_metric]).scores["corners"]
    (tmp_path / "corners.py").write_text(
        Path(cheap_metric).with_suffix(".py").read_text().replace(".mean(1)", ".std(1)")
    )
    (tmp_path / "corners.toml").write_text(re.sub('".*/corners.py', '"corners.py', Path(cheap_metric).read_text()))
    after = scoring.score(run, QUIET, [str(tmp_path / "corners.toml")]).scores["corners"]
    assert before.extractor == after.extractor and before.value != after.value
    assert after.value == scoring.score(run, QUIET, [str(tmp_path / "corners.toml")]).scores["corners"].value


def test_an_unchanged_metric_is_answered_from_the_cache(tmp_path, monkeypatch):
    run, card = make_run(tmp_path / "run"), bright(tmp_path / "own", 50)
    first = scoring.score(run, QUIET, [card]).scores
    monkeypatch.setattr(FeatureCache, "put_json", lambda *given: pytest.fail("it was observed again"))
    assert scoring.score(run, QUIET, [card]).scores == first


def copied_kvd(folder: Path, degree: int) -> str:
    text = (Path(distances.__file__).parent / "cards" / "kvd.toml").read_text()
    (folder / f"kvd-{degree}.toml").write_text(text.replace("degree = 3", f"degree = {degree}"))
    return str(folder / f"kvd-{degree}.toml")


def test_a_copy_of_a_card_with_other_options_stands_beside_the_original(tmp_path, small_i3d):
    run = make_run(tmp_path / "run", "zoom")
    first = scoring.score(run, QUIET, ["kvd"]).scores["kvd"]
    both = scoring.score(run, QUIET, [copied_kvd(tmp_path, 2)]).scores
    assert set(both) == {"kvd", "kvd(degree=2)"} and both["kvd"] == first
    seen = scoring.observe_all(run, [load_metric("kvd", device="cpu")], QUIET, None)
    observed = seen.of(load_metric("kvd", device="cpu"), run.cases)
    real, made = torch.stack(observed.reference), torch.stack(observed.generated)
    kernel = fn.PolynomialKernel(degree=2)
    assert both["kvd(degree=2)"].value == fn.kernel_distance(real, made, kernel, groups=observed.design)
    assert both["kvd(degree=2)"].details["all_pairs"] == fn.kernel_distance(real, made, kernel)
    assert scoring.score(run, QUIET, [copied_kvd(tmp_path, 3)]).scores == both  # a copy that changes nothing
    table = write_report([tmp_path / "run"], tmp_path / "report")
    assert "KVD ↓" in table and "KVD (degree=2) ↓" in table


def test_runs_that_were_scored_with_other_options_are_not_compared(tmp_path, small_i3d):
    """Neither by a column with one best value, nor by --compare; a metric of one's own and a copied card alike."""
    for model, degree in (("zoom", 3), ("noise", 2)):
        cards = [copied_kvd(tmp_path, degree), bright(tmp_path / model, 10 * degree), "fvd"]
        scoring.score(make_run(tmp_path / model / "run", model, limit=12), QUIET, cards)
    paths = [tmp_path / model / "run" for model in ("zoom", "noise")]
    table = write_report(paths, tmp_path / "report")
    for heading in ("KVD ↓", "KVD (degree=2) ↓", "bright (threshold=30) ↑", "bright (threshold=20) ↑"):
        assert f"| {heading} " in table
    rows = list(csv.DictReader((tmp_path / "report" / "table.csv").read_text().splitlines()))
    assert {row["metric"] for row in rows if row["best"] == "True"} == {"fvd"}
    compared = compare_runs(paths[0], paths[1], QUIET)
    assert set(compared.found) == {"fvd"}
    assert set(compared.reasons) == {"kvd", "kvd(degree=2)", "bright"}
    assert "other options or other code (version 1" in compared.reasons["bright"]
    assert f"only {paths[1]} was scored with it" in compared.reasons["kvd(degree=2)"]
    assert "Not compared: bright: scored with other options" in to_markdown(compared, ["zoom", "noise"])


def test_every_set_metric_is_compared(tmp_path, small_i3d):
    """Against the definition: the difference of the two values, and the sign of what is better."""
    names = ["density", "precision", "recall", "coverage", "fvd_infinity", "fvd"]
    records = [scoring.score(make_run(tmp_path / m, m, limit=20), QUIET, names) for m in ("zoom", "noise")]
    compared = compare_runs(tmp_path / "zoom", tmp_path / "noise", QUIET)
    assert {"density", "fvd_infinity", "fvd"} <= set(compared.found)
    assert {*compared.found, *compared.reasons} == set(names)
    assert all("the same difference" in reason for reason in compared.reasons.values())  # recall is 0 everywhere
    for name, comparison in compared.found.items():
        one, two = (record.scores[name].value for record in records)
        assert one is not None and two is not None
        printed = comparison.difference if comparison.plain is None else comparison.plain
        assert printed == pytest.approx(one - two, rel=1e-9) and (name == "fvd") == (comparison.plain is not None)
    table = to_markdown(compared, ["zoom", "noise"])
    assert all(f"| {name} |" in table for name in compared.found)
    chosen = compare_runs(tmp_path / "zoom", tmp_path / "noise", QUIET, ["fvd", "dens*"])
    assert set(chosen.found) == {"fvd", "density"} and not chosen.reasons
    with pytest.raises(UserError, match='no run was scored with "fvdd"'):
        compare_runs(tmp_path / "zoom", tmp_path / "noise", QUIET, ["fvdd"])


def test_runs_that_were_scored_by_cards_of_ones_own_are_compared(tmp_path, cheap_metric):
    for model in ("zoom", "noise"):
        scoring.score(make_run(tmp_path / model, model), QUIET, [cheap_metric, bright(tmp_path / "own", 128)])
    compared = compare_runs(tmp_path / "zoom", tmp_path / "noise", QUIET)
    assert set(compared.found) == {"corners", "bright"} and not compared.reasons
    assert compared.found["corners"].difference < 0


def test_a_record_never_names_the_code_that_is_run(tmp_path, cheap_metric, monkeypatch):
    """On a machine that does not know the card, its owner gives it; one that is not the same any more is refused."""
    paths = [tmp_path / "zoom", tmp_path / "noise"]
    for path in paths:
        scoring.score(make_run(path, path.name), QUIET, [cheap_metric])
    by_record = compare_runs(paths[0], paths[1], QUIET).found
    for path in paths:  # as in a record of an older dcbench: then the features are needed, and so is the card
        kept = json.loads((path / "record.json").read_text())
        kept["scores"]["corners"]["replicates"] = None
        (path / "record.json").write_text(json.dumps(kept))
    monkeypatch.setenv("DCBENCH_CACHE", str(tmp_path / "another machine"))
    reason = compare_runs(paths[0], paths[1], QUIET).reasons["corners"]
    assert "give it: --metrics CARD.toml" in reason
    by_features = compare_runs(paths[0], paths[1], QUIET, [cheap_metric]).found
    assert set(by_features) == {"corners"}
    assert by_features["corners"].plain == pytest.approx(by_record["corners"].plain, rel=1e-9)
    assert by_features["corners"].p_value == pytest.approx(by_record["corners"].p_value, rel=1e-6)
    other = tmp_path / "corners.py"
    other.write_text(Path(cheap_metric).with_suffix(".py").read_text() + "# other\n")
    (tmp_path / "corners.toml").write_text(re.sub('".*/corners.py', '"corners.py', Path(cheap_metric).read_text()))
    assert (
        "its card or its code has changed"
        in compare_runs(paths[0], paths[1], QUIET, [str(tmp_path / "corners.toml")]).reasons["corners"]
    )


def test_a_metric_of_the_form_of_01_still_works(tmp_path):
    (tmp_path / "old.py").write_text(
        "from dcbench.metrics.per_clip import PerClipMetric\n"
        "class Extractor:\n    identity = {'name': 'old', 'weights_sha256': '', 'preprocessing': ''}\n"
        "class Old(PerClipMetric):\n    extractor = Extractor()\n"
        "    def extract(self, clips, images=None, prompts=None):\n"
        "        return [{'value': float(image.float().mean())} for image in images]\n"
        "def build(card, runtime):\n    return Old(card)\n"
    )
    (tmp_path / "old.toml").write_text(
        'name = "old"\ntitle = "Old"\nsummary = "s"\nkind = "per_clip"\n'
        'needs = ["image"]\nentry_point = "old.py:build"\n'
    )
    run = make_run(tmp_path / "run")
    expected = sum(float(run.image(case).float().mean()) for case in run.cases) / 4
    assert scoring.score(run, QUIET, [str(tmp_path / "old.toml")]).scores["old"].value == pytest.approx(expected)


def test_two_metrics_of_one_name_are_refused(tmp_path):
    cards = [bright(tmp_path / str(threshold), threshold) for threshold in (50, 200)]
    with pytest.raises(UserError, match="two metrics are called bright"):
        scoring.choose_metrics(cards)
    assert [card.name for card in scoring.choose_metrics([cards[0], cards[0], "judge_*", "judge_all"])] == [
        "bright", "judge_all", "judge_background", "judge_colour", "judge_motion", "judge_shape",
    ]  # fmt: skip


def test_what_is_no_metric_is_named(tmp_path):
    (tmp_path / "none.py").write_text("def build(card, runtime):\n    return 7\n")
    (tmp_path / "none.toml").write_text(
        'name = "none"\ntitle = "N"\nsummary = "s"\nkind = "set"\nentry_point = "none.py:build"\n'
    )
    with pytest.raises(UserError, match=r"none\.py:build made int, which is no metric"):
        scoring.score(make_run(tmp_path / "run", limit=1), QUIET, [str(tmp_path / "none.toml")])


def test_a_metric_sees_only_what_its_card_needs(tmp_path):
    """So a cached observation cannot depend on more than its key holds."""
    seen = []

    class Spy(SetDistance):
        in_workers = False

        def observe(self, view):
            seen.append(view)
            return super().observe(view)

    run = make_run(tmp_path / "run", limit=2)
    card = find_metric("fvd").model_copy(update={"needs": ("prompt", "fps")})
    scoring.observe_all(run, [Spy(card, Small(), score_frechet)], QUIET, None)
    assert len(seen) == 4 and all(view.image is view.reference is view.truth is None for view in seen)
    assert {view.prompt for view in seen} == {case.prompt for case in run.cases} and seen[0].fps == 25


def test_a_case_that_lacks_what_a_metric_needs_has_no_value_and_the_reason_is_said(tmp_path):
    """Two folders: a clip without a partner has no input image."""
    clips = {name: torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8) for name in ("both", "made", "real")}
    for folder, names in (("made", ("both", "made")), ("real", ("both", "real"))):
        for name in names:
            video.write_mp4(tmp_path / folder / f"{name}.mp4", clips[name], 8)
    folders = plan_folders(tmp_path / "made", tmp_path / "real", find_protocol("folders"), tmp_path / "run")
    assert [case.id for case in folders.cases] == ["both", "made", "real"]
    scores = scoring.score(folders, QUIET, ["ssim_image", "motion", "judge_shape"]).scores
    assert scores["ssim_image"].n_generated == 1
    assert scores["ssim_image"].warnings[0].startswith("1 clips do not count: ssim_image needs the input image")
    assert (scores["motion"].n_generated, scores["judge_shape"].value) == (2, None)
    assert "judge_shape needs what the clip should show" in (scores["judge_shape"].reason or "")
    rows = [json.loads(line) for line in (tmp_path / "run" / "per_clip.jsonl").read_text().splitlines()]
    assert [sorted(row) for row in rows] == [
        ["id", "motion", "reference", "ssim_image"],
        ["id", "motion"],
        ["id", "reference"],
    ]


@pytest.mark.parametrize("limit", [2, 3, 20])
def test_real_against_itself_is_at_distance_zero(tmp_path, small_i3d, limit):
    """At any number of clips. KVD with all pairs is not: a clip is there compared with itself."""
    names = ["fvd", "kvd", "kvd_all_pairs", *(["fvd_infinity"] if limit > 15 else [])]
    scores = scoring.score(make_run(tmp_path / "run", "real", limit=limit), QUIET, names).scores
    assert scores["fvd"].value == 0 and scores["kvd"].value == 0
    assert limit < 16 or scores["fvd_infinity"].value == pytest.approx(0, abs=1e-6)
    assert (scores["kvd_all_pairs"].value or 0) < 0
    assert scores["kvd"].details["all_pairs"] == scores["kvd_all_pairs"].value


def test_a_set_metric_of_ones_own_needs_a_statistic_alone(tmp_path):
    """Interval and comparison come from the base class, with the run's groups."""
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "from dcbench.metrics import FeatureExtractor, SetMetric\n"
        "class Light(FeatureExtractor):\n"
        "    name, weights_sha256, preprocessing, num_features = 'light', '', 'mean', 1\n"
        "    def forward(self, clips):\n        return clips.float().mean((1, 2, 3, 4))[:, None]\n"
        "class Gap(SetMetric):\n"
        "    def statistic(self, real, generated):\n        return float((real.mean() - generated.mean()).abs())\n"
        "def build(card, runtime):\n    return Gap(card, Light())\n"
    )
    (tmp_path / "own.toml").write_text(
        'name = "gap"\ntitle = "Gap"\nsummary = "s"\nkind = "set"\nhigher_is_better = false\n'
        'entry_point = "own.py:build"\n'
    )
    card = str(tmp_path / "own.toml")
    scores = [scoring.score(make_run(tmp_path / m, m, 8), QUIET, [card]).scores["gap"] for m in ("zoom", "noise")]
    assert all(score.ci95 and score.ci_method == "jackknife over 8 blocks" for score in scores)
    compared = compare_runs(tmp_path / "zoom", tmp_path / "noise", QUIET).found["gap"]
    values = [score.value for score in scores if score.value is not None]
    assert compared.difference == pytest.approx(values[0] - values[1]) and compared.n_groups == 8


def test_a_metric_of_one_set_needs_no_reference_clips(tmp_path, small_i3d):
    """The Inception Score of generated clips alone; with real clips, theirs is beside it. One pass serves FVD too."""
    original = Path(catalogue.__file__).parent / "metrics" / "cards" / "is_i3d.toml"
    card = tmp_path / "is.toml"
    card.write_text(original.read_text().replace("splits = 10", "splits = 2"))
    run, name = make_run(tmp_path / "run", limit=12), "is_i3d(splits=2)"
    both = scoring.score(run, QUIET, ["fvd", str(card)]).scores
    assert both[name].value and both[name].ci95 and (both[name].n_reference, both[name].n_generated) == (0, 12)
    assert both["fvd"].n_reference == 12 and both["fvd"].value
    metric = inception_score.build_is_i3d(find_metric(str(card)), QUIET.runtime())
    fvd = load_metric("fvd", device="cpu")
    seen = scoring.observe_all(run, [metric, fvd], QUIET, None)
    observed = seen.of(metric, run.cases)
    values = [both[name].value, both[name].details["reference_value"]]
    for side, value in zip((observed.generated, observed.reference), values, strict=True):
        assert value == inception_score.score_inception(torch.stack(side), observed.groups, 2).value
    seen.reference.clear()
    alone = scoring.score_all(seen, scoring.Metrics({name: metric}), run.cases, "")[name]
    assert alone.value == both[name].value and "reference_value" not in alone.details
    reason = scoring.score_all(seen, scoring.Metrics({"fvd": fvd}), run.cases, "")["fvd"].reason
    assert reason == "0 reference and 12 generated clips: nothing to compare"


def test_the_metrics_of_a_protocol_are_those_of_the_run_unless_others_are_named(tmp_path):
    """A metric without its weights has its reason there; named by the user, it is an error."""
    protocol = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}})
    runs = []
    for name, metrics in (("usual", ()), ("own", ("flicker", "pic", "ssim_image"))):
        chosen = protocol.model_copy(update={"metrics": metrics})
        run = planning.plan(
            find_model("zoom"), find_dataset("shapes"), chosen, out=tmp_path / name, limit=2, quiet=True
        )
        sample(run, QUIET)
        runs.append(run)
    assert runs[0].plan.fingerprint == runs[1].plan.fingerprint
    assert "metrics" not in runs[0].plan.protocol and runs[1].plan.protocol["metrics"] == list(runs[1].protocol.metrics)
    scores = scoring.score(runs[1], QUIET).scores
    assert set(scores) == {"flicker", "pic", "ssim_image"} and scores["flicker"].value
    assert scores["pic"].value is None and scores["pic"].reason
    again = scoring.score(planning.reopen(tmp_path / "own"), QUIET).scores
    assert again == scores
    named = scoring.score(runs[1], QUIET, ["loop_seam"]).scores
    assert set(named) == {*scores, "loop_seam"}  # those of before are kept, none is made anew
    with pytest.raises(UserError):
        scoring.score(runs[1], QUIET, ["pic"])
    wrong = dataclasses.replace(runs[0], protocol=protocol.model_copy(update={"metrics": ("flickr",)}))
    with pytest.raises(UserError, match=r'no metric is called "flickr"\. Did you mean "flicker"'):
        grid.run_all([wrong], QUIET, None)
