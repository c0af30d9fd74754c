"""`doctor protocol`: the same clips under other choices. A small I3D of random weights stands in for the real one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcbench.analysis import sensitivity
from dcbench.catalogue import find_dataset, find_metric, find_model
from dcbench.errors import UserError
from dcbench.metrics import extractors
from dcbench.metrics import functional as fn
from dcbench.metrics.base import SetDistance
from dcbench.metrics.distances import score_frechet
from dcbench.metrics.extractors import I3DExtractor
from dcbench.protocol import find_protocol
from dcbench.record import Case
from dcbench.runs import planning, sampling
from dcbench.runs.run import Options, Run
from dcbench.runs.scoring import observe_all

QUIET = Options(device="cpu", quiet=True)


class SmallNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 12, (3, 16, 16), (2, 16, 16))
        self.bn = nn.BatchNorm3d(12, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x))).mean((2, 3, 4))


class SmallI3D(I3DExtractor):
    """The real preprocessing, a network of one layer."""

    def __init__(self, mode: str = "squash", device: str = "cpu") -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.name, self.mode, self.preprocessing, self.batch_size = "small", mode, mode, 2  # type: ignore[assignment]
        self.network, self.weights_sha256 = SmallNetwork().eval(), "0"


@pytest.fixture(scope="module")
def zoomed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six clips of 48x64 pixels at stride 2."""
    return zoom_of(tmp_path_factory.mktemp("runs") / "zoom")


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "i3d_extractor", SmallI3D)


def test_every_choice_is_measured_and_most_move_the_value(zoomed: Path) -> None:
    result = sensitivity.measure(zoomed, QUIET)
    rows = {row.name: row for row in result.rows}
    assert {"i3d-aa", "i3d-tf1", "i3d-crop", "range-0-1", "range-0-255", "mp4", "bn-eps", "reference-squash"} <= set(
        rows
    )
    assert {"antialias", "stride-1", "stride-3", "fps-8", "half-random", "half-first", "covariance-n"} <= set(rows)
    assert "stride-2" not in rows  # it is the run's own
    moved = [name for name, row in rows.items() if abs(row.fvd - row.base_fvd) > 1e-9]
    assert len(moved) >= len(rows) - 3
    assert rows["range-0-255"].fvd > 1000 * rows["bn-eps"].fvd
    assert rows["half-first"].n == 3 and rows["mp4"].n == 6 == result.n
    table = result.markdown()
    assert table.count("\n| ") == len(rows) + 1 and "own protocol**" in table and "(a mistake)" in table


def test_the_base_is_the_runs_own_score(zoomed: Path, tmp_path: Path) -> None:
    job = planning.reopen(zoomed)
    extractor = SmallI3D()
    real, made = (
        extractor.extract([source(job, entry) for entry in job.cases])
        for source in (sensitivity.own_reference, sensitivity.own_generated)
    )
    result = sensitivity.measure(zoomed, QUIET, only=["mp4"])
    assert result.base_fvd == pytest.approx(fn.frechet_distance(real, made), rel=1e-5)  # measured: 3e-6, other threads
    assert [row.name for row in result.rows] == ["mp4"]


@pytest.mark.slow
def test_another_file_of_weights_is_a_choice(tmp_path: Path) -> None:
    """The same network from a PyTorch file gives the original's FVD; half of its precision moves it a little."""
    run = zoom_of(tmp_path / "run", limit=4, num_frames=9)  # the least that I3D takes
    i3d = extractors.i3d_extractor()
    state = i3d.network.state_dict()
    torch.save(state, tmp_path / "i3d_pretrained_400.pt")
    torch.save({name: value.bfloat16().float() for name, value in state.items()}, tmp_path / "rounded.pt")
    files = [tmp_path / "i3d_pretrained_400.pt", tmp_path / "rounded.pt"]
    names = [f"i3d-file-{file.name}" for file in files]
    result = sensitivity.measure(run, QUIET, only=names, i3d=files)
    same, rounded = result.rows
    job = planning.reopen(run)
    real, made = (
        i3d.extract([source(job, entry) for entry in job.cases])
        for source in (sensitivity.own_reference, sensitivity.own_generated)
    )
    assert same.fvd == pytest.approx(fn.frechet_distance(real, made), rel=1e-5)  # measured: 2e-6
    assert 1e-5 < abs(rounded.fvd / same.fvd - 1) < 0.2 and "other numbers" in rounded.what


def test_a_reference_of_the_datasets_first_videos(zoomed: Path) -> None:
    """Its frames are the first videos' own, from their first frame on, at the run's stride."""
    job = planning.reopen(zoomed)
    first = sorted(job.items)[: len(job.cases)]
    assert sorted(entry.id for entry in job.cases) != first
    read = sensitivity.first_videos(job)
    for name, entry in zip(first, job.cases, strict=True):
        frames = job.items[name].video.read([2 * k for k in range(len(entry.frames))])
        assert torch.equal(read(job, entry), job.to_size(frames))
    assert [row.name for row in sensitivity.measure(zoomed, QUIET, only=["reference-first"]).rows] == [
        "reference-first"
    ]


def zoom_of(out: Path, limit: int = 6, **changes) -> Path:
    update = {"height": 48, "width": 64, "frame_stride": 2, "start": "first", "datasets": {}} | changes
    protocol = find_protocol("smoke").model_copy(update=update)
    job = planning.plan(find_model("zoom"), find_dataset("shapes"), protocol, out=out, limit=limit, quiet=True)
    sampling.sample(job, QUIET)
    return out


def test_other_reference_videos_and_the_condition_frame_are_choices(zoomed: Path, tmp_path: Path) -> None:
    """Each row is the value that a run under a protocol of that choice has; from there, the way back is offered."""
    rows = {row.name: row for row in sensitivity.measure(zoomed, QUIET, only=["disjoint", "without-condition"]).rows}
    protocols: dict[str, tuple[dict[str, Any], str]] = {
        "disjoint": ({"reference_videos": "disjoint"}, "paired"),
        "without-condition": ({"scored_frames": "without_condition"}, "with-condition"),
    }
    for name, (changes, back) in protocols.items():
        other = sensitivity.measure(zoom_of(tmp_path / name, **changes), QUIET, only=[back])
        assert other.base_fvd == pytest.approx(rows[name].fvd, rel=1e-5)
        assert other.rows[0].fvd == pytest.approx(rows[name].base_fvd, rel=1e-5)
        assert abs(rows[name].fvd / rows[name].base_fvd - 1) > 0.1 and not rows[name].is_mistake


def test_every_choice_works_where_the_reference_videos_are_others(tmp_path: Path) -> None:
    """What is read otherwise is the clip apart: its video, its frames."""
    run = zoom_of(tmp_path / "run", reference_videos="disjoint")
    result = sensitivity.measure(run, QUIET)
    assert {row.name for row in result.rows} >= {"paired", "stride-1", "fps-8", "reference-first", "mp4"}
    job = planning.reopen(run)
    features = SmallI3D().extract([sensitivity.at_stride(1)(job, case.apart) for case in job.cases if case.apart])
    made = SmallI3D().extract([job.generated(case) for case in job.cases])
    row = next(row for row in result.rows if row.name == "stride-1")
    assert row.fvd == pytest.approx(fn.frechet_distance(features, made), rel=1e-5)
    metric = SetDistance(find_metric("fvd"), SmallI3D(), score_frechet)
    own = metric.score(observe_all(job, [metric], QUIET, None).of(metric, job.cases))
    assert own.ci95 and result.base_fvd_ci95 == pytest.approx(own.ci95, rel=1e-4)  # two independent sides, not pairs


def test_a_choice_that_is_not_possible_has_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not "too short" for a clip that fails otherwise."""
    card = find_dataset("shapes")
    few = card.model_copy(update={"options": card.options | {"test_videos": 6}})
    monkeypatch.setattr(planning, "find_dataset", lambda name: few)
    protocol = find_protocol("smoke").model_copy(update={"height": 48, "width": 64, "num_frames": 9, "datasets": {}})
    job = planning.plan(find_model("zoom"), few, protocol, out=tmp_path / "run", limit=4, quiet=True)
    sampling.sample(job, QUIET)

    def broken(run: Run, case: Case) -> Tensor:
        raise UserError(f"{case.id}.avi: damaged")

    monkeypatch.setattr(sensitivity, "through_mp4", broken)
    result = sensitivity.measure(tmp_path / "run", QUIET, only=["disjoint", "without-condition", "mp4"])
    assert not result.rows
    text = result.markdown()
    assert "compares 4 animated videos with as many others, and split 'test' has only 2" in text
    assert "I3D needs clips of at least 9 frames, got 8" in text
    assert (
        f"4 of 4 clips cannot be read in this way; for example {job.cases[0].id}: {job.cases[0].id}.avi: damaged"
        in text
    )
    assert "too short" not in text


def test_covariance_over_n_is_the_other_formula(zoomed: Path) -> None:
    """Against the definition with numpy's biased covariances."""
    import numpy as np
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    table = {
        str(i): sensitivity.Row(torch.randn(3, generator=generator), torch.randn(3, generator=generator) + 1, "", "")
        for i in range(20)
    }
    ids = list(table)

    def distances(features: dict, kept: list[str]) -> tuple[float, float]:
        real, made, _ = sensitivity._sides(features, kept)
        return fn.frechet_distance(real, made), 0.0

    row = sensitivity._other_covariance(table, ids, distances)
    real, made = (rows.double().numpy() for rows in sensitivity._sides(table, ids)[:2])
    one, other = np.cov(real.T, bias=True), np.cov(made.T, bias=True)
    slow = np.square(real.mean(0) - made.mean(0)).sum() + np.trace(
        one + other - 2 * np.real(np.asarray(sqrtm(one @ other)))
    )
    assert row.fvd == pytest.approx(float(slow), rel=1e-6) and row.fvd < row.base_fvd


def test_changed_extractors_leave_the_base_alone() -> None:
    base = SmallI3D()
    clip = torch.randint(0, 256, (1, 9, 3, 32, 32), dtype=torch.uint8)
    before = base(clip)
    other = sensitivity.other_epsilon(base, 1.0)
    ranged = sensitivity.OtherRange(base, 0, 1)
    assert not torch.equal(other(clip), before) and not torch.equal(ranged(clip), before)
    assert torch.equal(base(clip), before)
    assert float(ranged.prepare(clip).min()) >= 0 and float(base.prepare(clip).min()) < -0.9
    assert torch.allclose(ranged.prepare(clip), (base.prepare(clip) + 1) / 2)
    names = {str(part.identity) for part in (base, other, ranged)}
    assert len(names) == 3  # each has its own place in the feature cache


def test_too_few_clips_and_unknown_choices_are_refused(zoomed: Path) -> None:
    with pytest.raises(UserError, match="at least 4 are needed"):
        sensitivity.measure(zoomed, QUIET, limit=3)
    with pytest.raises(UserError, match='Did you mean "stride-3"'):
        sensitivity.measure(zoomed, QUIET, only=["stride-4"])
