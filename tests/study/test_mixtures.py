"""The studies' tasks follow from their seed, and can be predicted; their networks are what they say."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fasterai.study.description import Size
from fasterai.study.mixtures import BlendedLayer, BlendedMixture, make_frames, make_rules, train_samples

SIZE = Size("tiny", 64, 32, None, epochs=2, batch_size=16, lr=1e-2)


def test_a_blended_layer_is_the_sum_of_its_experts():
    torch.manual_seed(0)
    layer, x, gate = BlendedLayer(3, 5, 4), torch.randn(6, 5), torch.rand(6, 3)
    torch.nn.init.normal_(layer.bias)
    by_expert = torch.stack([F.linear(x, w, b) for w, b in zip(layer.weight, layer.bias, strict=True)], 1)
    torch.testing.assert_close(layer(x, gate), (gate[:, :, None] * by_expert).sum(1))


def test_frames_go_on_from_each_other_and_follow_from_the_seed():
    frames, changes = make_frames(100, seed=3)
    assert frames.shape == (100, 11) and changes.shape == (100, 8)
    torch.testing.assert_close(frames[:-4, :8] + changes[:-4], frames[4:, :8])  # four runs, moment by moment
    torch.testing.assert_close(frames[:, 8:10].square().sum(1), torch.ones(100))  # cosine and sine of the phase
    assert torch.equal(make_frames(100, seed=3).inputs, frames) and not torch.equal(make_frames(100, seed=4).inputs, frames)
    assert 0.3 < float(changes.std()) < 3


def test_each_symbol_follows_by_the_rule_that_the_first_names():
    sequences, following = make_rules(500, seed=0)
    assert torch.equal(sequences[:, 2:], following[:, 1:-1]) and bool((following[:, 0] == -100).all())
    assert int(sequences[:, 1:].max()) < 32 <= int(sequences[:, 0].min())
    rules: dict[tuple[int, int], int] = {}
    for name, befores, afters in zip(*(x.tolist() for x in (sequences[:, 0], sequences[:, 1:], following[:, 1:])), strict=True):
        for before, after in zip(befores, afters, strict=True):
            assert rules.setdefault((name, before), after) == after
    assert len(set(rules.values())) == 32


def test_training_follows_from_its_seed_and_is_interrupted_half_way_once():
    lines = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model, data, steps = BlendedMixture(11, 8, experts=2, hidden=4), make_frames(64, 0), []
        train_samples(model, data, F.mse_loss, size=SIZE, seed=seed, half_way=lambda o, found=steps: found.append(o))
        assert len(steps) == 1
        lines.append(model.layers[0].weight.detach())
    assert torch.equal(lines[0], lines[1]) and not torch.equal(lines[0], lines[2])
