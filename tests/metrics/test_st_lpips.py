"""ST-LPIPS: its network is the published one, its ends are exact, its order is right, and what it refuses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from observing import observed
from torch import Tensor

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.files import sha256_file
from dcbench.metrics.base import ClipMetric, View
from dcbench.metrics.st_lpips import FILES, MIN_SIDE, Net, StLpips, squared, st_lpips
from dcbench.models.base import Runtime
from dcbench.weights import MissingWeights, load_tensors

SIZES = ((64, 64), (45, 70), (21, 24))
RECORDED = json.loads((Path(__file__).parents[1] / "data" / "st_lpips.json").read_text())["distances"]


def pictures(height: int, width: int) -> Tensor:
    """uint8 [5 3 h w]: squares, the same shifted by 2 pixels, the same with noise, other squares, pure noise."""
    random = np.random.default_rng(7)

    def squares() -> np.ndarray:
        coarse = random.integers(0, 256, (3, 8, 12))
        return coarse.repeat(-(-height // 8) + 1, 1).repeat(-(-width // 12) + 1, 2)[:, :height, : width + 2]

    first, other = squares(), squares()[..., :-2]
    noisy = (first[..., :-2] + random.integers(-25, 26, (3, height, width))).clip(0, 255)
    noise = random.integers(0, 256, (3, height, width))
    made = np.stack([first[..., :-2], first[..., 2:], noisy, other, noise])
    return torch.from_numpy(made.astype(np.uint8))


@pytest.fixture(scope="module")
def alex() -> StLpips:
    """The real network; it fails, and is not skipped, when the package with the weights is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DCBENCH_STLPIPS", raising=False)
        return st_lpips()


def metric(name: str) -> ClipMetric:
    return load_entry_point(find_metric(name))(find_metric(name), Runtime(offline=True))


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_equals_the_class_of_the_authors(net: Net) -> None:
    """Measured: at most 1.5e-7 (float32), of distances between 0.02 and 0.68."""
    network = st_lpips(net)
    for height, width in SIZES:
        shown = pictures(height, width)
        found = network.distances(shown[:-1], shown[1:]).tolist()
        assert found == pytest.approx(RECORDED[f"{net} {height}x{width}"], abs=1e-6)


def test_weights_are_the_packages_and_its_code_is_not_imported(alex: StLpips) -> None:
    assert sha256_file(FILES["alex"].find()) == FILES["alex"].sha256 == find_metric("st_lpips").weights[0].sha256
    assert "stlpips_pytorch" not in sys.modules
    state = load_tensors(FILES["alex"].find())
    blur = torch.tensor([1.0, 2.0, 1.0])
    filters = [value for name, value in state.items() if name.endswith(".filt")]
    assert len(filters) == 3 and all(torch.equal(f[0, 0], blur[:, None] * blur / 16) for f in filters)


def test_it_is_a_distance_and_does_not_see_other_frames(alex: StLpips) -> None:
    shown = pictures(40, 52)
    assert torch.equal(alex.distances(shown, shown), torch.zeros(5, dtype=torch.float64))
    there, back = alex.distances(shown[:4], shown[1:]), alex.distances(shown[1:], shown[:4])
    assert torch.equal(there, back) and bool((there > 0).all())
    assert there[2] == alex.distances(shown[2:3], shown[3:4])[0]
    assert torch.equal(alex.distances(shown, shown[3:4]), alex.distances(shown, shown[3:4].expand(5, -1, -1, -1)))
    assert squared(alex.features(shown[0]), alex.features(shown[1])) == there[0]


def test_planted_changes_come_out_in_their_order(alex: StLpips) -> None:
    """A shift is almost nothing, another picture and noise are the most, and more noise is further away."""
    shown = pictures(64, 64)
    shifted, other, noise = (float(alex.distances(shown[:1], shown[k : k + 1])) for k in (1, 3, 4))
    assert shifted < 0.06 and other > 0.25 and noise > 0.25
    grains = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1))
    noisy = [(shown[0] + s * grains).clamp(0, 255).to(torch.uint8) for s in (0, 4, 12, 36, 108)]
    steps = alex.distances(noisy, shown[:1]).tolist()
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] > 0.2


def test_a_still_clip_keeps_its_image_and_a_moving_one_less(moving_clip: Tensor) -> None:
    still = moving_clip[:1].expand(4, -1, -1, -1)
    kept, moved = observed(metric("st_lpips_image"), [still, moving_clip], [moving_clip[0]] * 2)
    assert kept == {"value": 1.0, "without_first": 1.0, "per_frame": [1.0] * 4}
    assert moved["per_frame"][0] == 1 and moved["value"] < 1 and len(moved["per_frame"]) == 16
    assert moved["without_first"] == pytest.approx(sum(moved["per_frame"][1:]) / 15)


def test_the_distance_to_the_true_clip(moving_clip: Tensor) -> None:
    compare = metric("st_lpips")
    assert compare.observe(View(moving_clip, reference=moving_clip))["value"] == 0
    backwards = compare.observe(View(moving_clip, reference=moving_clip.flip(0)))
    still = compare.observe(View(moving_clip, reference=moving_clip[:1].expand_as(moving_clip)))
    assert backwards["value"] > still["value"] > 0 and still["per_frame"][0] == 0
    larger = torch.nn.functional.interpolate(moving_clip.float(), scale_factor=2).to(torch.uint8)
    assert compare.observe(View(moving_clip, reference=larger))["value"] < still["value"]
    view = View(moving_clip, reference=moving_clip.flip(0))
    between = metric("st_lpips(frames=between)").observe(view)
    assert between["per_frame"] == backwards["per_frame"][1:-1]
    assert metric("st_lpips(frames=middle)").observe(view) == {"value": backwards["per_frame"][8]}
    with pytest.raises(UserError, match='frames is "last"; allowed: all, middle, between'):
        metric("st_lpips(frames=last)")
    with pytest.raises(UserError, match="16 frames, and 3 in the reference clip"):
        compare.observe(View(moving_clip, reference=moving_clip[:3]))


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_the_smallest_frame(net: Net) -> None:
    side = MIN_SIDE[net]
    shown = pictures(side, side)
    assert float(st_lpips(net).distances(shown[:1], shown[4:])[0]) > 0
    with pytest.raises(UserError, match=rf"a frame of {side - 1}x30 is too small; .* needs {side} pixels"):
        st_lpips(net).distances(pictures(side - 1, 30)[:1], shown[:1])


def test_what_it_refuses(alex: StLpips) -> None:
    shown = pictures(30, 30)
    with pytest.raises(UserError, match="the input image is needed"):
        metric("st_lpips_image").observe(View(shown))
    with pytest.raises(UserError, match=r'net "vg" is unknown\. Did you mean "?vgg'):
        card = find_metric("st_lpips").model_copy(update={"options": {"net": "vg"}})
        load_entry_point(card)(card, Runtime())
    with pytest.raises(ValueError, match="5 frames and 2 others"):
        alex.distances(shown, shown[:2])
    with pytest.raises(UserError, match="expected uint8"):
        alex.distances(shown.float(), shown)


def test_a_file_of_ones_own(alex: StLpips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = load_tensors(FILES["alex"].find())
    path = tmp_path / "mine.pth"
    monkeypatch.setenv("DCBENCH_STLPIPS", str(path))
    with pytest.raises(MissingWeights, match=r"mine\.pth, which is no file.*stlpips-pytorch==0\.0\.2"):
        st_lpips()
    torch.save(state, path)
    assert st_lpips().identity == alex.identity  # the hash is of the numbers, not of the file
    with pytest.raises(UserError, match="does not hold the vgg network"):
        StLpips("vgg", path)
    for name, value, message in (
        ("lin2.model.1.weight", -state["lin2.model.1.weight"], "negative weights"),
        ("lin2.model.1.weight", None, "does not hold the alex network"),
        ("net.slice1.0.bias", None, "does not hold the alex network"),
        ("scaling_layer.scale", None, "does not hold the alex network"),
    ):
        changed = {**state, name: value}
        torch.save({key: tensor for key, tensor in changed.items() if tensor is not None}, path)
        with pytest.raises(UserError, match=message):
            StLpips("alex", path)


def test_missing_and_changed_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DCBENCH_STLPIPS", raising=False)
    file = tmp_path / "stlpips_pytorch" / FILES["alex"].file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"something else")
    monkeypatch.setattr("dcbench.weights.in_package", lambda module, name: file)
    with pytest.raises(UserError, match=r"sha256 is .*--force-reinstall stlpips-pytorch==0\.0\.2"):
        st_lpips()
    monkeypatch.setattr("dcbench.weights.in_package", lambda module, name: None)
    with pytest.raises(MissingWeights, match=r"alex_shift_tolerant\.pth.*--no-deps stlpips-pytorch==0\.0\.2"):
        metric("st_lpips_image")
