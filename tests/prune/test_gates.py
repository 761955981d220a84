"""A closed gate is an expert that is not there: numpy's softmax over the rest is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fasterai.graph.experts import expert_graph
from fasterai.prune.gates import Gates, without_experts
from fasterai.study.mixtures import BlendedMixture
from tests.graph.test_experts import Blended, Chosen, Stacked, Turned


def blended(experts: int = 4) -> BlendedMixture:
    torch.manual_seed(0)
    model = BlendedMixture(7, 3, experts=experts, hidden=6).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model.eval()


def by_numpy(model: BlendedMixture, x: torch.Tensor, rest: list[int]) -> np.ndarray:
    """The mixture of some of the experts, a softmax over these alone."""
    arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
    h = x[:, -3:].numpy() @ arrays["gate.0.weight"].T + arrays["gate.0.bias"]
    h = np.where(h > 0, h, np.expm1(h))
    logits = (h @ arrays["gate.2.weight"].T + arrays["gate.2.bias"])[:, rest]
    gate = np.exp(logits - logits.max(1, keepdims=True))
    gate /= gate.sum(1, keepdims=True)
    y = x.numpy()
    for i in range(3):
        weight = np.tensordot(gate, arrays[f"layers.{i}.weight"][rest], 1)
        y = (weight @ y[:, :, None])[:, :, 0] + gate @ arrays[f"layers.{i}.bias"][rest]
        y = np.where(y > 0, y, np.expm1(y)) if i < 2 else y
    return y


X = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_model_without_some_experts_is_the_softmax_over_the_rest():
    model = blended()
    dense = model(X).detach()
    np.testing.assert_allclose(dense.numpy(), by_numpy(model, X, [0, 1, 2, 3]), atol=1e-12)
    with without_experts(model, X, [2, 1, 1]):
        found = model(X).detach()
    np.testing.assert_allclose(found.numpy(), by_numpy(model, X, [0, 3]), atol=1e-12)
    assert float((found - dense).abs().max()) > 0.01
    assert torch.equal(model(X), dense)  # as before once the block is left


def test_no_gradient_reaches_an_expert_that_is_not_there():
    model = blended()
    with without_experts(model, X, [1]):
        model(X).square().sum().backward()
    assert [bool(g.any()) for g in model.layers[0].weight.grad] == [True, False, True, True]
    assert [bool(g.any()) for g in model.gate[2].weight.grad] == [True, False, True, True]


@pytest.mark.parametrize("kind", [Blended, Stacked, Turned, Chosen])
def test_gates_are_seen_in_any_form_of_the_product(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(6, 5)
    experts = expert_graph(model, (x,))
    (name,) = experts.experts
    with Gates(model, experts, {name: [0, 3]}) as gates:
        model(x)
    (logits,) = gates.logits[name]
    assert torch.isinf(logits).tolist() == [[True, False, False, True]] * 6


def test_a_chosen_expert_that_is_not_there_is_chosen_by_none():
    torch.manual_seed(0)
    model, x = Chosen(), torch.randn(50, 5)
    with torch.no_grad():
        model.v[1] = torch.nan
        assert model(x).isnan().any()
        with without_experts(model, x, [1]):
            assert not model(x).isnan().any()


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        ([4], ValueError, r"which must be experts 0 to 3 of gate.2.weight, got 4"),
        ([-1], ValueError, r"which must be experts 0 to 3 of gate.2.weight, got -1"),
        ([0, 1, 2, 3], ValueError, r"which must leave gate.2.weight at least one expert, got \[0, 1, 2, 3\] of 4"),
        ([], ValueError, r"which must name at least one expert, got \[\]"),
        ({"gate": [0]}, ValueError, r"which must name mixtures of gate.2.weight, got 'gate'"),
        ([1.0], TypeError, r"which must be numbers of experts, got 1.0 \(float\)"),
        ([True], TypeError, r"which must be numbers of experts, got True \(bool\)"),
        (2, TypeError, r"which must be numbers of experts, got 2 \(int\)"),
        ("1", TypeError, r"which must be numbers of experts, got '1' \(str\)"),
    ],
)
def test_experts_that_cannot_go_are_refused(which, error, message):
    with pytest.raises(error, match=message), without_experts(blended(), X, which):
        pass


def test_as_many_experts_stay_as_a_gate_chooses():
    model, x = Chosen(), torch.randn(3, 5)
    message = r"which must leave router at least the 2 experts that its gate chooses, got \[0, 1, 2\] of 4"
    with pytest.raises(ValueError, match=message), without_experts(model, x, [0, 1, 2]):
        pass


def test_a_model_without_stacks_is_refused():
    message = r"model must hold a mixture: stacks .*, got none; stack experts"
    with pytest.raises(ValueError, match=message), without_experts(nn.Linear(5, 2), torch.randn(2, 5), [0]):
        pass
