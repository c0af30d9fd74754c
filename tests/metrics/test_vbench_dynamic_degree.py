"""dynamic_degree: torchvision's RAFT is the authors', its rule is VBench's, and what it refuses.

tests/data/vbench.json has numbers of VBench's own class with the same random weights under the authors' names.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_weights import made_clip, made_weights
from observing import scored
from torch import Tensor
from torchvision.models.optical_flow import raft_large

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import View
from dcbench.metrics.vbench.dynamic_degree import DynamicDegree, Raft, largest, torchvision_names, verdict
from dcbench.models.base import Runtime
from dcbench.weights import MissingWeights

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "vbench.json").read_text())["dynamic_degree"]
INTO = (  # torchvision's names as the authors have them, one rule a line; the tests go the other way
    ("convnormrelu.0", "conv1"), ("convnormrelu.1", "norm1"), ("encoder.conv.", "encoder.conv2."),
    ("convnormrelu1.0", "conv1"), ("convnormrelu1.1", "norm1"), ("convnormrelu2.0", "conv2"),
    ("convnormrelu2.1", "norm2"), ("feature_encoder", "fnet"), ("context_encoder", "cnet"),
    ("motion_encoder.conv.0", "encoder.conv"), ("motion_encoder.conv2.0", "encoder.conv"),
    ("motion_encoder.convcorr1.0", "encoder.convc1"), ("motion_encoder.convcorr2.0", "encoder.convc2"),
    ("motion_encoder.convflow1.0", "encoder.convf1"), ("motion_encoder.convflow2.0", "encoder.convf2"),
    ("recurrent_block.convgru1.conv", "gru.conv#1"), ("recurrent_block.convgru2.conv", "gru.conv#2"),
    ("mask_predictor.convrelu.0", "update_block.mask.0"), ("mask_predictor.conv", "update_block.mask.2"),
)  # fmt: skip


def authors_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of torchvision's network as raft-things.pth has it: other names, and some tensors twice."""
    renamed = {}
    for name, value in state.items():
        for ours, theirs in INTO:
            name = name.replace(ours, theirs)
        if "#" in name:  # gru.conv#1z.weight -> gru.convz1.weight
            head, tail = name.split("#")
            name = f"{head}{tail[1]}{tail[0]}{tail[2:]}"
        renamed[f"module.{name}"] = value
        if ".downsample.1." in name:
            renamed[f"module.{name.replace('downsample.1', 'norm3')}"] = value
    return renamed


@pytest.fixture(scope="module")
def raft(tmp_path_factory: pytest.TempPathFactory) -> Raft:
    """The whole network, random, from a file of the authors' form: the one that VBench's class had."""
    theirs = {name.removeprefix("module."): value for name, value in authors_names(network_state()).items()}
    made = made_weights({name: value for name, value in theirs.items() if ".norm3." not in name}, 5)
    path = tmp_path_factory.mktemp("raft") / "raft-things.pth"
    torch.save({f"module.{name}": value for name, value in made.items()}, path)
    return Raft(path)


def network_state() -> dict[str, Tensor]:
    return raft_large(weights=None).state_dict()


def test_the_names_of_the_authors_file() -> None:
    state = network_state()
    theirs = authors_names(state)
    assert len(state) == 169 and len(theirs) == 179 and "module.update_block.gru.convz1.weight" in theirs
    back = torchvision_names(theirs)
    assert back.keys() == state.keys() and all(back[name] is state[name] for name in state)


def test_equals_vbenchs_own_class(raft: Raft) -> None:
    """130x130 pixels, so with a border. Measured: 3e-4 of flows up to 81 pixels, 3e-5 of the mean of the largest."""
    metric = DynamicDegree(find_metric("dynamic_degree"), raft)
    recorded = RECORDED["c"]
    seen = metric.observe(View(made_clip("c"), fps=12))
    assert seen["per_pair"] == pytest.approx(recorded["per_pair"], rel=1e-5)
    assert seen["threshold"] == recorded["params"]["thres"] and seen["needed"] == recorded["params"]["count_num"]
    assert seen["value"] == float(recorded["moves"])


def test_the_rule_is_vbenchs() -> None:
    """Recorded from its check_move: 1 to 25 frames, two sizes, flows around the threshold and none at all."""
    assert len(RECORDED["rule"]) == 40
    for count, side, per_pair, moves in RECORDED["rule"]:
        assert len(per_pair) == count - 1 and verdict(per_pair, side)["value"] == float(moves)
    assert {moves for *_, moves in RECORDED["rule"]} == {True, False}


def test_the_largest_five_in_a_hundred() -> None:
    flow = torch.zeros(2, 10, 20)
    flow[:, 3, :10] = torch.tensor([3.0, 4.0])[:, None]  # ten of 200 pixels
    assert largest(flow) == 5
    flow[0, 0, 0] = 105.0
    assert largest(flow) == 15


class Shift:
    """In place of RAFT: the flow of a clip whose frames are grey levels, one level = one pixel."""

    identity = {"name": "shift", "weights_sha256": "", "preprocessing": ""}

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        return (second.float() - first.float())[:2]


def grey(*levels: int) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 128, 128).contiguous()


def test_planted_motion_at_other_rates() -> None:
    """At 24 fps every third frame counts. The threshold at 128 pixels is a flow of 3."""
    shift: Any = Shift()
    metric = DynamicDegree(find_metric("dynamic_degree"), shift)
    slow, fast = grey(*range(0, 40, 1)), grey(*range(0, 200, 5))
    at = [metric.observe(View(clip, fps=fps))["value"] for clip in (slow, fast) for fps in (8, 24)]
    assert at == [0, 1, 1, 1]
    assert len(metric.observe(View(slow, fps=24))["per_pair"]) == 13
    assert len(metric.observe(View(slow, fps=12))["per_pair"]) == 19  # round(1.5) is 2
    assert scored(metric, [{"value": 1.0}, {"value": 0.0}]).value == 0.5


def test_what_it_refuses(tmp_path: Path) -> None:
    shift: Any = Shift()
    metric = DynamicDegree(find_metric("dynamic_degree"), shift)
    with pytest.raises(UserError, match="frames of 72x128; RAFT needs 121 pixels"):
        metric.observe(View(made_clip("a"), fps=8))
    assert "needs a frame rate" in str(metric.lacks(View(made_clip("c"))))
    torch.save({"module.fnet.conv1.weight": torch.zeros(1)}, tmp_path / "raft.pth")
    card = find_metric("dynamic_degree")
    other = card.model_copy(update={"options": {"checkpoint": str(tmp_path / "raft.pth")}})
    with pytest.raises(UserError, match="is not RAFT's large network: 168 tensors differ"):
        load_entry_point(card)(other, Runtime(offline=True))
    with pytest.raises(MissingWeights, match=r"raft_large_C_T_V1-22a6c225\.pth is missing"):
        load_entry_point(card)(card, Runtime(offline=True))
