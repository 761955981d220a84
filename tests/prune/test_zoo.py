"""A random half of the channels of whole networks goes, and the outputs stay. `python -m tests.sweep` does it for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.prune.removal import mask_channels_, remove
from tests.sweep.__main__ import build, line, names_of
from tests.sweep.check import Row, check, difference, outputs, randomize_

#: Zoo, network, side of its image; how many groups may go, and the share of the parameters that may be left at most.
NETWORKS = [
    ("torchvision", "mobilenet_v3_small", 64, 27, 0.37),
    ("torchvision", "regnet_y_400mf", 64, 53, 0.29),
    ("detection", "fasterrcnn_mobilenet_v3_large_320_fpn", 64, 30, 0.33),
    ("timm", "ghostnet_050", 64, 31, 0.27),
    ("timm", "deit3_small_patch16_224", None, 9, 0.27),
    ("transformers", "bert", None, 4, 0.79),
    ("transformers", "gpt2", None, 5, 0.41),
    ("transformers", "llama", None, 5, 0.33),
    ("transformers", "bart", None, 5, 0.64),
    ("transformers", "t5", None, 8, 0.55),
]
#: Networks whose code casts to float32 on its way: they round as that does, also where all their weights are in float64.
CASTING = frozenset({"llama"})


@pytest.mark.parametrize(("zoo", "name", "side", "groups", "left"), NETWORKS, ids=lambda v: v if isinstance(v, str) else "")
def test_half_goes_and_the_outputs_stay(zoo: str, name: str, side: int | None, groups: int, left: float) -> None:
    pytest.importorskip({"detection": "torchvision"}.get(zoo, zoo))
    model, inputs = build(zoo, name)
    if side is not None:
        inputs = (torch.randn(1, 3, side, side),)
    found = check(model.double(), tuple(x.double() if x is not None and x.is_floating_point() else x for x in inputs))
    assert found.verdict == "pass", found.why
    assert found.moved <= (2e-6 if name in CASTING else 1e-9)
    assert found.left <= left
    assert found.groups >= groups and found.stayed == 0


def small() -> nn.Sequential:
    norm = nn.BatchNorm2d(8)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


IMAGES = (torch.randn(2, 3, 8, 8),)


class Deaf(nn.Module):
    """Its output hears of the inputs, or of the weights, but not of the other."""

    def __init__(self, of_inputs: bool) -> None:
        super().__init__()
        self.inner, self.of_inputs = small(), of_inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y.detach() * 1e-9 + self.inner[5].weight.sum() + 1 if self.of_inputs else y * 1e-9 + x.mean((1, 2, 3))[:, None]


class Shifted(nn.Module):
    """Silent channels are not zero behind its softmax, and take from the others: what no rule may overlook."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).softmax(-1))


@pytest.mark.parametrize(("of_inputs", "reason"), [(True, "on the inputs"), (False, "on the masks")])
def test_a_network_whose_outputs_hear_of_nothing_is_called_blind(of_inputs: bool, reason: str) -> None:
    found = check(Deaf(of_inputs), IMAGES)
    assert found.verdict == "blind"
    assert reason in found.why
    assert check(small(), IMAGES).verdict == "pass"


def test_a_network_of_which_nothing_may_go_is_refused_with_the_reason() -> None:
    found = check(Shifted(), (torch.randn(4, 6),))
    assert (found.verdict, found.left) == ("refused", 1.0)
    assert "softmax mixes its entries" in found.stays


def test_a_removal_that_moves_the_outputs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(model: Any, inputs: Any, **options: Any) -> Any:
        removal = remove(model, inputs, **options)
        model[5].bias.data.add_(1.0)
        return removal

    monkeypatch.setattr("tests.sweep.check.remove", careless)
    assert check(small(), IMAGES).verdict == "failed"


def test_random_weights_make_every_channel_matter() -> None:
    """Each alone, silent, moves the outputs: so a wrong channel taken out is found."""
    net = small().double().eval()
    images = (IMAGES[0].double(),)
    randomize_(net, images)
    before = outputs(net, images)
    graph = channel_graph(net, images)
    for gone in range(8):
        other = small().double().eval()
        other.load_state_dict(net.state_dict())
        mask_channels_(other, graph, [np.arange(8) != gone])
        assert difference(before, outputs(other, images)) > 1e-3
    norm: Any = net[1]
    assert float((norm.running_mean / norm.running_var.sqrt()).abs().max()) > 0.1
    assert len(set(norm.weight.tolist())) == 8


def test_differences_are_shares_of_each_outputs_scale() -> None:
    small_and_large = [torch.tensor([1e-3, -2e-3]), torch.tensor([10.0])]
    assert difference(small_and_large, [torch.tensor([2e-3, -2e-3]), torch.tensor([10.0])]) == pytest.approx(0.5)
    assert difference(small_and_large, [torch.tensor([1e-3]), torch.tensor([10.0])]) == float("inf")
    assert difference(small_and_large, [torch.tensor([float("nan"), 0.0]), torch.tensor([10.0])]) == float("inf")


def test_rows_of_the_table() -> None:
    row = Row("pass", 2e-7, 0.25, 12, 1, 0.51, 1.26, "50 % d", "a | b\n c")
    assert line("net", row) == "| net | pass | 2e-07 | 0.250 | 12 | 1 | 0.5 s | 1.3 s | a / b c; 50 % d |"
    assert line("net", Row("refused", why="no")) == "| net | refused | | | | | | | no |"


@pytest.mark.parametrize(("zoo", "at_least"), [("torchvision", 23), ("detection", 9), ("timm", 100), ("transformers", 40)])
def test_the_zoos_hold_what_the_documentation_says(zoo: str, at_least: int) -> None:
    names = names_of(zoo)
    assert len(set(names)) == len(names) >= at_least
