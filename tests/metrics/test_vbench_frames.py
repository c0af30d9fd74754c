"""VBench's dimensions of single frames, beside numbers of VBench's own functions on the same clips and weights.

The recorded numbers are in tests/data/vbench.json: VBench's code (2026-03) read the clips of `made_weights` from
lossless files, with small networks of the authors' own classes. With a whole DINO ViT-B/16 of random weights, ours and
VBench's values of these clips differ by at most 1.7e-7.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from dreamsim.feature_extraction.vision_transformer import VisionTransformer
from made_weights import SHAPES, made_clip, made_picture, made_weights
from observing import scored
from torch import Tensor, nn

from dcbench.catalogue import MetricCard, find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics import ClipMetric, Observations
from dcbench.metrics.base import View
from dcbench.metrics.clip_similarity import CLIPEncoder
from dcbench.metrics.vbench import embedders
from dcbench.metrics.vbench.aesthetic import AestheticQuality, Aesthetics
from dcbench.metrics.vbench.consistency import Conformity, Consistency, Over
from dcbench.models.base import Runtime
from dcbench.weights import MissingWeights

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "vbench.json").read_text())
CLIP = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2},
}


class SmallDino:
    """DINO's class with a width of 96 and 3 layers."""

    weights_sha256 = "made up"

    def __init__(self) -> None:
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.network = VisionTransformer(
            patch_size=16, embed_dim=96, depth=3, num_heads=4, qkv_bias=True, norm_layer=norm, num_classes=0
        ).eval()
        self.network.load_state_dict(made_weights(self.network.state_dict(), 1, 1.5))


class SmallDreamSim:
    """64 numbers of a picture, in place of DreamSim's 1792."""

    name, weights_sha256 = "small", "made up"

    def __init__(self) -> None:
        self.network = self
        drawn = np.random.default_rng(3).standard_normal((64, 3 * 56 * 56), dtype=np.float32)
        self.weights = torch.from_numpy(drawn) / 97

    def embed(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.avg_pool2d(x, 4).flatten(1) @ self.weights.T + 0.1)


@pytest.fixture(scope="module")
def dino() -> Any:
    return SmallDino()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> embedders.ClipCrop:
    """CLIP's class in open_clip with a width of 64 and 2 layers, loaded as the real one is."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vbench-small.json").write_text(json.dumps(CLIP))
    open_clip.add_model_config(folder)
    state = open_clip.create_model("vbench-small", pretrained=None).state_dict()
    torch.save(made_weights(state, 2, 1.5), folder / "small.pt")
    return embedders.ClipCrop(CLIPEncoder("vbench-small", folder / "small.pt"), "cpu")


def of(name: str, **options: Any) -> MetricCard:
    card = find_metric(name)
    return card.model_copy(update={"options": card.options | options})


def values(metric: ClipMetric) -> list[dict[str, Any]]:
    return [metric.observe(View(made_clip(name), picture=made_picture(name))) for name in SHAPES]


def check(metric: ClipMetric, recorded: str, within: float) -> list[dict[str, Any]]:
    rows = values(metric)
    assert [row["value"] for row in rows] == pytest.approx(RECORDED[recorded]["clips"], abs=within)
    return rows


@pytest.mark.parametrize("antialias", [True, False])
def test_i2v_subject(dino: Any, antialias: bool) -> None:
    """Measured: at most 1e-7 with either resize. The two resizes are 2e-3 apart."""
    recorded = "i2v_subject" if antialias else "i2v_subject antialias=false"
    metric = Conformity(of("i2v_subject"), embedders.DinoCrop(dino, antialias, "cpu"))
    rows = check(metric, recorded, 1e-6)
    assert scored(metric, rows).value == pytest.approx(RECORDED[recorded]["score"], abs=1e-6)
    assert RECORDED["i2v_subject"]["score"] - RECORDED["i2v_subject antialias=false"]["score"] > 2e-3


@pytest.mark.parametrize("antialias", [True, False])
def test_i2v_background(antialias: bool) -> None:
    """Preprocessing and formula; DreamSim's own network is compared in test_pic. Measured: at most 1e-7."""
    small: Any = SmallDreamSim()
    metric = Conformity(of("i2v_background"), embedders.DreamSimSquash(small, antialias, "cpu"))
    check(metric, "i2v_background" if antialias else "i2v_background antialias=false", 1e-6)


def test_subject_consistency_over_clips_and_over_frames(dino: Any) -> None:
    """Measured: at most 2e-7. VBench's one process gives the mean over frames, several give the mean over clips."""
    whole = embedders.DinoWhole(dino, "cpu")
    metric = Consistency(of("subject_consistency"), whole, "clips")
    rows = check(metric, "subject_consistency", 1e-6)
    recorded = RECORDED["subject_consistency"]
    assert scored(metric, rows).value == pytest.approx(np.mean(recorded["clips"]), abs=1e-6)
    frames = scored(Consistency(of("subject_consistency", over="frames"), whole, "frames"), rows)
    assert frames.value == pytest.approx(recorded["score"], abs=1e-6) and frames.details["over"] == "frames"
    assert abs(recorded["score"] - np.mean(recorded["clips"])) > 5e-3


def test_background_consistency(clip: embedders.ClipCrop) -> None:
    """OpenAI's own class has the same weights there, open_clip's here. Measured: at most 3e-7."""
    metric = Consistency(of("background_consistency"), clip, "frames")
    rows = check(metric, "background_consistency", 1e-6)
    assert scored(metric, rows).value == pytest.approx(RECORDED["background_consistency"]["score"], abs=1e-6)


def test_aesthetic_quality(clip: embedders.ClipCrop, tmp_path: Path) -> None:
    """Measured: at most 1e-7."""
    torch.save(made_weights(nn.Linear(32, 1).state_dict(), 4, 10.0), tmp_path / "head.pth")
    rating = Aesthetics(clip, tmp_path / "head.pth", features=32)
    rows = check(AestheticQuality(of("aesthetic_quality"), rating), "aesthetic_quality", 1e-6)
    assert len(rows[1]["per_frame"]) == SHAPES["b"][0]
    assert rating.identity["weights_sha256"] != clip.weights_sha256
    torch.save(made_weights(nn.Linear(16, 1).state_dict(), 4), tmp_path / "head.pth")
    with pytest.raises(UserError, match="is not LAION's linear head: 1 tensors differ"):
        Aesthetics(clip, tmp_path / "head.pth", features=32)


def test_a_still_clip_of_its_own_picture_has_one_and_motion_less(dino: Any, clip: embedders.ClipCrop) -> None:
    """The picture goes through Pillow, the frames do not: of equal pixels, the cosine is 1 up to their rounding."""
    moving = made_clip("c")
    still = moving[:1].repeat(3, 1, 1, 1)
    for metric in (
        Consistency(of("subject_consistency"), embedders.DinoWhole(dino, "cpu"), "clips"),
        Consistency(of("background_consistency"), clip, "clips"),
    ):
        assert metric.observe(View(still)) == {"value": 1.0, "per_frame": [1.0, 1.0]}
        assert metric.observe(View(moving))["value"] < 0.99
    kept = Conformity(of("i2v_subject"), embedders.DinoCrop(dino, True, "cpu"))
    assert kept.observe(View(still, image=still[0]))["value"] == pytest.approx(1, abs=2e-4)
    other = kept.observe(View(still, image=moving[0].flip(2)))
    assert other["steps"] == [1.0, 1.0] and other["value"] == pytest.approx(0.6 + 0.4 * max(other["per_frame"]))


def test_the_pictures_own_file_comes_before_the_input_image(dino: Any) -> None:
    metric = Conformity(of("i2v_subject"), embedders.DinoCrop(dino, True, "cpu"))
    clip, picture = made_clip("a"), made_picture("a")
    both = metric.observe(View(clip, image=clip[2], picture=picture))
    assert both == metric.observe(View(clip, picture=picture)) != metric.observe(View(clip, image=clip[2]))
    assert metric.lacks(View(clip, image=clip[0])) is None and metric.lacks(View(clip, picture=picture)) is None
    assert "needs the input image" in str(metric.lacks(View(clip)))


def consistency(over: Over) -> Consistency:
    unused: Any = embedders.FrameEmbedder("none", lambda x: x, "", "", "cpu")
    return Consistency(of("subject_consistency"), unused, over)


def rows_of(lengths: list[int], shift: float = 0.0) -> list[dict[str, Any]]:
    """Rows of clips; those of clip k are better by (k + 1) * shift."""
    random = np.random.default_rng(8)
    rows = []
    for place, length in enumerate(lengths, start=1):
        frames = (random.uniform(0.5, 0.9, length) + place * shift).tolist()
        rows.append({"value": float(np.mean(frames)), "per_frame": frames})
    return rows


def test_over_frames_has_its_own_interval_and_comparison() -> None:
    lengths = [5, 20, 9, 40, 12, 7]
    rows, groups = rows_of(lengths), [str(k) for k in range(6)]
    clips, frames = (scored(consistency(over), rows, groups) for over in ("clips", "frames"))
    assert frames.value == pytest.approx(np.mean([value for row in rows for value in row["per_frame"]]))
    assert frames.value and frames.value != clips.value
    assert frames.ci95 and frames.ci95[0] < frames.value < frames.ci95[1]
    better = Observations(rows_of(lengths, 0.01), groups=groups)
    found = consistency("frames").difference(better, Observations(rows, groups=groups))
    expected = 0.01 * np.average(np.arange(1, 7), weights=lengths)
    assert found.difference == pytest.approx(expected) and found.ci95 and found.ci95[0] < expected < found.ci95[1]
    equal = rows_of([8] * 6)
    assert scored(consistency("frames"), equal, groups).ci95 == scored(consistency("clips"), equal, groups).ci95


NETWORKS = {
    "i2v_subject": r"dino_vitbase16_pretrain\.pth",
    "i2v_background": r"dino_vitbase16_pretrain\.pth",
    "subject_consistency": r"dino_vitbase16_pretrain\.pth",
    "background_consistency": r"ViT-B-32\.pt",
    "aesthetic_quality": r"ViT-L-14\.pt",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_missing_weights_say_how_to_get_them(name: str) -> None:
    with pytest.raises(MissingWeights, match=rf"{NETWORKS[name]} is missing(.|\n)*dcbench weights fetch"):
        load_entry_point(find_metric(name))(find_metric(name), Runtime(offline=True))


def test_wrong_files_and_options_say_what_is_allowed(tmp_path: Path) -> None:
    torch.save({"pos_embed": torch.zeros(1, 197, 768)}, tmp_path / "dino.pth")
    with pytest.raises(UserError, match="is not DINO's ViT-B/16: 149 tensors differ"):
        embedders.Dino(tmp_path / "dino.pth")
    for card, message in (
        (of("subject_consistency", over="frame"), 'over is "frame"; allowed: clips, frames. Did you mean "frames"'),
        (of("i2v_subject", antialias="no"), "antialias is 'no'; allowed: true, false"),
    ):
        with pytest.raises(UserError, match=message):
            load_entry_point(card)(card, Runtime(offline=True))


def test_clips_of_one_frame_have_no_consistency(dino: Any) -> None:
    metric = Consistency(of("subject_consistency"), embedders.DinoWhole(dino, "cpu"), "clips")
    with pytest.raises(UserError, match="a clip needs at least 2 frames"):
        metric.observe(View(made_clip("a")[:1]))
