"""Outputs of layers: found by name, taken once, and nothing stays."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from fasterai.distill.capture import Capture, copied, find_layers, is_compiled, tensor_of, unknown_layer
from tests.distill.nets import Named, X, hooks, net


def test_layers_are_found_by_name_and_by_themselves():
    model = Named()
    assert find_layers("a", model, ["model.0", model.model[1], "model"]) == [model.model[0], model.model[1], model.model]
    assert find_layers("a", model, ["0"]) == [model.model[0]]  # the only part that has it
    wrapped = torch.compile(model, backend="eager")
    assert find_layers("a", wrapped, ["model.0"]) == [model.model[0]]
    model.model[0] = torch.compile(model.model[0], backend="eager")
    assert find_layers("a", model, ["model.0"]) == [model.model[0]._orig_mod]


def test_a_module_under_two_names_is_found_by_both():
    model = nn.ModuleDict({"a": (one := nn.Linear(2, 2)), "b": one})
    assert find_layers("x", model, ["a", "b"]) == [one, one]


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (
            ["model.O"],
            ValueError,
            r"activations_student must be layers of the model: model, model.0, .*, got 'model.O'; did you mean 'model.",
        ),
        ([nn.Linear(2, 2)], ValueError, "activations_student must be layers of the model, got a Linear that is none of its; "),
        ([3], TypeError, r"activations_student must be names of layers or modules, got 3 \(int\)"),
        ("model.0", TypeError, r"activations_student must be a list of layers, got 'model.0'; pass \['model.0'\]"),
        (nn.ReLU(), TypeError, r"activations_student must be a list of layers, got ReLU\(\); pass \[ReLU\(\)\]"),
    ],
)
def test_unknown_layers_are_refused(layers, error, message):
    with pytest.raises(error, match=message):
        find_layers("activations_student", Named(), layers)


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("b3", ["b1", "b2", "head"], "did you mean 'b2' or 'b1'?"),
        ("blok2", ["b1", "b2", "head"], "did you mean 'b2'?"),
        ("model.b2", ["b1", "b2", "head"], "did you mean 'b2'?"),
        ("net.body.b2", ["body", "body.b2", "b2"], "did you mean 'body.b2'?"),
        ("conv", ["a", "a.conv", "b", "b.conv"], "did you mean 'a.conv' or 'b.conv'?"),  # several parts have it
        ("konv2", ["stage.first.conv1", "stage.first.relu"], "did you mean 'stage.first.conv1'?"),
        ("xyz", ["b1", "head"], "get_model_layers(model) lists them"),
    ],
)
def test_the_closest_layers_are_named(name, known, hint):
    error = str(unknown_layer("layers", name, ["", *known]))
    assert error == f"layers must be layers of the model: {', '.join(known)}, got {name!r}; {hint}"


def test_outputs_come_in_the_order_of_the_layers_and_one_may_stand_twice():
    """D-K3: pairs are the user's, whatever runs first."""
    model = net()
    capture = Capture("a", model, [model[3], model[0], model[3]], graph=True)
    model(X[0])
    shapes = [tuple(x.shape) for x in capture.take()]
    assert shapes == [(6, 4, 2, 2), (6, 4, 4, 4), (6, 4, 2, 2)]
    capture.remove()
    assert hooks(model) == 0


def test_of_a_layer_that_runs_twice_it_is_the_last_output():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = Twice()
    capture = Capture("a", model, [model.layer], graph=True)
    out = model(torch.ones(1, 2))
    assert torch.equal(capture.take()[0], out)


def test_passes_of_the_other_kind_are_not_looked_at():
    model = net()
    with_graph, without = (Capture("activations_student", model, [model[0]], graph=g) for g in (True, False))
    with torch.no_grad():
        model(X[0])
    with pytest.raises(ValueError, match=r"activations_student must be layers that run in each forward pass, .*got '0', which"):
        with_graph.take()
    assert len(without.take()) == 1
    model(X[0])
    assert with_graph.take()[0].requires_grad
    model(X[0])
    with_graph.forget()
    with pytest.raises(ValueError, match="gave no output"):
        with_graph.take()


def test_layers_without_a_tensor_are_refused():
    assert tensor_of("a", (1, torch.ones(2))).tolist() == [1, 1] and tensor_of("a", {"x": torch.ones(1)}).tolist() == [1]
    with pytest.raises(ValueError, match="a must be layers that return a tensor, or one in a tuple or dict, got NoneType"):
        tensor_of("a", None)


def test_copies_and_files_of_the_model_hold_nothing_of_it():
    model = net()
    capture = Capture("a", model, [model[0]], graph=True)
    out = model(X[0])  # what was found is no leaf, and could not be copied
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copied(model)]
    torch.save(model, io.BytesIO())
    found = weakref.ref(capture.take()[0])
    for one in copies:
        assert torch.equal(one(X[0]), model(X[0]))
        assert len(capture.take()) == 1  # of the model itself
    assert hooks(copies[2]) == 0 and hooks(model) == 1
    assert all("_do_nothing" in repr(h) for one in copies[:2] for h in one[0]._forward_hooks.values())
    del out, capture
    gc.collect()
    assert found() is None


def test_a_copy_leaves_out_what_others_have_put_on_the_model():
    class Watcher:
        def __init__(self):
            self.lock = (x for x in ())  # cannot be copied

        def see(self, *_):
            pass

    model = net()
    watcher = Watcher()
    model.register_forward_hook(watcher.see)
    model[0].register_full_backward_hook(watcher.see)
    model.training_step = watcher.see
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    other = copied(model)
    assert hooks(other) == 0 and not other[0]._backward_hooks and hooks(model) == 1
    assert all(a is not b and torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_layers_inside_of_compiled_modules_are_known():
    plain, whole, part = net(), net(), net()
    whole.compile(backend="eager")
    part[0] = torch.compile(part[0], backend="eager")
    assert not is_compiled(plain, plain[0]) and is_compiled(whole, whole[0])
    assert is_compiled(part, part[0]._orig_mod) and not is_compiled(part, part[1])


@pytest.mark.parametrize("where", ["whole", "in place", "part"])
def test_hooks_that_come_after_a_compiled_call_are_called(where):
    """Dynamo skips hooks that were not there when it compiled."""
    torch._dynamo.reset()
    model = net()
    if where == "part":
        model[0].compile(backend="eager")
    elif where == "in place":
        model.compile(backend="eager")
    called = torch.compile(model, backend="eager") if where == "whole" else model
    called(X[0])
    for _ in range(2):
        capture = Capture("a", called, [model[0]], graph=True)
        called(X[2])
        found = capture.take()[0]
        capture.remove()
        assert torch.allclose(found, nn.functional.conv2d(X[2], model[0].weight, model[0].bias))
        called(X[0])
        assert not capture._found
    torch._dynamo.reset()
