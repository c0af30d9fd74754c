"""PIC through the real DreamSim package, with random weights stored in its own file format."""

import time
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dreamsim import model as package
from dreamsim.feature_extraction.vision_transformer import DINOHead, vit_base
from observing import observed, scored
from torch import Tensor

from dcbench.catalogue import WeightSource, find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics import PerceptualInputConformity, pic
from dcbench.metrics.per_clip import to_pil
from dcbench.metrics.pic import ConformityMetric, DreamSimEmbedder, dreamsim_folder
from dcbench.models.base import Runtime
from dcbench.weights import MissingWeights, weights_dir


def store_clip_branch(folder: Path, name: str, patch: int) -> None:
    """A CLIP tower in DreamSim's own form."""
    tower = vit_base(patch_size=patch)
    tower.add_module("pos_drop", torch.nn.LayerNorm(768))
    torch.nn.init.normal_(tower.cls_token, std=0.02)
    torch.nn.init.normal_(tower.pos_embed, std=0.02)
    state = {**tower.state_dict(), "proj": torch.randn(768, 512) / 28}
    torch.save({"state_dict": state}, folder / f"{name}_pretrain.pth.tar")


def store_lora(folder: Path, kind: str, model: str) -> None:
    """Random low-rank updates of that type, as peft saves them."""
    settings = package.dreamsim_args["model_config"][kind]
    network = package.PerceptualModel(**settings, device="cpu", load_dir=str(folder), normalize_embeds=True)
    wrapped = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"], bias="none"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(str(folder / f"{model}_lora"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with DreamSim's open_clip_vitb32 type, weights random."""
    folder = tmp_path_factory.mktemp("dreamsim")
    torch.manual_seed(0)
    store_clip_branch(folder, "open_clip_vitb32", 32)
    store_lora(folder, "open_clip_vitb32", "open_clip_vitb32_single")
    return folder


@pytest.fixture(scope="module")
def metric(stored: Path) -> ConformityMetric:
    return ConformityMetric(find_metric("pic"), DreamSimEmbedder("open_clip_vitb32", stored))


def direct(folder: Path, kind: str, image: Tensor, clip: Tensor) -> list[float]:
    """The paper's equation, slowly: the package's own model and preprocessing, one pair of pictures at a time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        network, preprocess = package.dreamsim(device="cpu", cache_dir=str(folder), dreamsim_type=kind)
    with torch.no_grad():
        return [1 - float(network(preprocess(to_pil(image)), preprocess(to_pil(frame)))) for frame in clip]


def test_equals_the_papers_equation(metric: ConformityMetric, stored: Path, moving_clip: Tensor) -> None:
    """Measured: 2e-7."""
    image, clip = moving_clip[0], moving_clip[:5]
    expected = direct(stored, "open_clip_vitb32", image, clip)
    row = observed(metric, [clip], [image])[0]
    assert row["per_frame"] == pytest.approx(expected, abs=2e-6)
    assert row["value"] == pytest.approx(sum(expected) / 5, abs=2e-6)
    assert row["without_first"] == pytest.approx(sum(expected[1:]) / 4, abs=2e-6)
    assert row["per_frame"][0] == 1 and row["per_frame"][4] < 1


def test_as_a_torchmetrics_class(metric: ConformityMetric, moving_clip: Tensor) -> None:
    """Two updates give what the runner's metric gives for all clips; without images it says what is missing."""
    clips = torch.stack([moving_clip[:3], moving_clip[4:7].flip(2), moving_clip[5:8]])
    images = torch.stack([moving_clip[0], moving_clip[9], moving_clip[5]])
    mean = PerceptualInputConformity(metric=metric)
    mean.update(clips[:1], images=images[:1])
    mean.update(clips[1:], images=images[1:])
    expected = scored(metric, observed(metric, list(clips), list(images)))
    found = mean.compute_with_interval()
    assert float(mean.compute()) == found.value == pytest.approx(expected.value, abs=1e-12)
    assert found.n_generated == 3 and found.ci95 is not None
    with pytest.raises(UserError, match="needs one image"):
        mean.update(clips)


def test_the_class_says_how_to_get_its_weights(moving_clip: Tensor) -> None:
    mean = PerceptualInputConformity("clip_vitb32")
    with pytest.raises(MissingWeights, match="dreamsim-clip_vitb32"):
        mean.update(moving_clip[None, :3], images=moving_clip[None, 0])


def test_identical_frames_give_exactly_one(metric: ConformityMetric, moving_clip: Tensor) -> None:
    image = moving_clip[3]
    row = observed(metric, [image.repeat(6, 1, 1, 1)], [image])[0]
    assert row["value"] == 1 and row["without_first"] == 1 and row["per_frame"] == [1.0] * 6


def test_the_image_is_the_first_argument(metric: ConformityMetric, moving_clip: Tensor) -> None:
    """Swapping two images between two clips must change both values."""
    clips = [moving_clip[:2], moving_clip[:2].flip(3)]
    right = observed(metric, clips, [clip[0] for clip in clips])
    wrong = observed(metric, clips, [clips[1][0], clips[0][0]])
    assert all(r["value"] > w["value"] for r, w in zip(right, wrong, strict=True))


def test_batches_and_neighbours_do_not_matter(metric: ConformityMetric, moving_clip: Tensor) -> None:
    clips = [moving_clip[:2], moving_clip[4:7].flip(2)]
    images = [moving_clip[0], moving_clip[9]]
    together = observed(metric, clips, images)
    metric.extractor.remembered._known.clear()
    alone = [observed(metric, [clip], [image])[0] for clip, image in zip(clips[::-1], images[::-1], strict=True)][::-1]
    for one, other in zip(together, alone, strict=True):
        assert one["per_frame"] == pytest.approx(other["per_frame"], abs=1e-6)


def test_one_embedding_a_picture(
    metric: ConformityMetric, moving_clip: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[int] = []
    embed: Callable[[Tensor], Tensor] = metric.extractor.network.embed
    monkeypatch.setattr(metric.extractor.network, "embed", lambda x: embedded.append(len(x)) or embed(x))
    observed(metric, [moving_clip[10:14].flip(3)], [moving_clip[1].flip(1)])
    assert embedded == [5]


def test_nothing_is_left_behind(
    metric: ConformityMetric, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """No write to the working directory, no chatter, torch.hub and torch.load as they were."""
    monkeypatch.chdir(tmp_path)
    before = torch.hub.load, torch.load, torch.hub.get_dir()
    again = DreamSimEmbedder("open_clip_vitb32", stored)
    assert again.identity == metric.extractor.identity
    assert again.identity["name"] == "dreamsim open_clip_vitb32" and len(again.identity["weights_sha256"]) == 64
    assert (torch.hub.load, torch.load, torch.hub.get_dir()) == before
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


def test_the_hash_is_of_every_weight(stored: Path, metric: ConformityMetric, tmp_path: Path) -> None:
    """The projection behind the tower lies in no state dict of the network, and must count too."""
    for path in stored.iterdir():
        (tmp_path / path.name).symlink_to(path)
    file = tmp_path / "open_clip_vitb32_pretrain.pth.tar"
    saved = torch.load(file)
    saved["state_dict"]["proj"][0, 0] += 1
    file.unlink()
    torch.save(saved, file)
    assert DreamSimEmbedder("open_clip_vitb32", tmp_path).weights_sha256 != metric.extractor.weights_sha256


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_ensemble_runs_without_torch_hub(tmp_path: Path, moving_clip: Tensor) -> None:
    """DINO's network comes from the package, its weights from a file; the value is the package's own with its hub."""
    torch.manual_seed(1)
    for name in ("clip_vitb16", "open_clip_vitb16"):
        store_clip_branch(tmp_path, name, 16)
    head = DINOHead(768, 2048)
    student = {f"module.head.{k}": v for k, v in head.state_dict().items() if "last_layer" not in k}
    student["module.head.last_layer.weight"] = torch.randn(2048, 256)
    torch.save({"student": student}, tmp_path / "dino_vitb16_pretrain.pth")
    torch.save(vit_base(patch_size=16, num_classes=0).state_dict(), tmp_path / "dino.pth")
    with pic._kept_local(tmp_path / "dino.pth"):
        store_lora(tmp_path, "ensemble", "ensemble")
    metric = ConformityMetric(find_metric("pic"), DreamSimEmbedder("ensemble", tmp_path, tmp_path / "dino.pth"))
    row = observed(metric, [moving_clip[:3]], [moving_clip[0]])[0]
    with pic._kept_local(tmp_path / "dino.pth"):
        expected = direct(tmp_path, "ensemble", moving_clip[0], moving_clip[:3])
    assert row["per_frame"] == pytest.approx(expected, abs=2e-6) and row["per_frame"][0] == 1


def test_foreign_code_from_torch_hub_is_refused() -> None:
    with pic._kept_local(None), pytest.raises(UserError, match="which dcbench does not run"):
        torch.hub.load("facebookresearch/dino:main", "dino_vitb16")


def card(**options: Any) -> Any:
    known = find_metric("pic")
    return known.model_copy(update={"options": known.options | options})


def test_missing_weights_and_wrong_types_say_what_to_do() -> None:
    build = load_entry_point(find_metric("pic"))
    with pytest.raises(MissingWeights, match=r"dino_vitbase16_pretrain\.pth"):
        build(card(), Runtime(offline=True))
    with pytest.raises(MissingWeights, match=r"dreamsim-clip_vitb32\.zip"):
        build(card(dreamsim_type="clip_vitb32"), Runtime(offline=True))
    with pytest.raises(UserError, match=r"unpinned code(.|\n)*Known: ensemble"):
        build(card(dreamsim_type="dinov2_vitb14"), Runtime(offline=True))
    with pytest.raises(UserError, match='Did you mean "ensemble"'):
        build(card(dreamsim_type="ensembl"), Runtime(offline=True))


def test_archives_are_checked_and_unpacked_once(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(tmp_path / "weights"))
    archive = weights_dir() / "dreamsim-open_clip_vitb32.zip"
    archive.write_bytes(b"not a zip file")
    with pytest.raises(UserError, match="is damaged"):
        dreamsim_folder("open_clip_vitb32", (), offline=True)
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("open_clip_vitb32_pretrain.pth.tar", b"")
    with pytest.raises(UserError, match="holds no open_clip_vitb32_single_lora"):
        dreamsim_folder("open_clip_vitb32", (), offline=True)
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted(stored.rglob("*")):
            zipped.write(path, path.relative_to(stored))
    metric = load_entry_point(find_metric("pic"))(card(dreamsim_type="open_clip_vitb32"), Runtime(offline=True))
    assert metric.extractor.name == "dreamsim open_clip_vitb32"
    archive.unlink()
    assert dreamsim_folder("open_clip_vitb32", (), offline=True).is_dir()
    left = {path.name for path in weights_dir().iterdir()}
    assert left == {"dreamsim-open_clip_vitb32", "trusted.json", ".locks"}


def test_two_ranks_unpack_the_archive_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads: each opens the lock anew, as two processes do. What a killed process left is removed."""
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setitem(pic.REQUIRED, "small", ("a.pth",))
    with zipfile.ZipFile(weights_dir() / "dreamsim-small.zip", "w") as zipped:
        zipped.writestr("a.pth", b"weights")
    (weights_dir() / ".dreamsim-small-left").mkdir()
    source, times, unpack = WeightSource(name="dreamsim-small.zip"), [], pic.unpack

    def slowly(archive: Path, into: Path) -> None:
        times.append(archive.name)
        unpack(archive, into)
        time.sleep(0.3)

    monkeypatch.setattr(pic, "unpack", slowly)
    with ThreadPoolExecutor(2) as ranks:
        folders = list(ranks.map(lambda _: dreamsim_folder("small", [source], offline=True), range(2)))
    assert len(times) == 1 and all((folder / "a.pth").read_bytes() == b"weights" for folder in folders)
    assert not list(weights_dir().glob(".dreamsim*"))


def test_damaged_weights_are_named(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_vitb32_single_lora").mkdir()
    (tmp_path / "open_clip_vitb32_single_lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "open_clip_vitb32_pretrain.pth.tar").write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot be loaded from"):
        DreamSimEmbedder("open_clip_vitb32", tmp_path)


def test_a_missing_image_is_an_error(metric: ConformityMetric, moving_clip: Tensor) -> None:
    with pytest.raises(UserError, match="the input image is needed"):
        observed(metric, [moving_clip], None)
    with pytest.raises(ValueError, match=r"pic: clip: got uint8 \[16, 1, 64, 80\]"):
        observed(metric, [moving_clip[:, :1]], [moving_clip[0]])
