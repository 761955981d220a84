"""A model made ternary is a new one of the same kind; the given one stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fasterai.misc.ternary.ternarize import find_ternary, ternarize
from tests.misc.ternary.test_selection import Net, X


def is_ternary(weight: torch.Tensor, group: int) -> bool:
    """Told by loops over outputs, positions and inputs."""
    for row in weight.detach().movedim(1, -1).reshape(-1, weight.shape[1]):
        for part in row.split(group):
            if len({abs(x) for x in part.tolist()} - {0.0}) > 1:
                return False
    return True


def test_the_given_model_stays_and_ends_and_biases_are_those_of_it():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    new = ternarize(model, 4, example_inputs=X)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    changed = {n for n, x in new.state_dict().items() if not torch.equal(x, before[n])}
    assert changed == {"body.weight", "short.weight"}
    assert is_ternary(new.body.weight, 4) and not is_ternary(model.body.weight, 4)
    assert isinstance(new.body.weight, nn.Parameter) and new.training
    assert new(X).shape == (2, 3)


def test_norms_are_measured_anew_on_data_whose_first_batch_shows_the_ends():
    data = torch.randn(4, 8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    new = ternarize(Net(), 4, data=((x, None) for x in data))  # which can be read once
    seen: list[torch.Tensor] = []
    new.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    with torch.no_grad():
        new.eval()
        for x in data:
            new(x)
    torch.testing.assert_close(new.norm.running_mean, torch.stack(seen).mean(0))
    assert not is_ternary(new.stem.weight, 4)


@pytest.mark.parametrize("rule", ["exact", "threshold"])
@pytest.mark.parametrize("group", [1, 3, 8, "filter", "tensor"])
def test_groups_and_rules(group, rule):
    model = Net()
    new = ternarize(model, group, rule=rule, targets="short")
    sizes = {"filter": 8, "tensor": 8}
    assert is_ternary(new.short.weight, sizes.get(group, group))
    if group == 1 and rule == "exact":
        assert torch.equal(new.short.weight, model.short.weight)
    if group == "tensor":
        assert len(new.short.weight.abs().unique()) == 2


def test_the_report_is_of_what_ternarize_makes():
    model = Net()
    new, report = ternarize(model, 4, example_inputs=X), find_ternary(model, 4, example_inputs=X)
    layer = report.layers["body.weight"]
    before, after = model.body.weight.detach(), new.body.weight.detach()
    assert layer.error == pytest.approx(float((before - after).norm() / before.norm()))
    assert layer.zeros == pytest.approx(float((after == 0).float().mean()))
    assert (layer.weights, layer.groups) == (64, 16)
    assert (layer.dense_bytes, layer.packed_bytes) == (256, 16 + 64)  # 64 codes of 2 bits, 16 scales of 4 bytes
    assert (layer.macs, layer.multiplications) == (64 * 16 * 2, 16 * 16 * 2)  # 4 x 4 places, two samples
    again = find_ternary(new, 4, example_inputs=X)
    assert again.layers["body.weight"].error < 1e-6


def test_inputs_that_do_not_divide_have_a_smaller_last_group():
    model = nn.Linear(10, 3, bias=False)
    report = find_ternary(model, 4, targets="weight", example_inputs=torch.zeros(1, 10))
    assert report.layers["weight"].groups == 9 and report.layers["weight"].multiplications == 9
    new = ternarize(model, 4, targets="weight")
    alone = ternarize(nn.utils.skip_init(nn.Linear, 2, 3, bias=False), 4, targets="weight")
    assert is_ternary(new.weight, 4) and alone.weight.shape == (3, 2)


def test_scales_in_half_precision():
    new = ternarize(Net(), 4, targets="short", scale_dtype=torch.float16)
    assert torch.equal(new.short.weight.half().float(), new.short.weight)
    report = find_ternary(Net(), 4, targets="short", scale_dtype=torch.float16)
    assert report.layers["short.weight"].packed_bytes == 16 + 32


def test_a_type_that_does_not_hold_the_scales_is_refused():
    model = Net()
    model.short.weight.data[0] = 1e5
    for call in (ternarize, find_ternary):
        with pytest.raises(ValueError, match=r"scale_dtype must hold the scales, got torch.float16 for short.weight"):
            call(model, targets="short", scale_dtype=torch.float16)


def test_recurrent_and_attention_layers():
    model = nn.Sequential(nn.LSTM(8, 4, batch_first=True))
    report = find_ternary(model, 4, targets="0", example_inputs=torch.zeros(2, 5, 8))
    macs = {name: layer.macs for name, layer in report.layers.items()}
    assert macs == {"0.weight_ih_l0": 16 * 8 * 10, "0.weight_hh_l0": 16 * 4 * 10}
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = find_ternary(model, 4, targets="*", example_inputs=torch.zeros(1, 3, 8))
    assert report.layers["self_attn.in_proj_weight"].macs is None
    assert report.layers["linear1.weight"].macs == 3 * 128


def test_a_model_of_two_layers_has_none_left_and_that_is_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"no weight became ternary: 0.weight: the first layer.*1.weight: the last layer"):
        new = ternarize(model)
    assert torch.equal(new[0].weight, model[0].weight)
    assert "0 of 2 weights" in str(find_ternary(model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group": 0}, ValueError, "group must be at least 1"),
        ({"rule": "best"}, ValueError, "rule must be one of exact, threshold, got 'best'"),
        ({"rule": 0.7}, TypeError, "rule must be one of exact, threshold, got 0.7"),
        ({"scale_dtype": torch.int8}, ValueError, r"scale_dtype must be one of torch.float16, .*, got torch.int8"),
        ({"data": []}, ValueError, "data must hold at least one batch, got none"),
        (
            {"data": {"x": torch.zeros(3, 2)}},
            TypeError,
            "data must be batches, got dict; pass a DataLoader or",
        ),
        ({"data": 3, "example_inputs": torch.zeros(1, 2)}, TypeError, "data must be batches, got int"),
        ({"data": [torch.zeros(1, 2)]}, ValueError, "example_inputs must be arguments that the model runs on"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ternarize(Net(), **options)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_what_is_no_model_is_refused_and_a_layer_without_outputs_stays():
    for function in (ternarize, find_ternary):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
            function("net", data=[torch.zeros(1, 2)]) if function is ternarize else function("net")
    empty = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0), nn.Linear(0, 4), nn.Linear(4, 4))
    assert find_ternary(empty).left["1.weight"] == "targets must hold weights, got none"


def test_it_can_be_copied_and_trained():
    new = copy.deepcopy(ternarize(Net(), 4, example_inputs=X))
    new(X).sum().backward()
    assert new.body.weight.grad is not None
