"""The judge is right on the world's own clips, at any stride and size, and is not fooled by degraded ones."""

import random

import pytest
import torch

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.datasets.shapes import Shapes, ShapesVideo
from dcbench.metrics import Observations, View
from dcbench.metrics.judge import ASPECTS, judge
from dcbench.models.base import Runtime
from dcbench.shapes import MOTIONS


def clips_and_scenes(size, stride, count):
    rng = random.Random(0)
    videos = [item.video for item in Shapes(size=size, test_videos=count).items("test")]
    clips = []
    for video in videos:
        start = rng.randrange(48 - 15 * stride)
        clips.append(video.read(range(start, start + 15 * stride + 1, stride)))
    return clips, [video.scene for video in videos if isinstance(video, ShapesVideo)]


def score(clips, scenes, fps):
    """The five metrics' values, by aspect."""
    cards = {aspect: find_metric(f"judge_{aspect}") for aspect in (*ASPECTS, "all")}
    metrics = {aspect: load_entry_point(card)(card, Runtime()) for aspect, card in cards.items()}
    rows = []
    for clip, scene in zip(clips, scenes, strict=True):  # clip by clip: a clip is judged once for all of them
        view = View(clip, fps=fps, truth=vars(scene))
        rows.append({aspect: metric.observe(view) for aspect, metric in metrics.items()})
    return {aspect: metrics[aspect].score(Observations([row[aspect] for row in rows])).value for aspect in metrics}


@pytest.mark.parametrize(("size", "stride"), [(32, 1), (32, 3), (64, 3)])
def test_real_clips_are_judged_rightly(size, stride):
    clips, scenes = clips_and_scenes(size, stride, 150)
    assert min(score(clips, scenes, 25 / stride).values()) >= 0.99


def test_noise_of_fifteen_levels_changes_little():
    clips, scenes = clips_and_scenes(32, 3, 150)
    rng = torch.Generator().manual_seed(0)
    noisy = [(c + 15 * torch.randn(c.shape, generator=rng)).clamp(0, 255).to(torch.uint8) for c in clips]
    assert score(noisy, scenes, 25 / 3)["all"] >= 0.95


def test_what_is_wrong_is_seen():
    clips, scenes = clips_and_scenes(32, 3, 150)
    still = [clip[:1].expand_as(clip) for clip in clips]
    assert score(still, scenes, 25 / 3)["motion"] == sum(s.motion == "stays still" for s in scenes) / len(scenes)
    backwards = score([clip.flip(0) for clip in clips], scenes, 25 / 3)
    assert backwards["motion"] == still_share(scenes) and backwards["shape"] >= 0.99
    others = score(clips, scenes[1:] + scenes[:1], 25 / 3)
    assert all(others[aspect] < 0.4 for aspect in ASPECTS)


def still_share(scenes):
    return sum(scene.motion == "stays still" for scene in scenes) / len(scenes)


def test_each_motion_is_told_from_the_others():
    clips, scenes = clips_and_scenes(32, 1, 150)
    assert {scene.motion for scene in scenes} == set(MOTIONS)
    for clip, scene in zip(clips, scenes, strict=True):
        assert judge(clip, 25).motion == scene.motion


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_empty_clip_shows_nothing(value):
    verdict = judge(torch.full((16, 3, 32, 32), value, dtype=torch.uint8), 8)
    assert (verdict.shape, verdict.colour, verdict.motion) == ("none", "none", "none")


def test_an_object_that_vanishes_has_no_motion():
    clips, _ = clips_and_scenes(32, 3, 1)
    clip = clips[0].clone()
    clip[8:] = clip[0, :, :1, :1]
    assert judge(clip, 8).motion == "none"
