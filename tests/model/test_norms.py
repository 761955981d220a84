"""Which norm reads which layer: for the sparsifier, for folding and for the channel graph."""

from __future__ import annotations

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fasterai.graph.exported import exported
from fasterai.model.norms import Flow, Norm, norms_behind, read_folds, watch

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def conv(i=4, o=8, **options):
    return nn.Conv2d(i, o, 3, padding=1, bias=False, **options)


class Net(nn.Module):
    """Modules by name, and a forward pass in which they are called by name."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = forward

    def forward(self, *inputs):
        return self.run(self, *inputs)


def norm_of(name):
    return ((f"{name}.weight", f"{name}.bias"),)


def residual(m, x):
    y = F.relu(m.n1(m.c1(x)))
    return m.head((m.n2(m.c2(y)) + y).mean((2, 3)))


FLOWS = {
    "registered crosswise": (
        lambda: Net(
            lambda m, x: m.head(F.relu(m.n1(m.c2(F.relu(m.n2(m.c1(x)))))).mean((2, 3))),
            c1=conv(),
            c2=conv(8, 8),
            n1=nn.BatchNorm2d(8),
            n2=nn.BatchNorm2d(8),
            head=nn.Linear(8, 3),
        ),
        Flow({"c1.weight": norm_of("n2"), "c2.weight": norm_of("n1")}, frozenset({"head.weight"})),
    ),
    "residual": (
        lambda: Net(
            residual, c1=conv(), n1=nn.BatchNorm2d(8), c2=conv(8, 8), n2=nn.BatchNorm2d(8), head=nn.Linear(8, 3, bias=False)
        ),
        Flow({"c1.weight": norm_of("n1"), "c2.weight": norm_of("n2")}, frozenset({"head.weight"})),
    ),
    "one norm after two convolutions": (
        lambda: Net(lambda m, x: m.c3(m.n(m.c1(x)) + m.n(m.c2(x))), c1=conv(), c2=conv(), n=nn.BatchNorm2d(8), c3=conv(8, 4)),
        Flow({}, frozenset({"c3.weight"})),
    ),
    "two norms after one convolution": (
        lambda: Net(
            lambda m, x: m.c2(m.n1(y := m.c1(x)) * m.n2(y)),
            c1=conv(),
            n1=nn.BatchNorm2d(8),
            n2=nn.BatchNorm2d(8),
            c2=conv(8, 4),
        ),
        Flow({"c1.weight": (*norm_of("n1"), *norm_of("n2"))}, frozenset({"c2.weight"})),
    ),
    "a norm after the activation": (
        lambda: Net(lambda m, x: m.n(F.relu(m.c1(x))), c1=conv(), n=nn.BatchNorm2d(8)),
        Flow({}, frozenset({"c1.weight"})),
    ),
    "a norm after flattening": (
        lambda: Net(lambda m, x: m.n(m.c1(x).flatten(1)), c1=conv(), n=nn.BatchNorm1d(8 * 36)),
        Flow({}, frozenset({"c1.weight"})),
    ),
    "a norm after concatenation": (
        lambda: Net(
            lambda m, x: m.c3(m.n(torch.cat([m.c1(x), m.c2(x)], 1))), c1=conv(), c2=conv(), n=nn.BatchNorm2d(16), c3=conv(16, 4)
        ),
        Flow({}, frozenset({"c3.weight"})),
    ),
    "a norm before the convolution": (
        lambda: Net(lambda m, x: m.c1(F.relu(m.n(x))), c1=conv(), n=nn.BatchNorm2d(4)),
        Flow({}, frozenset({"c1.weight"})),
    ),
    "a norm without scale and shift": (
        lambda: Net(lambda m, x: m.c2(m.n(m.c1(x))), c1=conv(), n=nn.BatchNorm2d(8, affine=False), c2=conv(8, 4)),
        Flow({}, frozenset({"c2.weight"})),
    ),
    "with biases": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3)),
        Flow({"0.weight": norm_of("1")}, frozenset({"3.weight"})),
    ),
    "transposed and grouped": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), conv(8, 8, groups=8), nn.BatchNorm2d(8), conv(8, 3)
        ),
        Flow({"0.weight": norm_of("1"), "2.weight": norm_of("3")}, frozenset({"4.weight"})),
    ),
    "an output that is scaled and shifted": (
        lambda: Net(lambda m, x: torch.sigmoid(m.c1(x) * 2 + 1), c1=conv()),
        Flow({}, frozenset({"c1.weight"})),
    ),
    "an output that is scaled by a parameter of its own": (
        lambda: Net(lambda m, x: m.c1(x) * m.scale.weight.view(1, 8, 1, 1), c1=conv(), scale=nn.Linear(1, 8)),
        Flow({}, frozenset({"c1.weight"})),
    ),
    "a weight shown in another shape": (
        lambda: Net(lambda m, x: m.n(F.conv2d(x, m.c1.weight.flatten(1).view(8, 4, 3, 3))), c1=conv(), n=nn.BatchNorm2d(8)),
        Flow({"c1.weight": norm_of("n")}, frozenset({"c1.weight"})),
    ),
    "a weight worked out": (
        lambda: Net(lambda m, x: m.n(F.conv2d(x, m.c1.weight - 1)), c1=conv(), n=nn.BatchNorm2d(8)),
        Flow({}, frozenset()),
    ),
    "an output that is cast before its norm": (
        lambda: Net(lambda m, x: m.n(m.c1(x).double().float()), c1=conv(), n=nn.BatchNorm2d(8)),
        Flow({"c1.weight": norm_of("n")}, frozenset({"c1.weight"})),
    ),
    "two weights in one operation": (
        lambda: Net(
            lambda m, x: m.n(m.c1.weight[:, :, 0, 0] @ m.c2.weight[:4, :, 0, 0]), c1=conv(), c2=conv(), n=nn.BatchNorm1d(4)
        ),
        Flow({}, frozenset({"c1.weight", "c2.weight"})),
    ),
    "two outputs in a dict": (
        lambda: Net(lambda m, x: {"a": [m.c2(y := m.c1(x))], "b": m.c3(y)}, c1=conv(), c2=conv(8, 2), c3=conv(8, 3)),
        Flow({}, frozenset({"c2.weight", "c3.weight"})),
    ),
    "two heads added": (
        lambda: Net(lambda m, x: m.c1(x) + m.c2(x), c1=conv(), c2=conv()),
        Flow({}, frozenset({"c1.weight", "c2.weight"})),
    ),
    "an attention layer": (
        lambda: nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(36, 4, 16, batch_first=True), nn.Linear(36, 3)),
        Flow({}, frozenset({"2.weight"})),
    ),
}


@pytest.mark.parametrize(("make", "flow"), FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("training", [True, False])
def test_norms_and_outputs_are_read_off_the_graph(make, flow, training):
    seen = watch(make().train(training), (X,))
    assert {n: set(found) for n, found in seen.norms.items()} == {n: set(found) for n, found in flow.norms.items()}
    assert seen.outputs == flow.outputs


INPUTS = {
    "registered crosswise": {"c1.weight"},
    "residual": {"c1.weight"},
    "one norm after two convolutions": {"c1.weight", "c2.weight"},
    "a norm before the convolution": {"c1.weight"},
    "transposed and grouped": {"0.weight"},
    "two outputs in a dict": {"c1.weight"},
    "an attention layer": {"1.self_attn.in_proj_weight"},
}


@pytest.mark.parametrize("name", INPUTS)
def test_the_weights_that_read_an_input_come_first_on_every_way(name):
    assert watch(FLOWS[name][0](), (X,)).inputs == INPUTS[name]


def test_linear_layers_and_a_second_input_that_joins_later():
    model = Net(lambda m, x, z: m.c(m.a(x) + m.b(z)), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2))
    assert watch(model, (torch.zeros(1, 4), torch.zeros(1, 4))).inputs == {"a.weight", "b.weight"}


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_names_are_those_inside_wrappers(wrap):
    make, flow = FLOWS["registered crosswise"]
    assert dict(watch(wrap(make()), (X,)).norms) == dict(flow.norms)


def test_a_norm_of_several_dimensions_is_matched():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    assert dict(watch(model, (torch.randn(5, 4),)).norms) == {"0.weight": norm_of("1")}
    model = nn.Sequential(nn.Conv3d(4, 8, 3), nn.BatchNorm3d(8), nn.Flatten(), nn.Linear(64, 2))
    assert dict(watch(model, (torch.randn(2, 4, 4, 4, 4),)).norms) == {"0.weight": norm_of("1")}


def test_norms_are_found_under_autocast_too():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        seen = watch(model, (X,))
    assert dict(seen.norms) == {"0.weight": norm_of("1")}
    assert seen.outputs == {"2.weight"}


def test_frozen_parameters_are_seen_and_stay_frozen():
    make, flow = FLOWS["residual"]
    model = make().requires_grad_(False)
    assert dict(watch(model, (X,)).norms) == dict(flow.norms)
    assert not any(p.requires_grad for p in model.parameters())


def test_watching_leaves_the_model_and_the_random_generator_alone():
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 3, 3))
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {n: x.clone() for n, x in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.no_grad():
        watch(model, (X,))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes == [True, True, False, True, True]
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None


def test_inputs_that_the_model_does_not_run_on_are_refused_and_modes_come_back():
    model = nn.Sequential(conv(), nn.Dropout())
    with pytest.raises(ValueError, match="example_inputs must be arguments that the model runs on, got an error: "):
        watch(model, (torch.ones(2, 5, 6, 6),))
    assert model.training
    assert model[1].training


def test_outputs_that_depend_on_no_parameter_are_refused():
    with pytest.raises(ValueError, match="example_inputs must give outputs that depend on the parameters"):
        watch(nn.Sequential(nn.ReLU()), (X,))


def test_a_part_of_a_model_goes_by_its_own_names_and_the_rest_by_none_of_them():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    model = nn.Sequential(body, nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 4 * 4, 2))
    flow = watch(model, (torch.randn(2, 3, 8, 8),), part=body)
    assert flow.norms["0.weight"] == (("1.weight", "1.bias"),)
    assert not flow.outputs & {"0.weight", "3.weight"}, "the head makes the output, not the body"


# --- batch norms that can be folded ---

RGB = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Crossed(nn.Module):
    """Registered as conv1, conv2, norm1, norm2; run as conv2, norm1, conv1, norm2."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm2(self.conv1(self.norm1(self.conv2(x))))


class Reading(NamedTuple):
    norm: str
    layer: str | None
    why: str = ""


def readings(model, inputs):
    layers, left, _ = read_folds(copy.deepcopy(model).eval(), inputs)
    return [Reading(n, layers.get(n), left.get(n, "")) for n, _ in model.named_modules() if n in {**layers, **left}]


def watched(model, *inputs):
    return readings(model, inputs)


def traced(model):
    return readings(model, None)


@pytest.mark.parametrize("read", [lambda m: watched(m, RGB), traced], ids=["watched", "traced"])
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
    assert watched(model, RGB) == [Reading("2", "0")]


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

    assert watched(Custom(), RGB)[0].layer is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation, in some versions
        model = Scripted()
    assert watched(model, RGB)[0].layer is None


def test_watching_gives_the_output_and_leaves_no_hook():
    model = Crossed().eval()
    probe = copy.deepcopy(model)
    _, _, output = read_folds(probe, (RGB,))
    assert torch.equal(output, model(RGB))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in probe.modules())


def test_errors_ask_for_inputs():
    class Choosy(Crossed):
        def forward(self, x):
            return self.norm1(x) if x.max() > 0 else x

    with pytest.raises(ValueError, match="example_inputs must be given"):
        traced(Choosy())
    with pytest.raises(ValueError, match=r"example_inputs must be arguments that the model runs on, got an error: .*channels"):
        watched(Crossed(), torch.randn(2, 7, 4, 4))


# --- norms through which alone a layer is heard ---


def behind(model):
    return list(norms_behind(exported(model.eval(), (RGB,))[0]))


def heard(norm, *, direct=False):
    def forward(m, x):
        z = m.norm(y := m.a(x))
        return m.b((z + y if direct else z).relu())

    return Net(forward, a=nn.Conv2d(3, 4, 1), norm=norm, b=nn.Conv2d(4, 2, 1))


def test_a_norm_is_found_where_it_alone_reads_a_layer():
    norm = Norm(("a.weight", "a.bias"), "norm.weight", "norm.bias", "norm.running_mean", True)
    assert behind(heard(nn.BatchNorm2d(4))) == [norm]
    assert behind(heard(nn.BatchNorm2d(4), direct=True)) == []
    group = Norm(("a.weight", "a.bias"), "norm.weight", "norm.bias", None, False)
    assert behind(heard(nn.GroupNorm(2, 4))) == [group]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4, affine=False), nn.GroupNorm(2, 4, affine=False)], ids=str)
def test_a_norm_without_scale_and_shift_lets_everything_through(norm):
    assert behind(heard(norm)) == []


def test_a_layer_norm_and_an_instance_norm_are_found_behind_a_linear_layer_and_a_convolution():
    model = Net(lambda m, x: m.norm(m.a(x)), a=nn.Linear(6, 5), norm=nn.LayerNorm(5))
    assert behind(model) == [Norm(("a.weight", "a.bias"), "norm.weight", "norm.bias", None, False)]
    model = heard(nn.InstanceNorm2d(4, affine=True))
    assert behind(model) == [Norm(("a.weight", "a.bias"), "norm.weight", "norm.bias", None, True)]


def test_a_layer_that_is_used_twice_is_not_heard_through_one_norm_alone():
    def forward(m, x):
        return m.b(m.norm(m.a(x)) + m.a(x + 1))

    assert behind(Net(forward, a=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), b=nn.Conv2d(4, 2, 1))) == []


# --- all of them on whole networks ---


@pytest.mark.parametrize(("name", "count"), [("resnet18", 20), ("shufflenet_v2_x0_5", 56)])
def test_all_users_get_the_same_norms_of_a_network(name, count):
    """Every norm stands right behind a convolution.

    By hand, resnet18: one at the stem, two in each of 8 blocks, one in each of 3 shortcuts. shufflenet_v2_x0_5: one at the
    stem and one at the last convolution, three in each of 16 units, two more in the shortcuts of the 3 that halve the image.
    """
    model = getattr(torchvision.models, name)(weights=None)
    images = torch.randn(2, 3, 64, 64)
    flow, (folds, left, _) = watch(model, (images,)), read_folds(copy.deepcopy(model).eval(), (images,))
    partners = {(weight, norm) for weight, norms in flow.norms.items() for norm in norms}
    assert len(partners) == count
    assert partners == {(f"{layer}.weight", (f"{norm}.weight", f"{norm}.bias")) for norm, layer in folds.items()}
    assert partners == {(n.layer[0], (n.scale, n.shift)) for n in norms_behind(exported(model, (images,))[0])}
    assert left == {}
    assert flow.outputs == {"fc.weight"}
