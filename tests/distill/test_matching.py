from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasterai.distill.matching import get_model_layers, get_module_by_name, match_feature_layers


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Block(nn.Module):
    """A residual block, whose first convolution keeps the size of what comes in as a bottleneck's does."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(inputs, outputs), convolution(outputs, outputs, stride))
        self.side = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.side(x)


class Residual(nn.Module):
    def __init__(self, width: int, depth: int, stem: int = 1) -> None:
        super().__init__()
        self.stem = convolution(3, width, stem)
        self.drop = nn.Dropout(0.5)
        for i, stride in enumerate((1, 2, 2)):
            blocks = [
                Block(width << max(0, i - 1), width << i, stride),
                *(Block(width << i, width << i, 1) for _ in range(depth)),
            ]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.head = nn.Linear(4 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.layer0(self.drop(self.stem(x))))).mean((2, 3)))


class Attending(nn.Module):
    """A block of a vision transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.mlp(x)


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Attending(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def pairs(student: nn.Module, teacher: nn.Module, x: Any = X) -> list[tuple[str, str]]:
    found = match_feature_layers(student, teacher, x)
    assert list(found) == ["student", "teacher"]
    return list(zip(found["student"], found["teacher"], strict=True))


def test_residual_networks_of_other_depths_are_paired_by_size():
    """The last layers of 16, 8 and 4: no layer inside of the block that halves the size."""
    assert pairs(Residual(4, 0), Residual(8, 2)) == [("layer0", "layer0"), ("layer1", "layer1"), ("layer2", "layer2")]


def test_sizes_that_one_of_them_does_not_have_are_left_out():
    """A stem of stride 2: 8, 4 and 2."""
    assert pairs(Residual(4, 0), Residual(8, 1, stem=2)) == [("layer1", "layer0"), ("layer2", "layer1")]


def test_without_two_common_sizes_stages_are_paired_by_depth():
    """16, 8 and 4 of the one, 4, 2 and 1 of the other, whose last size has one place: so its two stages and the last two."""
    assert pairs(Residual(4, 0), Residual(8, 1, stem=4)) == [("layer1", "layer0"), ("layer2", "layer1")]


def test_transformers_are_paired_by_depth():
    assert pairs(Transformer(8, 3), Transformer(16, 6)) == [
        *(("blocks.0", "blocks.1"), ("blocks.1", "blocks.3"), ("blocks.2", "blocks.5"))
    ]
    assert pairs(Transformer(8, 8), Transformer(16, 12)) == [
        *(("blocks.1", "blocks.2"), ("blocks.3", "blocks.5"), ("blocks.5", "blocks.8"), ("blocks.7", "blocks.11"))
    ]


def test_a_network_of_convolutions_beside_a_transformer():
    assert pairs(Residual(4, 1), Transformer(8, 6)) == [
        *(("layer0", "blocks.1"), ("layer1", "blocks.3"), ("layer2", "blocks.5"))
    ]


def test_plain_stacks_of_layers():
    one = nn.Sequential(convolution(3, 4), nn.MaxPool2d(2), convolution(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    other = nn.Sequential(*(convolution(3 if not i else 4, 4) for i in range(3)), nn.MaxPool2d(2), nn.Conv2d(4, 8, 1))
    assert pairs(one, other) == [("0", "2"), ("2", "4")]


class Keywords(nn.Module):
    """Two inputs by name, and blocks that return tuples of other things and tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(5, 4), nn.Embedding(5, 4)
        self.layers = nn.ModuleList(Both() for _ in range(2))

    def forward(self, ids: Tensor, types: Tensor) -> dict[str, Tensor]:
        x = self.first(ids) + self.second(types)
        for layer in self.layers:
            _, x = layer(x)
        return {"logits": x}


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, self.inner(x)


def test_inputs_by_name_and_outputs_in_tuples():
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1]])
    assert pairs(Keywords(), Keywords(), {"ids": ids, "types": ids}) == [("layers.0", "layers.0"), ("layers.1", "layers.1")]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training):
    """Statistics of batch norms, modes, hooks, gradients, the sample, the random generator."""
    student, teacher = Residual(4, 0).train(training), Residual(8, 1).train(training)
    student.layer1.eval()
    before = [deepcopy(model.state_dict()) for model in (student, teacher)]
    modes = [[m.training for m in model.modules()] for model in (student, teacher)]
    x, state = X.clone(), torch.get_rng_state()
    match_feature_layers(student, teacher, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, X)
    for model, saved, mode in zip((student, teacher), before, modes, strict=True):
        assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
        assert [m.training for m in model.modules()] == mode
        assert not any(m._forward_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())


def test_a_model_that_fails_keeps_no_hooks():
    student = Residual(4, 0)
    with pytest.raises(RuntimeError):
        match_feature_layers(student, Residual(4, 0), X[:, :2])
    assert not any(m._forward_hooks for m in student.modules())


def test_where_nothing_fits_the_layers_are_named():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 5))
    message = r"got none among \(no layer with places\) of the student and layer0 \(2, 8, 16, 16\), .*get_model_layers\(model\)"
    with pytest.raises(ValueError, match=message):
        match_feature_layers(flat, Residual(8, 0), X)


class Shared(nn.Module):
    """One ReLU behind both convolutions: its last output is not that of the first size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x)))).mean((2, 3))


def test_layers_that_run_twice_are_left_out():
    assert pairs(Shared(), Shared()) == [("first", "first"), ("second", "second")]


def test_names_of_layers():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU()))
    assert get_model_layers(model) == ["0", "1", "1.0"]
    assert get_model_layers(model, get_layer_repr=True)["0"] == repr(model[0])
    assert get_module_by_name(model, "1.0") is model[1][0]
    compiled = torch.compile(model)
    assert get_model_layers(compiled) == ["0", "1", "1.0"]
    assert get_module_by_name(compiled, "0") is model[0]


def test_an_unknown_layer_is_answered_with_the_near_one():
    with pytest.raises(ValueError, match=r"access_string must be layers of the model: .*got 'layer3'; did you mean 'layer"):
        get_module_by_name(Residual(4, 0), "layer3")
