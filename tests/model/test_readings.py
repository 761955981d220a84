"""Both ways of reading a forward pass give the same answer, or the symbolic one asks for inputs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torchvision
from torch import nn

from fasterai.model.readings import Reading, trace_norms, watch_norms

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Crossed(nn.Module):
    """Registered as conv1, conv2, norm1, norm2; run as conv2, norm1, conv1, norm2."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm2(self.conv1(self.norm1(self.conv2(x))))


def watched(model, *inputs):
    return watch_norms(copy.deepcopy(model).eval(), inputs)[0]


def traced(model):
    return trace_norms(copy.deepcopy(model).eval())


@pytest.mark.parametrize("read", [lambda m: watched(m, X), traced], ids=["watched", "traced"])
class TestBoth:
    def test_follow_the_data(self, read):
        assert read(Crossed()) == [Reading("norm1", "conv2"), Reading("norm2", "conv1")]

    def test_an_output_read_twice(self, read):
        class Twice(Crossed):
            def forward(self, x):
                y = self.conv1(x)
                return self.norm1(y) + y

        first, second = read(Twice())
        assert first.layer is None
        assert first.why == "conv1 has its output read by add as well"
        assert second.why == "it is called 0 times"

    def test_an_output_returned(self, read):
        class Returned(Crossed):
            def forward(self, x):
                y = self.conv1(x)
                return self.norm1(y), y

        assert read(Returned())[0].layer is None

    def test_a_layer_called_twice(self, read):
        class Again(Crossed):
            def forward(self, x):
                return self.norm1(self.conv1(self.conv1(x)))

        assert read(Again())[0].why == "conv1 is called 2 times"

    def test_a_norm_called_twice(self, read):
        class Again(Crossed):
            def forward(self, x):
                return self.norm1(self.conv2(self.norm1(self.conv1(x))))

        assert read(Again())[0].why == "it is called 2 times"

    def test_a_weight_read_elsewhere(self, read):
        class Penalised(Crossed):
            def forward(self, x):
                return self.norm1(self.conv1(x)) + self.conv1.weight.sum()

        assert read(Penalised())[0].why == "conv1 cannot take it: its weight is read elsewhere as well"

    def test_what_asks_for_the_shape_alone_is_no_reader(self, read):
        class Shaped(Crossed):
            def forward(self, x):
                y = self.conv1(x)
                return self.norm1(y).reshape(y.shape[0], y.size(1), -1)

        assert read(Shaped())[0] == Reading("norm1", "conv1")

    @pytest.mark.parametrize("between", [nn.ReLU(), nn.ReLU(inplace=True), nn.Dropout(), nn.MaxPool2d(1)])
    def test_a_module_between(self, read, between):
        reading = read(nn.Sequential(nn.Conv2d(3, 3, 1), between, nn.BatchNorm2d(3)))[0]
        assert reading.layer is None
        assert reading.why.startswith("it reads the output of ")

    def test_an_input(self, read):
        assert read(nn.Sequential(nn.BatchNorm2d(3)))[0].why.startswith("it reads an input of the model")


def test_an_identity_between_is_seen_through_when_watched():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.BatchNorm2d(3))
    assert watched(model, X) == [Reading("2", "0")]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "mnasnet0_5"])
def test_both_agree_on_torchvision(name):
    model = getattr(torchvision.models, name)(weights=None)
    assert watched(model, torch.randn(2, 3, 64, 64)) == traced(model)


def test_a_linear_layer_needs_inputs():
    """Whether its output has two dimensions does not show in the code."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert traced(model)[0].why == "0 may have its features elsewhere than in dimension 1; example_inputs would show it"
    assert watched(model, torch.randn(4, 3)) == [Reading("1", "0")]


def test_what_a_script_or_a_custom_function_reads_is_seen():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

    class Custom(Crossed):
        def forward(self, x):
            y = self.conv1(x)
            return self.norm1(y) + Twice.apply(y)

    class Scripted(Crossed):
        def __init__(self):
            super().__init__()
            self.script = torch.jit.script(nn.Sequential(nn.ReLU()))

        def forward(self, x):
            y = self.conv1(x)
            return self.norm1(y) + self.script(y)

    assert watched(Custom(), X)[0].layer is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation, in some versions
        model = Scripted()
    assert watched(model, X)[0].layer is None


def test_watching_gives_the_output_and_leaves_no_hook():
    model = Crossed().eval()
    probe = copy.deepcopy(model)
    _, output = watch_norms(probe, (X,))
    assert torch.equal(output, model(X))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in probe.modules())


def test_errors_ask_for_inputs():
    class Choosy(Crossed):
        def forward(self, x):
            return self.norm1(x) if x.max() > 0 else x

    with pytest.raises(ValueError, match="example_inputs must be given"):
        traced(Choosy())
    with pytest.raises(ValueError, match=r"example_inputs must be arguments that the model runs on, got an error: .*channels"):
        watched(Crossed(), torch.randn(2, 7, 4, 4))
