"""The sparsifier with coupled channels: what is masked, which channels may go, and what a training makes of them."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Batch, Fit, Loop
from fasterai.graph.channels import channel_graph
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import silent_channels
from fasterai.sparse.sparsifier import Sparsifier
from tests.networks import residual

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_all_slices_of_a_pruned_channel_are_zero_and_nothing_else_is():
    model = residual()
    before = copy.deepcopy(model.state_dict())
    sparsifier = Sparsifier(model, "coupled", "local", "large_final", example_inputs=X)
    sparsifier.sparsify_model(0.5)
    gone = (~sparsifier.masks["stem.weight"]).flatten(1).all(1)
    inner = (~sparsifier.masks["branch.0.weight"]).flatten(1).all(1)
    assert (int(gone.sum()), int(inner.sum())) == (3, 2)
    masks = {
        "stem.weight": ~gone[:, None, None, None],
        "stem.bias": ~gone,
        "branch.0.weight": ~(inner[:, None, None, None] | gone[None, :, None, None]),
        "branch.1.weight": ~inner,
        "branch.1.bias": ~inner,
        "branch.3.weight": ~(gone[:, None, None, None] | inner[None, :, None, None]),
        "branch.3.bias": ~gone,
        "head.weight": ~gone[None, :],
    }
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value * masks[name] if name in masks else value), name
    for name, mask in sparsifier.masks.items():
        assert torch.equal(mask, masks[name].expand(mask.shape)), name


def test_reports_count_shared_weights_once():
    sparsifier = Sparsifier(residual(), "coupled", "local", "large_final", example_inputs=X)
    sparsifier.sparsify_model(0.5)
    report = sparsifier.report()
    assert {r.name: (r.shape, r.units, r.pruned) for r in report.rows} == {
        "stem.weight": ((6,), 6, 3),
        "branch.0.weight": ((4,), 4, 2),
    }
    total = 6 * 27 + 4 * 54 + 6 * 4 + 5 * 6
    zeros = 3 * 27 + (4 * 54 - 2 * 27) + (6 * 4 - 3 * 2) + 5 * 3
    assert (report.together.weights, report.together.zeros, report.together.masked) == (total, zeros, zeros)
    assert sparsifier.sparsity.overall == 0.5
    assert math.isclose(sparsifier.sparsity.weights, zeros / total)
    assert "channels" in str(report).splitlines()[0]
    assert sum(row.zeros for row in report.rows) > zeros
    assert "zeros: a weight that two groups of channels share stands in the rows of both" in str(report)
    dense = Sparsifier(residual(), "filter", "local", "large_final", example_inputs=X)
    assert "stands in the rows of both" not in str(dense.report())


def test_weights_that_disobey_count_once_where_channels_cross():
    model = residual()
    sparsifier = Sparsifier(model, "coupled", "local", "large_final", example_inputs=X)
    sparsifier.sparsify_model(0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    report = sparsifier.report()
    # branch.0 is 4 x 6 x 3 x 3 with 2 and 3 channels left, branch.3 the same way round
    masked = 3 * 27 + (4 * 54 - 2 * 27) + (6 * 4 - 3 * 2) + 5 * 3
    assert (report.together.disobeying, report.together.masked) == (masked, masked)
    assert f"{masked} of {masked} masked weights are not zero" in str(report)


def test_round_to_keeps_counts_at_multiples():
    counts = {}
    for round_to in (None, 1, 8, 10):
        sparsifier = Sparsifier(residual(40, 12), "coupled", "local", "large_final", example_inputs=X, round_to=round_to)
        sparsifier.sparsify_model(0.45)
        counts[round_to] = {r.name: r.units - r.pruned for r in sparsifier.report().rows}
    assert counts == {
        None: {"stem.weight": 24, "branch.0.weight": 7},  # 22 and 7 stay: of 40 rounded up to a multiple of 8, of 12 not
        1: {"stem.weight": 22, "branch.0.weight": 7},
        8: {"stem.weight": 24, "branch.0.weight": 8},
        10: {"stem.weight": 30, "branch.0.weight": 10},
    }


# --- which ones -------------------------------------------------------------------------------------------------------


def test_a_dict_names_any_of_the_layers_that_make_channels():
    sparsifier = Sparsifier(residual(), "coupled", {"branch.3": 0.5}, example_inputs=X)
    sparsifier.sparsify_model()
    assert dict(sparsifier.sparsity) == {"stem.weight": 0.5, "branch.0.weight": 0.0}


def test_coupled_layers_cannot_have_two_shares():
    with pytest.raises(
        ValueError, match=r"sparsity's keys must give layers whose channels are coupled one share, got branch.3.weight: 0.25"
    ):
        Sparsifier(residual(), "coupled", {"branch.3": 0.25, "stem": 0.5}, example_inputs=X)


def test_a_dict_that_names_what_makes_no_channels_lists_what_does():
    with pytest.raises(
        ValueError, match=r"sparsity's keys must be .* of stem.weight, branch.0.weight, branch.3.weight, got 'head'"
    ):
        Sparsifier(residual(), "coupled", {"head": 0.5}, example_inputs=X)


def test_targets_choose_the_pools_that_they_make():
    sparsifier = Sparsifier(residual(), "coupled", targets="branch.0", example_inputs=X)
    sparsifier.sparsify_model(0.5)
    assert dict(sparsifier.sparsity) == {"branch.0.weight": 0.5}
    with pytest.raises(ValueError, match=r"got none that do \(head.weight: it is an output of the network\)"):
        Sparsifier(residual(), "coupled", targets="head", example_inputs=X)


def test_channels_that_run_through_frozen_weights_are_left_alone():
    model = residual()
    model.stem.requires_grad_(False)
    sparsifier = Sparsifier(model, "coupled", example_inputs=X)
    sparsifier.sparsify_model(0.5)
    assert dict(sparsifier.sparsity) == {"stem.weight": 0.0, "branch.0.weight": 0.5}
    assert sparsifier.report().left_out["stem.weight"] == "frozen"


def test_channels_that_run_through_a_frozen_norm_are_left_alone():
    model = residual()
    model.branch[1].requires_grad_(False)
    before = copy.deepcopy(model.branch[1].state_dict())
    sparsifier = Sparsifier(model, "coupled", example_inputs=X)
    sparsifier.sparsify_model(0.5)
    assert dict(sparsifier.sparsity) == {"stem.weight": 0.5, "branch.0.weight": 0.0}
    assert all(torch.equal(v, model.branch[1].state_dict()[n]) for n, v in before.items())


def test_without_inputs_it_says_what_to_do():
    sparsifier = Sparsifier(residual(), "coupled")
    with pytest.raises(ValueError, match="example_inputs must be given for granularity 'coupled', got None"):
        sparsifier.sparsify_model(0.5)
    with pytest.raises(ValueError, match="example_inputs must be given"):
        sparsifier.sparsify_layer(sparsifier.model.stem, 0.5)


def test_one_layer_takes_what_it_is_coupled_with():
    sparsifier = Sparsifier(residual(), "coupled", example_inputs=X)
    sparsifier.sparsify_layer(sparsifier.model.branch[3], 0.5)
    assert dict(sparsifier.sparsity) == {"stem.weight": 0.5, "branch.0.weight": 0.0}


# --- over a training --------------------------------------------------------------------------------------------------


def train(model, participants, steps=6, optimizer=None, after=lambda: None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(2)
    with attach(optimizer, *participants, total_steps=steps):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, 3, 8, 8, generator=generator)), torch.tensor([0, 1, 2, 3])).backward()
            optimizer.step()
            after()


def test_pruned_channels_stay_silent_in_training():
    model = residual()
    sparsifier = Sparsifier(model, "coupled", "local", "large_final", sparsity=0.5, schedule="one_shot", example_inputs=X)
    graph = channel_graph(model, (X,))
    reached = []

    def check():
        silent = {g.name: int(s.sum()) for g, s in zip(graph.groups, silent_channels(model, graph), strict=True)}
        reached.append((silent["stem.weight"], silent["branch.0.weight"]))

    train(model, [sparsifier], after=check)
    assert reached[0] == (0, 0)
    assert reached[-1] == (3, 2)
    assert set(reached) == {(0, 0), (3, 2)}


def test_channels_that_return_get_their_bias_and_norm_back():
    model = residual()
    sparsifier = Sparsifier(model, "coupled", example_inputs=X)
    before = {n: model.get_parameter(n).detach().clone() for n in ("stem.bias", "branch.1.weight", "branch.1.bias")}
    sparsifier.sparsify_model(0.5)
    assert all(int((model.get_parameter(n) == 0).sum()) > 0 for n in before)
    sparsifier.sparsify_model(0.0)
    assert all(torch.equal(model.get_parameter(n), value) for n, value in before.items())


def test_a_run_can_be_taken_up_again():
    states = []
    whole, parts = residual(), residual()
    options = {"sparsity": 0.5, "schedule": "lin", "example_inputs": X}

    def sgd(model):
        return torch.optim.SGD(model.parameters(), 0.05)

    train(whole, [Sparsifier(whole, "coupled", "global", "movement", **options)], optimizer=sgd(whole))
    sparsifier = Sparsifier(parts, "coupled", "global", "movement", **options)
    train(parts, [sparsifier], optimizer=sgd(parts), after=lambda: states.append(copy.deepcopy(sparsifier.state_dict())))
    fresh = Sparsifier(residual(), "coupled", "global", "movement", **options)
    fresh.load_state_dict(states[-1])
    for name, mask in sparsifier.masks.items():
        assert torch.equal(fresh.masks[name], mask)
        assert torch.equal(whole.get_parameter(name), parts.get_parameter(name))
    with pytest.raises(ValueError, match="state's keep must be bool of shape"):
        fresh.load_state_dict({**states[-1], "keep": {"stem.weight": torch.ones(7, dtype=torch.bool)}})


def test_reports_count_a_weight_once_whose_channels_cross():
    torch.manual_seed(0)
    model = nn.LSTM(4, 8, batch_first=True)
    whole = nn.Sequential(Last(model), nn.Linear(8, 3)).eval()
    sparsifier = Sparsifier(whole, "coupled", example_inputs=torch.randn(2, 5, 4))
    sparsifier.sparsify_model(0.5)
    (row,) = sparsifier.report().rows
    assert row.masked == row.zeros
    assert row.masked == sum(int((~mask).sum()) for mask in sparsifier.masks.values())


class Last(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


# --- channels that the loop's batch shows -----------------------------------------------------------------------------


def run(model, participant, batch=(X,)):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop = Loop([participant])
    loop.start(Fit(4, model, optimizer, batch=Batch(batch)))
    for _ in range(4):
        optimizer.zero_grad()
        model(*batch).square().mean().backward()
        loop.before_step()
        optimizer.step()
        loop.after_step()
    loop.end(True)


@pytest.mark.parametrize("targets", [None, ["branch.0"]])
def test_earlier_weights_of_all_that_the_batch_shows_are_remembered(targets):
    model = residual(8, 8)
    model.unused = nn.Linear(5, 5)
    sparsifier = Sparsifier(model, "coupled", "local", "movement", sparsity=0.5, targets=targets)
    run(model, sparsifier)
    assert sparsifier.sparsity.overall == 0.5
    sparsifier.load_state_dict(sparsifier.state_dict())


def test_the_channels_of_a_part_are_seen_in_a_pass_of_the_whole():
    part = residual(8, 8)
    sparsifier = Sparsifier(part, "coupled", "local", "large_final", sparsity=0.5)
    run(nn.Sequential(part, nn.Linear(5, 5)), sparsifier)
    assert sparsifier.sparsity.overall == 0.5


def test_only_what_has_the_batchs_length_is_cut_to_a_few_samples():
    class Tabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = residual(8, 8)

        def forward(self, x, table):
            return self.net(x) * table

    model = Tabled()
    sparsifier = Sparsifier(model, "coupled", "local", "large_final", sparsity=0.5)
    run(model, sparsifier, (torch.cat([X, X]), torch.ones(5)))
    assert sparsifier.sparsity.overall == 0.5


# --- what rounding misses ---------------------------------------------------------------------------------------------


def test_a_ratio_that_rounding_misses_is_said():
    model = residual(40, 12)
    message = r"asked to prune 23 of 52 channels, pruned 21 \(40.4%\): .* multiples of 8; pass round_to=1 for exact counts"
    with pytest.warns(UserWarning, match=message):  # asked for 18 and 5 of 52, pruned 16 and 5
        Sparsifier(model, "coupled", "local", "large_final", example_inputs=X).sparsify_model(0.45)
    with pytest.warns(UserWarning, match=message):
        Pruner(residual(40, 12), 0.45, "local", "large_final", example_inputs=X).prune_model(measure=False)


def test_a_ratio_that_rounding_by_hand_misses_is_said():
    message = r"asked to prune 23 of 52 channels, pruned 20 \(38.5%\): kept channels .* multiples of 8; pass round_to=1"
    with pytest.warns(UserWarning, match=message):  # 16 and 4 of 40 and 12 go
        Sparsifier(residual(40, 12), "coupled", "local", "large_final", example_inputs=X, round_to=8).sparsify_model(0.45)
    with pytest.warns(UserWarning, match=message):
        Pruner(residual(40, 12), 0.45, "local", "large_final", example_inputs=X, round_to=8).prune_model(measure=False)


@pytest.mark.parametrize(("sparsity", "round_to"), [(0.45, 1), (0.4, None)])
def test_what_was_asked_for_is_not_said(sparsity, round_to):
    with warnings.catch_warnings(action="error", category=UserWarning):
        sparsifier = Sparsifier(residual(40, 12), "coupled", example_inputs=X, round_to=round_to)
        sparsifier.sparsify_model(sparsity)


def test_the_line_says_that_channels_are_not_known_before_example_inputs():
    axes = "coupled, local, large_final, one_cycle"
    unseen, seen = (Sparsifier(residual(), "coupled", example_inputs=inputs) for inputs in (None, X))
    assert repr(unseen) == f"<Sparsifier: channels not known yet, example_inputs= shows them; {axes}>"
    assert repr(seen) == f"<Sparsifier: 0.0% of the channels pruned in 2 targets; {axes}>"
