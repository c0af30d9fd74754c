"""CD-FVD's and JEDi's networks equal the released code, at a small size, through the real loading code.

tests/data/video_transformers.json holds the released networks' outputs for weights drawn by name (`seeded`).
"""

import json
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dcbench.catalogue import find_metric
from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.video_transformers import (
    VIDEOMAE_G,
    VJEPA,
    VJEPA_H,
    Shape,
    VideoMAE,
    load_videomae,
    load_vjepa,
    score_jedi,
)

SMALL_MAE = Shape(width=32, depth=2, heads=4, hidden=139, patch=14, size=28, split_bias=True)
SMALL_JEPA = Shape(width=48, depth=2, heads=4, hidden=192, patch=16, size=32)


def seeded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor drawn from the hash of its own name."""
    made = {}
    for name, value in state.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        made[name] = 0.2 * torch.randn(value.shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    path = Path(__file__).parents[1] / "data" / "video_transformers.json"
    return {name: torch.tensor(rows) for name, rows in json.loads(path.read_text()).items()}


@pytest.fixture(scope="module")
def clips() -> Tensor:
    return torch.randint(0, 256, (2, 16, 3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints in their released layouts: nesting, prefixes, heads and bookkeeping included."""
    folder = tmp_path_factory.mktemp("weights")
    state = seeded(VideoMAE(SMALL_MAE).state_dict()) | {"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}
    torch.save({"module": state}, folder / "mae.pth")
    whole = VJEPA(SMALL_JEPA).state_dict()
    encoder = seeded({name: value for name, value in whole.items() if not name.startswith("pooler.")})
    probe = seeded({name: value for name, value in whole.items() if name.startswith("pooler.")})
    probe |= {"linear.weight": torch.zeros(5, 48), "linear.bias": torch.zeros(5)}
    prefixed = {f"module.backbone.{name}": value for name, value in encoder.items()}
    torch.save({"epoch": 300, "encoder": {}, "target_encoder": prefixed}, folder / "jepa.pth.tar")
    torch.save({"epoch": 20, "classifier": {f"module.{k}": v for k, v in probe.items()}}, folder / "probe.pth.tar")
    return folder


def test_videomae_equals_the_released_network(files: Path, clips: Tensor, expected: dict[str, Tensor]) -> None:
    """Measured: 5e-7."""
    extractor = load_videomae(files / "mae.pth", shape=SMALL_MAE)
    features = extractor.extract(list(clips))
    assert float((features - expected["videomae"]).abs().max()) < 1e-5
    assert extractor.identity["preprocessing"] == "squash to 28, [0, 1]"


def test_vjepa_equals_the_released_network(files: Path, clips: Tensor, expected: dict[str, Tensor]) -> None:
    """Measured: 2e-6."""
    extractor = load_vjepa(files / "jepa.pth.tar", files / "probe.pth.tar", shape=SMALL_JEPA)
    features = extractor.extract(list(clips))
    assert float((features - expected["vjepa"]).abs().max()) < 1e-5
    assert extractor.identity["name"] == "v-jepa-h-ssv2"


def test_the_real_sizes_are_the_published_ones() -> None:
    """Parameters of the blocks, by hand: attention 4 w², MLP 2 w h; about 1.0 and 0.63 billion."""
    for shape, billions in ((VIDEOMAE_G, 1.01), (VJEPA_H, 0.629)):
        blocks = shape.depth * (4 * shape.width**2 + 2 * shape.width * shape.hidden)
        assert blocks / 1e9 == pytest.approx(billions, rel=0.01)
    assert VIDEOMAE_G.tokens == 2048 and VJEPA_H.tokens == 1568


def test_wrong_files_are_named(files: Path, tmp_path: Path, clips: Tensor) -> None:
    with pytest.raises(UserError, match=r"does not fit: \d+ tensors differ, first blocks\.2"):
        load_videomae(files / "mae.pth", shape=Shape(32, 3, 4, 139, 14, size=28, split_bias=True))
    with pytest.raises(UserError, match="holds none of classifier"):
        load_vjepa(files / "jepa.pth.tar", files / "mae.pth", shape=SMALL_JEPA)
    (tmp_path / "cut.pth").write_bytes((files / "mae.pth").read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be loaded safely"):
        load_videomae(tmp_path / "cut.pth", shape=SMALL_MAE)
    torch.save({"epoch": 3}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="holds none of target_encoder, encoder"):
        load_vjepa(tmp_path / "odd.pth", files / "probe.pth.tar", shape=SMALL_JEPA)
    with pytest.raises(UserError, match="reads clips of 16 frames, got 9"):
        load_videomae(files / "mae.pth", shape=SMALL_MAE)(clips[:, :9])


def test_jedi_is_its_published_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    real, made = torch.rand(30, 6, generator=generator), torch.rand(24, 6, generator=generator) + 0.2
    score = score_jedi(real, made)
    x, y = real.double(), made.double()
    slow = ((x @ x.T / 6) ** 2).mean() + ((y @ y.T / 6) ** 2).mean() - 2 * ((x @ y.T / 6) ** 2).mean()
    assert score.value == pytest.approx(100 * float(slow), rel=1e-9)
    assert score.value is not None and score.ci95 and score.ci95[0] < score.value < score.ci95[1]
    assert score.details["kernel"] == "(x·y/d + 0)^2"
    assert score_jedi(real, real).value == pytest.approx(0, abs=1e-9)
    assert fn.kernel_distance(real, made) != score.value


def test_the_cards_name_their_files() -> None:
    for name, files_ in (("cd_fvd", 1), ("jedi", 2)):
        assert len(find_metric(name).weights) == files_ and not find_metric(name).default
