import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest

from dcbench.errors import UserError
from dcbench.facts import validate
from dcbench.protocol import FOLDER, Protocol, choose_frames, find_protocol, fingerprint, plan_clips, protocols


@dataclass(frozen=True)
class Video:
    id: str
    num_frames: int = 100
    fps: float = 25.0
    label: str | None = None
    captions: tuple[str, ...] = ("one", "two", "three")
    group: str | None = None
    film: bool = False
    place: int | None = None

    @property
    def path(self) -> str:
        return f"{self.id}.avi"


def protocol(**changes) -> Protocol:
    base = {"name": "p", "version": 1, "title": "P", "summary": "s", "split": "test", "num_clips": 20}
    base |= {"num_frames": 16, "frame_stride": 3, "height": 8, "width": 8}
    return Protocol.model_validate(base | changes)


def plan(p, videos, seed=0, limit=None):
    return plan_clips(p, videos, lambda order: order, seed, limit, lambda item, case: None)


VIDEOS = [Video(f"v{k:03d}", label=f"class{k // 40}") for k in range(200)]


def test_named_protocols_say_what_they_pin():
    assert {"dynamicrafter-paper", "consisti2v", "smoke"} <= set(protocols())
    paper = find_protocol("dynamicrafter-paper").resolved("ucf101")
    assert (paper.num_clips, paper.num_frames, paper.frame_stride) == (2048, 16, 3)
    assert (paper.height, paper.width, paper.condition) == (256, 256, "first")
    assert find_protocol("consisti2v").resolved("ucf101").selection == "by_class"
    assert find_protocol("consisti2v").resolved("msrvtt").num_clips == 2990
    with pytest.raises(UserError, match='Did you mean "smoke"'):
        find_protocol("smok")


def test_a_dataset_may_override_only_fields_that_exist():
    with pytest.raises(UserError, match="hieght"):
        protocol(datasets={"shapes": {"hieght": 3}}).resolved("shapes")


def test_the_choice_does_not_depend_on_the_order_of_the_directory():
    shuffled = VIDEOS.copy()
    random.Random(1).shuffle(shuffled)
    assert plan(protocol(), VIDEOS) == plan(protocol(), shuffled)


def test_a_smaller_limit_is_a_subset_and_another_seed_another_choice():
    whole = {item.id: item for item in plan(protocol(), VIDEOS)[0]}
    part = plan(protocol(), VIDEOS, limit=5)[0]
    assert len(part) == 5
    assert all(whole[item.id] == item for item in part)
    other = plan(protocol(selection_seed=1), VIDEOS)[0]
    assert {item.id for item in other} != set(whole)


def test_adding_videos_changes_few_choices():
    """A video's place depends on its id alone: one more file in the folder moves one clip at most."""
    before = {item.id for item in plan(protocol(), VIDEOS)[0]}
    after = {item.id for item in plan(protocol(), [*VIDEOS, Video("w000")])[0]}
    assert len(before - after) <= 1


def test_the_sampling_seed_is_no_part_of_the_fingerprint_but_every_cause_of_different_numbers_is():
    base = protocol()
    manifest = plan(base, VIDEOS)[0]
    print_of = fingerprint(base, "d", manifest)
    assert print_of == fingerprint(base, "d", plan(base, VIDEOS, seed=7)[0])
    assert plan(base, VIDEOS, seed=7)[0][0].seed != manifest[0].seed
    changes = [
        {"num_clips": 21}, {"selection": "first"}, {"selection_seed": 2}, {"num_frames": 15}, {"frame_stride": 2},
        {"start": "first"}, {"short_videos": "shrink_stride"}, {"condition": "random"}, {"height": 16}, {"width": 16},
        {"resize": "squash"}, {"interpolation": "bicubic"}, {"antialias": False}, {"caption": "random"},
        {"decoder": "pyav"}, {"split": "train"}, {"version": 2}, {"reference_videos": "disjoint"},
        {"scored_frames": "without_condition"}, {"cuts": "drop"}, {"scored_frames": "between"}, {"condition": "ends"},
        {"interpolation": "area_linear_light"}, {"chunks": "all", "start": "first"},
    ]  # fmt: skip
    prints = [fingerprint(p := protocol(**change), "d", plan(p, VIDEOS)[0]) for change in changes]
    assert len({print_of, fingerprint(base, "other", manifest), *prints}) == len(changes) + 2


def test_fingerprints_of_older_protocols_do_not_move():
    """Recorded before `reference_videos`, `scored_frames` and `cuts` were added."""
    base = protocol()
    assert fingerprint(base, "d", plan(base, VIDEOS)[0]) == "fa186a34bbeb46f4"
    later = {"reference_videos", "scored_frames", "cuts", "samples_per_item", "reference", "chunks", "frames", "size"}
    later |= {"seconds", "metrics"}
    assert not later & set(base.model_dump())
    names = ("consisti2v", "dynamicrafter-paper", "folders", "smoke", "tiny", "tiny-first")
    older = [find_protocol(name) for name in names]
    assert all(not later & set(known.identity()) for known in older)


# --- chunks and ends ---

CHUNKS: dict[str, object] = {"chunks": "all", "start": "first", "num_frames": 9, "frame_stride": 1}


def test_all_complete_chunks_in_order_until_there_are_enough():
    videos = [Video("a", 30), Video("b", 8), Video("c", 18, group="film"), Video("d", 9)]
    cases, excluded = plan(protocol(**CHUNKS, selection="first", num_clips=5), videos)
    assert [case.id for case in cases] == ["a-00000", "a-00009", "a-00018", "c-00000", "c-00009"]
    assert [(entry.id, entry.rule) for entry in excluded] == [("b", "short")]
    assert [case.frames[0] for case in cases] == [0, 9, 18, 0, 9] and cases[2].frames == list(range(18, 27))
    assert [case.cluster for case in cases] == ["a", "a", "a", "film", "film"]
    assert {case.source_id for case in cases} == {"a", "c"} and cases[0].item_id == "a-00000"
    every, _ = plan(protocol(**CHUNKS, selection="all"), videos)
    assert len(every) == 6
    assert [case.id for case in plan(protocol(**CHUNKS, selection="first"), videos, limit=2)[0]] == [
        "a-00000",
        "a-00009",
    ]


def test_chunks_keep_the_stride_and_the_rate():
    cases, _ = plan(protocol(**CHUNKS | {"frame_stride": 2}), [Video("a", 40)])
    assert [case.frames for case in cases] == [list(range(0, 18, 2)), list(range(18, 36, 2))]
    assert cases[0].fps == 12.5
    slow, _ = plan(protocol(**CHUNKS, fps=12.5), [Video("a", 40)])
    assert [case.frames for case in slow] == [list(range(0, 18, 2)), list(range(18, 36, 2))]
    assert [case.id for case in slow] == ["a-00000", "a-00018"] and slow[0].fps == 12.5


def test_several_clips_of_each_chunk():
    cases, _ = plan(protocol(**CHUNKS, samples_per_item=2), [Video("a", 18)])
    assert [case.id for case in cases] == ["a-00000-0", "a-00000-1", "a-00009-0", "a-00009-1"]
    assert [case.item_id for case in cases] == ["a-00000", "a-00000", "a-00009", "a-00009"]
    assert {case.source_id for case in cases} == {"a"} and len({case.seed for case in cases}) == 4


def test_a_chunk_with_a_cut_or_without_its_frames_is_left_out_alone():
    def find_cut(item, case):
        return {0: 5, 9: UserError("damaged")}.get(case.frames[0])

    cases, excluded = plan_clips(protocol(**CHUNKS, cuts="drop"), [Video("a", 27)], lambda o: o, 0, None, find_cut)
    assert [case.id for case in cases] == ["a-00018"]
    assert [(entry.id, entry.rule) for entry in excluded] == [("a-00000", "cut"), ("a-00009", "unreadable")]


def test_a_published_order_needs_a_place_for_each_video():
    videos = [Video("a", place=2), Video("b", place=0), Video("c", place=1)]
    cases, _ = plan(protocol(selection="published", num_clips=2), videos)
    assert [case.id for case in cases] == ["b", "c"]
    with pytest.raises(UserError, match='selection = "published", but d has no place'):
        plan(protocol(selection="published"), [*videos, Video("d")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": "ends", "num_frames": 1}, '"ends" needs num_frames >= 2, got 1'),
        ({"condition": "ends", "reference": "none", "fps": 8}, 'needs reference = "clip"'),
        ({"condition": "ends", "scored_frames": "without_condition"}, 'use "between"'),
        ({"scored_frames": "between", "num_frames": 2}, '"between" needs num_frames >= 3, got 2'),
        ({"chunks": "all"}, 'chunks = "all" needs start = "first", got "random"'),
        (CHUNKS | {"short_videos": "shrink_stride"}, 'needs short_videos = "drop"'),
        (CHUNKS | {"reference_videos": "disjoint"}, 'needs reference_videos = "paired"'),
    ],
)
def test_choices_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        validate(protocol().model_dump() | changes, Protocol, "p.toml")


def test_the_protocols_of_vidim_bench():
    davis, ucf = find_protocol("vidim-davis-7"), find_protocol("vidim-ucf101-7")
    for chosen in (davis, ucf):
        assert (chosen.num_frames, chosen.frame_stride, chosen.height, chosen.width) == (9, 1, 256, 256)
        assert (chosen.chunks, chosen.condition, chosen.scored_frames) == ("all", "ends", "all")
    assert (davis.num_clips, davis.split, davis.resize, davis.interpolation) == (
        357, "2016", "crop", "area_linear_light",
    )  # fmt: skip
    assert (ucf.num_clips, ucf.split, ucf.resize, ucf.interpolation) == (400, "test01", "squash", "bicubic")


# --- the clips apart ---

DISJOINT = protocol(reference_videos="disjoint")


def test_the_clips_apart_are_the_next_ones_in_the_seeded_order():
    """The animated videos and those apart are, together, what twice as many clips would be."""
    chosen, _ = plan(DISJOINT, VIDEOS)
    assert [case.model_copy(update={"apart": None}) for case in chosen] == plan(protocol(), VIDEOS)[0]
    both = [part for case in chosen for part in (case.model_copy(update={"apart": None}), case.apart) if part]
    assert sorted(both, key=lambda case: case.id) == plan(protocol(num_clips=40), VIDEOS)[0]
    shuffled = VIDEOS.copy()
    random.Random(1).shuffle(shuffled)
    assert plan(DISJOINT, shuffled)[0] == chosen
    other = plan(protocol(reference_videos="disjoint", selection_seed=1), VIDEOS)[0]
    assert {case.apart.id for case in other if case.apart} != {case.apart.id for case in chosen if case.apart}


def test_no_source_video_is_on_both_sides():
    """Ten videos of each source: the next ones in the order alone would share sources with the animated ones."""
    videos = [replace(video, group=f"source{k % 20}") for k, video in enumerate(VIDEOS)]
    chosen = plan(protocol(num_clips=8, reference_videos="disjoint"), videos)[0]
    animated = {case.group for case in chosen}
    assert len(chosen) == len({case.apart.id for case in chosen if case.apart}) == 8
    assert not animated & {case.apart.group for case in chosen if case.apart}
    naive = [case for case in plan(protocol(num_clips=16), videos)[0] if case.id not in {c.id for c in chosen}]
    assert animated & {case.group for case in naive}


def test_the_seed_of_a_clip_apart_is_no_part_of_the_fingerprint_but_its_video_is():
    chosen = plan(DISJOINT, VIDEOS)[0]
    print_of = fingerprint(DISJOINT, "d", chosen)
    assert print_of == fingerprint(DISJOINT, "d", plan(DISJOINT, VIDEOS, seed=7)[0])
    swapped = [
        chosen[0].model_copy(update={"apart": chosen[1].apart}),
        chosen[1].model_copy(update={"apart": chosen[0].apart}),
        *chosen[2:],
    ]
    assert print_of != fingerprint(DISJOINT, "d", swapped)


def test_too_few_other_videos_are_an_error_that_says_how_many_there_are():
    def never(order):
        raise AssertionError("videos were read before the error")

    with pytest.raises(UserError, match=r"compares 20 animated .* has only 19 usable ones.*--limit.*\"paired\""):
        plan_clips(DISJOINT, VIDEOS[:39], never, 0)
    with pytest.raises(UserError, match=r"compares 200 animated .* has only 0"):
        plan_clips(protocol(reference_videos="disjoint", selection="all"), VIDEOS, never, 0)
    one_source = [replace(video, group="one") if k < 190 else video for k, video in enumerate(VIDEOS)]
    with pytest.raises(UserError, match=r"has only [0-9]+ usable ones of other source videos"):
        plan(DISJOINT, one_source)
    short = [replace(v, num_frames=20) for v in VIDEOS if v.id not in {c.id for c in plan(protocol(), VIDEOS)[0]}]
    usable = [video for video in VIDEOS if video.id not in {v.id for v in short}]
    with pytest.raises(UserError, match=r"compares 20 animated .* has only 0"):
        plan(DISJOINT, [*usable, *short])
    assert len(plan(protocol(reference_videos="disjoint", selection="all"), VIDEOS, limit=100)[0]) == 100


def test_an_unreadable_video_apart_is_named_and_not_replaced():
    broken = next(case.apart.id for case in plan(DISJOINT, VIDEOS)[0] if case.apart)

    def probe(order):
        return [UserError("damaged") if video.id == broken else video for video in order]

    chosen, excluded = plan_clips(DISJOINT, VIDEOS, probe, 0)
    assert len(chosen) == 20 and sum(case.apart is not None for case in chosen) == 19
    assert [(lost.id, lost.reason, lost.rule) for lost in excluded] == [(broken, "damaged", "unreadable")]


def test_what_is_compared_is_said_only_when_it_is_not_the_usual():
    assert protocol().compared == ""
    both = protocol(reference_videos="disjoint", scored_frames="without_condition")
    assert both.compared == "with videos that are not animated, without the condition frame"


def test_a_protocol_without_any_scored_frame_is_refused():
    with pytest.raises(UserError, match='"without_condition" needs num_frames >= 2, got 1'):
        data = protocol().model_dump() | {"scored_frames": "without_condition", "num_frames": 1}
        validate(data, Protocol, "one.toml")


def test_trap_01_the_first_videos_in_sorted_order_are_not_taken():
    labels = Counter(item.label for item in plan(protocol(num_clips=50), VIDEOS)[0])
    assert len(labels) == 5
    assert set(Counter(i.label for i in plan(protocol(num_clips=40, selection="first"), VIDEOS)[0])) == {"class0"}


def test_by_class_follows_the_distribution_at_every_size():
    uneven = [Video(f"a{k}", label="a") for k in range(150)] + [Video(f"b{k}", label="b") for k in range(50)]
    for size in (20, 40, 100):
        counts = Counter(item.label for item in plan(protocol(num_clips=size, selection="by_class"), uneven)[0])
        assert abs(counts["a"] - 0.75 * size) <= 1


def test_trap_02_the_stride_is_in_the_frames():
    for item in plan(protocol(), VIDEOS)[0]:
        assert {b - a for a, b in zip(item.frames, item.frames[1:], strict=False)} == {3}
        assert item.frame_stride == 3


def test_trap_03_sixteen_frames_are_sixteen_frames():
    assert all(len(item.frames) == 16 and item.frames[-1] < 100 for item in plan(protocol(), VIDEOS)[0])


def test_trap_08_the_frame_rate_of_a_clip_is_that_of_its_stride():
    assert {item.fps for item in plan(protocol(), VIDEOS)[0]} == {25 / 3}


def test_trap_07_the_number_of_clips_changes_the_fingerprint():
    few, many = protocol(num_clips=20), protocol(num_clips=40)
    assert fingerprint(few, "d", plan(few, VIDEOS)[0]) != fingerprint(many, "d", plan(many, VIDEOS)[0])
    limited = plan(many, VIDEOS, limit=20)[0]
    assert fingerprint(many, "d", limited) != fingerprint(many, "d", plan(many, VIDEOS)[0])


def test_trap_11_an_unreadable_video_is_named_and_not_replaced():
    broken = plan(protocol(), VIDEOS)[0][3].id

    def probe(order):
        return [UserError("damaged") if video.id == broken else video for video in order]

    chosen, excluded = plan_clips(protocol(), VIDEOS, probe, 0)
    assert len(chosen) == 19
    assert [(lost.id, lost.reason, lost.rule) for lost in excluded] == [(broken, "damaged", "unreadable")]


def test_the_answers_belong_to_the_videos_in_the_protocols_order():
    """Whatever the order is, a video's frames are chosen by its own length, and no more is asked than is needed."""
    videos = [replace(video, num_frames=46 + 5 * k) for k, video in enumerate(VIDEOS)]
    asked = []

    def probe(order):
        for video in order:
            asked.append(video.id)
            yield video

    chosen, _ = plan_clips(protocol(), videos, probe, 0)
    lengths = {video.id: video.num_frames for video in videos}
    expected = {item.id: choose_frames(protocol(), item.id, lengths[item.id]) for item in chosen}
    assert {item.id: (item.frames, item.frame_stride) for item in chosen} == expected
    assert sorted(asked) == [item.id for item in chosen]


def test_short_videos_are_dropped_and_replaced_by_rule_or_the_stride_shrinks():
    videos = [replace(video, num_frames=29) if k % 2 else video for k, video in enumerate(VIDEOS)]
    chosen, excluded = plan(protocol(), videos)
    assert len(chosen) == 20
    assert excluded
    assert {lost.rule for lost in excluded} == {"short"}
    assert "29 frames; 46 are needed" in excluded[0].reason
    chosen, excluded = plan(protocol(short_videos="shrink_stride"), videos)
    assert not excluded
    assert {item.frame_stride for item in chosen} == {1, 3}


def test_a_video_with_a_cut_in_its_clip_is_replaced_where_the_protocol_says_so():
    usual, _ = plan(protocol(), VIDEOS)
    cut, broken = usual[3].id, usual[5].id
    asked = []

    def find_cut(item, case):
        asked.append((item.id, case.id))
        return 7 if item.id == cut else UserError("damaged") if item.id == broken else None

    def probe(order):
        return order

    kept, _ = plan_clips(protocol(), VIDEOS, probe, 0, find_cut=find_cut)
    assert kept == usual and not asked
    chosen, excluded = plan_clips(protocol(cuts="drop"), VIDEOS, probe, 0, find_cut=find_cut)
    assert [(lost.id, lost.reason, lost.rule) for lost in excluded] == sorted(
        [(cut, "a cut before frame 7 of its clip", "cut"), (broken, "damaged", "unreadable")]
    )
    before, after = {case.id for case in usual}, {case.id for case in chosen}
    assert before - after == {cut, broken} and len(after - before) == 1 and len(asked) == 21
    _, apart = plan_clips(protocol(cuts="drop", reference_videos="disjoint"), VIDEOS, probe, 0, find_cut=find_cut)
    assert [lost.id for lost in apart] == sorted([cut, broken])
    with pytest.raises(ValueError, match="needs find_cut"):
        plan_clips(protocol(cuts="drop"), VIDEOS, probe, 0)
    with pytest.raises(ValueError, match="num_frames >= 2"):
        protocol(cuts="drop", num_frames=1)


@pytest.mark.parametrize("frames", range(16, 60))
def test_frames_exist_whatever_the_length(frames):
    for start in ("random", "first", "middle"):
        found = choose_frames(protocol(short_videos="shrink_stride", start=start), "v", frames)
        assert found is not None
        assert 0 <= found[0][0] <= found[0][-1] < frames
    assert (choose_frames(protocol(), "v", frames) is None) == (frames < 46)


def test_twice_the_same_id_is_an_error():
    with pytest.raises(UserError, match='two videos with the id "v001"'):
        plan(protocol(), [*VIDEOS, Video("v001")])


def test_no_usable_clip_is_an_error_with_an_example():
    with pytest.raises(UserError, match=r"no usable clip among 1 videos.*8 frames; 46 are needed"):
        plan(protocol(), [Video("v", num_frames=8)])


def test_metrics_of_a_protocol_are_names_that_the_fingerprint_does_not_cover(tmp_path):
    plain, own = protocol(), protocol(metrics=["psnr", "lpips(net=vgg)"])
    assert own.metrics == ("psnr", "lpips(net=vgg)") and own.identity() == plain.identity()
    cases, _ = plan(plain, VIDEOS)
    assert fingerprint(own, "d", cases) == fingerprint(plain, "d", cases)
    assert "metrics" not in plain.model_dump() and own.model_dump()["metrics"] == own.metrics
    assert protocol(datasets={"shapes": {"metrics": ["ssim"]}}).resolved("shapes").metrics == ("ssim",)
    for name in ("/tmp/card.toml", "card.toml", "card.toml(a=1)", "../x", "file.py:build", "", "a b"):
        with pytest.raises(UserError, match="no name of a metric"):
            validate(plain.model_dump() | {"metrics": [name]}, Protocol, "p")


@pytest.mark.parametrize("table", ["", "[datasets.msrvtt]\n"])
def test_an_unknown_metric_is_an_error_when_the_protocol_is_read(tmp_path, table):
    path = tmp_path / "mine.toml"
    text = (FOLDER / "smoke.toml").read_text()
    path.write_text(f'{text}\n{table}metrics = ["psnrr"]\n' if table else f'metrics = ["psnrr"]\n{text}')
    with pytest.raises(UserError, match=r'mine.toml, metrics.*no metric is called "psnrr". Did you mean "psnr"'):
        find_protocol(str(path))
