"""Which models are let in, and what those that are not are told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from fasterai.graph.channels import channel_graph
from fasterai.model.inputs import positional
from fasterai.model.supported import (
    check_inputs,
    check_model,
    check_whole,
    directions,
    is_followed,
    is_weight_normed,
    recomputed,
    shapes_of_inputs,
    way_out,
)
from fasterai.prune.removal import remove
from fasterai.sparse.sparsifier import Sparsifier

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    """One channel of eight is silent, so that a removal that is let through shows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight[:, 2] = 0
    return model


def refused(model: Any, x: Any, error: type[Exception], match: str) -> None:
    """A clear error, and nothing has changed."""
    before = {n: t.detach().clone() for n, t in model.state_dict().items()} if isinstance(model, nn.Module) else {}
    with pytest.raises(error, match=match):
        remove(model, x)
    after = model.state_dict() if before else {}
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_the_plain_model_is_let_in() -> None:
    assert remove(net(), X).removed == {"0.weight": (8, 7)}


def compiled_inside() -> nn.Module:
    return nn.Sequential(torch.compile(net()))  # type: ignore[arg-type]


def compiled_in_place() -> nn.Module:
    model = net()
    model.compile()
    return model


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: nn.Module = torch.jit.trace(net(), X)
    return traced


def quantised() -> nn.Module:
    from torch.ao.nn import quantized

    return nn.Sequential(quantized.Linear(5, 3))


WRAPPED: dict[str, tuple[Callable[[], Any], str]] = {
    "compile": (lambda: torch.compile(net()), r"got torch\.compile \(OptimizedModule\); prune the module inside"),
    "compile inside": (compiled_inside, r"got 0, which is torch\.compile \(OptimizedModule\)"),
    "compile in place": (compiled_in_place, r"got compiled in place \(Sequential\); compile it after the removal"),
    "script": (scripted, r"got a TorchScript module .*; prune the nn\.Module that it was made of"),
    "quantised": (quantised, r"got 0, which is a module of torch\.ao's quantisation \(Linear\); prune first"),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.filterwarnings("ignore")
def test_wrapped_models_are_refused_by_kind_with_the_repair(kind: str) -> None:
    build, match = WRAPPED[kind]
    with pytest.raises(ValueError, match=f"model must be the bare network, {match}"):
        remove(build(), X)


@pytest.fixture
def one_process(tmp_path: Any) -> Any:
    if not torch.distributed.is_available():
        pytest.skip("this torch is built without distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_is_refused_with_the_repair_and_its_module_is_let_in(one_process: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(net())
    refused(wrapped, X, ValueError, r"got DistributedDataParallel \(.*\); prune model\.module before wrapping")
    assert remove(wrapped.module, X).removed == {"0.weight": (8, 7)}


def test_sharded_models_are_refused(one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"got FSDP \(FSDPSequential\); prune the model before it is sharded"):
        remove(model, X)


@pytest.mark.parametrize("bad", [None, 3, "resnet18", nn.Linear])
def test_what_is_no_module_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        remove(bad, X)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        channel_graph(bad, (X,))


def test_lazy_modules_and_empty_ones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be initialised, got 0\.weight without a shape; run the lazy module once"):
        remove(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3)), X)
    with pytest.raises(ValueError, match=r"model must hold its weights, got 0\.weight on the meta device"):
        remove(net().to("meta"), X)
    assert check_model(net().to("meta"))  # its graph can be read


def test_no_inputs() -> None:
    refused(net(), None, ValueError, r"example_inputs must be a tensor, or a tuple of what the model takes, got None")


def test_inputs_that_do_not_fit_are_shown_with_the_place() -> None:
    refused(
        net(), torch.randn(4, 6), ValueError, r"example_inputs must be arguments that the model runs on, got 4x6 float32: Ru"
    )
    refused(net(), (X, X), ValueError, r"example_inputs .*, got 4x5 float32, 4x5 float32: TypeError")
    refused(net(), (), ValueError, r"example_inputs .*, got no arguments: TypeError")
    refused(
        net(), {"x": X}, ValueError, r"got \{x: 4x5 float32\}: TypeError.*; a dict is one argument: for keywords wrap the model"
    )
    model = Asserting()
    line = Asserting.forward.__code__.co_firstlineno + 1
    refused(model, X, ValueError, rf"example_inputs .*: AssertionError: six \(forward, line {line} of test_supported\.py\)")


class Asserting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 6, "six"
        return super().forward(x)


class Sloping(nn.Module):
    """What neither torch.export nor a record of a run can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.inner(x).sum(), x)[0] * (x.sum() > 0).item()


def test_a_model_that_cannot_be_followed_is_told_where_and_what_would_help() -> None:
    line = Sloping.forward.__code__.co_firstlineno + 3
    place = rf"\(forward, line {line} of test_supported\.py\)"
    match = (
        rf"model must be one that torch\.export can read .*, or whose operations a run shows, got .*{place}; remove branches"
    )
    refused(Sloping(), X, ValueError, match)


class Wordy(nn.Module):
    """Returns what nothing can be compared of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> str:
        return str(self.inner(x))


def test_outputs_that_cannot_be_compared() -> None:
    with pytest.raises(
        ValueError, match=r"model must return tensors, alone or in tuples, lists and dicts, to be compared, got str"
    ):
        check_inputs(Wordy(), (X,))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_weights_stay_with_the_reason(kind: str) -> None:
    model = net()
    getattr(nn.utils.parametrizations, kind)(model[2])
    model.eval()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
        wanted = model(X)
    before = copy.deepcopy(model.state_dict())
    removal = remove(model, X)
    assert removal.removed == {}
    assert any(name.startswith("2.parametrizations.weight.original") for name, _ in removal.pinned)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    torch.testing.assert_close(model(X), wanted)


def test_inputs_in_words() -> None:
    assert (
        shapes_of_inputs((torch.zeros(2, 3), {"a": torch.zeros(1, dtype=torch.int64), "b": 3}))
        == "2x3 float32, {a: 1 int64, b: int}"
    )
    assert shapes_of_inputs((torch.tensor(1.0),)) == "a single float32"
    assert positional([1, 2]) == (1, 2)
    assert positional(X) == (X,)


def test_inputs_are_left_as_they_are() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_()

    x = X.clone()
    check_inputs(InPlace(), (x,))
    assert torch.equal(x, X)


def test_quantised_parameters_are_refused() -> None:
    model = net()
    assert check_whole(model) is model
    model[0].weight = nn.Parameter(torch.quantize_per_tensor(torch.zeros(8, 5), 0.1, 0, torch.qint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"model must hold plain parameters, got 0\.weight, a"):
        check_whole(model)


def test_what_a_weight_is_worked_out_from_is_known() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    nn.utils.parametrizations.orthogonal(model[1], use_trivialization=False)
    l1_unstructured(model[2], "weight", 0.5)
    model[0].register_parameter("key_v", nn.Parameter(torch.ones(2)))  # a name alone is none
    own = {"1.bias", "1.parametrizations.weight.original"}
    found = recomputed(model)
    assert found.keys() == own | {"2.bias", "2.weight_orig", "2.weight_mask"}
    assert 'torch.nn.utils.parametrize.remove_parametrizations(module, "weight")' in found["1.bias"]
    assert 'torch.nn.utils.prune.remove(module, "weight")' in found["2.bias"]
    assert recomputed(nn.Sequential(nn.Linear(2, 2))) == {}


class Worked(nn.Module):
    def __init__(self, out: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (lambda x: x / x.abs().sum(1, keepdim=True).clamp_min(1e-6), True),
        (lambda x: x + 1, False),
        (lambda x: x - x.mean(0), False),
        (lambda x: x @ x.T, False),
    ],
    ids=["scaled", "shifted", "centred", "squared"],
)
def test_a_parametrisation_is_followed_where_zeros_stay_zeros(out: Callable[[Tensor], Tensor], expected: bool) -> None:
    layer = nn.Linear(3, 3)
    before = layer.weight.detach().clone()
    nn.utils.parametrize.register_parametrization(layer, "weight", Worked(out))
    assert is_followed(layer) is expected
    assert torch.equal(layer.parametrizations.weight.original, before)


@pytest.mark.filterwarnings("ignore")
def test_a_network_to_be_quantised_later_is_let_in_and_a_prepared_one_is_not() -> None:
    class Prepared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
            self.body, self.add = net(), torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.leave(self.add.add(self.body(self.enter(x)), x[:, :3]))
            return y

    model = Prepared()
    assert remove(model, X).removed == {"body.0.weight": (8, 7)}
    model = Prepared().train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    refused(
        torch.ao.quantization.prepare_qat(model), X, ValueError, "which is a module of torch.ao's quantisation .*; prune first"
    )


@pytest.mark.filterwarnings("ignore")
def test_weight_norms_are_followed_and_have_a_way_out_all_the_same() -> None:
    new, old = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)), nn.utils.weight_norm(nn.Linear(2, 3))
    spectral, both = nn.utils.spectral_norm(nn.Linear(2, 3)), nn.utils.weight_norm(nn.Linear(2, 3))
    nn.utils.parametrizations.spectral_norm(both, "weight_g")
    assert [is_weight_normed(m) for m in (new, old, spectral, both, nn.Linear(2, 3))] == [True, True, False, False, False]
    assert [[(a, x.shape) for a, x in directions(m)] for m in (new, old)] == [[("weight", (3, 2))]] * 2
    assert way_out(old, "model.a") == 'torch.nn.utils.remove_weight_norm(model.a, "weight")'
    assert way_out(spectral, "model.a") == 'torch.nn.utils.remove_spectral_norm(model.a, "weight")'
    assert way_out(nn.Linear(2, 3), "model.a") is None
    assert recomputed(nn.Sequential(new, old)) == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["parametrisation", "hook"])
def test_weight_normed_layers_lose_channels_exactly_after_a_sparsifier(norm: Any) -> None:
    torch.manual_seed(0)
    layers = [norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.ConvTranspose2d(8, 6, 2)), nn.Flatten(), norm(nn.Linear(96, 4))]
    net, x = nn.Sequential(*layers).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    Sparsifier(net, "coupled", example_inputs=x, round_to=1).sparsify_model(0.5)
    wanted = net(x).detach()
    removal = remove(net, x, measure=False)
    assert not removal.refused and {len(net[0].bias), len(net[2].bias)} == {4, 3}
    assert (net[0].out_channels, net[2].in_channels, net[4].in_features) == (4, 4, 48)
    assert wanted.isfinite().all() and torch.allclose(net(x), wanted, rtol=0, atol=1e-12)
