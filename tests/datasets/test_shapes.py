"""The shapes world: deterministic, disjoint splits, strides that mean speed, exact frames."""

import pickle
from collections import Counter

import pytest
import torch

from dcbench.datasets.base import VideoError
from dcbench.datasets.shapes import Shapes
from dcbench.errors import UserError
from dcbench.shapes import JITTER, MOTIONS, TEMPLATES, TRAVEL, scene


def test_a_video_is_the_same_wherever_it_is_read():
    first, again = Shapes(size=32, test_videos=3), Shapes(size=32, test_videos=9)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    for item, other in zip(first.items("test"), again.items("test"), strict=False):
        assert item.id == other.id and item.captions == other.captions
        copy = pickle.loads(pickle.dumps(other.video))
        assert torch.equal(item.video.read([5, 0, 47]), copy.read(range(48))[[5, 0, 47]])
    assert torch.equal(state, torch.random.get_rng_state())


def test_ids_are_sorted_and_splits_differ():
    world = Shapes(train_videos=200, test_videos=200)
    train, test = world.items("train"), world.items("test")
    assert [item.id for item in test] == sorted(item.id for item in test)
    assert not {repr(item.video) for item in train} & {repr(item.video) for item in test}


def test_the_default_has_2048_test_videos_of_the_stated_form():
    items = Shapes().items("test")
    assert len(items) == 2048
    info = items[0].video.info()
    assert (info.num_frames, info.fps, info.height, info.width, info.decoder) == (48, 25.0, 64, 64, "procedural")
    clip = items[0].video.read([0, 3, 6])
    assert clip.dtype == torch.uint8 and clip.shape == (3, 3, 64, 64)
    counts = Counter(item.label for item in items)
    assert set(counts) == set(MOTIONS) and min(counts.values()) > 270


def test_only_videos_in_which_something_moves():
    every, moving = Shapes(test_videos=60).items("test"), Shapes(test_videos=60, moving=True).items("test")
    still = {item.id for item in every if item.label == "stays still"}
    assert still and [item.id for item in moving] == [item.id for item in every if item.id not in still]
    for item in moving:
        first, last = item.video.read([0, 47])
        assert not torch.equal(first, last)
    with pytest.raises(UserError, match="moving = 1, expected true or false"):
        Shapes(moving=1)  # type: ignore[arg-type]


def test_the_caption_names_what_is_shown():
    item = Shapes().item("test", 0)
    made = scene("test", 0)
    assert len(item.captions) == len(TEMPLATES)
    for caption in item.captions:
        for word in (made.shape, made.colour, made.background, made.size, made.motion):
            assert word in caption


def test_the_first_frame_does_not_tell_the_motion():
    starts = {motion: [] for motion in MOTIONS}
    for i in range(3000):
        made = scene("train", i)
        starts[made.motion].append(made.start)
        assert max(map(abs, made.start)) <= JITTER
    for values in starts.values():
        assert torch.tensor(values).mean(0).abs().max() < 0.03


def test_the_stride_scales_the_way():
    item = next(i for i in Shapes(size=64).items("test") if i.label == "moves right")
    for stride in (1, 3):
        clip = item.video.read(range(0, 16 * stride, stride)).float()
        mask = (clip - clip[:, :, :1, :1]).abs().sum(1)
        centre = (mask.sum(1) * torch.arange(64)).sum(1) / mask.sum((1, 2))
        way = float(centre[8] - centre[0]) / 32
        assert way == pytest.approx(TRAVEL * 8 * stride / 25, abs=0.01)


def test_sizes_show_the_same_scene():
    small, large = Shapes(size=32).item("test", 7).video, Shapes(size=256).item("test", 7).video
    shrunk = torch.nn.functional.avg_pool2d(large.read([20]).float(), 8)
    assert (shrunk - small.read([20]).float()).abs().mean() < 1


def test_wrong_requests_name_the_remedy():
    with pytest.raises(VideoError, match=r"0\.\.47"):
        Shapes().item("test", 0).video.read([48])
    with pytest.raises(UserError, match="train"):
        Shapes().items("trian")
    with pytest.raises(UserError, match="size = 3"):
        Shapes(size=3)
