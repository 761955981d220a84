"""Which parameters are plain and whole, by hand: FSDP of one process, tensor parallelism, subclasses, quantised ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._python_dispatch import return_and_correct_aliasing

from fasterai.model.sharded import check_plain, check_unflattened


class At(NamedTuple):
    name: str
    module: nn.Module
    attribute: str


class Packed(Tensor):
    """A weight that is worked out from others, as torchao's are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def inner(x: Any) -> Any:
            return x.inner if isinstance(x, Packed) else x

        out = function(*map(inner, args), **(kwargs or {}))
        out = Packed(out) if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) else out
        return return_and_correct_aliasing(function, args, kwargs or {}, out)


class Tagged(Tensor):
    """A subclass that only carries a note; its operations are torch's."""


class FourBits(nn.Parameter):
    """Two weights in each byte."""


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def holding(weight: Tensor, requires_grad: bool = True) -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad)
    return linear


@pytest.fixture
def one_process() -> Any:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def check(module: nn.Module, attribute: str = "weight", named: tuple[str, ...] = ()) -> None:
    check_plain([At("it", module, attribute)], named)


def test_dtensors_are_named_with_their_placement_and_the_repair(one_process: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    sharded, split = fully_shard(net(), mesh=mesh), net()
    parallelize_module(split, mesh, {"0": ColwiseParallel()})
    for module in (sharded[0], split[0]):
        with pytest.raises(ValueError, match=r"got it, a DTensor \(Shard\(dim=0\)\); prune before the model is sharded"):
            check(module)
        with pytest.raises(ValueError, match="got it, a DTensor"):  # frozen ones too: they may train later
            check(module.requires_grad_(False))
    check(split[3])
    check_unflattened(sharded)  # it is told from FSDP's flat parameters


def test_flat_parameters_of_fsdp_are_found_in_the_wrapper_and_in_its_part(one_process: None) -> None:
    model = net()
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    what = "a flat parameter of FSDP; prune before"
    with pytest.raises(ValueError, match=rf"got _fsdp_wrapped_module\._flat_param, {what}"):
        check_unflattened(wrapped)
    with pytest.raises(ValueError, match=rf"got _flat_param, {what}"):
        check_unflattened(model)
    with pytest.raises(ValueError, match=rf"got weight, {what}"):
        check_unflattened(model[3])
    with pytest.raises(ValueError, match=rf"got it, {what}"):
        check(model[0])
    with FullyShardedDataParallel.summon_full_params(wrapped):
        check_unflattened(wrapped)
        check(model[0])


def test_weights_that_fsdp_leaves_whole_are_let_in(one_process: None) -> None:
    model = net()
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)  # one process: NO_SHARD
    check_unflattened(wrapped)
    check(model[0])


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        (lambda: Packed(torch.ones(4, 4)), "the tensor subclass Packed"),
        (lambda: torch.ones(4, 4).to_sparse_csr(), r"a tensor of layout torch\.sparse_csr"),
    ],
)
def test_what_is_no_plain_tensor_is_refused_if_it_trains_or_was_named(weight: Any, what: str) -> None:
    message = rf"model must hold its weights as plain, whole tensors, got it, {what}; prune before .* leave this one out with"
    with pytest.raises(ValueError, match=message):
        check(holding(weight()))
    check(holding(weight(), requires_grad=False))
    with pytest.raises(ValueError, match=message):
        check(holding(weight(), requires_grad=False), named=("it",))


@pytest.mark.filterwarnings("ignore")
def test_integers_are_refused_where_they_stand_for_other_numbers() -> None:
    quantised = torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match=r"got it, a quantised tensor \(torch\.qint8\)"):
        check(holding(quantised, requires_grad=False), named=("it",))
    packed = FourBits(torch.ones(4, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"got it, the tensor subclass FourBits of torch\.uint8"):
        check(holding(packed), named=("it",))
    check(holding(torch.ones(4, 4, dtype=torch.int8), requires_grad=False), named=("it",))


def test_plain_parameters_are_let_in() -> None:
    check(nn.Linear(4, 4))
    check(holding(Tagged(torch.ones(4, 4))))
    check(holding(FourBits(torch.ones(4, 4))))
    check(holding(torch.ones(4, 4, dtype=torch.complex64)))
    check(nn.Linear(4, 4, bias=False), "bias")
    check_unflattened(nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Conv1d(2, 2, 1, bias=False)}))
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False))
    check_unflattened(parametrised)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 3, device="meta"), r"got fc\.weight, on the meta device, which holds no numbers"),
        (
            lambda: _with(nn.Linear(2, 3), torch.ones(3, 2).to(torch.float8_e4m3fn)),
            r"got fc\.weight, a tensor of torch\.float8_e4m3fn, which torch neither multiplies nor compares",
        ),
    ],
)
def test_weights_without_numbers_to_multiply_are_refused(make, message):
    layer = make()
    with pytest.raises(ValueError, match=message):
        check_plain([At("fc.weight", layer, "weight")])
    layer.weight.requires_grad_(False)
    check_plain([At("fc.weight", layer, "weight")])  # what does not train and is not named is left alone
    with pytest.raises(ValueError, match=message):
        check_plain([At("fc.weight", layer, "weight")], named={"fc.weight"})


def _with(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    layer.weight = nn.Parameter(weight)
    return layer
