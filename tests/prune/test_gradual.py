import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fasterai.callbacks.plain import attach
from fasterai.core.loop import Batch, Fit, Loop, Participant
from fasterai.core.schedules import Linear, OneShot, Piecewise, agp, cos, lin
from fasterai.model.cuts import note_optimizer
from fasterai.model.slim_norms import dense_size
from fasterai.prune.choice.budget import Budget
from fasterai.prune.gradual import GradualPruner
from fasterai.sparse.sparsifier import Sparsifier
from tests.networks import Heads, Sloping, perceptron
from tests.transformer_nets import Design, Transformer

STEPS = 4


def net(hidden: int = 10, seed: int = 0) -> nn.Sequential:
    return perceptron(6, hidden, 4, seed=seed)


def deep() -> nn.Sequential:
    return perceptron(6, 10, 6, 4)


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (8,), generator=torch.Generator().manual_seed(2))


def gradual(model: nn.Module, ratio=0.5, context="local", criteria="large_final", schedule=lin, **options) -> GradualPruner:
    return GradualPruner(model, ratio, context, criteria, schedule, example_inputs=options.pop("example_inputs", X), **options)


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), Y).backward()
    optimizer.step()


def widths(model: nn.Module) -> list[int]:
    return [m.out_features for m in model.modules() if isinstance(m, nn.Linear)][:-1]


def train(
    model: nn.Module, pruner: GradualPruner, steps: int = STEPS, optimizer=None, until: int | None = None
) -> list[list[int]]:
    """The hidden widths after each step."""
    optimizer = optimizer or adam(model)
    seen = []
    with attach(optimizer, pruner, total_steps=steps):
        for i in range(until or steps):
            step(model, optimizer, i)
            seen.append(widths(model))
    return seen


# --- the schedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "steps", "seen"),
    [
        (lin, 4, [9, 8, 6, 5]),  # 1.25, 2.5, 3.75 and 5 of 10; halves round to even
        (OneShot(0.5), 4, [10, 5, 5, 5]),
        (Linear(0.25, 0.75), 8, [10, 10, 9, 8, 6, 5, 5, 5]),
        (OneShot(1.0), 3, [10, 10, 5]),
        (lambda position: 0.6 * position, 2, [8, 7]),  # 1.5 and 3 of 10
    ],
)
def test_follows_the_schedule_in_its_window(schedule, steps, seen):
    model = net()
    pruner = gradual(model, schedule=schedule)
    assert train(model, pruner, steps) == [[n] for n in seen]
    assert pruner.sparsity == pytest.approx(1 - seen[-1] / 10)
    assert pruner.channels == {"0.weight": (10, seen[-1])}
    assert model(X).shape == (8, 4)


def test_the_stream_of_a_transformer_goes_step_by_step_under_its_norms():
    torch.manual_seed(0)
    vit = Transformer(Design(reads="patches", token=True, fused=True))
    x, optimizer, seen = vit.inputs(4, 6), adam(vit), []
    with attach(optimizer, gradual(vit, example_inputs=x), total_steps=STEPS):
        for _ in range(STEPS):
            optimizer.zero_grad()
            vit(x).square().sum().backward()
            optimizer.step()
            norms = [m for m in vit.modules() if isinstance(m, nn.LayerNorm)]
            seen.append({(*norm.normalized_shape, dense_size(norm)) for norm in norms})
    # 1.5, 3, 4.5 and 6 of 12 channels; halves round to even
    assert seen == [{(10, 12)}, {(9, 12)}, {(8, 12)}, {(6, 12)}]


@pytest.mark.parametrize(
    ("max_updates", "changes"),
    # A straight line to 8 of 16 channels in 40 steps. All go at once where half of the survivors' way is gone: at 2^(-1/2) of
    # them, share 0.586. In two updates: the first at the same place (0.6 of 8 channels are 5), the end from 2^(-3/4) on, 0.811.
    [(1, {24: 8}), (2, {24: 11, 33: 8})],
)
def test_goes_at_most_max_updates_times(max_updates, changes):
    model = net(16)
    seen = [n for (n,) in train(model, gradual(model, max_updates=max_updates), 40)]
    assert {i + 1: n for i, n in enumerate(seen) if n != [16, *seen][i]} == changes


def test_is_exact_over_all_groups_together():
    model = deep()
    train(model, gradual(model, 0.5, "global"))
    assert sum(widths(model)) == 8  # of 10 + 6


def test_a_dict_gives_layers_their_own_ratio():
    model = deep()
    train(model, gradual(model, {"0": 0.5}))
    assert widths(model) == [5, 6]


def test_ignored_layers_stay():
    model = deep()
    train(model, gradual(model, ignored_layers=[model[0]]))
    assert widths(model) == [10, 3]


@pytest.mark.parametrize("context", ["local", "global"])
def test_nearly_all_leaves_a_channel_of_each_group(context):
    model = deep()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # min_keep
        train(model, gradual(model, 0.99, context))
    assert widths(model) == [1, 1]
    assert model(X).isfinite().all()


def test_the_lowest_go():
    model = net()
    with torch.no_grad():
        size = torch.tensor([3.0, 9, 1, 7, 5, 2, 8, 4, 10, 6])
        model[0].weight.copy_(size[:, None].expand(10, 6))
        model[2].weight.copy_(size.expand(4, 10))
    train(model, gradual(model), optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    assert model[0].weight[:, 0].tolist() == [9, 7, 8, 10, 6]


class Particular(nn.Module):
    """Its code wants ten features."""

    def __init__(self):
        super().__init__()
        self.net = deep()

    def forward(self, x):
        x = self.net[0](x)
        if x.shape[1] != 10:
            raise RuntimeError("ten")
        return self.net[1:](x)


def test_what_cannot_go_is_said_at_the_end():
    model = Particular()
    with pytest.warns(UserWarning, match="pruning_ratio was not reached: 1 of 2 groups keep more .*; net.0.weight: .*ten"):
        train(model, gradual(model))
    assert widths(model) == [10, 3]


def test_a_run_that_ends_early_as_completed_reaches_the_end():
    model = net()
    pruner, optimizer = gradual(model), adam(model)
    handle = attach(optimizer, pruner, total_steps=4)
    step(model, optimizer)
    handle.remove(completed=True)
    assert widths(model) == [5]


def test_a_run_that_fails_leaves_a_model_that_works():
    model = net()
    pruner, optimizer = gradual(model), adam(model)
    handle = attach(optimizer, pruner, total_steps=4)
    step(model, optimizer)
    handle.remove()  # as a `with` does when an exception goes by
    assert widths(model) == [9]
    assert model(X).isfinite().all()
    assert train(model, pruner) == [[9], [8], [6], [5]]


def test_a_second_run_does_not_compound():
    model = net()
    pruner = gradual(model)
    train(model, pruner)
    assert train(model, pruner) == [[5]] * 4
    assert pruner.channels == {"0.weight": (10, 5)}


@pytest.mark.parametrize("context", ["erk", "lamp"])
def test_other_contexts_share_the_ratio_out(context):
    model = deep()
    train(model, gradual(model, 0.5, context))
    assert sum(widths(model)) == 8  # of 10 + 6


def test_a_budget_is_gone_to_step_by_step():
    model = deep()
    dense = sum(p.numel() for p in model.parameters())
    seen = train(model, gradual(model, Budget(params=0.5), "global"))
    assert seen == sorted(seen, reverse=True)
    assert len({tuple(s) for s in seen}) > 1
    assert abs(sum(p.numel() for p in model.parameters()) / dense - 0.5) < 0.05  # these layers have few channels


@pytest.mark.parametrize(
    "criterion", ["taylor", "wanda", "movement", "large_init", "variety(taylor)", "variety(large_final, cosine, activations)"]
)
def test_criteria_that_need_more_than_the_weight(criterion):
    model = net()
    optimizer = adam(model)
    loop = Loop([gradual(model, criteria=criterion, schedule=OneShot(1.0))])
    batch = Batch((X,), (Y,))
    loop.start(Fit(2, model, optimizer, loss=nn.functional.cross_entropy, batch=batch))
    for _ in range(2):
        optimizer.zero_grad()
        loop.after_forward(batch)
        nn.functional.cross_entropy(model(X), Y).backward()
        loop.before_step()
        optimizer.step()
        loop.after_step()
    loop.end(completed=True)
    assert widths(model) == [5]


def test_a_removal_waits_while_all_gradients_are_zero():
    model = net()
    optimizer = adam(model)
    seen = []
    with attach(optimizer, gradual(model, criteria="taylor", schedule=OneShot(0.25)), total_steps=4):
        for i in range(4):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(X), Y) * (i > 0)).backward()
            optimizer.step()
            seen.append(widths(model))
    assert seen == [[10], [5], [5], [5]]


def test_the_model_is_exported_once(monkeypatch):
    model = net()
    pruner = gradual(model)
    train(model, pruner, until=2)
    monkeypatch.setattr("fasterai.prune.pruner.channel_graph", None)
    assert train(model, pruner) == [[8], [8], [6], [5]]


# --- the optimizer ------------------------------------------------------------------------------------------------------


def test_trains_on_as_a_small_network_built_by_hand():
    model, twin = net(), net()
    train(model, gradual(model, schedule=OneShot(0.5)), 4)
    dense = adam(twin)
    for i in range(2):
        step(twin, dense, i)
    w0, w2 = twin[0].weight.detach().numpy(), twin[2].weight.detach().numpy()
    # Magnitudes of what makes a channel and of what reads it, each averaged over its weights, then summed.
    score = np.abs(w0).mean(1) + np.abs(w2).mean(0)
    kept = torch.as_tensor(np.sort(np.argsort(score)[5:]))
    small = net(5)
    optimizer = adam(small)
    cuts = {0: lambda t: t[kept], 1: lambda t: t[kept], 2: lambda t: t[:, kept], 3: lambda t: t}
    for (i, cut), p, old in zip(cuts.items(), small.parameters(), twin.parameters(), strict=True):
        p.data = cut(old.data).clone()
        entry = dense.state[old]
        optimizer.state[p] = {k: v.clone() if k == "step" else cut(v).clone() for k, v in entry.items()}
        assert p.shape == list(model.parameters())[i].shape
    for i in (2, 3):
        step(small, optimizer, i)
    for ours, expected in zip(model.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_the_optimizer_holds_the_models_parameters_and_no_other():
    model = net()
    optimizer = adam(model)
    train(model, gradual(model), optimizer=optimizer)
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in model.parameters()]
    assert all(optimizer.state[p][k].shape == p.shape for p in model.parameters() for k in ("exp_avg", "exp_avg_sq"))


def test_an_optimizer_whose_state_cannot_be_cut_is_refused_before_the_run():
    model = net()
    with pytest.raises(ValueError, match="optimizer must keep a state for each parameter, got LBFGS"):
        attach(torch.optim.LBFGS(model.parameters()), gradual(model), total_steps=4)


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_optimizers_those_that_were_noted_go_on_too(first):
    model = deep()
    optimizers = [
        torch.optim.Adam([p for p in model.parameters() if (p.dim() == 2) == is_matrix]) for is_matrix in (True, False)
    ]
    note_optimizer(model, optimizers[1 - first])
    with attach(optimizers[first], gradual(model), total_steps=4):
        for _ in range(4):
            nn.functional.cross_entropy(model(X), Y).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert widths(model) == [5, 3]
    assert all(o.state[p]["exp_avg"].shape == p.shape for o in optimizers for p in o.param_groups[0]["params"])


def test_an_optimizer_of_another_model_is_refused():
    model = net()
    with pytest.raises(ValueError, match="optimizer must train the model that channels go from, got one that holds none"):
        attach(adam(net()), gradual(model), total_steps=4)


def test_frozen_layers_are_left_alone_until_they_train():
    model = deep()
    model[0].requires_grad_(False)
    pruner = gradual(model)
    assert train(model, pruner)[-1] == [10, 3]
    assert pruner.sparsity == 3 / 16
    model[0].requires_grad_(True)
    assert train(model, pruner)[-1] == [5, 3]
    assert pruner.channels == {"0.weight": (10, 5), "2.weight": (6, 3)}


def test_layers_that_begin_to_train_in_a_run_catch_up_with_the_schedule():
    model = deep()
    model[0].requires_grad_(False)
    pruner, seen = gradual(model), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with attach(optimizer, pruner, total_steps=8):
        for i in range(8):
            model[0].requires_grad_(i >= 2)
            step(model, optimizer, i)
            seen.append(widths(model))
    # A straight line to 5 of 10 and 3 of 6; the first layer trains from the third step on, and is looked at after it.
    assert seen == [[10, 6], [10, 5], [10, 5], [8, 4], [7, 4], [6, 4], [6, 3], [5, 3]]


def test_layers_that_train_in_turns_are_not_looked_at_at_each_step(monkeypatch):
    model, looks = deep(), []
    pruner = gradual(model)
    count = pruner._count
    monkeypatch.setattr(pruner, "_count", lambda frozen: (looks.append(frozen), count(frozen)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model[0].requires_grad_(False)
    with attach(optimizer, pruner, total_steps=6):
        for i in range(6):
            model[0].requires_grad_(i % 2 == 1)
            model[2].requires_grad_(i % 2 == 0)
            step(model, optimizer, i)
    assert looks == [["0"], []]


def test_a_budget_that_is_out_of_reach_while_layers_are_frozen_waits_for_them():
    model = deep()  # 164 parameters; 74 + 15 n with n of the second layer's 6 channels, 89 or 54 % at least
    pruner = gradual(model, Budget(params=0.5))
    model[0].requires_grad_(False)
    with pytest.warns(
        UserWarning, match=r"params=0.5 is out of reach while layers are frozen \(0\): no channels are removed until"
    ):
        assert train(model, pruner) == [[10, 6]] * 4
    model[0].requires_grad_(True)
    train(model, pruner)
    assert sum(p.numel() for p in model.parameters()) <= 82


def test_a_budget_within_reach_does_not_wait():
    model = deep()
    model[0].requires_grad_(False)
    assert train(model, gradual(model, Budget(params=0.7)))[-1] == [10, 2]  # 104 of 164; 3 channels would leave 119


def test_a_budget_out_of_reach_is_an_error_where_nothing_is_frozen():
    model = deep()
    with pytest.raises(ValueError, match=r"params must be at least 0\.104 for this model"):  # 17 of 164
        train(model, gradual(model, Budget(params=0.05)))


def test_a_run_in_which_every_layer_that_could_shrink_is_frozen_goes_by():
    model = net()
    model[0].requires_grad_(False)
    pruner = gradual(model)
    assert train(model, pruner) == [[10]] * 4
    assert pruner.sparsity == 0.0


# --- what it looks at ---------------------------------------------------------------------------------------------------


def test_inputs_are_taken_from_the_loops_batch():
    model = net()
    loop = Loop([pruner := gradual(model, example_inputs=None)])
    loop.start(Fit(2, model, adam(model), batch=Batch((X,), (Y,))))
    loop.end(completed=True)
    assert widths(model) == [5]
    assert pruner.sparsity == 0.5


def test_inputs_of_a_part_are_seen_in_a_pass_of_the_whole():
    whole = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), net_of_12 := nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)))
    whole.train()
    loop = Loop([gradual(net_of_12, example_inputs=None)])
    loop.start(Fit(2, whole, adam(whole), batch=Batch((X,), (Y,))))
    loop.end(completed=True)
    assert widths(whole) == [12, 4]
    assert whole.training


def test_a_loop_without_a_batch_needs_inputs():
    model = net()
    with pytest.raises(ValueError, match="example_inputs must be given for a loop that shows no batch, got None"):
        attach(adam(model), gradual(model, example_inputs=None), total_steps=4)


def test_a_model_that_cannot_be_followed_is_refused_before_the_first_step():
    model = Sloping(net())
    with pytest.raises(ValueError, match=r"model must be one that torch\.export can read"):
        attach(adam(model), gradual(model), total_steps=4)


# --- wrapped models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_in_place(model):
    model.compile()
    return model


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize(
    ("wrap", "what", "repair"),
    [
        (nn.parallel.DistributedDataParallel, "DistributedDataParallel", "before wrapping"),
        (sharded, "FSDP", "before it is sharded"),
        (torch.compile, "torch.compile", "compile the small one"),
        (compiled_in_place, "compiled in place", "compile it after the removal"),
        (lambda model: nn.Sequential(torch.compile(model)), "0, which is torch.compile", "compile the small one"),
    ],
)
def test_a_wrapped_model_is_refused(process_group, wrap, what, repair):
    wrapped = wrap(net())
    before = {n: p.shape for n, p in wrapped.named_parameters()}
    with pytest.raises(ValueError, match=f"model must be the bare network, got {what} .*{repair}"):
        attach(adam(wrapped), gradual(wrapped), total_steps=4)
    assert {n: p.shape for n, p in wrapped.named_parameters()} == before


def test_a_model_that_was_compiled_since_the_last_run_is_refused():
    model = net()
    pruner = gradual(model)
    train(model, pruner)
    model.compile()
    with pytest.raises(ValueError, match="model must be the bare network, got compiled in place"):
        attach(adam(model), pruner, total_steps=4)


def test_a_model_that_the_loop_has_wrapped_is_refused(process_group):
    model = net()
    with pytest.raises(ValueError, match="got DistributedDataParallel"):
        Loop([gradual(model)]).start(Fit(4, nn.parallel.DistributedDataParallel(model), adam(model)))


# --- copies -------------------------------------------------------------------------------------------------------------


class Ema(nn.Module):
    """A moving average as timm keeps it."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)

    def update(self, model):
        for mean, p in zip(self.module.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(p.data, 0.5)


def torchs(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return average, average.update_parameters


def ema(model):
    average = Ema(model)
    return average, average.update


@pytest.mark.parametrize("make", [torchs, ema])
@pytest.mark.parametrize("as_function", [False, True])
def test_copies_are_cut_alike(make, as_function):
    model = net()
    average, update = make(model)
    pruner, optimizer = gradual(model, copies=(lambda: [average]) if as_function else average), adam(model)
    dense = copy.deepcopy(average.module)
    with attach(optimizer, pruner, total_steps=4):
        for i in range(4):
            step(model, optimizer, i)
            update(model)
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    assert dense[0].weight.shape == (10, 6)
    assert average(X).shape == (8, 4) if make is torchs else average.module(X).shape == (8, 4)


def test_a_copy_keeps_its_own_values():
    model, other = net(), net(seed=5)
    kept_before = other[0].weight.detach().clone()
    pruner = gradual(model, copies=[other], schedule=OneShot(1.0))
    train(model, pruner)
    kept = pruner.plans[0].keep["0.weight", 0]
    assert torch.equal(other[0].weight, kept_before[kept])


def test_a_copy_of_another_structure_is_refused_before_the_run():
    model = net()
    with pytest.raises(
        ValueError, match=r"copies must be .*, got Sequential where 0.weight is \(9, 6\), in the model \(10, 6\)"
    ):
        attach(adam(model), gradual(model, copies=[net(9)]), total_steps=4)


def test_a_copy_that_changes_meanwhile_stops_the_run_before_the_model_is_cut():
    model = net()
    copies = [net()]
    pruner, optimizer = gradual(model, copies=lambda: copies), adam(model)
    attach(optimizer, pruner, total_steps=4)
    copies[0] = net(9)
    with pytest.raises(ValueError, match="copies must be"):
        step(model, optimizer)
    assert widths(model) == [10]


# --- saving and going on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "options"),
    [
        ([1], {}),
        ([1, 2, 3], {}),
        ([2, 3], {"criteria": "updating_movement"}),
        ([2, 3], {"criteria": "movement", "context": "global"}),
        ([2, 3], {"criteria": "variety(movement)", "context": "global"}),
        ([2], {"ratio": Budget(params=0.5), "context": "global"}),
        ([1, 3], {"ratio": 0.7, "context": "global", "make": deep}),  # first looks at two groups
        ([2, 3], {"ratio": 0.7, "context": "global", "make": deep, "criteria": "taylor"}),
    ],
)
def test_a_run_that_is_saved_and_gone_on_with_is_the_same_bit_for_bit(stops, options):
    options = dict(options)
    make = options.pop("make", net)
    whole = make()
    train(whole, gradual(whole, **options), 4)
    saved = None
    for start, stop in zip([0, *stops], [*stops, 4], strict=True):
        model = make() if saved is None or make is deep else net(seed=9)
        optimizer = adam(model)
        handle = attach(optimizer, gradual(model, **options), total_steps=4)
        if saved is not None:
            saved.seek(0)
            state = torch.load(saved, weights_only=True)
            before = repr(state["run"])
            handle.load_state_dict(state["run"])
            assert repr(state["run"]) == before
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        for i in range(start, stop):
            step(model, optimizer, i)
        saved = io.BytesIO()
        state = {"run": handle.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, saved)
        handle.remove(completed=stop == 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


HALVES = [0.5, {"embed": 0.5, "value": 0.5}, {"e*": 0.5, "query": 0.5}]


@pytest.mark.parametrize("ratio", HALVES, ids=["a number", "the name of a layer that went", "a glob"])
@pytest.mark.parametrize("early", [True, False])
def test_a_run_that_is_gone_on_with_leaves_groups_alone_that_the_last_head_makes(ratio, early):
    """The values of a head are summed over nothing else once it is the last, so they could go one by one."""
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))

    def go_on(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def begin(model):
        return gradual(model, ratio, example_inputs=x, round_to=1, criteria="updating_movement"), adam(model)

    torch.manual_seed(0)
    whole = Heads()
    fresh = copy.deepcopy(whole)
    pruner, optimizer = begin(whole)
    with attach(optimizer, pruner, total_steps=4) as run:
        go_on(whole, optimizer, 3)
        state = copy.deepcopy({"run": run.state_dict(), "model": whole.state_dict(), "optimizer": optimizer.state_dict()})
        assert pruner.channels == {"embed.weight": (8, 5), "query.weight": (2, 1)}
        go_on(whole, optimizer, 1)
    resumed, optimizer = begin(fresh)
    if early:  # as the Trainer of transformers does, which reads the weights before the run begins
        resumed.load_state_dict(state["run"]["participants"][resumed.name])
    with attach(optimizer, resumed, total_steps=4) as run:
        run.load_state_dict(state["run"])
        fresh.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        assert (resumed.channels, resumed.sparsity) == ({"embed.weight": (8, 5), "query.weight": (2, 1)}, 0.4)
        go_on(fresh, optimizer, 1)
    assert (resumed.channels, resumed.sparsity) == ({"embed.weight": (8, 4), "query.weight": (2, 1)}, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), whole.parameters(), strict=True))


def test_a_run_in_which_no_group_has_more_than_a_channel_left_is_gone_on_with():
    model = net(2)
    pruner = gradual(model)
    train(model, pruner)
    assert widths(model) == [1]
    again = gradual(net(2))
    again.load_state_dict(pruner.state_dict())
    train(again.model, again)
    assert (again.channels, again.sparsity) == ({"0.weight": (2, 1)}, 0.5)


def test_a_state_goes_into_the_model_that_it_is_of():
    model = net()
    pruner = gradual(model)
    train(model, pruner)
    before = [p.clone() for p in model.parameters()]
    pruner.load_state_dict(pruner.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {}, "state must be what GradualPruner.state_dict.. returned, got one without format, plans"),
        (lambda s: [], "state must be what GradualPruner.state_dict.. returned"),
        (lambda s: {**s, "format": "other"}, "state's format must be fasterai-gradual-1, got 'other'"),
    ],
)
def test_another_state_is_refused(spoil, message):
    model = net()
    pruner = gradual(model)
    train(model, pruner)
    fresh = gradual(net())
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(spoil(pruner.state_dict()))
    assert widths(fresh.model) == [10]


@pytest.mark.parametrize(("criterion", "part"), [("movement", "initial"), ("updating_movement", "previous")])
@pytest.mark.parametrize("gone", [1, 2])
def test_a_state_without_a_remembered_weight_is_refused_before_anything_goes(criterion, part, gone):
    model = net()
    pruner = gradual(model, criteria=criterion)
    with attach(adam(model), pruner, total_steps=4, model=model):
        state = pruner.state_dict()
        names = list(state["pruner"][part])[:gone]
        changed = {
            **state,
            "pruner": {**state["pruner"], part: {n: x for n, x in state["pruner"][part].items() if n not in names}},
        }
        with pytest.raises(ValueError, match=f"state's {part} weights must be those of all targets, .* without {names[0]}"):
            pruner.load_state_dict(changed)
        assert widths(model) == [10]
        pruner.load_state_dict(state)


@pytest.mark.parametrize("other", [net(7), net(4), deep()])
def test_a_state_of_another_model_is_refused(other):
    model = net()
    pruner = gradual(model)
    train(model, pruner)
    before = widths(other)
    with pytest.raises(ValueError, match=r"state must be of this model as it was before .*; build the model anew"):
        gradual(other).load_state_dict(pruner.state_dict())
    assert widths(other) == before


class Refusing(Participant):
    def load_state_dict(self, state):
        if state.get("bad"):
            raise ValueError("refused")


def test_a_state_that_another_participant_refuses_leaves_the_model_as_it_was():
    model, other = net(), net()
    pruner = gradual(model)
    train(model, pruner)
    average = copy.deepcopy(other)
    loop = Loop([gradual(other, copies=average), Refusing()])
    loop.start(Fit(4, other, adam(other), batch=Batch((X,))))
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match="refused"):
        loop.load_state_dict({"step": 4, "participants": [pruner.state_dict(), {"bad": True}]})
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), before, strict=True))
    assert widths(average) == [10]
    loop.end(completed=True)
    assert widths(other) == widths(average) == [5]


def test_what_was_taken_out_stays_out_once_the_run_has_gone_on():
    model, other = net(), net()
    pruner, fresh = gradual(model), gradual(other)
    train(model, pruner)
    optimizer = adam(other)
    attach(optimizer, fresh, total_steps=4)
    dense = fresh.state_dict()
    fresh.load_state_dict(pruner.state_dict())
    step(other, optimizer)
    with pytest.raises(ValueError, match="build the model anew"):
        fresh.load_state_dict(dense)
    assert widths(other) == [5]


def test_copies_and_pickles_go_on():
    model = net()
    pruner = gradual(model)
    assert train(model, pruner, until=2) == [[9], [8]]
    for twin in (copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))):
        assert twin.sparsity == 0.2
        assert twin.model is not model
        assert train(twin.model, twin) == [[8], [8], [6], [5]]
    assert widths(model) == [8]


# --- arguments ----------------------------------------------------------------------------------------------------------


def dense_sparse_dense(position):
    return 1 - abs(2 * position - 1)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((1.5, "local", "large_final"), {}, ValueError, r"pruning_ratio must be in \[0, 1\], got 1.5"),
        (("0.5", "local", "large_final"), {}, TypeError, r"pruning_ratio must be a number in \[0, 1\], got '0.5'"),
        (({"0": 50}, "local", "large_final"), {}, ValueError, r"pruning_ratio must be in \[0, 1\], got 50; pass 0.5"),
        (({"0": 0.5}, "global", "large_final"), {}, ValueError, "pruning_ratio must be one number for .*, got a dict"),
        ((0.5, "two_four", "large_final"), {}, ValueError, "context must be 'local', .*, got 'two_four'"),
        ((0.5, "locl", "large_final"), {}, ValueError, "context must be .*, got 'locl'; did you mean 'local'"),
        ((0.5, "local", "large"), {}, ValueError, "criteria must be .*, got 'large'"),
        ((0.5, "local", "large_final", "dsd"), {}, ValueError, "schedule must never fall, .*, got DSD.*pass one that rises"),
        ((0.5, "local", "large_final", dense_sparse_dense), {}, ValueError, "schedule must never fall, .* at position 0.501"),
        ((0.5, "local", "large_final", Piecewise(((0.0, 0.5), (1.0, 0.4)))), {}, ValueError, "schedule must never fall"),
        ((0.5, "local", "large_final", lambda p: 2 * p), {}, ValueError, "what the schedule returns must be in"),
        ((0.5, "local", "large_final", "lni"), {}, ValueError, "schedule must be .*, got 'lni'"),
        ((0.5, "local", "large_final", 3), {}, TypeError, "schedule must be a schedule, its name, or .*, got 3"),
        ((0.5, "local", "large_final", lin, "0"), {}, TypeError, "ignored_layers must be several modules or names, got '0'"),
        ((0.5, "local", "large_final", lin, nn.ReLU()), {}, TypeError, "ignored_layers must be several .*, got ReLU"),
        ((0.5, "local", "large_final"), {"max_updates": 0}, ValueError, "max_updates must be at least 1, got 0"),
        ((0.5, "local", "large_final"), {"round_to": 0}, ValueError, "round_to must be at least 1, got 0"),
        ((0.5, "local", "large_final"), {"over_places": "min"}, ValueError, "over_places must be .*, got 'min'"),
        ((0.5, "local", "large_final"), {"iterative_steps": 3}, TypeError, "iterative_steps must be left out, .*max_updates="),
        ((0.5, "local", "large_final"), {"granularity": "filter"}, TypeError, "options must be of .*, got 'granularity'"),
        ((0.5, "local", "large_final"), {"copies": 3}, TypeError, "copies must be modules .*, got 3"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, options, error, message):
    with pytest.raises(error, match=message):
        GradualPruner(net(), *arguments, **options)


def test_an_unknown_ignored_layer_is_refused_before_the_first_step():
    model = net()
    with pytest.raises(ValueError, match=r"ignored_layers must be modules of the model or their names, .*, got 'body'"):
        attach(adam(model), gradual(model, ignored_layers=["body"]), total_steps=4)


def test_a_function_that_gives_no_modules_is_refused_before_the_first_step():
    model = net()
    with pytest.raises(TypeError, match=r"copies must give modules of the model's structure, got 3 \(int\)"):
        attach(adam(model), gradual(model, copies=lambda: 3), total_steps=4)


@pytest.mark.parametrize("schedule", [agp, cos])
def test_a_sparsifier_in_the_same_run_is_no_hindrance(schedule):
    model = net()
    optimizer = adam(model)
    sparsifier = Sparsifier(model, "weight", "local", "large_final", sparsity=0.5, schedule=schedule)
    with attach(optimizer, gradual(model, schedule=schedule), sparsifier, total_steps=4):
        for i in range(4):
            step(model, optimizer, i)
    assert widths(model) == [5]


def test_a_model_without_parameters_is_refused():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Buffer(torch.ones(6))

        def forward(self, x):
            return x * self.scale

    with pytest.raises(ValueError, match="model must have channels that can be removed, got none"):
        gradual(Bare()).on_fit_start(Fit(4))


def test_what_another_has_taken_out_in_the_same_run_is_counted():
    model = net()
    one, other = gradual(model), gradual(model, 0.3)
    optimizer = adam(model)
    with attach(optimizer, one, other, total_steps=STEPS):
        for i in range(STEPS):
            step(model, optimizer, i)
    assert widths(model) == [5]
    assert one.channels == other.channels == {"0.weight": (10, 5)}
