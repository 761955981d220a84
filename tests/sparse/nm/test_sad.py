"""SAD: flips of masks per layer and overall, over a training and between two moments."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.sparse.nm.sad import SAD, sad
from fasterai.sparse.nm.srste import STE


def trained(looks: int = 50, steps: int = 5) -> tuple[STE, list[dict[str, torch.Tensor]]]:
    """Two layers whose masks are kept after every step, the first mask included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    training = STE(model, 2, 4, looks=looks)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with attach(optimizer, training, total_steps=steps, model=model):
        seen = [training.masks]
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(16, 8)).pow(2).sum(1).mean().backward()
            optimizer.step()
            seen.append(training.masks)
    return training, seen


def test_over_a_training_it_is_the_sum_of_differences_of_the_masks():
    training, seen = trained()
    found = sad(training)
    wanted = {n: [int((b[n] != a[n]).sum()) for a, b in itertools.pairwise(seen)] for n in seen[0]}
    assert {n: list(flips) for n, flips in found.flips.items()} == wanted
    assert found.overall == int(found) == sum(map(sum, wanted.values())) > 0
    assert found.over_time == [sum(flips) for flips in zip(*wanted.values(), strict=True)]
    assert found.per_layer == {n: sum(flips) for n, flips in wanted.items()}
    assert found.steps == (1, 2, 3, 4, 5) and found.weights == {"0.weight": 64, "2.weight": 32}
    assert found.to_dict()["overall"] == found.overall
    assert "all targets" in str(found) and repr(found).startswith(f"<SAD: {found.overall}")


def test_between_two_moments_it_counts_places():
    _, seen = trained()
    between = sad(seen[0], seen[-1])
    assert between.per_layer == {n: int((seen[0][n] ^ seen[-1][n]).sum()) for n in seen[0]}
    assert sad(seen[0], seen[0]).overall == 0
    with pytest.raises(ValueError, match="got one without looks"):
        between.plot()


def test_the_picture_has_a_line_for_each_target_and_one_for_all():
    axes = sad(trained()[0]).plot()
    assert len(axes.lines) == 3
    assert axes.get_xlabel() == "step"


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (lambda: (trained(looks=0)[0],), ValueError, "must have trained with looks of at least 1, got looks=0"),
        (lambda: (trained()[0], {}), TypeError, "then must be left out"),
        (lambda: ({"w": torch.ones(2)},), TypeError, "the masks of two moments"),
        (lambda: (3,), TypeError, "sad must be given an SRSTE or STE"),
        (lambda: ({"w": torch.ones(2)}, {"w": torch.ones(3)}), ValueError, "same names and shapes"),
        (lambda: ({"w": torch.ones(2)}, {"v": torch.ones(2)}), ValueError, "same names and shapes"),
    ],
)
def test_what_has_no_flips_is_refused(given, kind, words):
    with pytest.raises(kind, match=words):
        sad(*given())


def test_numbers_by_hand():
    found = SAD((10, 20), {"a": (3, 1), "b": (0, 2)}, {"a": 8, "b": 4})
    assert (found.overall, found.per_layer, found.over_time) == (6, {"a": 4, "b": 2}, [3, 3])
    assert "0.5000" in str(found)
