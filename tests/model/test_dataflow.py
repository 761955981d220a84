"""A forward pass as steps, and stand-ins for a model's tensors."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.model.dataflow import HELD, Step, from_autograd, from_calls, from_graph, from_symbols, held_by, leaves
from tests.networks import TwoNames

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def test_leaves_share_the_parameters_memory_and_copy_the_buffers():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8))
    held = leaves(model)
    assert list(held) == ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert held["0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert held["1.running_mean"].data_ptr() != model[1].running_mean.data_ptr()
    assert held["0.weight"] is not model[0].weight


def test_leaves_fill_each_place_once_and_what_is_shared_is_one():
    held = leaves(TwoNames())
    assert list(held) == ["stem.weight", "stem.bias", "last.weight", "last.bias"]
    assert held["last.weight"] is held["stem.weight"]
    assert held["last.bias"] is not held["stem.bias"]


def test_a_layer_under_two_names_keeps_its_parameters():
    model = TwoNames()
    before = dict(model.named_parameters(remove_duplicate=False))
    from_autograd(model, (X,))
    assert dict(model.named_parameters(remove_duplicate=False)).keys() == before.keys()
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())


def held_names(step):
    return [a.name for a in step.arguments if a is not None and a.operation == HELD]


def chain(step):
    """A step, what it reads first, and so on; without casts and transposes of parameters."""
    while step is not None:
        yield step
        step = next((a for a in step.arguments if a is not None and a.operation not in (HELD, "t")), None)


def test_autograds_steps_lead_from_the_output_back_through_both_uses_of_a_shared_weight():
    (last,) = (step for step in from_autograd(TwoNames(), (X,)) if step.stays)
    assert [step.operation for step in chain(last)] == ["addmm", "relu", "addmm"]
    assert [held_names(step) for step in chain(last)] == [["last.bias"], [], ["stem.bias"]]


@pytest.mark.parametrize("symbolic", [False, True])
def test_steps_of_calls_and_symbols_name_layers_and_count_readers(symbolic):
    model = TwoNames().eval()
    held = held_by(model)
    steps = from_symbols(model, held) if symbolic else from_calls(model, (X,), held)[0]
    assert [step.name for step in steps if step.name in ("stem", "last")] == ["stem", "last"]
    assert held[id(model.stem.weight)].name == "stem.weight"
    assert len(held[id(model.stem.weight)].readers) == 2
    assert len(held[id(model.last.bias)].readers) == 1


def test_a_layer_called_as_a_function_is_a_call_of_it_and_only_with_all_of_its_own():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model.forward = lambda x: F.linear(F.linear(x, model["a"].weight, model["a"].bias), model["b"].weight)
    steps, _ = from_calls(model, (X,), held_by(model))
    assert [step.name for step in steps] == ["a", None]


def test_what_writes_through_a_view_is_read_by_autograd():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x):
            out = torch.zeros(2, 4)
            out[:, :2], out[:, 2:] = self.a(x), self.b(x)
            return out

    steps = from_autograd(Written(), (X,))
    assert sorted(step.name for step in steps if step.operation == HELD) == ["a.weight", "b.weight"]


def test_a_graphs_arguments_keep_their_places_and_metadata_reads_nothing():
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("size")
    rows = graph.call_method("size", (x, 0))
    y = graph.call_function(F.batch_norm, (x, None, w), {"eps": 1e-5})
    graph.output(graph.call_function(operator.mul, (y, rows)))
    held = Step(HELD, name="scale", dims=1)
    _, read, _, norm, product, _ = from_graph(graph, {w: held})
    del read
    assert norm.operation == "batch_norm"
    assert norm.arguments[1] is None
    assert norm.arguments[2] is held
    assert norm.readers == ["mul"]
    assert product.readers == ["output"]
    assert norm.arguments[0].readers == ["batch_norm"]


def test_modules_named_like_metadata_are_followed():
    model = nn.Sequential()
    model.add_module("shape", nn.Linear(4, 4))
    model.add_module("layout", nn.BatchNorm1d(4))
    model.eval()
    steps = from_symbols(model, held_by(model))
    assert [(s.operation, s.name) for s in steps if s.name is not None] == [("Linear", "shape"), ("batch_norm", "layout")]
    assert next(s for s in steps if s.name == "layout").arguments[0].name == "shape"
