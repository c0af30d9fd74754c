"""Programs as models: in another environment, crashing, writing too little, hanging; each mended and resumed."""

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import venv
from pathlib import Path

import numpy as np
import pytest
import torch

from dcbench import video
from dcbench.catalogue import find_dataset, find_model, with_overrides
from dcbench.cli import main
from dcbench.errors import UserError
from dcbench.models.base import Request, Runtime
from dcbench.models.baselines import adapters, external
from dcbench.protocol import find_protocol
from dcbench.runs import planning, sampling
from dcbench.runs.directory import RunDirectory
from dcbench.runs.run import Options, Run

# A model in the standard library alone: frame k of a clip is the grey (seed + k) % 256. `fault.txt` beside it says
# what goes wrong with which clip.
PROGRAM = """
import json, os, struct, subprocess, sys, time, zlib

def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

def png(level, size=32):
    rows = b"".join(b"\\0" + bytes([level]) * size * 3 for _ in range(size))
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\\x89PNG\\r\\n\\x1a\\n" + parts

requests, output, fault_file = sys.argv[1:]
fault = json.load(open(fault_file))
print("python", sys.prefix, flush=True)
for number, line in enumerate(open(requests)):
    request = json.loads(line)
    assert os.path.getsize(request["image"]) > 0
    here = fault.get("clip") in (number, request["clip_id"])
    if here and fault["kind"] == "crash":
        sys.exit("CUDA error: out of imagination")
    if here and fault["kind"] == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open(fault_file + ".child", "w").write(str(child.pid))
        time.sleep(600)
    folder = os.path.join(output, request["clip_id"])
    os.makedirs(folder, exist_ok=True)
    for k in range(request["num_frames"] - (here and fault["kind"] == "short")):
        with open(os.path.join(folder, "%05d.png" % k), "wb") as file:
            file.write(png((request["seed"] + k) % 256))
    with open(fault_file + ".made", "a") as file:
        file.write(request["clip_id"] + "\\n")
"""


@pytest.fixture(scope="session")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of a virtual environment that has nothing but the standard library."""
    folder = tmp_path_factory.mktemp("environment") / "its own"  # with a space in its path
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    check = "import importlib.util as u; raise SystemExit(any(u.find_spec(n) for n in ('torch', 'numpy', 'dcbench')))"
    assert subprocess.run([python, "-c", check], cwd=folder).returncode == 0
    return str(python)


@pytest.fixture
def program(tmp_path: Path, other_python: str):
    """Writes the program and its card; `fault(...)` says what goes wrong from now on."""
    (tmp_path / "model.py").write_text(PROGRAM)
    (tmp_path / "model.toml").write_text(
        f'name = "grey"\ntitle = "Grey"\nsummary = "Greys"\nentry_point = "{external.__name__}:load"\n[options]\n'
        f'command = "{{python}} {tmp_path}/model.py {{requests}} {{output}} {tmp_path}/fault.txt"\n'
        f'python = "{other_python}"\ntimeout = 2.0\ntemporal = "first"\n'
    )

    class Program:
        folder, card, made = tmp_path, str(tmp_path / "model.toml"), tmp_path / "fault.txt.made"

        def fault(self, kind: str = "", clip: int | str | None = None) -> None:
            (tmp_path / "fault.txt").write_text(json.dumps({"kind": kind, "clip": clip}))

        def times_made(self) -> list[str]:
            return self.made.read_text().split() if self.made.is_file() else []

    made = Program()
    made.fault()
    return made


def plan(program, limit: int = 4) -> Run:
    protocol = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}})
    card = find_model(program.card)
    return planning.plan(card, find_dataset("shapes"), protocol, out=program.folder / "run", limit=limit, quiet=True)


QUIET = Options(device="cpu", quiet=True)


def is_right(job: Run) -> bool:
    """Every clip is there, and is that of its own request."""
    clips = {entry.id: job.generated(entry) for entry in job.cases}
    return all(
        clips[entry.id][:, 0, 0, 0].tolist() == [(entry.seed + k) % 256 for k in range(16)] for entry in job.cases
    )


def test_a_program_in_another_environment_is_run_once_for_all_clips(program, other_python):
    job = plan(program)
    sampling.sample(job, QUIET)
    assert is_right(job)
    assert program.times_made() == [entry.id for entry in job.cases]
    log = (job.directory.path / "work" / "program-0.log").read_text()
    assert log.count("python ") == 1
    assert str(Path(other_python).parent.parent) in log
    row = next(iter(job.directory.finished_samples().values()))
    assert row["seconds"] > 0.01  # of the program, not only of reading its clips
    assert row["dtype"] == "of an external program"
    assert row["peak_memory_mb"] > 1


def test_a_crash_on_the_third_clip_keeps_two_and_resumes(program, monkeypatch, capfd):
    """Through the command line, as a user would meet it."""
    arguments = ["sample", "--model", program.card, "--dataset", "shapes", "--limit", "4"]
    arguments += ["--out", str(program.folder / "run"), "--device", "cpu"]

    def command() -> int:
        monkeypatch.setattr(sys, "argv", ["dcbench", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    program.fault("crash", 2)
    assert command() == 2
    said = capfd.readouterr().err
    assert "has no output; the program ended with code 1" in said
    assert "CUDA error: out of imagination" in said
    assert "Traceback" not in said
    directory = RunDirectory(program.folder / "run")
    first = set(directory.finished_samples())
    assert len(first) == 2
    program.fault()
    assert command() == 0
    assert len(directory.finished_samples()) == 4
    assert len(program.times_made()) == 4  # nothing was made twice
    assert first < set(directory.finished_samples())


def test_fifteen_of_sixteen_frames_are_named_and_made_again(program):
    job = plan(program)
    short = job.cases[1].id
    program.fault("short", short)
    with pytest.raises(UserError, match=rf"clip {short} is not usable: 15 frames .* do not hold 16") as error:
        sampling.sample(job, QUIET)
    assert "the program ended with code 0" in str(error.value)
    assert len(job.directory.finished_samples()) == 1
    program.fault()
    sampling.sample(plan(program), QUIET)
    assert is_right(job)
    assert sorted(program.times_made()) == sorted([*(entry.id for entry in job.cases), short])  # the short one twice


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_a_hang_is_ended_with_all_its_children_and_resumed(program):
    job = plan(program)
    program.fault("hang", 2)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"wrote no new file for 2 seconds \(options.timeout\) and was stopped"):
        sampling.sample(job, QUIET)
    assert time.monotonic() - start < 60
    assert len(job.directory.finished_samples()) == 2
    assert not alive(int((program.folder / "fault.txt.child").read_text()))
    program.fault()
    sampling.sample(plan(program), QUIET)
    assert is_right(job)
    assert len(program.times_made()) == 4


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_ctrl_c_ends_the_program_and_the_run_continues(program, monkeypatch, capfd):
    child = program.folder / "fault.txt.child"

    def interrupt() -> None:
        while not child.is_file() or not child.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    card = Path(program.card)
    card.write_text(card.read_text().replace("timeout = 2.0", "timeout = 60.0"))
    program.fault("hang", 2)
    threading.Thread(target=interrupt, daemon=True).start()
    arguments = ["sample", "--model", program.card, "--dataset", "shapes", "--limit", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["dcbench", *arguments, "--out", str(program.folder / "run")])
    with pytest.raises(SystemExit, match="130"):
        main()
    assert "The same command continues where it was" in capfd.readouterr().err
    assert not alive(int(child.read_text()))
    program.fault()
    with pytest.raises(SystemExit, match="0"):
        main()
    assert len(program.times_made()) == 3  # two before, one after


def test_clips_that_finished_behind_a_missing_one_are_not_made_again(program):
    job = plan(program)
    for index, entry in enumerate(job.cases):
        if index != 1:
            external_clip(job.directory.path / "work" / "output", entry)
    program.fault("crash", job.cases[1].id)
    with pytest.raises(UserError, match="has no output"):
        sampling.sample(job, QUIET)
    program.fault()
    sampling.sample(plan(program), QUIET)
    assert is_right(job)
    assert program.times_made() == [job.cases[1].id]


def external_clip(output: Path, entry) -> None:
    output.mkdir(parents=True, exist_ok=True)
    levels = np.array([(entry.seed + k) % 256 for k in range(16)], dtype=np.uint8)
    np.save(output / f"{entry.id}.npy", np.broadcast_to(levels[:, None, None, None], (16, 32, 32, 3)))


# --- what may be left, and what may be asked ---


def test_videos_arrays_and_folders_of_images_are_read_alike(tmp_path):
    from PIL import Image

    clip = torch.randint(0, 256, (16, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    video.write_lossless(tmp_path / "a.mkv", clip, 8)
    np.save(tmp_path / "b.npy", clip.permute(0, 2, 3, 1).numpy())
    (tmp_path / "c").mkdir()
    for k, frame in enumerate(clip):
        Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(tmp_path / "c" / f"{k:03}.png")
    assert external.read_output(tmp_path / "a.mkv")[1] == 8
    for name in ("a.mkv", "b.npy", "c"):
        assert torch.equal(external.read_output(tmp_path / name)[0], clip)


def test_outputs_that_are_not_whole_are_named(tmp_path):
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    np.save(tmp_path / "float.npy", np.zeros((2, 4, 4, 3)))
    for name in ("empty", "torn"):
        (tmp_path / name).mkdir()
    (tmp_path / "torn" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    expected = {
        "cut.npy": "no whole .npy",
        "float.npy": "float64",
        "empty": "holds no image",
        "torn": "no picture that can be read",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message):
            external.read_output(tmp_path / name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"command": "run {requests}"}, r"must name \{requests\} and \{output\}"),
        ({"command": "run {requests} {output} {imge}"}, "imge"),
        ({"command": ""}, "is empty"),
        ({"command": "run '{requests} {output}"}, "is no command line"),
        ({"command": "run {requests} {output}", "cwd": ""}, r"--set options.cwd=FOLDER"),
        ({"command": "run {requests} {output}", "cwd": "/no/such/folder"}, "is no folder"),
        ({"command": "run {requests} {output}", "timeout": 0}, "must be above 0"),
        ({"command": "run {requests} {output}", "tempral": "first"}, 'Did you mean "temporal"'),
    ],
)
def test_a_card_that_cannot_work_is_refused(settings, message):
    card = find_model("zoom").model_copy(update={"options": settings})
    with pytest.raises(UserError, match=message):
        external.load(card, Runtime())


def test_a_program_that_cannot_be_started_is_named(tmp_path):
    card = find_model("zoom").model_copy(update={"options": {"command": "no-such-program {requests} {output}"}})
    request = Request("a", torch.zeros(3, 8, 8, dtype=torch.uint8), "", 16, 8.0, 1, 0)
    with pytest.raises(UserError, match="cannot start 'no-such-program'"):
        external.load(card, Runtime()).prepare([request], tmp_path)


def test_the_clip_comes_back_to_the_shape_of_its_image(tmp_path):
    options = {"command": "true {requests} {output}", "resize": "squash", "temporal": "nearest_time"}
    model = external.load(find_model("zoom").model_copy(update={"options": options}), Runtime())
    output = tmp_path / "output"
    output.mkdir()
    clip = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1, 1).expand(64, 3, 16, 64)
    video.write_lossless(output / "a.mkv", clip.contiguous(), 16)
    request = Request("a", torch.zeros(3, 24, 24, dtype=torch.uint8), "", 16, 8.0, 1, 0)
    assert model.prepare([request], tmp_path) == {}  # it is there already: the program is not started
    made = model.generate([request])[0]
    assert tuple(made.shape) == (16, 3, 24, 24)
    assert made[:, 0, 0, 0].tolist() == list(range(0, 32, 2))


def test_the_program_does_not_inherit_the_environment_of_dcbench(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/dcbench")
    show = "import os, sys; open(sys.argv[2] + '/../seen', 'w').write(repr(sorted(os.environ.items())))"
    command = (sys.executable, "-c", show, "{requests}", "{output}")
    options = {"command": command, "environment": {"HF_HOME": "/models"}}
    model = external.load(find_model("zoom").model_copy(update={"options": options}), Runtime())
    model.prepare([Request("a", torch.zeros(3, 8, 8, dtype=torch.uint8), "", 16, 8.0, 1, 0)], tmp_path)
    seen = (tmp_path / "seen").read_text()
    assert "'HF_HOME', '/models'" in seen
    assert "/of/dcbench" not in seen
    assert os.environ["PYTHONPATH"] == "/of/dcbench"


# --- the repositories of the paper's baselines, each replaced by a stand-in with the same command line ---

STAND_INS = {
    "videocomposer": {
        "run_net.py": """
            import argparse, json, os, numpy
            parser = argparse.ArgumentParser()
            for name in ("cfg", "seed", "input_video", "image_path", "input_text_desc"):
                parser.add_argument("--" + name, required=True)
            given = parser.parse_args()
            numpy.random.seed(int(given.seed))
            config = json.load(open(given.cfg))
            assert config["guidances"] == ["y", "local_image"] and config["read_image"], config
            assert config["ddim_timesteps"] == 50 and not os.path.exists(given.input_video)
            folder = os.path.join(config["log_dir"], "image_only-S%05d" % int(given.seed))
            os.makedirs(folder)
            level = sum(map(ord, given.input_text_desc)) % 256
            numpy.save(os.path.join(folder, "clip.npy"), numpy.full((16, 32, 32, 3), level, numpy.uint8))
        """,
    },
    "seine": {
        "sample_scripts/with_mask_sample.py": """
            import argparse, json, os, av, numpy
            parser = argparse.ArgumentParser()
            parser.add_argument("--config")
            config = json.load(open(parser.parse_args().config))
            assert config["num_sampling_steps"] == 250 and config["cfg_scale"] == 8.0, config
            prompt = config["text_prompt"][0]
            name, prompt = prompt.replace(" ", "_"), prompt + config["additional_prompt"]
            path = os.path.join(config["save_path"], name + ".mp4")
            level = sum(map(ord, prompt)) % 256
            with av.open(path, "w", format="mp4") as file:
                stream = file.add_stream("libx264", rate=8)
                stream.height, stream.width = config["image_size"]
                for k in range(16):
                    grey = numpy.full((*config["image_size"], 3), level, numpy.uint8)
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
                file.mux(stream.encode(None))
        """,
    },
    "consisti2v": {
        "scripts/animate.py": """
            import argparse, json, os, av, numpy
            parser = argparse.ArgumentParser()
            for name in ("inference_config", "prompt_config", "format"):
                parser.add_argument("--" + name, required=True)
            parser.add_argument("optional_args", nargs="*", default=[])
            given = parser.parse_args()
            changed = dict(part.split("=", 1) for part in given.optional_args)
            assert changed["sampling_kwargs.steps"] == "50" and changed["sampling_kwargs.frame_stride"] == "3", changed
            config = json.load(open(given.prompt_config))
            folder = changed["output_dir"] + "/" + changed["output_name"] + "-2024/sample"
            os.makedirs(folder)
            for index, prompt in enumerate(config["prompts"]):
                assert os.path.exists(config["path_to_first_frames"][index]) and len(config["seeds"]) > index
                name = "-".join(prompt.replace("/", "").split(" ")[:10]).replace(":", "")
                level = sum(map(ord, prompt)) % 256
                with av.open(folder + "/%d-%s.mp4" % (index, name), "w") as file:
                    stream = file.add_stream("libx264", rate=8)
                    stream.height = stream.width = 64
                    for k in range(16):
                        grey = numpy.full((64, 64, 3), level, numpy.uint8)
                        file.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
                    file.mux(stream.encode(None))
        """,
    },
}


def test_the_adapters_are_python_3_8_and_need_nothing():
    tree = ast.parse(Path(adapters.__file__).read_text(), feature_version=(3, 8))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)
    done = subprocess.run([sys.executable, adapters.__file__, "seien"], capture_output=True, text=True)
    assert "usage: adapters.py videocomposer|seine|consisti2v" in done.stderr


@pytest.mark.parametrize("name", STAND_INS)
def test_the_adapter_of_each_repository_speaks_its_command_line(name, tmp_path):
    repository = tmp_path / "its repository"
    for path, text in STAND_INS[name].items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text(textwrap.dedent(text))
    card = find_model(name)
    with pytest.raises(UserError, match=r"docs/baselines\.md"):
        external.load(card, Runtime())
    model = external.load(
        with_overrides(card, [f"options.cwd={repository}", f"options.python={sys.executable}"]), Runtime()
    )
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    prompts = (
        ["a cat / a dog: both run", "-x --seed" * 30] if name != "consisti2v" else ["a cat / a dog: both run", "x"]
    )
    requests = [Request(f"clip{k}", image, prompt, 16, 8.0, 3, 2**60 + k) for k, prompt in enumerate(prompts)]
    model.prepare(requests, tmp_path / "work")
    for request, clip in zip(requests, model.generate(requests), strict=True):
        assert clip.shape[0] == 16
        assert abs(clip.float().mean() - sum(map(ord, request.prompt)) % 256) < 3
        assert name != "seine" or tuple(clip.shape[2:]) == (48, 64)
    assert sorted(path.name for path in (tmp_path / "work").iterdir() if path.is_dir()) == ["images", "output"]
