"""Tables: only comparable numbers are compared, and every mark, footnote and escape is there."""

import csv
import io
import math

import pytest
from records import EXTRACTOR, markdown, published, run, score, without_blocks

from dcbench.errors import UserError
from dcbench.files import write_json
from dcbench.metrics.statistics import jackknife, student_p
from dcbench.record import Excluded, Failure, Replicates
from dcbench.reports.notations import to_csv, to_latex, to_markdown
from dcbench.reports.results import Result, load_results, name_runs
from dcbench.reports.tables import choose, chosen_metrics, layout, numbers, show_value


def best(runs: list[Result], metric: str = "fvd") -> list[str]:
    return [number.model for number in numbers(runs, {}) if number.metric == metric and number.best]


# --- what is compared -------------------------------------------------------------------------------------------------


def test_the_lowest_fvd_and_the_highest_pic_are_best():
    runs = [
        run("A", {"fvd": score(300), "pic": score(0.6, "pic"), "motion": score(9, "motion")}),
        run("B", {"fvd": score(200), "pic": score(0.7, "pic"), "motion": score(1, "motion")}),
    ]
    assert best(runs) == ["B"] and best(runs, "pic") == ["B"]
    assert best(runs, "motion") == []  # neither direction is better
    text = markdown(runs)
    assert "**200.00**" in text and "**300.00**" not in text and "**0.7000**" in text
    assert "FVD ↓" in text and "PIC ↑" in text and "| Motion " in text


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "beef"},
        {"n_generated": 2047},
        {"n_reference": 2990},
        {"extractor": {**EXTRACTOR, "preprocessing": "crop"}},
        {"extractor": {**EXTRACTOR, "weights_sha256": "cd" * 32}},
    ],
)
def test_trap_13_two_protocols_in_one_table_are_never_compared(change):
    runs = [run("A", {"fvd": score(300)}), run("B", {"fvd": score(200, **change)})]
    assert best(runs) == []
    assert "**" not in markdown(runs)


def test_different_fingerprints_are_marked_apart():
    runs = [run("A", {"fvd": score(300)}), run("B", {"fvd": score(200, fingerprint="beef")}, fingerprint="beef")]
    text = markdown(runs)
    assert "2048 [1]" in text and "2048 [2]" in text
    assert "[1] Fingerprint f00d (dynamicrafter-paper v1)" in text and "[2] Fingerprint beef" in text


def test_measured_and_published_rows_are_never_compared():
    """Rows of one published tag are compared with each other, under that tag alone."""
    cards = {"a": published(), "b": published("Other", value=400), "c": published("Third", "consisti2v", 1.0)}
    runs = [run("A", {"fvd": score(450)}), run("B", {"fvd": score(460)})]
    found = numbers(runs, cards)
    assert [n.model for n in found if n.best] == ["A"]  # published numbers have no test, so none is marked
    text = to_markdown(layout(runs, found))
    at = [
        text.index(part)
        for part in (
            "*dynamicrafter-paper v1*",
            "| A ",
            "*published, consisti2v*",
            "Third",
            "*published, dynamicrafter-paper*",
            "Theirs",
        )
    ]
    assert at == sorted(at)
    assert "Source: arXiv 1 Table 1." in text and "compare them only within their own block" in text


def test_published_numbers_of_other_datasets_and_secondary_ones():
    assert "published" not in markdown([run("A", {"fvd": score(1)}, dataset="msrvtt")], {"a": published()})
    assert "Source: arXiv 1 Table 1 (secondary)." in markdown(
        [run("A", {"fvd": score(1)})], {"a": published(status="secondary")}
    )


def test_the_catalogue_gives_the_published_table():
    """The paper's Table 1 stands below a measured run. Nothing in it is bold: published numbers have no test."""
    found = numbers([run("A", {"fvd": score(450)})])
    theirs = {n.model: n for n in found if n.metric == "fvd" and n.block == "published, dynamicrafter-paper"}
    assert theirs["DynamiCrafter"].value == min(n.value for n in theirs.values() if n.value is not None)
    assert len(theirs) == 3 and not any(n.best for n in found)


def test_equal_values_share_the_place_and_alone_nobody_is_best():
    assert best([run("A", {"fvd": score(2)})]) == []
    assert best([run("A", {"fvd": score(2)}), run("B", {"fvd": score(2)})]) == []
    assert best([run("A", {"fvd": score(2)}), run("B", {"fvd": score(2)}), run("C", {"fvd": score(3)})]) == ["A", "B"]


def test_bold_is_what_a_test_does_not_tell_from_the_best():
    """A is the smallest, B cannot be told from it, C can; where nothing can be told, nothing is bold."""
    runs = [run("A", {"fvd": score(200, spread=0.05)}), run("B", {"fvd": score(203, spread=0.05)})]
    assert best(runs) == []
    text = markdown(runs)
    assert "**" not in text and "No model is told from the best by a paired test: FVD." in text
    assert "in 80 % of such tests, the true difference must be at least: FVD " in text
    runs.append(run("C", {"fvd": score(900, spread=0.05)}))
    assert best(runs) == ["A", "B"] and "all that a paired test does not tell from it" in markdown(runs)
    least = {n.model: n.detectable for n in numbers(runs, {})}
    assert least["B"] and f"must be at least: FVD {show_value(least['B'])}." in markdown(runs)  # of B, not of C


def test_holm_counts_the_models_of_a_column():
    """One of many models at p = 0.03 is not told from the best: with ten, one such p is common."""

    def shifted(title: str, gap: float) -> Result:
        blocks = [(8.0, 200 + gap + 0.2 * gap * math.sin(k)) for k in range(8)]
        return run(title, {"fvd": score(200 + gap, replicates=Replicates(design="d", strata=[blocks]))})

    base = run("A", {"fvd": score(200, replicates=Replicates(design="d", strata=[[(8.0, 200.0)] * 8]))})
    error = jackknife(1.0, Replicates(design="d", strata=[[(8.0, 1 + 0.2 * math.sin(k)) for k in range(8)]]))
    p = student_p(1.0, error.standard_error, error.degrees)
    assert 0.005 < p < 0.05
    assert best([base, shifted("B", 1.0)]) == ["A"]
    count = math.ceil(0.05 / p) + 1
    assert best([base, *(shifted(f"B{k}", 1.0 + k / 1000) for k in range(count))]) == []


def test_fvd_is_ranked_without_its_bias():
    """B copies its input, so its bias is small: the plain value is lower, the unbiased one is not."""

    def biased(title: str, value: float, slope: float) -> Result:
        blocks = [(8.0, value + slope / 7 + 0.01 * math.sin(3 * k + slope)) for k in range(8)]
        return run(title, {"fvd": score(value, replicates=Replicates(design="d", strata=[blocks], biased=True))})

    assert best([biased("A", 300, 200.0), biased("B", 250, 20.0)]) == ["A"]  # 100 and 230 without bias


def test_scores_of_other_clips_or_older_records_are_not_told_apart():
    assert best([run("A", {"fvd": score(1)}), run("B", {"fvd": score(2, replicates=without_blocks(2, 1, "e"))})]) == []
    assert best([run("A", {"fvd": score(1)}), run("B", {"fvd": score(2, replicates=None)})]) == []


def test_the_sample_size_names_source_videos():
    text = markdown([run("A", {"fvd": score(1, n_groups=512)}), run("B", {"fvd": score(2, n_groups=512)})])
    assert "2048 (512 videos)" in text
    rows = list(csv.DictReader(io.StringIO(to_csv(numbers([run("A", {"fvd": score(1, n_groups=512)})], {})))))
    assert rows[0]["n_groups"] == "512"


def test_the_real_clips_are_a_bound_and_no_contestant():
    real = run("Real", {"fvd": score(0)}, model={"conditions_on": ["reference"]})
    runs = [real, run("A", {"fvd": score(300)}), run("B", {"fvd": score(200)})]
    assert best(runs) == ["B"]
    assert "Real [1]" in markdown(runs) and "[1] Returns the reference clip itself" in markdown(runs)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_metrics_and_published_rows_are_chosen():
    runs = [run("A", {"fvd": score(1), "kvd": score(2, "kvd"), "pic": score(0.5, "pic", warnings=["about PIC"])})]
    cards = {"a": published("Theirs"), "b": published("Other", "consisti2v")}
    found = numbers(runs, cards)

    def shown(metrics: tuple[str, ...] = (), tags: str = "all") -> list[tuple[str, str]]:
        return [(number.model, number.metric) for number in choose(runs, found, metrics, tags)]

    ours = [("A", "fvd"), ("A", "kvd"), ("A", "pic")]
    assert shown() == [*ours, ("Theirs", "fvd"), ("Other", "fvd")]
    assert shown(tags="none") == ours and shown(tags="same-protocol") == [*ours, ("Theirs", "fvd")]
    assert shown(("kvd",)) == [("A", "kvd")]
    assert shown(("*vd",), "none") == ours[:2]
    text = to_markdown(layout(runs, choose(runs, found, ("fvd",), "none")))
    assert "KVD" not in text and "about PIC" not in text and "Theirs" not in text
    with pytest.raises(UserError, match=r'no run was scored with "kdv"\. Did you mean "kvd"'):
        shown(("kdv",))
    with pytest.raises(UserError, match="expected none, same-protocol, all"):
        shown(tags="some")


def test_a_metric_is_chosen_with_all_its_options_and_by_its_card(tmp_path):
    (tmp_path / "own.toml").write_text(
        'name = "own"\ntitle = "Own"\nsummary = "s"\nkind = "set"\nhigher_is_better = true\nentry_point = "a:b"\n'
    )
    known = ["fvd", "kvd", "kvd(degree=2)", "own"]
    assert chosen_metrics(["kvd"], known) == ["kvd", "kvd(degree=2)"]
    assert chosen_metrics(["kvd(degree=2)", str(tmp_path / "own.toml")], known) == ["kvd(degree=2)", "own"]


def test_short_footnotes_have_no_advice_and_keep_what_a_mark_means():
    lost = score(None, "pic", reason="x.pt is missing. Get it: dcbench weights fetch pic")
    runs = [
        run("A", {"fvd": score(1, ci95=(0.5, 1.5), ci_method="jackknife", warnings=["few clips"])}),
        run("B", {"fvd": score(2), "pic": lost}, failures=[Failure(id="v1", reason="a.avi: broken")]),
        run("C", {"pic": score(0.5, "pic")}),
    ]
    found = numbers(runs, {"a": published()})
    short, full = (layout(runs, found, full_notes=full).notes for full in (False, True))
    assert not [note for note in short if "weights fetch" in note or "few clips" in note or "sha256" in note]
    for part in ("not computed", "Source: arXiv", "In brackets: 95 % interval.", "Bold: ", "1 clips are lost"):
        assert any(part in note for note in short), part
    assert any("weights fetch" in note for note in full) and len(full) > len(short)


# --- marks and footnotes ----------------------------------------------------------------------------------------------


def test_null_score_shows_its_reason():
    runs = [run("A", {"fvd": score(1), "pic": score(None, "pic", reason="weights are missing.\n  put them there")})]
    text = markdown(runs)
    assert "PIC: not computed: weights are missing." in text and "put them there" not in text
    both = [*runs, run("B", {"fvd": score(2), "pic": score(0.5, "pic")})]
    assert "– [" in markdown(both)


def test_a_model_that_hardly_moves_is_marked():
    still = run("Still", {"fvd": score(1), "motion": score(0.05, "motion", details={"reference_value": 1.0})})
    moving = run("Moving", {"fvd": score(2), "motion": score(0.2, "motion", details={"reference_value": 1.0})})
    text = markdown([still, moving])
    assert "| Still [1] " in text and "| Moving   " in text
    assert "[1] Moves less than a tenth as much as the real clips" in text


def test_sizes_intervals_and_lost_clips_are_told():
    runs = [
        run(
            "A",
            {
                "fvd": score(
                    234.661, ci95=(220.5, 250.25), ci_method="jackknife", n_generated=2000, warnings=["few clips"]
                )
            },
            failures=[Failure(id="v1", reason="a.avi: broken")],
            excluded=[
                Excluded(id=f"v{k}", reason="", rule=rule) for k, rule in enumerate(("short", "unreadable", "cut"), 2)
            ],
        )
    ]
    text = markdown(runs)
    assert "234.66 [220.50, 250.25]" in text and "2000 vs 2048" in text
    for part in (
        "95 % interval (jackknife)",
        "1 clips are lost and not counted, for example v1 (a.avi: broken)",
        "1 videos are too short",
        "1 videos have a cut inside and were replaced, for example v4.",
        "FVD: few clips",
        "FVD: i3d, weights sha256 abababababab, preprocessing squash.",
    ):
        assert part in text


def test_runs_of_one_model_are_told_apart_by_what_differs():
    runs = [
        run("A", {"fvd": score(1)}, path="r1", model={"sampling": {"steps": 50, "eta": 1.0}}),
        run("A", {"fvd": score(2)}, path="r2", model={"sampling": {"steps": 25, "eta": 1.0}}),
        run("A", {"fvd": score(2)}, path="r3", dataset="msrvtt"),
        run("B", {"fvd": score(2)}, path="r4"),
        run("B", {"fvd": score(2)}, path="r5"),
    ]
    assert list(name_runs(runs).values()) == ["A (steps 50)", "A (steps 25)", "A", "B (r4)", "B (r5)"]


def test_two_datasets_share_a_row_and_keep_their_columns():
    runs = [
        run("A", {"fvd": score(1)}, path="r1"),
        run("A", {"fvd": score(2), "kvd": score(3, "kvd")}, path="r2", dataset="msrvtt", fingerprint="cafe"),
    ]
    table = layout(runs, numbers(runs, {}))
    assert table.columns == [
        ("ucf101", "FVD ↓"),
        ("ucf101", "N"),
        ("msrvtt", "FVD ↓"),
        ("msrvtt", "KVD ↓"),
        ("msrvtt", "N"),
    ]
    ((_, rows),) = table.blocks
    assert [cell.text for cell in rows[0][1]] == ["1.0000", "2048", "2.0000", "3.0000", "2048"]
    text = to_markdown(table)
    assert text.index("Dataset: ucf101") < text.index("1.0000") < text.index("Dataset: msrvtt") < text.index("3.0000")
    assert "KVD" not in text[: text.index("Dataset: msrvtt")]
    assert r"\multicolumn{2}{c}{ucf101} & \multicolumn{3}{c}{msrvtt}" in to_latex(table)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (234.664, "234.66"),
        (0.0, "0.0000"),
        (1e-9, "0.0000"),
        (0.58031, "0.5803"),
        (-6.82461, "-6.8246"),
        (1.6e-5, "1.6e-05"),
    ],
)
def test_values_are_shown_as_papers_do(value, text):
    assert show_value(value) == text


# --- loading ----------------------------------------------------------------------------------------------------------


def test_records_are_loaded_once_each_and_errors_are_for_the_user(tmp_path):
    for name in ("one", "two"):
        write_json(tmp_path / name / "record.json", run(name, {"fvd": score(1)}).record.model_dump(mode="json"))
    loaded = load_results([tmp_path / "two", tmp_path / "one" / "record.json", tmp_path / "two"])
    assert [entry.title for entry in loaded] == ["two", "one"]
    with pytest.raises(UserError, match="no record at"):
        load_results([tmp_path / "three"])
    with pytest.raises(UserError, match="no runs were given"):
        load_results([])
    (tmp_path / "one" / "record.json").write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="schema version 99"):
        load_results([tmp_path / "one"])
