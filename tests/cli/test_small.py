from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fasterai.cli.data import Data
from fasterai.cli.output import file_of, save_weights
from fasterai.cli.small import make_small
from fasterai.cli.training import Recipe
from tests.networks import Sloping

RECIPE = Recipe(1, 8, 0.1, 0, torch.device("cpu"))


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 1, 6, 6), dtype=torch.uint8, generator=generator)
    part = Subset(TensorDataset(pixels, torch.arange(12) % 2), range(12))
    return Data(part, part, ("a", "b"), (0.5,), (0.25,), image_size=6, validation="all")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def silence(model: nn.Sequential) -> nn.Sequential:
    """The last six of the eight first channels."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        result[0].weight[2:], result[0].bias[2:] = 0, 0
    return result


def written(folder: Path, **networks: nn.Module) -> dict[str, nn.Module]:
    for name, model in networks.items():
        save_weights(model, file_of(folder, name), ("a", "b"))
    return networks


def test_the_small_network_is_counted_beside_the_others(tmp_path: Path) -> None:
    networks = written(tmp_path, dense=network(), sparse=silence(network()))
    before = {name: copy.deepcopy(model.state_dict()) for name, model in networks.items()}
    found = make_small(networks, data(), RECIPE, tmp_path)

    assert found["removal"]["removed"] == {"0.weight": [8, 2]}
    # 1x8x9 + 8, 8x4x9 + 4, 16x2 + 2 parameters; 6 of 8 channels with their biases are zero
    dense = 72 + 8 + 288 + 4 + 34
    size = (tmp_path / "dense.safetensors").stat().st_size
    macs = 72 * 16 + 288 * 4 + 32
    assert found["costs"]["dense"] == {"parameters": dense, "nonzero": dense, "macs": macs, "file_bytes": size}
    assert found["costs"]["sparse"]["nonzero"] == dense - 6 * 9 - 6
    assert found["costs"]["sparse"]["macs"] == found["costs"]["dense"]["macs"]
    assert found["costs"]["small"]["parameters"] == 18 + 2 + 72 + 4 + 34
    assert found["costs"]["small"]["macs"] == 18 * 16 + 72 * 4 + 32
    assert [batch["images"] for batch in found["times"]["batches"]] == [1, 32]
    assert all(batch["seconds"].keys() == {"dense", "sparse", "small"} for batch in found["times"]["batches"])
    assert all(batch["as_fast"]["dense"] == 1.0 for batch in found["times"]["batches"])
    for name, model in networks.items():
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())


def test_a_batch_that_takes_long_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasterai.cli.small.QUICK", 0.0)
    networks = written(tmp_path, sparse=silence(network()))
    found = make_small(networks, data(), RECIPE, tmp_path)
    assert [batch["images"] for batch in found["times"]["batches"]] == [1]
    assert found["times"]["batches"][0]["as_fast"]["sparse"] == 1.0


def test_nothing_silent_makes_no_small_network(tmp_path: Path) -> None:
    found = make_small(written(tmp_path, sparse=network()), data(), RECIPE, tmp_path)
    assert found == {"why_not": "no removable channel is silent"}
    assert not (tmp_path / "small.safetensors").exists()


def test_a_network_that_cannot_be_followed_does_not_lose_the_training(tmp_path: Path) -> None:
    found = make_small(written(tmp_path, sparse=Sloping(network())), data(), RECIPE, tmp_path)
    assert found.keys() == {"why_not"}
    assert "model must be" in found["why_not"]
    assert not (tmp_path / "small.safetensors").exists()
