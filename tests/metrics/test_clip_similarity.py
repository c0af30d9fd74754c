"""CLIP-similarity through open_clip's real code, with a tiny model of random weights in a file."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from observing import observed, scored
from torch import Tensor

from dcbench.catalogue import MetricCard, find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics import ClipSimilarity
from dcbench.metrics.base import ClipMetric
from dcbench.metrics.clip_similarity import CLIPEncoder, load_clip
from dcbench.metrics.per_clip import to_pil
from dcbench.models.base import Runtime
from dcbench.weights import MissingWeights, save_tensors

TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Card options of a tiny model: its JSON and its weights."""
    folder = tmp_path_factory.mktemp("clip")
    config = folder / "tiny-clip-quickgelu.json"
    config.write_text(json.dumps(TINY))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip-quickgelu", pretrained=None)
    save_tensors({k: v.detach() for k, v in model.state_dict().items()}, folder / "tiny.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, folder / "tiny.pt")
    return {"model": str(config), "checkpoint": str(folder / "tiny.safetensors")}


def metric_of(name: str, options: dict[str, Any]) -> ClipMetric:
    card: MetricCard = find_metric(name)
    card = card.model_copy(update={"options": card.options | options})
    return load_entry_point(card)(card, Runtime(offline=True))


def test_as_a_torchmetrics_class(tiny: dict[str, str], moving_clip: Tensor) -> None:
    clips, prompts = torch.stack([moving_clip[:3], moving_clip[4:7]]), ["left", "a texture moves"]
    cases: dict[str, dict[str, Any]] = {"text": {"prompts": prompts}, "frames": {}, "image": {"images": clips[:, 2]}}
    for kind, given in cases.items():
        similarity = ClipSimilarity(kind, **tiny)  # type: ignore[arg-type]
        similarity.update(clips, **given)
        metric = metric_of(f"clip_{kind}", tiny)
        rows = observed(metric, list(clips), list(clips[:, 2]), prompts)
        assert float(similarity.compute()) == pytest.approx(sum(row["value"] for row in rows) / 2, abs=1e-7)


def slow_cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1))


def test_equals_a_direct_evaluation(tiny: dict[str, str], moving_clip: Tensor) -> None:
    """Each similarity, frame by frame at batch size 1, through open_clip's own transform and tokenizer."""
    clip, image, prompt = moving_clip[:4], moving_clip[9], "a texture moves to the right"
    model, _, transform = open_clip.create_model_and_transforms(Path(tiny["model"]).stem, pretrained=tiny["checkpoint"])
    model.eval()
    with torch.no_grad():
        frames = [model.encode_image(transform(to_pil(f))[None])[0] for f in clip]  # type: ignore[operator, index]
        condition = model.encode_image(transform(to_pil(image))[None])[0]  # type: ignore[operator, index]
        text = model.encode_text(open_clip.get_tokenizer(Path(tiny["model"]).stem)([prompt]))[0]  # type: ignore[operator]
    expected = {
        "clip_text": [slow_cosine(text, frame) for frame in frames],
        "clip_image": [slow_cosine(condition, frame) for frame in frames],
        "clip_frames": [slow_cosine(frames[i], frames[i + 1]) for i in range(3)],
    }
    for name, values in expected.items():
        row = observed(metric_of(name, tiny), [clip], [image], [prompt])[0]
        assert row["per_frame"] == pytest.approx(values, abs=2e-6), name
        assert row["value"] == pytest.approx(sum(values) / len(values), abs=2e-6)


def test_a_still_picture_is_perfectly_consistent_and_exactly_so(tiny: dict[str, str], moving_clip: Tensor) -> None:
    still = moving_clip[:1].repeat(5, 1, 1, 1)
    assert observed(metric_of("clip_frames", tiny), [still], None, None)[0]["value"] == 1
    assert observed(metric_of("clip_image", tiny), [still], [still[0]], None)[0]["value"] == 1


def test_one_encoder_serves_all_and_encodes_each_frame_once(
    tiny: dict[str, str], moving_clip: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = [metric_of(name, tiny) for name in ("clip_text", "clip_frames", "clip_image")]
    assert metrics[0].extractor is metrics[1].extractor is metrics[2].extractor
    encoder = metrics[0].extractor
    assert isinstance(encoder, CLIPEncoder)
    encoded: list[int] = []
    encode = encoder.network.encode_image
    monkeypatch.setattr(encoder.network, "encode_image", lambda x: encoded.append(len(x)) or encode(x))
    clip = moving_clip[3:7].flip(2)
    for metric in metrics:
        observed(metric, [clip], [clip[0]], ["moving"])
    assert sum(encoded) == 4


def test_prompts_that_clip_does_not_read_to_their_end_are_counted(tiny: dict[str, str], moving_clip: Tensor) -> None:
    metric = metric_of("clip_text", tiny)
    clips, prompts = [moving_clip[:2]] * 3, ["short", "word " * 75, "word " * 76]  # 75 words and two marks are 77
    rows = observed(metric, clips, prompts=prompts)
    assert ["tokens_not_read" in row for row in rows] == [False, False, True]
    whole, cut = scored(metric, rows[:2]), scored(metric, rows[::-1])
    assert cut.warnings == ["1 of 3 prompts are longer than the 77 tokens that CLIP reads; the rest is cut"]
    assert whole.warnings == [] and whole.details.keys() == cut.details.keys()


def test_batches_do_not_matter(tiny: dict[str, str], moving_clip: Tensor) -> None:
    metric = metric_of("clip_frames", tiny)
    clips = [moving_clip[:3], moving_clip[5:9].flip(3)]
    together = [row["value"] for row in observed(metric, clips, None, None)]
    metric.extractor.remembered._known.clear()  # type: ignore[attr-defined]
    alone = [observed(metric, [clip], None, None)[0]["value"] for clip in reversed(clips)][::-1]
    assert together == pytest.approx(alone, abs=1e-6)


def test_every_container_of_the_same_weights_loads_equally(tiny: dict[str, str]) -> None:
    folder = Path(tiny["checkpoint"]).parent
    first, second = load_clip(folder / "tiny.safetensors"), load_clip(folder / "tiny.pt")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_identity_names_model_weights_and_activation(tiny: dict[str, str], tmp_path: Path) -> None:
    identity = metric_of("clip_text", tiny).extractor.identity
    assert identity["name"] == "open_clip tiny-clip-quickgelu (QuickGELU)" and len(identity["weights_sha256"]) == 64
    plain = tmp_path / "tiny-clip-gelu.json"
    plain.write_text(json.dumps(TINY | {"quick_gelu": False}))
    other = metric_of("clip_text", tiny | {"model": str(plain)}).extractor.identity
    assert other["name"].endswith("(GELU)") and other["weights_sha256"] == identity["weights_sha256"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_openai_archives_need_quickgelu(tiny: dict[str, str], tmp_path: Path, moving_clip: Tensor) -> None:
    """OpenAI's files are TorchScript; `ViT-B-32` would silently give them the wrong activation."""
    model = open_clip.create_model(Path(tiny["model"]).stem, pretrained=tiny["checkpoint"])
    holder = torch.nn.Module()
    for name, value in model.state_dict().items():
        parent = holder
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.register_parameter(last, torch.nn.Parameter(value, requires_grad=False))
    archive = tmp_path / "openai.pt"
    torch.jit.script(holder).save(str(archive))
    ours = observed(metric_of("clip_frames", tiny | {"checkpoint": str(archive)}), [moving_clip[:3]], None, None)
    assert ours == observed(metric_of("clip_frames", tiny), [moving_clip[:3]], None, None)
    plain = tmp_path / "tiny-other-gelu.json"
    plain.write_text(json.dumps(TINY | {"quick_gelu": False}))
    with pytest.raises(UserError, match="QuickGELU"):
        metric_of("clip_frames", {"model": str(plain), "checkpoint": str(archive)})


def test_errors_say_what_to_do(tiny: dict[str, str], moving_clip: Tensor, tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"ViT-B-32\.pt"):
        metric_of("clip_text", {})
    with pytest.raises(UserError, match='Did you mean "ViT-'):
        metric_of("clip_text", tiny | {"model": "ViT-B-23"})
    with pytest.raises(UserError, match="no such open_clip model description"):
        metric_of("clip_text", tiny | {"model": "nowhere.json"})
    with pytest.raises(UserError, match="no such checkpoint"):
        metric_of("clip_text", tiny | {"checkpoint": "nowhere.pt"})
    with pytest.raises(UserError, match="allowed: text, frames, image"):
        metric_of("clip_text", tiny | {"kind": "sound"})
    foreign = tmp_path / "foreign.pt"
    torch.save({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(UserError, match="does not fit tiny-clip-quickgelu"):
        metric_of("clip_text", tiny | {"checkpoint": str(foreign)})
    with pytest.raises(UserError, match="needs one prompt for each of the 1 clips; got 0"):
        ClipSimilarity("text", **tiny).update([moving_clip])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs one image for each of the 1 clips; got 2"):
        ClipSimilarity("image", **tiny).update([moving_clip], images=moving_clip[:2])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a caption is needed"):
        observed(metric_of("clip_text", tiny), [moving_clip])
    with pytest.raises(UserError, match="at least 2"):
        observed(metric_of("clip_frames", tiny), [moving_clip[:1]], None, None)
