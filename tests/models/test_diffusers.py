"""Pipelines of diffusers behind the one interface: real classes, real `from_pretrained`, random weights."""

import dataclasses
import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch

from dcbench.catalogue import ModelCard, cards, find_model, with_overrides
from dcbench.cli import main
from dcbench.clips import TemporalPolicy
from dcbench.errors import UserError
from dcbench.models.base import Request, Runtime, Wanted, check_generated, check_wanted
from dcbench.models.baselines import diffusers as family
from dcbench.runs.directory import RunDirectory

pytestmark = [
    # the Euler scheduler hands torch tensors to numpy in a way that numpy 2 comments on
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]
ALIKE = ("svd-xt", "skyreels-v2-i2v", "skyreels-v2-i2v-1.3b", "sparsectrl")  # near others that the fast suite runs
CARDS = [name for name, card in cards("models").items() if card.entry_point == f"{family.__name__}:load"]
SMALL = ["clip.height=32", "clip.width=32", "sampling.steps=2"]


def tiny_card(name: str, folder: Path, *settings: str) -> ModelCard:
    """The card itself, with its weights, its size and its number of frames made small."""
    card = find_model(name)
    frames = 17 if card.options["temporal"] == "nearest_time" else 16
    return with_overrides(card, [f"options.path={folder}", *SMALL, f"clip.frames={frames}", *settings])


def request(card: ModelCard, clip_id: str = "a", seed: int = 1, size: tuple[int, int] = (24, 40)) -> Request:
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Request(clip_id, image, "a red square moves", 16, card.clip.fps or 8.0, 3, seed)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Folder of a tiny saved pipeline, by builder; built once."""
    base, done = tmp_path_factory.mktemp("pipelines"), {}

    def get(name: str) -> Path:
        if name not in done:
            done[name] = tiny_pipelines.build(name, base / name)
        return done[name]

    return get


def builder_of(card: ModelCard) -> str:
    return "Wan2.2" if card.name == "wan2.2-i2v" else card.options["pipeline"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in ALIKE else []) for n in CARDS])
def test_the_pipeline_of_each_card_makes_clips_of_the_protocol(name, saved):
    card = tiny_card(name, saved(builder_of(find_model(name))))
    model = family.load(card, Runtime())
    assert type(model.pipeline).__name__ == card.options["pipeline"]
    asked = request(card)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    clip = check_generated(model.generate([asked])[0], asked, name)
    assert tuple(clip.shape) == (16, 3, 24, 40)
    assert clip.float().std() > 1
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)  # a clip depends on its own request: not on what was drawn before, nor on its neighbour
    again = model.generate([request(card, "b", seed=2), asked])
    assert torch.equal(again[1], clip)
    assert not torch.equal(again[0], clip)


def test_every_class_has_a_builder_and_every_card_its_facts():
    assert {find_model(name).options["pipeline"] for name in CARDS} <= set(tiny_pipelines.BUILDERS)
    for name in CARDS:
        card = find_model(name)
        assert {"path", "resize", "temporal", "dtype", "offload", "memory_gb"} <= set(card.options), name
        assert card.licence, name
        assert all(source.size and source.licence and source.repository for source in card.weights), name


def test_a_run_of_a_pipeline_records_what_it_was_made_with(saved, in_tmp, monkeypatch):
    settings = [f"options.path={saved('LTXImageToVideoPipeline')}", *SMALL, "clip.frames=49"]
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ["sample", "--model", "ltx-video", "--dataset", "shapes", "--limit", "2", "--out", "run", *options]
    monkeypatch.setattr("sys.argv", ["dcbench", *arguments])
    with pytest.raises(SystemExit, match="0"):
        main()
    directory = RunDirectory(Path("run"))
    rows = directory.finished_samples()
    assert len(rows) == 2
    for row in rows.values():
        assert row["shape"] == [16, 3, 64, 64]
        assert row["dtype"] == "bfloat16"
        assert row["device"] == "cpu"
        assert row["weights"] == "LTXImageToVideoPipeline"
    plan = json.loads(directory.plan.read_text())
    assert plan["model"]["options"]["resize"] == "same_area"
    assert plan["model"]["options"]["temporal"] == "nearest_time"


# ---------------------------------------------------------------------------------------------------- size and time


def ramp(height: int, width: int) -> torch.Tensor:
    """uint8 [3 h w]: red grows to the right, green downwards."""
    down, right = torch.meshgrid(torch.linspace(0, 255, height), torch.linspace(0, 255, width), indexing="ij")
    return torch.stack([right, down, right]).to(torch.uint8)


@pytest.mark.parametrize("policy", ["squash", "pad", "same_area"])
def test_these_policies_show_the_whole_image_at_its_place(policy):
    image = ramp(256, 256)
    height, width = family.working_size(policy, (256, 256), (320, 576), 16)
    worked = family.to_working(image, height, width, policy)
    assert tuple(worked.shape) == (3, height, width)
    back = family.from_working(worked[None], 256, 256, policy)[0]
    assert (back.float() - image.float()).abs().max() < 4


def test_the_policy_crop_shows_the_middle_alone():
    worked = family.to_working(ramp(256, 256), 144, 288, "crop")
    assert (worked[0].min(), worked[0].max()) == (0, 255)
    assert worked[1].min() > 60
    assert worked[1].max() < 195


def test_same_area_keeps_area_and_shape():
    height, width = family.working_size("same_area", (240, 320), (480, 832), 16)
    assert (height % 16, width % 16) == (0, 0)
    assert height * width == pytest.approx(480 * 832, rel=0.05)
    assert width / height == pytest.approx(4 / 3, rel=0.05)
    assert family.working_size("squash", (240, 320), (480, 832), 16) == (480, 832)


def test_pad_fills_the_borders_with_the_edge():
    worked = family.to_working(ramp(64, 64), 64, 128, "pad")
    assert (worked[0, :, :32] < 5).all()
    assert (worked[0, :, -32:] > 250).all()


class Counts:
    """A pipeline whose frame k is grey k; remembers how it was called."""

    def __call__(
        self, image, height, width, num_frames, fps=7, prompt="", num_inference_steps=1, generator=None, output_type=""
    ):
        self.called = locals()
        grey = torch.arange(num_frames).view(-1, 1, 1, 1).expand(-1, height, width, 3) / 255
        return type("Output", (), {"frames": [grey.numpy()]})()


def counting(temporal: TemporalPolicy, frames: int, fps: float, conditions: tuple[str, ...]) -> family.Diffusers:
    card = find_model("svd").model_copy(update={"conditions_on": conditions, "sampling": {"steps": 3}})
    card = with_overrides(card, [f"clip.frames={frames}", f"clip.fps={fps}", "clip.height=64", "clip.width=64"])
    options = family.PipelineOptions(pipeline="Counts", resize="squash", temporal=temporal, fps_argument="fps")
    return family.Diffusers(card, options, Counts(), "cpu", {})


def test_nearest_time_covers_the_span_of_the_request():
    model = counting("nearest_time", 40, 16.0, ("image", "prompt"))
    asked = request(model.card)
    clip = model.generate([Request("a", asked.image, "p", 16, 8.0, 3, 1)])[0]
    assert clip[:, 0, 0, 0].tolist() == list(range(0, 32, 2))
    assert model.pipeline.called["fps"] == 16.0  # its own rate
    assert model.pipeline.called["num_inference_steps"] == 3
    assert model.pipeline.called["prompt"] == "p"


def test_a_model_that_conditions_on_the_rate_is_asked_for_it_and_ignores_the_prompt_if_it_must():
    model = counting("first", 25, 7.0, ("image", "fps"))
    clip = model.generate([Request("a", request(model.card).image, "p", 16, 25 / 3, 3, 1)])[0]
    assert clip[:, 0, 0, 0].tolist() == list(range(16))
    assert model.pipeline.called["fps"] == 8
    assert model.pipeline.called["prompt"] == ""


def test_too_few_frames_are_found_before_the_expensive_part():
    model = counting("first", 14, 7.0, ("image", "fps"))
    with pytest.raises(UserError, match=r"14 frames .* do not hold 16 .*--set clip.frames=N") as error:
        model.generate([request(model.card)])
    assert "svd" in str(error.value)
    assert not hasattr(model.pipeline, "called")


@pytest.mark.parametrize(
    ("name", "settings", "wanted", "said"),
    [
        ("ltx-video", ["clip.frames=16"], (9, 25.0), "8k + 1 frames: --set clip.frames=9, or 17"),
        ("wan2.1-i2v-480p", ["clip.frames=80"], (9, 16.0), "4k + 1 frames: --set clip.frames=77, or 81"),
        ("ltx-video", [], (None, 8.0), "161 frames at 25 fps do not hold 161 frames at 8 fps"),
        ("svd", [], (16, 8.0), "14 frames at 8 fps do not hold 16"),
        ("videocomposer", [], (17, 8.0), "16 frames at 8 fps do not hold 17 .* mend \\[clip\\] of its card"),
        ("dynamicrafter-512", [], (16, 25 / 3), "clip a asks for a fps of 8: .* was trained with a fps of 15 to 30"),
        ("dynamicrafter", [], (17, 8.0), "17 frames were asked for; dynamicrafter makes up to 16"),
    ],
)
def test_what_a_model_cannot_make_is_refused_by_its_card_alone(name, settings, wanted, said):
    card = with_overrides(find_model(name), settings)
    with pytest.raises(UserError, match=said.replace("8k +", r"8k \+").replace("4k +", r"4k \+")):
        check_wanted(card, [Wanted("a", *wanted, frame_stride=3)])


def test_what_it_can_make_is_not_refused():
    for name in (
        "ltx-video",
        "wan2.1-i2v-480p",
        "hunyuanvideo-i2v",
        "skyreels-v2-i2v",
        "cogvideox-5b-i2v",
        "i2vgen-xl",
    ):
        card = find_model(name)
        check_wanted(card, [Wanted("a", 16, 25 / 3, 3), Wanted("animation", None, card.clip.fps or 8.0, motion=None)])
    tried = with_overrides(find_model("dynamicrafter-512"), ["options.any_motion=true"])
    check_wanted(tried, [Wanted("a", 16, 25 / 3, 3)])
    check_wanted(find_model("zoom"), [Wanted("a", 99, 1.0)])


def test_a_run_refuses_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    """17 frames at 8 fps are not in 14: the folder of the pipeline, which is not there, is not asked for."""
    arguments = ["run", "--model", "svd", "--dataset", "shapes", "--protocol", "smoke", "--limit", "1", "--set"]
    monkeypatch.setattr(sys, "argv", ["dcbench", *arguments, "options.path=/nowhere", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "14 frames at 8 fps do not hold 16" in capsys.readouterr().err


def test_any_argument_of_the_pipeline_may_be_set_and_others_are_refused_before_the_weights(saved):
    folder = saved("LTXImageToVideoPipeline")
    card = tiny_card("ltx-video", folder, "sampling.guidance_rescale=0.5", "sampling.max_sequence_length=64")
    assert family.load(card, Runtime()).arguments["guidance_rescale"] == 0.5
    nowhere = find_model("ltx-video").model_copy(update={"weights": ()})
    for wrong, said in (
        (
            "guidance_rescal=1",
            r"takes no 'guidance_rescal'\. Did you mean \"guidance_rescale\"\? Allowed in \[sampling\]: steps",
        ),
        ("num_inference_steps=3", "takes no 'num_inference_steps'"),
        ("height=3", "takes no 'height'"),
        ("frame_rate=3", "takes no 'frame_rate'"),
    ):
        settings = [f"sampling.{wrong}", "options.path=/nowhere", "options.memory_gb=0"]
        with pytest.raises(UserError, match=said):
            family.load(with_overrides(nowhere, settings), Runtime())
    settings = ["options.path=/nowhere", "options.memory_gb=0"]
    odd = with_overrides(nowhere, settings)
    odd = odd.model_copy(update={"options": odd.options | {"scheduler": {"class": "DDIMScheduler", "flow": 1}}})
    with pytest.raises(UserError, match="DDIMScheduler knows no flow"):
        family.load(odd, Runtime())


# --------------------------------------------------------------------------------------------------------- loading


def test_nan_is_an_error_not_a_black_clip():
    frames = torch.zeros(4, 8, 8, 3)
    frames[1, 2, 3] = float("nan")
    with pytest.raises(UserError, match=r"NaN.*bfloat16"):
        family.frames_to_uint8(frames.numpy(), "pipeline")
    assert family.frames_to_uint8(torch.ones(4, 3, 8, 8), "pipeline").min() == 255


def test_i2vgen_xl_reads_the_layer_before_the_last_of_its_text_encoder(saved):
    model = family.load(tiny_card("i2vgen-xl", saved("I2VGenXLPipeline")), Runtime())
    pipe: Any = model.pipeline
    with torch.no_grad():
        pipe._guidance_scale = 1.0
        embeds, _ = pipe.encode_prompt("a b", "cpu", 1, clip_skip=1)
        ids = pipe.tokenizer("a b", padding="max_length", return_tensors="pt").input_ids
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(embeds, pipe.text_encoder.final_layer_norm(states[-2]), atol=1e-5)


def test_parts_from_repositories_of_their_own_join_the_base(tmp_path):
    base = tiny_pipelines.build("StableDiffusionPipeline", tmp_path / "base")
    card = tiny_card("pia", base)
    with pytest.raises(UserError, match="weights are missing and this run is offline") as error:
        family.load(card, Runtime(offline=True))
    assert "openmmlab/PIA-condition-adapter" in str(error.value)
    tiny_pipelines.motion_adapter(conv_in_channels=9).save_pretrained(base / "motion_adapter")
    model = family.load(card, Runtime())
    assert type(model.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert tuple(model.generate([request(card)])[0].shape) == (16, 3, 24, 40)


@pytest.mark.parametrize(
    ("name", "settings", "window"),
    [("ltx-video", [], 128), ("ltx-video", ["sampling.max_sequence_length=32"], 32), ("pia", [], 77)],
)
def test_a_prompt_longer_than_the_text_encoder_reads_is_told_and_kept(saved, name, settings, window):
    card = tiny_card(name, saved(builder_of(find_model(name))), "sampling.steps=1", *settings)
    model = family.load(card, Runtime())
    asked = request(card)
    model.generate([asked])
    assert model.clip_facts == {}
    long = dataclasses.replace(asked, clip_id="long", prompt="a " * 200)
    with pytest.warns(UserWarning, match=rf"clip long has \d+ tokens; its text encoder reads the first {window}\b"):
        model.generate([long])
    assert model.clip_facts["long"]["prompt_cut"].startswith(f"its text encoder read {window} of ")


def test_precision_is_the_card_s_and_recorded(saved):
    model = family.load(tiny_card("wan2.1-i2v-480p", saved("WanImageToVideoPipeline")), Runtime())
    assert model.facts["dtype"] == "bfloat16"
    assert model.pipeline.transformer.dtype == torch.bfloat16
    assert model.pipeline.vae.dtype == model.pipeline.image_encoder.dtype == torch.float32
    whole = family.load(tiny_card("pia", saved("PIAPipeline")), Runtime())
    assert (whole.facts["dtype"], whole.pipeline.unet.dtype) == ("float32", torch.float32)  # float16, on a CPU


def test_missing_weights_say_size_licence_gate_and_what_to_do(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        family.load(find_model("svd-xt"), Runtime(offline=True))
    for part in ("offline", "4.50 GB", "Stability AI Community", "gated", "options.path", "weights fetch svd-xt"):
        assert part in str(error.value), part


def test_a_repository_is_read_from_the_hub_s_cache_and_its_commit_recorded(saved, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "models--Lightricks--LTX-Video"
    shutil.copytree(saved("LTXImageToVideoPipeline"), home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    card = with_overrides(find_model("ltx-video"), [*SMALL, "clip.frames=17"])
    model = family.load(card, Runtime(offline=True))
    assert model.facts["weights"] == f"Lightricks/LTX-Video@{commit}"
    assert tuple(model.generate([request(card)])[0].shape) == (16, 3, 24, 40)


def test_faults_of_cards_and_machines_are_named(saved, tmp_path, monkeypatch):
    folder = saved("LTXImageToVideoPipeline")
    card = tiny_card("ltx-video", folder)
    with pytest.raises(UserError, match=r"weights alone take about 1000000 GB .* this machine has"):
        family.load(with_overrides(card, ["options.path=", "options.memory_gb=1000000"]), Runtime())
    with pytest.raises(UserError, match=r'takes no \'guidance_scal\'. Did you mean "guidance_scale"'):
        family.load(card.model_copy(update={"sampling": {"guidance_scal": 3}}), Runtime())
    with pytest.raises(UserError, match=r'has no LTXImageToVideoPipelin. Did you mean "LTXImageToVideoPipeline"'):
        family.load(with_overrides(card, ["options.pipeline=LTXImageToVideoPipelin"]), Runtime())
    with pytest.raises(UserError, match="resize"):
        family.load(with_overrides(card, ["options.resize=stretch"]), Runtime())
    with pytest.raises(UserError, match=r"no model_index.json"):
        family.load(with_overrides(card, [f"options.path={tmp_path}"]), Runtime())
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(UserError, match="cannot be read as LTXImageToVideoPipeline"):
        family.load(with_overrides(card, [f"options.path={tmp_path}"]), Runtime())
    with pytest.raises(UserError, match=r"names no \[\[weights\]\] repository"):
        family.load(with_overrides(card, ["options.path="]).model_copy(update={"weights": ()}), Runtime())
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"needs diffusers 0.42 or later, here is 0.35"):
        patch.setattr("diffusers.__version__", "0.35.1")
        family.load(card, Runtime())
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "diffusers" else real(name))
    with pytest.raises(UserError, match=r"in the clone of dcbench, pip install --upgrade '\.\[baselines\]'"):
        family.load(card, Runtime())


def test_a_tokenizer_that_needs_more_packages_says_which(saved, tmp_path, monkeypatch):
    """transformers' own message speaks of tiktoken."""
    folder = tmp_path / "pipeline"
    shutil.copytree(saved("LTXImageToVideoPipeline"), folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "spiece.model").touch()
    monkeypatch.setattr(family, "_installed", lambda package: package != "google.protobuf")
    with pytest.raises(UserError, match=r"reading spiece.model needs protobuf: pip install protobuf"):
        family.load(tiny_card("ltx-video", folder), Runtime())


def test_only_the_notice_of_deprecation_is_hidden(saved):
    heard: list[str] = []

    class Listens(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    folder = saved("I2VGenXLPipeline")
    logger, listener = logging.getLogger("diffusers.pipelines.pipeline_utils"), Listens()
    before = list(logger.filters)
    logger.addHandler(listener)
    try:
        tiny_pipelines.i2vgen_xl()
        assert len(heard) == 1 and "deprecated" in heard[0]
        family.load(tiny_card("i2vgen-xl", folder), Runtime())
        assert len(heard) == 1
        with family._quiet():
            logger.warning("something else")
        assert heard[1:] == ["something else"]
    finally:
        logger.removeHandler(listener)
    assert logger.filters == before


def test_a_size_that_the_pipeline_refuses_is_a_user_s_error(saved):
    card = with_overrides(tiny_card("wan2.1-i2v-480p", saved("WanImageToVideoPipeline")), ["options.resize=squash"])
    model = family.load(with_overrides(card, ["clip.height=40"]), Runtime())
    with pytest.raises(UserError, match=r"clip a: .*divisible by 16"):
        model.generate([request(card)])


def test_the_page_names_every_pipeline_of_a_card():
    page = (Path(__file__).parents[2] / "docs" / "baselines.md").read_text()
    for name in CARDS:
        card = find_model(name)
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        for fact in (card.options["pipeline"], f"{card.clip.height} x {card.clip.width}", card.options["resize"]):
            assert fact in row, (name, fact)
        assert f"| {card.options['temporal']} |" in row
