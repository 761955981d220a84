"""Regularisation in every framework: what is validated, where the penalty acts, and the familiar callback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import Tensor, nn

import fasterai.callbacks.fastai as for_fastai
import fasterai.callbacks.huggingface as for_huggingface
import fasterai.callbacks.lightning as for_lightning
from fasterai.regularize.regularizer import Regularizer
from tests.callbacks.test_own_method import FRAMEWORKS, Net, loader

pytestmark = pytest.mark.filterwarnings("ignore")


def learner(network: nn.Module, folder: Any, loss: Any = None) -> Learner:
    return Learner(DataLoaders(loader(), loader()), network, loss_func=loss or CrossEntropyLossFlat(), lr=0.01, path=folder)


def fit(network: nn.Module, folder: Any, *callbacks: Any, loss: Any = None) -> list[float]:
    """Train for an epoch; return the row of the table."""
    learn = learner(network, folder, loss)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=list(callbacks))
    return list(learn.recorder.values[-1])


@pytest.mark.parametrize("run", FRAMEWORKS)
def test_all_places_of_the_penalty_act_in_every_framework(run, tmp_path):
    models = {how: Net() for how in ("loss", "gradient", "proximal")}
    for how, model in models.items():
        strong = {"weight": 1e4, "penalty": "group_lasso"} if how == "proximal" else {"weight": 0.05}
        made = Regularizer(model, granularity="row", targets="body", how=how, **strong)
        run(model, [made], tmp_path / how, stop=False, resume=False)
        assert made.metrics()["regularization"] > 0
    for a, b in zip(models["loss"].parameters(), models["gradient"].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not models["proximal"].body.weight.any() and models["proximal"].head.weight.any()
    assert not torch.equal(models["loss"].body.weight, models["proximal"].body.weight)


@pytest.mark.parametrize("run", FRAMEWORKS)
def test_a_resumed_run_is_the_same_bit_for_bit(run, tmp_path):
    whole, stopped, resumed = Net(), Net(), Net()
    options = {"weight": 0.02, "schedule": "cos", "penalty": "group_lasso", "how": "proximal", "granularity": "row"}
    made = {one: Regularizer(one, **options) for one in (whole, stopped, resumed)}
    (tmp_path / "parts").mkdir()
    run(whole, [made[whole]], tmp_path / "whole", stop=False, resume=False)
    run(stopped, [made[stopped]], tmp_path / "parts", stop=True, resume=False)
    run(resumed, [made[resumed]], tmp_path / "parts", stop=False, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert made[whole].effect == made[resumed].effect


def test_the_valid_loss_is_the_tasks_own_and_no_loss_is_written_into(tmp_path):
    def root(outputs: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, y).sqrt()  # its backward pass reads its own result

    network = Net()
    callback = for_fastai.RegularizeCallback("large_final", "row", 1000.0, nn.Linear)
    row = fit(network, tmp_path, callback, loss=root)
    with torch.no_grad():
        own = torch.stack([root(network(x), y) for x, y in loader()]).mean().item()
    assert row[1] == pytest.approx(own, rel=1e-4) and row[2] > 0 and row[3] == 1000.0
    assert callback.get_norm().item() == pytest.approx(
        network.body.weight.abs().mean(1).sum().item()
    )  # the head makes the output


def test_granularity_criterion_and_schedule_matter(tmp_path):
    seen = {}
    for axes in [
        ("large_final", "weight"),
        ("large_final", "row"),
        ("squared_final", "weight"),
        ("large_final", "weight", "lin"),
    ]:
        callback = for_fastai.RegularizeCallback(*axes[:2], 0.1, nn.Linear, *axes[2:])
        network = Net()
        fit(network, tmp_path, callback)
        seen[axes] = network.body.weight.abs().mean().item()
    assert len({round(x, 5) for x in seen.values()}) == 4


@pytest.mark.parametrize("module", [for_fastai, for_lightning, for_huggingface])
def test_the_callback_checks_its_arguments_at_once(module):
    callback = module.RegularizeCallback("squared_final", "filter", 1e-3, schedule="one_cycle")
    assert repr(callback) == "<RegularizeCallback: 'squared_final', 'filter', 0.001>"
    assert callback.metrics() == {"regularization": 0.0, "strength": 0.0} and callback.regularizer is None
    with pytest.raises(ValueError, match="granularity must be one of"):
        module.RegularizeCallback("large_final", "filters")
    with pytest.raises(ValueError, match="get_norm must come after the first batch of a run"):
        callback.get_norm()
    with pytest.raises(ValueError, match="weight must be a number of at least 0, got -1"):
        module.RegularizeCallback("large_final", "filter", -1)


def test_layers_are_convolutions_unless_others_are_named(tmp_path):
    with pytest.raises(ValueError, match="layer_type must match a layer of the model, got Conv2d; it has Linear"):
        fit(Net(), tmp_path, for_fastai.RegularizeCallback("large_final", "weight"))
    named, default = (
        for_fastai.RegularizeCallback("large_final", "weight", **o) for o in ({"targets": "head"}, {"layer_types": None})
    )
    for callback in (named, default):
        fit(Net(), tmp_path, callback)
    assert [[t.name for t in one.regularizer.terms[0].record.targets] for one in (named, default)] == [
        ["head.weight"],
        ["body.weight", "head.weight"],
    ]
