"""Bad input gives a message that says what to do, exit code 2, and never a traceback."""

import re
import sys
from pathlib import Path

import pytest
import torch

from dcbench import cli, protocol, video

RUN = ["run", "--model", "zoom", "--dataset", "shapes"]


def world(folder: Path) -> None:
    """Files that the cases below refer to, made in the working directory."""
    (folder / "empty").mkdir()
    (folder / "a_file").write_text("text")
    (folder / "bad.toml").write_text("name = \n")
    (folder / "odd.toml").write_text('name = "odd"\ntitle = "Odd"\nsummary = "s"\nentrypoint = "a:b"\n')
    (folder / "nowhere.toml").write_text('name = "n"\ntitle = "N"\nsummary = "s"\nentry_point = "no.such.room:load"\n')
    (folder / "bad.jsonl").write_text("{broken\n")
    (folder / "foreign.jsonl").write_text(
        '{"id":"cat","video":"cat.mp4","frames":[0],"fps":8,"frame_stride":1,"prompt":"","caption_index":-1,"seed":1}\n'
    )
    folders = (Path(protocol.__file__).parent / "protocols" / "folders.toml").read_text()
    (folder / "apart.toml").write_text(folders + 'reference_videos = "disjoint"\n')
    (folder / "drop_cuts.toml").write_text(folders + 'cuts = "drop"\n')
    (folder / "broken.py").write_text("class MyModel(:\n")
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("mine")
    clips = folder / "clips"
    clips.mkdir()
    video.write_lossless(clips / "wrong_name.mkv", torch.zeros(16, 3, 32, 32, dtype=torch.uint8), 8)


CASES = {
    "unknown model": (["run", "--model", "zoon", "--dataset", "shapes"], 'no model is called "zoon".*mean "zoom"'),
    "unknown dataset": (["run", "--model", "zoom", "--dataset", "ucf10"], 'no dataset.*Did you mean "ucf101"'),
    "unknown protocol": ([*RUN, "--protocol", "smok"], 'no protocol.*Did you mean "smoke"'),
    "unknown metric": ([*RUN, "--limit", "1", "--metrics", "fvdd"], 'no metric.*Did you mean "fvd"'),
    "dataset not here": (["run", "--model", "zoom", "--dataset", "ucf101"], "Get it from .* and give --data DIR"),
    "data without its layout": (
        ["run", "--model", "zoom", "--dataset", "msrvtt", "--data", "empty"],
        "(?s)empty.*(TestVideo|datainfo)",
    ),
    "data that does not exist": (
        ["run", "--model", "zoom", "--dataset", "ucf101", "--data", "no"],
        "no does not exist",
    ),
    "limit of nothing": ([*RUN, "--limit", "0"], "--limit 0: it must be at least 1"),
    "setting without a value": ([*RUN, "--set", "options.factor"], "takes key=value"),
    "setting that the card lacks": ([*RUN, "--set", "options.facter=2"], r'Did you mean "options\.factor"'),
    "setting of another type": ([*RUN, "--set", "options.factor=big"], "expected float, such as 1.25"),
    "setting out of range": ([*RUN, "--limit", "1", "--set", "options.factor=0.5"], "between 1 and 16"),
    "no GPU": ([*RUN, "--limit", "1", "--device", "cuda"], "finds no GPU. Use --device cpu"),
    "no such device": ([*RUN, "--limit", "1", "--device", "tpux"], "--device tpux.*For example: auto, cpu, cuda"),
    "unknown dtype": ([*RUN, "--dtype", "float8"], "expected float16, bfloat16 or float32"),
    "manifest that is not there": ([*RUN, "--manifest", "none.jsonl"], "cannot read none.jsonl"),
    "manifest that is no JSON": ([*RUN, "--manifest", "bad.jsonl"], "bad.jsonl, line 1: not a JSON object"),
    "manifest of another dataset": ([*RUN, "--manifest", "foreign.jsonl"], "1 of 1 clips are not in this dataset"),
    "out is a file": ([*RUN, "--limit", "1", "--out", "a_file"], "a_file.*Choose another: --out DIR"),
    "out holds something else": ([*RUN, "--limit", "1", "--out", "other"], "holds other files.*--out DIR"),
    "closed system": (["run", "--model", "pikalabs", "--dataset", "shapes"], "put its clips into a folder"),
    "card that is no TOML": (["run", "--model", "bad.toml", "--dataset", "shapes"], "bad.toml is not valid TOML"),
    "card with an unknown key": (["run", "--model", "odd.toml", "--dataset", "shapes"], 'Did you mean "entry_point"'),
    "card of code that is not there": (
        ["run", "--model", "nowhere.toml", "--dataset", "shapes", "--limit", "1"],
        "entry_point.*cannot be loaded",
    ),
    "model file with an error": (
        ["run", "--model", "broken.py:MyModel", "--dataset", "shapes", "--limit", "1"],
        "cannot be loaded: .*syntax",
    ),
    "clips of the wrong name": (
        ["run", "--model", "clips", "--dataset", "shapes", "--limit", "2"],
        r"2 of 2 clips have no file.*expected 'test-\d+\.mp4'.*wrong_name",
    ),
    "folder without videos": (["score", "clips", "--reference", "empty"], "empty.*no video"),
    "score without a reference": (["score", "clips"], "give --reference FOLDER"),
    "score of a missing folder": (["score", "nothing", "--reference", "clips"], "nothing is no folder"),
    "report of no run": (["report", "empty"], "no record at empty"),
    "list of nothing known": (["list", "model"], 'Did you mean "models"'),
    "layout that is not known": (
        ["data", "make", "shapes", "--layout", "ucf", "--videos", "4", "--out", "made"],
        'Did you mean "ucf101"',
    ),
    "two folders and videos apart": (
        ["score", "clips", "--reference", "clips", "--protocol", "apart.toml"],
        'reference_videos = "disjoint" chooses reference videos, but here --reference names them',
    ),
    "two folders and videos without cuts": (
        ["score", "clips", "--reference", "clips", "--protocol", "drop_cuts.toml"],
        'cuts = "drop" replaces reference videos, but here --reference names them',
    ),
    "split that is not there": (["data", "verify", "shapes", "--split", "tset"], 'Did you mean "test"'),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_says_what_to_do(case, in_tmp, monkeypatch, capsys):
    arguments, message = CASES[case]
    world(in_tmp)
    monkeypatch.delenv("DCBENCH_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["dcbench", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert said.startswith("dcbench: ")
    assert "Traceback" not in said
    assert re.search(message, said, re.IGNORECASE), said
