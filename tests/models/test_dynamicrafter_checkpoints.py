"""Released files of every layout load; wrong, cut or unsafe ones say what is wrong with them."""

import dataclasses
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dcbench.catalogue import ModelCard, WeightSource
from dcbench.errors import UserError
from dcbench.models.base import Request, Runtime
from dcbench.models.dynamicrafter import checkpoint
from dcbench.models.dynamicrafter.config import VARIANTS, Config
from dcbench.models.dynamicrafter.load import load
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.models.dynamicrafter.unet import parameter_role
from dcbench.training.networks import build
from dcbench.training.recipe import DiffusionStage, find_recipe
from dcbench.training.start import begin
from dcbench.weights import load_tensors


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DCBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def released(networks: Networks) -> dict[str, Tensor]:
    """A file as it was released: with schedule buffers and the unused layers of the image tower."""
    _, optional = checkpoint.layout(networks.cfg)
    buffers = checkpoint.released_buffers(networks.cfg.diffusion)
    extra = {key: buffers.get(key, torch.zeros(shape)) for key, shape in optional.items()}
    return networks.state_dict() | extra


def forward(networks: Networks) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 6, 4, 8, 8, generator=g), torch.randn(1, 77 + 64, 24, generator=g)
    with torch.no_grad():
        return networks.unet(x, torch.tensor([5]), context)


def older_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("fps_embedding", "framestride_embed"): value for key, value in state.items()}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], dict]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "older names": lambda state: {"state_dict": older_names(state)},
    "deepspeed": lambda state: {"module": {"_forward_module." + key: value for key, value in state.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_released_layout_loads(layout: str, released: dict[str, Tensor], networks: Networks, tmp_path: Path):
    path = tmp_path / "model.ckpt"
    torch.save(LAYOUTS[layout](released), path)
    loaded, schedule = checkpoint.load_networks(path, networks.cfg)
    assert torch.equal(forward(loaded), forward(networks))
    assert torch.equal(schedule.alphas_cumprod, released["alphas_cumprod"])
    assert not [name for name, tensor in loaded.named_buffers() if tensor.is_meta]


def test_each_load_is_the_same_and_leaves_nothing_behind(
    released: dict[str, Tensor], networks: Networks, tmp_path: Path, cache: Path
):
    path = tmp_path / "model.ckpt"
    torch.save(released, path)
    for _ in range(2):
        loaded, _ = checkpoint.load_networks(path, networks.cfg)
        assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())  # else some processors round another way
        assert torch.equal(forward(loaded), forward(networks))
    assert [found.name for found in tmp_path.iterdir()] == ["model.ckpt"] and not cache.exists()
    changed = {**released, "model.diffusion_model.out.2.bias": torch.ones(3)}
    torch.save(changed, path)  # another file under the same name is not taken for the first
    loaded, _ = checkpoint.load_networks(path, networks.cfg)
    assert torch.equal(loaded.unet.get_parameter("out.2.bias"), torch.ones(3))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells which memory is a file's on Linux alone")
def test_a_zip_checkpoint_is_mapped_and_not_copied(released: dict[str, Tensor], networks: Networks, tmp_path: Path):
    path = tmp_path / "model.ckpt"
    torch.save(released, path)
    loaded, _ = checkpoint.load_networks(path, networks.cfg)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    assert all(any(low <= p.data_ptr() < high for low, high in ranges) for p in loaded.parameters())


@pytest.mark.parametrize("kind", ["before PyTorch 1.6", "safetensors"])
def test_other_kinds_of_files_load_to_the_same_bits(
    kind: str, released: dict[str, Tensor], networks: Networks, tmp_path: Path
):
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.ckpt")
    if kind == "safetensors":
        save_file({key: value.contiguous() for key, value in networks.state_dict().items()}, path)
    else:
        torch.save(released, path, _use_new_zipfile_serialization=False)
    loaded, _ = checkpoint.load_networks(path, networks.cfg)
    assert all(p.data_ptr() % 64 == 0 for p in loaded.parameters())
    assert torch.equal(forward(loaded), forward(networks))


def test_a_large_file_is_told(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(checkpoint, "SLOW", 1e3)
    torch.save(networks.state_dict(), tmp_path / "model.ckpt")
    checkpoint.load_networks(tmp_path / "model.ckpt", networks.cfg)
    assert capsys.readouterr().err.startswith("reading model.ckpt (")


def test_half_precision_safetensors_load_as_float32(networks: Networks, tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    save_file({key: value.half().contiguous() for key, value in networks.state_dict().items()}, path)
    loaded, schedule = checkpoint.load_networks(path, networks.cfg)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert len(schedule.alphas_cumprod) == 1000  # the configuration's


def test_the_schedule_in_the_file_wins(released: dict[str, Tensor], networks: Networks, tmp_path: Path):
    released["alphas_cumprod"] = released["alphas_cumprod"] * 0.9
    torch.save(released, tmp_path / "model.ckpt")
    with pytest.warns(UserWarning, match="schedule differs.*the file's is used"):
        _, schedule = checkpoint.load_networks(tmp_path / "model.ckpt", networks.cfg)
    assert torch.equal(schedule.alphas_cumprod, released["alphas_cumprod"])


def test_missing_unexpected_and_reshaped_keys_are_named(released: dict[str, Tensor], cfg: Config):
    del released["model.diffusion_model.time_embed.0.weight"]
    released["lora.up"] = torch.zeros(2)
    released["image_proj_model.latents"] = torch.zeros(1, 2, 3)
    with pytest.raises(UserError) as error:
        checkpoint.check(released, cfg, "model.ckpt")
    said = str(error.value)
    assert "missing (1): model.diffusion_model.time_embed.0.weight" in said
    assert "unexpected (1): lora.up" in said
    assert "image_proj_model.latents: has [1, 2, 3], needs [1, 64, 24]" in said


def variant_tensors(name: str) -> dict[str, Tensor]:
    needed, optional = checkpoint.layout(VARIANTS[name])
    tensors = {key: torch.empty(shape, device="meta") for key, shape in (needed | optional).items()}
    if (final := VARIANTS[name].diffusion.dynamic_rescale) is not None:
        tensors["scale_arr"] = torch.full((1400,), final)
    return tensors


def test_a_512_file_for_the_256_model_is_recognised():
    with pytest.raises(UserError) as error:
        checkpoint.check(variant_tensors("512"), VARIANTS["256"], "model.ckpt")
    assert "attn2.alpha" in str(error.value) and "scale_arr" in str(error.value)
    assert "It fits the variant 512" in str(error.value)


def test_a_256_file_for_the_1024_model_is_recognised():
    tensors = {checkpoint.released_name(k): v for k, v in older_names(variant_tensors("256")).items()}
    with pytest.raises(UserError, match="It fits the variant 256"):
        checkpoint.check(tensors, VARIANTS["1024"], "model.ckpt")


def test_a_1024_file_for_the_512_model_is_told_by_its_schedule():
    with pytest.raises(UserError, match=r"rescales latents to 0\.30, as the variant 1024 does"):
        checkpoint.check(variant_tensors("1024"), VARIANTS["512"], "model.ckpt")


def test_a_truncated_file_is_refused(released: dict[str, Tensor], cfg: Config, tmp_path: Path):
    path = tmp_path / "model.ckpt"
    torch.save(released, path)
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(UserError, match="truncated"):
        checkpoint.load_networks(path, cfg)


def test_a_pickled_object_is_not_executed(cfg: Config, tmp_path: Path):
    path, mark = tmp_path / "model.ckpt", tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (Path.touch, (mark,))

    path.write_bytes(pickle.dumps({"state_dict": Attack()}))
    with pytest.raises(UserError, match="cannot be loaded safely"):
        checkpoint.load_networks(path, cfg)
    torch.save({"state_dict": Attack()}, path)
    with pytest.raises(UserError, match="cannot be loaded safely"):
        checkpoint.load_networks(path, cfg)
    assert not mark.exists()


def test_a_trained_folder_loads_as_a_card_says(
    networks: Networks, card: ModelCard, tmp_path: Path, request_of: Callable[..., Request]
):
    (tmp_path / "config.json").write_text(json.dumps(networks.cfg.to_dict()))
    save_file(
        {key: value.contiguous() for key, value in networks.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    options = {"folder": str(tmp_path), "decode_chunk": 2}
    model = load(card.model_copy(update={"options": options, "sampling": {"steps": 2}}), Runtime())
    assert model.sampling.steps == 2 and model.options.decode_chunk == 2
    assert model.generate([request_of()])[0].shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "sampling", "said"),
    [
        ({}, {}, "options.variant"),
        ({"variant": "255"}, {}, "variant '255' is unknown"),
        ({"variant": "256", "vgd": False}, {}, 'options.vgd: unknown. Did you mean "vdg"'),
        ({"variant": "256", "vdg": "no"}, {}, "expected bool"),
        ({"variant": "256"}, {"steps": 0}, "from 1 to 1000"),
        ({"variant": "256"}, {"step": 10}, 'Did you mean "steps"'),
        ({"variant": "256"}, {"guidance_scale": True}, "expected float"),
        ({"variant": "256"}, {"spacing": "trailing"}, "uniform_trailing"),
        ({"variant": "256"}, {}, "names no"),
        ({"folder": "/nowhere"}, {}, "cannot read /nowhere/config.json"),
    ],
)
def test_mistakes_in_a_card_are_told_before_weights_are_read(card: ModelCard, options: dict, sampling: dict, said: str):
    with pytest.raises(UserError) as error:
        load(card.model_copy(update={"options": options, "sampling": sampling}), Runtime())
    assert said in str(error.value)


def test_missing_weights_say_size_licence_and_place(card: ModelCard):
    source = WeightSource(
        name="m.ckpt", repository="Doubiiu/X", file="model.ckpt", size=10437000000, licence="research"
    )
    card = card.model_copy(update={"options": {"variant": "256"}, "weights": (source,)})
    with pytest.raises(UserError, match=r"10\.44 GB, licence: research"):
        load(card, dataclasses.replace(Runtime(), offline=True))


TINY = Path(checkpoint.__file__).parent / "tiny"
INTERP = TINY.with_name("tiny-interp")


def test_the_shipped_tiny_weights_are_those_of_their_card() -> None:
    shipped = {TINY: ("weights.safetensors", "base.safetensors"), INTERP: ("weights.safetensors",)}
    for folder, names in shipped.items():
        card = (folder / "README.md").read_text(encoding="utf-8")
        for name in names:
            assert f"| `{name}`, sha256 | {hashlib.sha256((folder / name).read_bytes()).hexdigest()} |" in card
    assert sum(path.stat().st_size for folder in shipped for path in folder.iterdir()) < 25e6
    logs = {"tiny": "log", "tiny-refine": "log-refine", "tiny-finish": "log-finish", "tiny-interp": "log"}
    for recipe, log in logs.items():
        folder = INTERP if recipe == "tiny-interp" else TINY
        lines = [json.loads(line) for line in (folder / f"{log}.jsonl").read_text().splitlines()]
        steps = {stage.name: stage.steps for stage in find_recipe(recipe).stages}
        assert {line["stage"]: line["step"] for line in lines} == steps


def test_the_interpolation_weights_hold_what_its_recipe_trained_and_nothing_else() -> None:
    learned, tiny = (load_tensors(folder / "weights.safetensors") for folder in (INTERP, TINY))
    (stage,) = find_recipe("tiny-interp").stages
    assert isinstance(stage, DiffusionStage)
    prefixes = ("model.diffusion_model.", "image_proj_model.")
    trained = {name for name in tiny if name.startswith(prefixes) and parameter_role(name) in stage.train}
    assert set(learned) == trained
    assert not [name for name in learned if torch.equal(learned[name], tiny[name])]


def test_a_folder_names_another_for_the_tensors_that_it_does_not_have(
    card: ModelCard, cfg: Config, networks: Networks, tmp_path: Path
) -> None:
    """Those of the folder go first; without `rest` their absence is an error, and so is a tensor of another shape."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    own = {name: value + 1 for name, value in networks.state_dict().items() if name.startswith("image_proj_model.")}
    for folder, state in ((whole, networks.state_dict()), (part, own)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(cfg.to_dict()))
        save_file(state, folder / "weights.safetensors")

    def loaded(**options: str) -> dict[str, Tensor]:
        model = load(card.model_copy(update={"options": options, "sampling": {"steps": 2}}), Runtime())
        return model.networks.state_dict()

    together = loaded(folder=str(part), rest=str(whole))
    assert all(torch.equal(value, own.get(name, networks.state_dict()[name])) for name, value in together.items())
    with pytest.raises(UserError, match=r"part/weights.safetensors is no checkpoint of this variant.\n  missing"):
        loaded(folder=str(part))
    with pytest.raises(UserError, match=r"options\.rest completes the weights of options\.folder"):
        loaded(variant="tiny", rest=str(whole))
    (whole / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"whole/weights.safetensors"):
        loaded(folder=str(part), rest=str(whole))
    save_file(networks.state_dict(), part / "weights.safetensors")
    assert loaded(folder=str(part), rest=str(whole)).keys() == together.keys()  # nothing is missing: not read


def test_the_papers_stages_left_the_shipped_base_s_temporal_layers_alone() -> None:
    """Half precision of the same bits; the spatial layers were tuned. `tiny-from-base` can begin with the file."""
    base, tuned = (load_tensors(TINY / f"{name}.safetensors") for name in ("base", "weights"))
    same = {name: torch.equal(base[name], tuned[name]) for name in base}
    roles = {name: parameter_role(name) for name in base}
    assert set(roles.values()) == {"spatial", "temporal"}
    assert all(same[name] for name in base if roles[name] == "temporal")
    assert not all(same[name] for name in base if roles[name] == "spatial")
    new = begin(build(find_recipe("tiny-from-base").config(), 0), base, ("unet",), "dynamicrafter")
    assert new and all(parameter_role(name) == "context" for name in new)
