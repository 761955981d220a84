"""What a removal says of itself: what was measured, and no more."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from fasterai.analyze.comparison import Comparison
from fasterai.analyze.cost import Cost, LayerCost
from fasterai.analyze.latency import Latency, LatencyComparison, Timing
from fasterai.prune.measure import Measurement
from fasterai.prune.removal import remove
from fasterai.prune.removal_report import Removal
from fasterai.prune.surgery.plan import Plan

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def costs(parameters: int, nonzero: int, macs: int) -> Cost:
    layers = (LayerCost("a", "Linear", parameters, nonzero, macs, 100, (4, 8), 1),)
    return Cost(parameters, nonzero, macs, 100, 100, 4 * parameters, 0, 0, 4 * parameters + 120, layers)


def times(dense: float, small: float, quartiles: tuple[float, float]) -> LatencyComparison:
    models = {
        name: Latency((Timing(None, seconds, seconds / 10, 7),), "cpu", 2, False)
        for name, seconds in (("dense", dense), ("small", small))
    }
    ratios = {"dense": (1.0,), "small": (dense / small,)}
    return LatencyComparison(models, ratios, {"dense": ((1.0, 1.0),), "small": (quartiles,)})


def removal(latency: LatencyComparison | None = None, **changes: object) -> Removal:
    both = {"dense": costs(2_000_000, 600_000, 50_000_000), "small": costs(500_000, 490_000, 20_000_000)}
    latency = latency or times(0.010, 0.004, (2.4, 2.6))
    fields: dict[str, object] = {
        "plan": Plan({}, {}, (), {}),
        "removed": {"a.weight": (64, 16)},
        "refused": {"a.weight": "3 of its 51 silent channels stay (1, 2, 3): the outputs would move", "b.weight": "it fails"},
        "pinned": {("c.weight", 0): "layer_norm_1 averages over it", ("c.weight", 1): "layer_norm averages over it"},
        "difference": 2e-7,
        "parameters": (2_000_000, 500_000),
        "stayed": {"a.weight": (1, 2, 3), "b.weight": (0,)},
        "groups": {"a.weight": (64, 16), "b.weight": (8, 8)},
        "measurement": Measurement(Comparison(both, latency), "4x5 float32", ""),
        **changes,
    }
    return Removal(**fields)  # type: ignore[arg-type]


def test_the_table_has_dense_masked_and_small() -> None:
    lines = [line.split() for line in str(removal()).splitlines()]
    assert ["dense", "masked", "small"] in lines
    assert ["parameters", "2", "M", "as", "dense", "500", "k", "(25.0%)"] in lines
    assert ["not", "zero", "600", "k", "490", "k"] in lines
    assert ["MACs", "50", "M", "as", "dense", "20", "M", "(40.0%)"] in lines
    assert ["file", "7.63", "MiB", "as", "dense", "1.91", "MiB", "(25.0%)"] in lines
    assert ["time", "10", "ms", "as", "dense", "4", "ms", "(40.0%)"] in lines


def test_a_mask_is_not_measured_twice_and_the_report_says_so() -> None:
    text = str(removal())
    assert "masked: 70.0% of the parameters are zero; a mask changes no shape, so that all else is as dense" in text
    assert "was not measured again" in text


def test_the_conditions_and_the_spread_stand_with_the_time() -> None:
    text = str(removal())
    assert "time: a forward pass on 4x5 float32, cpu, 2 threads, the fastest of 7 turns; 2.50x as fast (half of the " in text
    assert "2.50x as fast (half of the fastest passes: 2.40x to 2.60x)" in text


@pytest.mark.parametrize(("small", "quartiles"), [(0.0098, (1.0, 1.04)), (0.009, (0.98, 1.15))])
def test_what_lies_within_the_spread_is_not_called_faster(small: float, quartiles: tuple[float, float]) -> None:
    text = str(removal(times(0.010, small, quartiles)))
    assert "no faster within the spread (half of the fastest passes: " in text
    assert "x as fast" not in text
    assert "ms (same)" in text


def test_a_time_that_is_noise_is_not_named() -> None:
    found = removal(times(0.010, 0.010 / 16.23, (1.39, 21.39)))
    text = str(found)
    assert "between 1.4x and 21x as fast: too noisy to name one" in text
    assert "616 us (5% to 72%)" in text
    assert "16.2" not in text and "6.2%" not in text
    assert "(half of" not in text
    for said in (str(found.comparison), *found.comparison.verdicts()):
        assert "between 1.4x and 21x as fast" in said and "16.2" not in said


def test_a_small_model_that_is_slower_is_said_to_be() -> None:
    assert "0.50x as fast" in str(removal(times(0.010, 0.020, (0.49, 0.51))))


def test_what_stayed_and_why() -> None:
    text = str(removal())
    assert "a.weight: 64 -> 16 channels" in text
    assert "a.weight: 3 of its 51 silent channels stay (1, 2, 3): the outputs would move" in text
    assert "b.weight: stays, it fails" in text
    assert "2 dimensions of parameters cannot shrink, kernel sizes aside:\n  2 because layer_norm averages over it" in text


def test_long_lists_are_cut_and_counted() -> None:
    many = {f"layer{i}.weight": (8, 4) for i in range(40)}
    lines = str(removal(removed=many, refused={})).splitlines()
    assert lines[:24] == [
        *(f"layer{i}.weight: 8 -> 4 channels" for i in range(23)),
        "and 17 more: 40 groups lost channels in all",
    ]
    assert len(removal(removed=many).to_dict()["removed"]) == 40


def test_plain_data_goes_through_json() -> None:
    data = json.loads(json.dumps(removal().to_dict()))
    assert data["removed"] == {"a.weight": [64, 16]}
    assert data["stayed"] == {"a.weight": [1, 2, 3], "b.weight": [0]}
    assert data["pinned"][0] == ["c.weight", 0, "layer_norm_1 averages over it"]
    assert data["measured"]["costs"]["small"]["macs"] == 20_000_000
    assert data["measured"]["latency"]["ratios"]["small"] == [2.5]
    assert (data["exact"], data["difference"], data["parameters"]) == (True, 2e-7, [2_000_000, 500_000])
    bare = json.loads(json.dumps(removal(measurement=Measurement()).to_dict()))
    assert (bare["measured"], bare["not_measured"]) == (None, "measure=False was given")


def test_layer_by_layer_on_request() -> None:
    layers = removal().layers()
    assert [row.name for row in layers.rows] == ["a"]
    assert "2,000,000" in str(layers)
    with pytest.raises(ValueError, match="layers must have figures to show, got none: measure=False was given"):
        removal(measurement=Measurement()).layers()


def test_an_approximate_removal_says_that_it_is() -> None:
    assert "outputs moved by at most 1.2e-01 of their scale, as was allowed (exact=False)" in str(
        removal(exact=False, difference=0.12)
    )


def test_the_report_of_a_real_removal() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[2].weight[:, 2] = 0
    found = remove(net, X)
    lines = [line.split() for line in str(found).splitlines()]
    assert ["parameters", "75", "as", "dense", "66", "(88.0%)"] in lines
    assert ["MACs", "of", "4", "samples", "256", "as", "dense", "224", "(87.5%)"] in lines
    assert any(line[:5] == ["time:", "a", "forward", "pass", "on"] and line[5] == "4x5" for line in lines)
    assert [row.costs["small"].parameters for row in found.layers().rows] == [42, 24]


def test_the_file_is_said_to_be_of_the_weights_alone() -> None:
    assert "file: the weights alone, as safetensors; save_small writes what was removed beside them" in str(removal())


def test_layers_say_that_the_zeros_of_the_dense_model_are_masked_channels() -> None:
    assert str(removal().layers()).splitlines()[-1] == (
        "non-zero of dense: its removed channels were masked already, so that they count as zeros"
    )
