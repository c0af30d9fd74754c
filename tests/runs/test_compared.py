"""What metrics of sets compare: the videos that are animated or others, with or without the condition frame."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dcbench import cli, protocol, record
from dcbench.catalogue import find_dataset, find_metric, find_model
from dcbench.datasets.base import VideoError
from dcbench.errors import UserError
from dcbench.files import sha256_file
from dcbench.metrics.base import ClipMetric, FeatureExtractor, SetDistance, View
from dcbench.metrics.cache import FeatureCache
from dcbench.metrics.distances import score_frechet
from dcbench.protocol import find_protocol
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.folders import score_folders
from dcbench.runs.run import Options, Run

QUIET = Options(device="cpu", quiet=True)
SIZE = {"height": 32, "width": 32, "datasets": {}}


def make_run(out: Path, model: str = "noise", limit: int = 4, manifest: Path | None = None, **changes) -> Run:
    chosen = find_protocol("smoke").model_copy(update=SIZE | changes)
    card, data = find_model(model), find_dataset("shapes")
    run = planning.plan(card, data, chosen, out=out, limit=limit, manifest=manifest, quiet=True)
    sampling.sample(run, QUIET)
    return run


class Small(FeatureExtractor):
    """Twelve pixel means."""

    name, weights_sha256, preprocessing, num_features = "small", "none", "mean of quarters", 12

    def forward(self, clips: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(clips.float().mean(1), 2).flatten(1)


class SetSpy(SetDistance):
    """Remembers what it is shown."""

    in_workers = False

    def __init__(self, needs: tuple[str, ...] = ()) -> None:
        super().__init__(find_metric("fvd").model_copy(update={"needs": needs}), Small(), score_frechet)
        self.views: list[View] = []

    def observe(self, view: View) -> Tensor:
        self.views.append(view)
        return super().observe(view)


class ClipSpy(ClipMetric):
    def __init__(self) -> None:
        super().__init__(find_metric("motion").model_copy(update={"needs": ("reference", "image")}))
        self.views: list[View] = []

    def observe(self, view: View) -> dict:
        self.views.append(view)
        return {"value": 1.0}


def same(clips: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(clips, expected, strict=True))


def apart_of(run: Run) -> list[record.Case]:
    return [case.apart for case in run.cases if case.apart]


def test_an_older_run_keeps_its_bytes(tmp_path):
    """Recorded before the two fields were added. The fingerprint is that of the table in README.md."""
    card, data = find_model("zoom"), find_dataset("shapes")
    run = planning.plan(card, data, find_protocol("smoke"), out=tmp_path / "run", quiet=True)
    assert run.plan.fingerprint == "fe6a04f3d2fc2d2d"
    hashes = [sha256_file(tmp_path / "run" / name)[:16] for name in ("manifest.jsonl", "request.json")]
    assert hashes == ["715bb9a79d8ff710", "1cdd38ba532a44ec"]
    assert not {"reference_videos", "scored_frames"} & set(run.plan.protocol)


def test_only_the_reference_side_of_set_metrics_is_apart(tmp_path):
    run = make_run(tmp_path / "run", reference_videos="disjoint", condition="random")
    sets, clips = SetSpy(("image", "prompt")), ClipSpy()
    seen = scoring.observe_all(run, [sets, clips], QUIET, None)
    made, own = [run.generated(case) for case in run.cases], [run.reference(case)[0] for case in run.cases]
    others = [run.reference(case)[0] for case in apart_of(run)]
    assert len(others) == 4 and not same(others, own)
    assert same([view.clip for view in sets.views[::2]], made)
    assert same([view.clip for view in sets.views[1::2]], others)
    assert same([view.clip for view in clips.views[::2]], made)  # its card says of_reference
    assert same([view.clip for view in clips.views[1::2]], own)
    assert same([view.reference for view in clips.views if view.reference is not None], [c for c in own for _ in "ab"])
    for case, generated, real in zip(run.cases, sets.views[::2], sets.views[1::2], strict=True):
        assert case.apart and torch.equal(generated.need("image"), run.image(case))
        assert torch.equal(real.need("image"), run.image(case.apart)) and real.prompt == case.apart.prompt
    observed = seen.of(sets, run.cases)
    assert torch.equal(torch.stack(observed.reference), Small().extract(others))
    assert observed.groups == [case.id for case in run.cases]
    assert observed.reference_groups == [case.id for case in apart_of(run)]
    assert seen.of(clips, run.cases).reference_groups == observed.groups


@pytest.mark.parametrize("reference_videos", ["paired", "disjoint"])
def test_the_condition_frame_is_left_out_of_both_sides_for_set_metrics_alone(tmp_path, reference_videos):
    changes: dict[str, Any] = {
        "scored_frames": "without_condition",
        "condition": "random",
        "reference_videos": reference_videos,
    }
    run = make_run(tmp_path / "run", **changes)
    assert len({case.condition_frame for case in run.cases}) > 1
    sets, clips = SetSpy(), ClipSpy()
    scoring.observe_all(run, [sets, clips], QUIET, None)

    def without(clip: Tensor, case: record.Case) -> Tensor:
        return clip[[k for k in range(16) if k != case.condition_frame]]

    real = apart_of(run) or run.cases
    assert same([view.clip for view in sets.views[::2]], [without(run.generated(c), c) for c in run.cases])
    assert same([view.clip for view in sets.views[1::2]], [without(run.reference(c)[0], c) for c in real])
    assert {len(view.clip) for view in clips.views} == {16}


def test_neither_end_is_seen_by_set_metrics(tmp_path):
    run = make_run(tmp_path / "run", scored_frames="between")
    sets, clips = SetSpy(), ClipSpy()
    scoring.observe_all(run, [sets, clips], QUIET, None)
    assert same([view.clip for view in sets.views[::2]], [run.generated(case)[1:-1] for case in run.cases])
    assert same([view.clip for view in sets.views[1::2]], [run.reference(case)[0][1:-1] for case in run.cases])
    assert {len(view.clip) for view in clips.views} == {16}
    assert run.protocol.compared == "without the first and last frame"


def test_the_cache_never_gives_the_features_of_other_pixels(tmp_path):
    """One cache for all ways to compare: the values are those without a cache, also when they are read again."""
    for reference_videos in ("paired", "disjoint"):
        for scored_frames in ("all", "without_condition"):
            changes: dict[str, Any] = {"reference_videos": reference_videos, "scored_frames": scored_frames}
            run = make_run(tmp_path / f"{reference_videos}-{scored_frames}", **changes)
            metric = SetDistance(find_metric("fvd"), Small(), score_frechet)
            seen = [scoring.observe_all(run, [metric], QUIET, cache) for cache in (None, *[FeatureCache()] * 2)]
            plain, *cached = [torch.stack([*rows.reference, *rows.generated]) for rows in
                              (one.of(metric, run.cases) for one in seen)]  # fmt: skip
            assert all(torch.equal(rows, plain) for rows in cached)


def test_too_few_frames_for_the_network_are_named(tmp_path):
    run = make_run(tmp_path / "run", limit=1, num_frames=9, scored_frames="without_condition")
    score = scoring.score(run, QUIET, ["fvd"]).scores["fvd"]
    assert (score.value, score.reason) == (None, "I3D needs clips of at least 9 frames, got 8")


def test_real_clips_are_not_at_distance_zero_of_other_videos(tmp_path, cheap_metric):
    values = {}
    for name in ("paired", "disjoint"):
        run = make_run(tmp_path / name, "real", limit=8, reference_videos=name)
        values[name] = scoring.score(run, QUIET, [cheap_metric]).scores["corners"].value
    assert values["paired"] == pytest.approx(0, abs=1e-6) and values["disjoint"] > 1


def test_a_run_goes_on_and_is_scored_again_with_the_same_videos_apart(tmp_path, cheap_metric):
    run = make_run(tmp_path / "run", reference_videos="disjoint")
    first = scoring.score(run, QUIET, [cheap_metric])
    kept = (tmp_path / "run" / "record.json").read_bytes()
    again = make_run(tmp_path / "run", reference_videos="disjoint")
    assert again.cases == run.cases and apart_of(again)
    scoring.score(planning.reopen(tmp_path / "run"), QUIET, [cheap_metric])
    assert (tmp_path / "run" / "record.json").read_bytes() == kept
    assert first.decoders == {"procedural": 8} and first.scores["corners"].n_reference == 4
    with pytest.raises(UserError, match="differs in protocol"):
        make_run(tmp_path / "run")


def test_scores_are_not_kept_when_a_clip_apart_has_other_pixels(tmp_path, cheap_metric):
    run = make_run(tmp_path / "run", reference_videos="disjoint")
    before = scoring.score(run, QUIET, [cheap_metric])
    other, source = apart_of(run)[0].id, run.items[run.cases[0].id]
    run.items[other] = replace(run.items[other], video=source.video)
    after = scoring.score(run, QUIET, ["motion"])
    assert after.clips_sha256 != before.clips_sha256 and set(after.scores) == {"motion"}


def test_a_clip_apart_that_cannot_be_read_is_a_failure_that_names_it(tmp_path, cheap_metric):
    run = make_run(tmp_path / "run", reference_videos="disjoint")

    class Broken:
        def info(self):
            raise VideoError("broken.avi")

        def read(self, indices):
            raise VideoError("broken.avi: frame 3 cannot be decoded")

    other = apart_of(run)[0].id
    run.items[other] = replace(run.items[other], video=Broken())
    result = scoring.score(run, QUIET, [cheap_metric])
    assert [(lost.id, lost.reason) for lost in result.failures] == [
        (run.cases[0].id, "broken.avi: frame 3 cannot be decoded")
    ]
    assert (result.scores["corners"].n_reference, result.scores["corners"].n_generated) == (3, 3)


def test_a_case_without_a_clip_apart_is_not_compared_with_its_own(tmp_path, cheap_metric):
    run = make_run(tmp_path / "run", reference_videos="disjoint")
    run.cases[0] = run.cases[0].model_copy(update={"apart": None})
    score = scoring.score(run, QUIET, [cheap_metric]).scores["corners"]
    assert (score.n_reference, score.n_generated) == (3, 4)


def test_a_manifest_replays_the_videos_apart_and_must_fit_the_protocol(tmp_path):
    theirs = make_run(tmp_path / "theirs", reference_videos="disjoint")
    path = tmp_path / "theirs" / "manifest.jsonl"
    ours = make_run(tmp_path / "ours", "zoom", manifest=path, reference_videos="disjoint", selection_seed=9)
    assert ours.cases == theirs.cases
    with pytest.raises(
        UserError, match=r'lists videos apart .* reference_videos = "paired".* protocol with "disjoint"'
    ):
        make_run(tmp_path / "a", manifest=path)
    plain = make_run(tmp_path / "plain").directory.manifest
    with pytest.raises(UserError, match=r'does not list videos apart .* = "disjoint".* protocol with "paired"'):
        make_run(tmp_path / "b", manifest=plain, reference_videos="disjoint")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    wrong = {
        "1 of 8 clips are not in this dataset": {"id": "test-999999"},
        "does not have the protocol's 16 frames": {"frames": [0, 1]},
        "is not one of its frames": {"condition_frame": 16},
        "its source video is animated": {"group": rows[1]["id"]},
    }
    for number, (message, change) in enumerate(wrong.items()):
        bad = tmp_path / f"bad{number}.jsonl"
        changed = [rows[0] | {"apart": rows[0]["apart"] | change}, *rows[1:]]
        bad.write_text("".join(json.dumps(row) + "\n" for row in changed))
        with pytest.raises(UserError, match=message):
            make_run(tmp_path / f"run{number}", manifest=bad, reference_videos="disjoint")


def test_two_folders_without_the_condition_frame(tmp_path, cheap_metric):
    """Both sides leave out frame 0. Folders that differ in it alone are at distance 0."""
    from dcbench import video

    for name in "abc":
        clip = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(ord(name))).byte()
        video.write_lossless(tmp_path / "real" / f"{name}.mkv", clip, 8)
        clip[0] = 0
        video.write_lossless(tmp_path / "made" / f"{name}.mkv", clip, 8)
    text = (protocol.FOLDER / "folders.toml").read_text()
    (tmp_path / "later.toml").write_text(text + 'scored_frames = "without_condition"\n')
    values = []
    for chosen in ("folders", str(tmp_path / "later.toml")):
        path = score_folders(
            tmp_path / "made", tmp_path / "real", chosen, QUIET, [cheap_metric], tmp_path / chosen[-9:]
        )
        values.append(record.read_record(path).scores["corners"].value)
    assert values[0] > 1 and values[1] == pytest.approx(0, abs=1e-6)


def own_protocol(folder: Path) -> Path:
    path = folder / "my.toml"
    text = (protocol.FOLDER / "smoke.toml").read_text().replace('name = "smoke"', 'name = "my"')
    lines = 'caption = "first"\nreference_videos = "disjoint"\nscored_frames = "without_condition"\n'
    path.write_text(text.replace('caption = "first"\n', lines))
    return path


def test_the_command_line_shows_the_choice(in_tmp, monkeypatch, capsys):
    said = "with videos that are not animated, without the condition frame"
    arguments = ["run", "--model", "still", "--dataset", "shapes", "--limit", "2", "--dry-run", "--protocol"]
    for name, shown in (("smoke", False), (str(own_protocol(in_tmp)), True)):
        monkeypatch.setattr(sys, "argv", ["dcbench", *arguments, name])
        with contextlib.suppress(SystemExit):
            cli.main()
        assert (f"compared     {said}" in capsys.readouterr().out) == shown
    monkeypatch.setattr(protocol, "FOLDER", in_tmp)
    monkeypatch.setattr(sys, "argv", ["dcbench", "list", "protocols"])
    with contextlib.suppress(SystemExit):
        cli.main()
    assert f"[{said}]" in capsys.readouterr().out


@pytest.mark.slow  # test_run.py has the same for the usual protocol
def test_two_processes_give_the_record_of_one(tmp_path, cheap_metric):
    program = tmp_path / "program.py"
    program.write_text("from dcbench.cli import main\nmain()\n")
    own = own_protocol(tmp_path)
    for ranks in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        options = ["--model", "noise", "--dataset", "shapes", "--limit", "5", "--protocol", str(own)]
        done = subprocess.run(
            [*launch, str(program), "run", *options, "--metrics", cheap_metric, "--out", str(tmp_path / str(ranks))],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DCBENCH_CACHE": str(tmp_path / f"cache{ranks}")},
        )
        assert done.returncode == 0, done.stderr
    for name in ("plan.json", "manifest.jsonl", "record.json", "per_clip.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
