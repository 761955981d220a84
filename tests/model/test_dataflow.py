"""Which norm reads which weight, and which weights make the outputs, seen from one forward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.model.dataflow import Flow, leaves, watch
from fasterai.model.running import evaluating, undisturbed

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


def test_leaves_share_the_parameters_memory_and_copy_the_buffers():
    model = nn.Sequential(conv(), nn.BatchNorm2d(8))
    held = leaves(model)
    assert list(held) == ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert held["0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert held["1.running_mean"].data_ptr() != model[1].running_mean.data_ptr()
    assert held["0.weight"] is not model[0].weight


def test_modes_and_generators_come_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.ReLU().eval())
    state = torch.get_rng_state()

    def fail():
        with undisturbed(model), evaluating(model):
            assert not model[0].training
            torch.rand(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [True, True, False]


def test_a_part_of_a_model_goes_by_its_own_names_and_the_rest_by_none_of_them():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    model = nn.Sequential(body, nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 4 * 4, 2))
    flow = watch(model, (torch.randn(2, 3, 8, 8),), part=body)
    assert flow.norms["0.weight"] == (("1.weight", "1.bias"),)
    assert not flow.outputs & {"0.weight", "3.weight"}, "the head makes the output, not the body"
