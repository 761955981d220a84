"""Which weights become ternary: those with inputs, less both ends of the network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.misc.ternary.selection import choose_targets

X = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """Registers its head first and its stem last."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.body, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.short = nn.Conv2d(8, 8, 1, bias=False)
        self.stem = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(F.relu(self.stem(x)))
        return self.head((self.norm(self.body(x)) + self.short(x)).mean((2, 3)))


def chosen(model: nn.Module, targets=None, ignored=None, inputs=None) -> tuple[list[str], dict[str, str]]:
    found = choose_targets(model, targets, ignored, inputs)
    return [t.name for t in found.targets], dict(found.left_out)


def test_both_ends_are_found_by_the_data_flow():
    names, left = chosen(Net(), inputs=X)
    assert names == ["body.weight", "short.weight"]
    assert left["stem.weight"] == "it reads the model's input"
    assert left["head.weight"] == "it makes the model's output"
    assert "two inputs at least" in left["depthwise.weight"]
    assert set(left) == {"stem.weight", "head.weight", "depthwise.weight"}


def test_without_inputs_they_are_the_first_and_the_last_and_that_is_said():
    names, left = chosen(Net())
    assert names == ["body.weight", "short.weight"]  # of head, body, short, stem
    assert left["head.weight"].startswith("the first layer, by the order of the parameters; example_inputs=")
    assert left["stem.weight"].startswith("the last layer, by the order")


def test_named_targets_are_taken_ends_and_all_and_ignored_ones_are_not():
    assert chosen(Net(), ["stem", "b*"])[0] == ["body.weight", "stem.weight"]
    model = Net()
    for ignored in ("short", ["short.weight"], "sh*", model.short, [model.short]):
        names, left = chosen(model, None, ignored, X)
        assert names == ["body.weight"] and left["short.weight"] == "named in ignored_layers"
    assert chosen(model, lambda name, p: p.dim() == 2)[0] == ["head.weight"]
    assert chosen(nn.Linear(4, 2)) == ([], {"weight": chosen(nn.Linear(4, 2))[1]["weight"]})


@pytest.mark.parametrize(
    ("targets", "ignored", "error", "message"),
    [
        ("nothing", None, ValueError, "targets must be the name of a parameter or module, or a glob, of .*, got 'nothing'"),
        ("depthwise", None, ValueError, "targets must have two inputs at least.*, for depthwise.weight"),
        ("norm.weight", None, ValueError, "targets must have inputs, for norm.weight"),
        (None, "nothing", ValueError, "ignored_layers must be the name of a layer, or a glob, of .*, got 'nothing'"),
        (None, nn.Linear(2, 2), ValueError, "ignored_layers must be modules of the model, got another Linear"),
        (None, [3], TypeError, "ignored_layers must be modules or their names, got 3"),
    ],
)
def test_names_that_mean_nothing_are_refused(targets, ignored, error, message):
    with pytest.raises(error, match=message):
        choose_targets(Net(), targets, ignored, X)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value):
    model = Net()
    model.body.weight.data[0, 0] = value
    with pytest.raises(ValueError, match=r"model must have finite weights, got NaN or infinity in body.weight"):
        choose_targets(model, None, None, X)


def test_models_and_embeddings_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got 3"):
        choose_targets(3, None, None, None)
    with pytest.raises(ValueError, match=r"embeddings, whose rows are read one at a time, for 0.weight"):
        choose_targets(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), "0", None, None)
    with pytest.raises(ValueError, match="example_inputs must be arguments that the model runs on"):
        choose_targets(Net(), None, None, torch.zeros(1, 5))
