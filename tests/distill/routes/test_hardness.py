"""Hardness against numpy, and the greedy choice from tables worked out by hand."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from torch import nn

from fasterai.core.batch import Batch
from fasterai.distill.routes.hardness import Greedy, held_out_batches, next_anchor, outputs_of, relative_entropy
from tests.route_nets import X, Y, student, teacher


def by_numpy(teacher, student):
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (teacher, student))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return rel_entr(p, q).sum(1).mean()


def test_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812; the other row is alike, so half of it.
    one = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    other = torch.zeros(2, 2)
    assert relative_entropy([one], [other]) == pytest.approx(0.130812 / 2, abs=1e-6)
    # The other way around it is 1/2 ln(2/3) + 1/2 ln 2 = 0.143841.
    assert relative_entropy([other], [one]) == pytest.approx(0.143841 / 2, abs=1e-6)


def test_by_numpy_over_batches_of_unequal_size():
    first, second = student(), teacher()
    batches = held_out_batches([(X[:20], Y[:20]), (X[20:], Y[20:])])
    found = relative_entropy(outputs_of(second, batches), outputs_of(first, batches))
    with torch.no_grad():
        wanted = by_numpy(second.eval()(X).numpy(), first.eval()(X).numpy())
    assert found == pytest.approx(wanted, rel=1e-5)


def test_networks_are_run_in_eval_mode_and_get_their_modes_back():
    model = student().train()
    model.norm.eval()
    before = model.norm.running_mean.clone()
    held = held_out_batches([(X, Y)])
    assert torch.equal(outputs_of(model, held)[0], outputs_of(model, held)[0]), "no dropout"
    assert model.training and not model.norm.training and torch.equal(model.norm.running_mean, before)


class Keywords(nn.Module):
    def forward(self, x, labels=None):
        assert labels is None, "labels are not read"
        return {"logits": x.mean(2)}


def test_dicts_and_logits_of_more_dimensions():
    batches = held_out_batches([{"x": torch.ones(2, 3, 5), "labels": Y}])
    assert outputs_of(Keywords(), batches)[0].shape == (2, 3)
    # (B, T, C): rows are tokens.
    assert outputs_of(nn.Identity(), [Batch((torch.ones(2, 5, 3),))])[0].shape == (10, 3)


@pytest.mark.parametrize(
    ("table", "current", "delta", "wanted"),
    [
        ([1.0, 1.2, 1.7, 1.9], 0, 0.8, 2),  # bound 1.8
        ([1.0, 1.2, 1.8, 1.9], 0, 0.8, 2),  # at the bound
        ([1.0, 1.9, 1.7, 5.0], 0, 0.8, 2),  # one before it is harder
        ([1.0, 1.9, 2.0, 5.0], 0, 0.8, 1),  # none: the next one
        ([1.0, 1.2, 1.7, 1.8], 0, 0.8, 3),
        ([9.0, 1.0, 1.1, 1.9], 1, 0.1, 2),
        ([9.0, 9.0, 1.0, 9.0], 2, 0.8, 3),
        ([1.0, 1.0, 1.0, 1.1], 0, 0.0, 2),  # no harder at all
        ([0.0, 0.0, 0.1, 0.1], 0, 0.8, 1),  # a student that is its anchor
        ([1.0, 1.0, 1.0, 1.0], 3, 0.8, None),
        ([1.0], 0, 0.8, None),
    ],
)
def test_the_next_anchor_by_hand(table, current, delta, wanted):
    assert next_anchor(table, current, delta) == wanted


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"delta": -0.1}, ValueError, "delta must be at least 0 and finite, got -0.1"),
        ({"delta": float("nan")}, ValueError, "delta must be at least 0 and finite, got nan"),
        ({"delta": "0.8"}, TypeError, "delta must be a number of at least 0, got '0.8'"),
        ({"delta": True}, TypeError, "delta must be a number"),
        ({"data": []}, ValueError, "data must hold batches of held-out samples, got none"),
        ({"data": X}, TypeError, r"data must be a list or loader of batches, got a Tensor; pass data=\[\(x, y\), ...\]"),
        ({"data": 3}, TypeError, "data must be a list or loader of batches, got a int"),
        (
            {"data": iter([X])},
            TypeError,
            r"data must be gone through again after each stage, got an iterator; pass list\(data\)",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Greedy(**{"data": [(X, Y)], **arguments})


def test_nan_and_other_classes_are_refused():
    with pytest.raises(ValueError, match="hardness must be finite, got outputs with NaN"):
        relative_entropy([torch.full((2, 3), float("nan"))], [torch.zeros(2, 3)])
    with pytest.raises(ValueError, match=r"student must have the outputs of its teacher, got \(2, 4\) where it has \(2, 3\)"):
        relative_entropy([torch.zeros(2, 3)], [torch.zeros(2, 4)])
