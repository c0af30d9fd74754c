"""What every command line has: its version, help by -h, completion, a list of all, a doctor that says what to type."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dcbench
from dcbench import machine, weights
from dcbench.catalogue import Card, find_metric
from dcbench.cli import app
from dcbench.cli.evaluate import _lines
from dcbench.cli.options import completes
from dcbench.cli.tools import _advice
from dcbench.errors import UserError


def shown(*arguments: str, **more) -> str:
    done = CliRunner().invoke(app, list(arguments), prog_name="dcbench", catch_exceptions=False, **more)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_version():
    assert shown("--version") == f"dcbench {dcbench.__version__}\n"


@pytest.mark.parametrize("command", [(), ("run",), ("list",), ("weights", "fetch"), ("doctor", "protocol"), ("probe",)])
def test_help_by_its_short_name(command):
    text = shown(*command, "-h")
    assert text == shown(*command, "--help") and text.startswith(f"Usage: dcbench {' '.join(command)}".rstrip())


def test_the_shell_completes_commands_and_names():
    assert "--install-completion" in shown("--help")
    for words, wanted in (("dcbench rep", "report"), ("dcbench run --model dynamicrafter-tiny-", "-interp")):
        index = str(len(words.split()) - 1)
        environment = {"_DCBENCH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": index}
        assert CliRunner().invoke(app, [], prog_name="dcbench", env=environment).output.strip().endswith(wanted)
    assert (
        completes("protocols")("tiny") == ["tiny-ends", "tiny-first", "tiny"] and completes("datasets")("/home") == []
    )


def test_list_alone_lists_everything_with_other_names():
    text = shown("list")
    for kind, name in (("models", "dynamicrafter"), ("datasets", "ucf101"), ("metrics", "fvd"), ("protocols", "tiny")):
        below = text[text.index(f"{kind}\n") :]
        assert f" {name} " in below
    line = next(line for line in text.splitlines() if line.startswith("  dynamicrafter "))
    assert line.endswith("(also: dynamicrafter-256)")
    everything = json.loads(shown("list", "--json"))
    assert list(everything) == ["models", "datasets", "metrics", "protocols"]
    assert json.loads(shown("list", "datasets", "--json")) == everything["datasets"]


def test_a_title_moves_no_cursor():
    assert list(_lines({"x": Card(name="x", title="\x1b[2J", summary="a\nb")})) == ["- x  �[2J: a b"]


def test_a_file_name_moves_no_cursor(tmp_path):
    """The names of videos, in what `data verify` prints."""
    (tmp_path / "a\x1b[2Jb.mp4").write_bytes(b"no video")
    done = CliRunner().invoke(app, ["data", "verify", "folder", "--data", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 1 and "a�[2Jb.mp4" in done.output and "\x1b" not in done.output
    assert len(done.output.splitlines()) > 2


def test_the_doctor_says_what_to_type_once_for_each_file(monkeypatch, tmp_path):
    """Three metrics need one file; that of PIC has no published size."""
    importlib.import_module("dcbench.runs.planning")  # before the patch: modules keep the true function
    importlib.import_module("dcbench.models.baselines.diffusers")
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(tmp_path))

    def entry_point(card):
        needs = [source for source in card.weights if card.name.startswith("clip_") or card.name == "pic"]
        return lambda card, runtime: weights.fetch(needs[0], offline=True) if needs else None

    monkeypatch.setattr("dcbench.catalogue.load_entry_point", entry_point)
    text = shown("doctor")
    assert "NAME" not in text and "unknown size" not in text
    line = next(line for line in text.splitlines() if "clip_text" in line)
    assert line.startswith("  missing  clip_frames, clip_image, clip_text: ") and "weights fetch clip_frames" in line
    name = find_metric("clip_text").weights[0].name
    assert text.count(f"{name} is missing") == 1 and text.count(f" {name}: ") == 0
    assert "dcbench weights fetch pic" in text and "  ready    fvd" in text


def test_advice_without_a_file_stays_as_it_is():
    error = UserError("UCF-101 is not here: no --data.\nGet it from x, from y")
    assert _advice(str(error), "ucf101") == "UCF-101 is not here: no --data.\n           Get it from x, from y"


# --- the processor ----------------------------------------------------------------------------------------------------


def test_the_processor_has_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel\t\t: 1\nmodel name\t: AMD EPYC  7763 64-Core\nflags : a\n")
    assert machine.hardware("cpu") == "AMD EPYC 7763 64-Core"
    (tmp_path / "cpuinfo").write_text("processor : 0\nCPU implementer : 0x41\n")  # as on ARM
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert machine.hardware("cpu") == "aarch64"


def test_the_processor_of_a_mac_has_its_name(monkeypatch, tmp_path):
    program = tmp_path / "sysctl"
    program.write_text('#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo "Apple M2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(machine, "CPUINFO", Path(tmp_path / "none"))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.processor() == "Apple M2"
