"""torch's 2:4 kernels: where they are refused, and which layers are converted, with converter and timer put in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fasterai.sparse.nm.semi_structured import convert_layers, to_semi_structured


def sparse(outputs: int, inputs: int, dtype: torch.dtype = torch.float16) -> nn.Linear:
    layer = nn.Linear(inputs, outputs).to(dtype)
    with torch.no_grad():
        layer.weight.unflatten(1, (-1, 4))[..., :2] = 0
    return layer


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "fast": sparse(64, 128),
            "slow": sparse(128, 64),
            "wrong": sparse(64, 64),
            "dense": nn.Linear(64, 64).half(),
            "small": sparse(32, 64),
            "single": sparse(64, 64, torch.float32),
        }
    )


def converted(weight: Tensor) -> Tensor:
    """Twice the weight of the only one that is square; an equal copy of the others."""
    return weight.clone() * (2 if weight.shape == (64, 64) else 1)


def run(model: nn.Module, tolerance: float = 1e-2):
    times = iter([4.0, 3.0, 2.0, 2.0])  # dense and sparse of `fast`, then of `slow`
    calls = []

    def seconds(call):
        calls.append(call())
        return next(times)

    found = convert_layers(model, 16, tolerance, converted, seconds)
    return found, calls


def test_only_layers_that_stay_the_same_and_get_faster_are_converted_in_a_copy():
    model = network()
    found, calls = run(model)
    assert found.converted == ["fast"]
    fates = {x.name: x.kept_dense for x in found.layers}
    assert fates.pop("wrong").startswith("its outputs would be ")
    assert fates == {
        "fast": "",
        "slow": "no faster",
        "dense": "4 of four weights are not zero",
        "small": "32 x 64, not multiples of 64",
        "single": "float32, not float16 or bfloat16",
    }
    assert [tuple(x.shape) for x in calls] == [(16, 64), (16, 64), (16, 128), (16, 128)]
    assert found.model is not model and not found.model["fast"].weight.requires_grad
    assert model["fast"].weight.requires_grad
    assert found.model["fast"].weight.data_ptr() != model["fast"].weight.data_ptr()
    assert (found.layers[0].dense, found.layers[0].sparse) == (4.0, 3.0)
    assert repr(found) == "<SemiStructured: 1 of 6 Linear layers on 2:4 kernels>"
    assert "no faster" in str(found)


def test_without_cuda_it_says_where_and_what_else():
    with pytest.raises(
        ValueError, match=r"model must be on a CUDA device of capability 8.0 or more, got cpu: .* masked weights"
    ):
        to_semi_structured(network())
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        to_semi_structured("net")
    with pytest.raises(ValueError, match="rows must be at least 1"):
        to_semi_structured(network(), rows=0)
    with pytest.raises(ValueError, match="tolerance must be a number of at least 0"):
        to_semi_structured(network(), tolerance=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_outputs_stay_the_same():
    model = nn.Sequential(sparse(256, 256)).cuda()
    found = to_semi_structured(model)
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    torch.testing.assert_close(found.model(x), model(x), rtol=1e-2, atol=1e-2)
