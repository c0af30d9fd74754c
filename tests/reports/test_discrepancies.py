"""Published numbers of one model, data set and metric that differ stand together, with their protocols."""

import csv
import io
import sys
from pathlib import Path

import pytest

from dcbench import cli
from dcbench.catalogue import ModelCard, Published, cards, find_model
from dcbench.errors import UserError
from dcbench.reports.discrepancies import Discrepancy, find_discrepancies, to_csv, to_markdown, write_discrepancies


def of(model: str, dataset: str, metric: str) -> Discrepancy:
    return next(one for one in find_discrepancies([model]) if (one.dataset, one.metric) == (dataset, metric))


def test_the_five_fvds_of_dynamicrafter_on_msrvtt_are_there() -> None:
    text = to_markdown([of("dynamicrafter", "msrvtt", "fvd")])
    assert text.startswith("DynamiCrafter on msrvtt, FVD ↓: 219.31 to 486.37, 2.22 times\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    values = [row[0] for row in rows[2:7]]
    assert values == ["219.31", "234.66", "271.63", "328.00", "486.37"]
    assert [row[1] for row in rows[2:4]] == ["consisti2v", "dynamicrafter-paper"]
    assert {row[2] for row in rows[2:7]} == {"verified", "secondary"} and "issue 10" in rows[5][3]


def test_protocols_of_these_names_are_compared_on_that_data_set() -> None:
    """Both are dcbench's: on MSR-VTT they differ in other fields than on UCF-101."""
    choices = of("dynamicrafter", "msrvtt", "fvd").choices
    assert choices["condition"] == {"consisti2v": "random", "dynamicrafter-paper": "first"}
    assert choices["num_clips"] == {"consisti2v": 2990, "dynamicrafter-paper": 2048}
    assert not {"name", "version", "frame_stride", "height"} & set(choices)
    ucf = of("dynamicrafter", "ucf101", "fvd").choices
    assert "num_clips" not in ucf and ucf["selection"] == {"consisti2v": "by_class", "dynamicrafter-paper": "random"}
    text = to_markdown([of("dynamicrafter", "ucf101", "fvd")])
    assert "prompts = sentence" in text and "prompts = class-name" in text
    assert of("dynamicrafter", "msrvtt", "pic").choices == {}  # of pix2gif dcbench has no protocol


def test_one_name_with_two_numbers_across_papers() -> None:
    film = of("film", "vidim-davis-7", "fvd")
    assert [(entry.value, entry.protocol, entry.status) for entry in film.entries] == [
        (162.86, "framer", "quoted"),
        (214.8, "vidim", "quoted"),
    ]
    assert {one.model.name for one in find_discrepancies()} >= {"dynamicrafter", "i2vgen-xl", "svd", "film", "ldmvfi"}


def test_equal_numbers_and_single_ones_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(value: float, protocol: str, metric: str = "fvd") -> Published:
        return Published(dataset="d", metric=metric, value=value, protocol=protocol, source="s|x")

    own = ModelCard(name="own", title="O*wn", summary="s", published=(entry(1, "a"), entry(1, "b"), entry(2, "a", "m")))
    monkeypatch.setattr("dcbench.reports.discrepancies.cards", lambda kind: {"own": own})
    assert find_discrepancies() == []
    with pytest.raises(UserError, match="no two published numbers of any model"):
        write_discrepancies([])
    own = own.model_copy(update={"published": (*own.published, entry(0, "c"))})
    text = to_markdown(find_discrepancies())
    assert "O\\*wn on d, FVD ↓: 0.0000 to 1.0000\n" in text and "s\\|x" in text  # no ratio to zero; text stays text


def test_csv_has_every_number_in_full() -> None:
    found = find_discrepancies(["i2vgen-xl"])
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert len(rows) == sum(len(one.entries) for one in found)
    assert ["i2vgen-xl", "msrvtt", "fvd", "592.13", "follow-your-click", "verified"] in [
        list(r.values())[:6] for r in rows
    ]


def test_an_unknown_model_has_a_near_match() -> None:
    with pytest.raises(UserError, match=r'no model is called "dynamicrafte"\..*dynamicrafter'):
        find_discrepancies(["dynamicrafte"])


def test_each_model_without_code_says_how_to_score_its_clips() -> None:
    for name in ("film", "ldmvfi", "framer", "vidim", "generative-inbetweening", "trf", "sora-2", "framebridge"):
        card = find_model(name)
        assert not card.available and "give `--model DIR`" in card.unavailable and card.published
    assert {e.status for card in cards("models").values() if isinstance(card, ModelCard) for e in card.published} == {
        "verified",
        "secondary",
        "quoted",
    }


def report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dcbench", "report", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_command_needs_no_run_and_writes_files_if_a_folder_is_given(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(monkeypatch, "--discrepancies", "dynamicrafter") == 0
    shown = capsys.readouterr().out
    assert "486.37" in shown and "| field " in shown and not list(in_tmp.iterdir())
    assert report(monkeypatch, "--discrepancies", "film", "svd", "--out", "two") == 0
    assert sorted(path.name for path in (in_tmp / "two").iterdir()) == ["discrepancies.csv", "discrepancies.md"]
    assert (in_tmp / "two" / "discrepancies.md").read_text() == to_markdown(find_discrepancies(["film", "svd"]))


def test_wrong_calls_say_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ((), "give run directories or record.json files"),
        (("--discrepancies", "dynamicrafte"), 'Did you mean "dynamicrafter"'),
        (("--discrepancies", "still"), "no two published numbers of still"),
        (("--discrepancies", "--metrics", "fvd"), "--metrics cannot be used with --discrepancies"),
    ):
        assert report(monkeypatch, *arguments) != 0
        assert message in capsys.readouterr().err
