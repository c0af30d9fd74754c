"""LPIPS with a random trunk, because the real ones are not here: the loading code, and the formula."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchmetrics.functional.image as of_images
from torch import Tensor, nn
from torchvision import models

from dcbench.catalogue import MetricCard, find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import View
from dcbench.metrics.lpips import Lpips
from dcbench.models.base import Runtime

LAYERS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # the ReLUs whose maps are compared
FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}


def features(net: str) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        layers = models.alexnet(weights=None).features if net == "alex" else models.vgg16(weights=None).features
    assert isinstance(layers, nn.Sequential)
    return layers.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trunks with random weights, named and laid out as torchvision's files."""
    path = tmp_path_factory.mktemp("trunks")
    for net, name in FILES.items():
        torch.save({f"features.{key}": value for key, value in features(net).state_dict().items()}, path / name)
    return path


def clips() -> tuple[Tensor, Tensor]:
    coarse = torch.randint(0, 256, (2, 3, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    first, second = (F.interpolate(side, (64, 80), mode="bilinear").to(torch.uint8) for side in coarse)
    return first, second


def by_formula(net: str, first: Tensor, second: Tensor) -> Tensor:
    """Zhang et al., eq. 1: per layer, unit length in each place, heads' weights, mean over places; summed."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    heads = torch.load(Path(of_images.__file__).parent / "lpips_models" / f"{net}.pth", "cpu", weights_only=True)
    sides = [(x.float() / 127.5 - 1 - shift[:, None, None]) / scale[:, None, None] for x in (first, second)]
    total = torch.zeros(len(first))
    with torch.inference_mode():
        for number, layer in enumerate(features(net)):
            sides = [layer(x) for x in sides]
            if number in LAYERS[net]:
                a, b = (x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt() for x in sides)
                weights = heads[f"lin{LAYERS[net].index(number)}.model.1.weight"]
                total += ((a - b).square() * weights).sum(1).mean((1, 2))
    return total


def test_it_is_the_published_formula(folder: Path) -> None:
    first, second = clips()
    for net, name in FILES.items():
        ours = Lpips(net, folder / name)
        found = ours(first, second)
        # 1e-9 measured; 2e-7 relative from the package lpips 0.1.4 with the same trunk, on real clips
        assert found.tolist() == pytest.approx(by_formula(net, first, second).tolist(), rel=1e-5)
        assert float(ours(first, first).abs().max()) == 0


def test_the_metric_reads_the_file_of_its_net(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(folder))
    first, second = clips()
    values = {}
    for name in ("lpips", "lpips(net=vgg)", "lpips_middle"):
        card: MetricCard = find_metric(name)
        card = card.model_copy(
            update={"weights": tuple(source.model_copy(update={"sha256": ""}) for source in card.weights)}
        )
        metric = load_entry_point(card)(card, Runtime(offline=True))
        values[name] = metric.observe(View(first, reference=second))
    assert values["lpips"]["per_frame"] == pytest.approx(by_formula("alex", first, second).tolist(), rel=1e-5)
    assert values["lpips(net=vgg)"]["per_frame"] == pytest.approx(by_formula("vgg", first, second).tolist(), rel=1e-5)
    assert values["lpips_middle"] == pytest.approx({"value": values["lpips"]["per_frame"][1]}, rel=1e-5)


def test_what_it_refuses(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(folder))
    card = find_metric("lpips")
    with pytest.raises(UserError, match=r"sha256 is [0-9a-f]{64}, expected 7be5be79"):
        load_entry_point(card)(card, Runtime(offline=True))
    with pytest.raises(UserError, match="is no vgg trunk of torchvision: it has no features"):
        Lpips("vgg", folder / FILES["alex"])
    with pytest.raises(UserError, match='net is "squeeze"; allowed: alex, vgg'):
        load_entry_point(card)(find_metric("lpips(net=squeeze)"), Runtime(offline=True))
    with pytest.raises(UserError, match="at least 32 pixels, got 16x40"):
        Lpips("alex", folder / FILES["alex"])(torch.zeros(1, 3, 16, 40).byte(), torch.zeros(1, 3, 16, 40).byte())
