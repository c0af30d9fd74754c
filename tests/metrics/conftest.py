"""What the tests of the metrics share."""

from pathlib import Path

import pytest
import torch

from dcbench.metrics.extractors import I3DExtractor


@pytest.fixture(scope="session")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> I3DExtractor:
    """The real network; it fails, and is not skipped, when the package with the weights is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "DCBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache")
        )  # tests' own cache, as for each test
        patch.delenv("DCBENCH_I3D", raising=False)
        return I3DExtractor()


@pytest.fixture(scope="session")
def golden() -> Path:
    return Path(__file__).parents[1] / "data" / "i3d"


@pytest.fixture
def moving_clip() -> torch.Tensor:
    """uint8 [16 3 64 80]: a smooth texture that moves 1 px right and down a frame."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(1, 3, 12, 14, generator=generator)
    texture = torch.nn.functional.interpolate(coarse, (96, 112), mode="bicubic", align_corners=False)[0].clamp(0, 1)
    return torch.stack([(texture[:, 16 - i : 80 - i, 16 - i : 96 - i] * 255).to(torch.uint8) for i in range(16)])
