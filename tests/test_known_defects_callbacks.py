"""A case for each known defect of sparsity callbacks elsewhere, D-C1 to D-C14.

D-C13, a pruner beside a sparsifier, is in test_known_defects_prune.py.
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from fastai.callback.all import Callback, SaveModelCallback, sched_exp
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.callbacks.fastai import HoldCallback, SparsifyCallback
from fasterai.callbacks.plain import attach
from fasterai.core.schedules import Schedule, cos, iterative, one_cycle, one_shot, sched_iterative, sched_oneshot
from fasterai.sparse.sparsifier import Sparsifier


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.PReLU(), nn.Linear(10, 4))


def learner(path, model: nn.Module | None = None, batches: int = 4, **options) -> Learner:
    g = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(8 * batches, 6, generator=g), torch.randint(4, (8 * batches,), generator=g))
    dls = DataLoaders(*(TfmdDL(data, bs=8, num_workers=0) for _ in range(2)), device="cpu")
    learn = Learner(dls, net() if model is None else model, loss_func=CrossEntropyLossFlat(), path=path, **options)
    if hasattr(learn, "progress"):
        learn.remove_cb(learn.progress)
    learn.logger = lambda log: None
    return learn


def sparsify(sparsity=0.5, criteria="large_final", schedule=one_cycle, granularity="weight", **options) -> SparsifyCallback:
    return SparsifyCallback(sparsity, granularity, "local", criteria, schedule, **options)


def zeros(model: nn.Module) -> list[int]:
    return [int((p == 0).sum()) for p in model.parameters() if p.dim() > 1]


class Steps(Callback):
    order = 90

    def __init__(self):
        self.seen = []

    def after_step(self):
        self.seen.append(zeros(self.learn.model))


class Interrupts(Callback):
    def before_validate(self):
        raise KeyboardInterrupt


def test_c1_save_model_callback_and_saving_within_a_fit(tmp_path):
    class Saves(Callback):
        def after_batch(self):
            self.learn.save("within")

    learn = learner(tmp_path)
    learn.save("dense")
    learn.fit(2, 1e-3, cbs=[sparsify(), SaveModelCallback(fname="b"), Saves()])
    learner(tmp_path).load("within").load("b", with_opt=False)
    dense, sparse = (torch.load(tmp_path / "models" / f"{n}.pth", weights_only=False) for n in ("dense", "b"))
    assert list(sparse) == list(dense.get("model", dense))


def test_c2_lr_find_with_the_callback_attached(tmp_path):
    learn = learner(tmp_path, cbs=sparsify())
    before = copy.deepcopy(learn.model.state_dict())
    learn.lr_find(num_it=10, show_plot=False)
    assert all(torch.equal(before[n], x) for n, x in learn.model.state_dict().items())


@pytest.mark.parametrize("attached", ["cbs", "learner"])
def test_c3_after_an_interrupt_nothing_is_left_and_loaded_weights_stay(tmp_path, attached):
    learn, callback = learner(tmp_path), sparsify(0.68, schedule=lambda p: p)
    clean = copy.deepcopy(learn.model.state_dict())
    if attached == "learner":
        learn.add_cb(callback)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=[Interrupts()] if attached == "learner" else [callback, Interrupts()])
    assert zeros(learn.model) == [41, 27]
    assert list(learn.model.state_dict()) == list(clean)
    learn.model.load_state_dict(clean)
    steps = Steps()
    if attached == "learner":
        learn.remove_cb(callback)
    learn.fit(1, cbs=[sparsify(0.25, schedule=lambda p: p), steps])
    assert steps.seen == [[4, 2], [8, 5], [11, 8], [15, 10]]  # halves round to even


def test_c3_the_same_callback_starts_anew_on_loaded_weights(tmp_path):
    learn, callback, steps = learner(tmp_path), sparsify(0.5, schedule=lambda p: p), Steps()
    clean = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=[callback, Interrupts()])
    learn.model.load_state_dict(clean)
    learn.fit(1, cbs=[callback, steps])
    assert steps.seen == [[8, 5], [15, 10], [22, 15], [30, 20]]


def test_c4_validation_runs_nothing_of_ours(tmp_path, capsys):
    learn = learner(tmp_path, cbs=sparsify(lth=True, reset_end=True, save_tickets=True))
    learn.model[1].running_mean.fill_(3.0)
    first, second = learn.validate(), learn.validate()
    learn.get_preds()
    assert list(first) == list(second) and torch.equal(learn.model[1].running_mean, torch.full((10,), 3.0))
    assert not list(tmp_path.rglob("winning_ticket*"))
    assert capsys.readouterr().out == ""


def test_c5_fine_tune_does_not_fall_back_and_leaves_frozen_weights(tmp_path):
    def splitter(model):
        return [list(model[0].parameters()), list(model[1:].parameters())]

    learn, steps = learner(tmp_path, splitter=splitter), Steps()
    learn.fine_tune(1, cbs=[sparsify(), steps])
    frozen, unfrozen = steps.seen[:4], steps.seen[4:]
    assert all(first == 0 for first, _ in frozen) and frozen[-1][1] == 20
    assert all(second == 20 for _, second in unfrozen)
    assert unfrozen[-1] == [30, 20]


def test_c6_the_sparsity_can_be_held_and_baked_in(tmp_path):
    learn, callback, steps = learner(tmp_path), sparsify(), Steps()
    learn.fit(1, cbs=callback)
    learn.fit(1, cbs=[HoldCallback(callback.sparsifier), steps])
    assert steps.seen == [[30, 20]] * 4
    optimizer = torch.optim.SGD(learn.model.parameters(), lr=0.1, momentum=0.9)
    handle = callback.sparsifier.hold(optimizer)
    for _ in range(2):
        learn.model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
    assert zeros(learn.model) == [30, 20]
    handle.remove()
    callback.sparsifier.finalize()
    assert zeros(learn.model) == [30, 20]


def test_c7_no_copies_of_weights_on_the_model_after_a_fit(tmp_path):
    learn = learner(tmp_path)
    keys = list(learn.model.state_dict())
    learn.fit(1, cbs=sparsify(criteria="updating_movement"))
    assert list(learn.model.state_dict()) == keys
    learn.fit(1, cbs=sparsify(criteria="updating_movement"))
    assert zeros(learn.model) == [30, 20]


def test_c8_rewinding_takes_all_back_statistics_and_the_optimizer_too(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.raw = net(), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.inner(x) * self.raw

    learn = learner(tmp_path, Scaled())
    with torch.no_grad():
        learn.model.inner[1].running_mean.fill_(3.0)
        learn.model.inner[1].weight.fill_(2.0)
    initial, states = copy.deepcopy(learn.model.state_dict()), []

    class Notes(Callback):
        order = 90

        def after_step(self):
            states.append(copy.deepcopy(self.learn.model.state_dict()))

    callback = sparsify(schedule=one_shot, lth=True)
    learn.fit(2, 0.1, cbs=[callback, Notes()])
    assert states[2]["raw"].ne(1).any() and states[2]["inner.1.running_mean"].ne(3.0).any()
    for name, value in states[3].items():  # at half of the run the masks move
        assert torch.equal(value, initial[name] * callback.sparsifier.masks.get(name, 1)), name


def test_c8_the_optimizers_moments_are_cleared(tmp_path):
    learn, moments = learner(tmp_path), []

    class Notes(Callback):
        order = 90

        def after_step(self):
            state = [self.learn.opt.state[p] for p in self.learn.model.parameters()]
            moments.append(sum("grad_avg" in s and bool(s["grad_avg"].any()) for s in state))

    learn.fit(2, cbs=[sparsify(schedule=one_shot, lth=True), Notes()])
    assert moments[2] > 0 and moments[3] == 0 and moments[4] > 0


def test_c9_tickets_of_models_with_embedding_prelu_and_norms_without_bias(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(5, 6), nn.RMSNorm(6), nn.Sequential(nn.PReLU(), nn.Linear(6, 4))

        def forward(self, x):
            return self.head(self.norm(x + self.table.weight.sum(0)))

    learn = learner(tmp_path, Odd())
    learn.fit(2, cbs=sparsify(schedule=one_shot, lth=True, reset_end=True, save_tickets=True))
    assert int((learn.model.head[1].weight == 0).sum()) == 12
    assert len(list(tmp_path.rglob("winning_ticket*"))) == 1


def test_c10_a_continuous_schedule_with_tickets_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"lth rewinds the weights at every move.*use a schedule with few moves"):
        learner(tmp_path).fit(2, cbs=sparsify(schedule=cos, lth=True))


@pytest.mark.filterwarnings("ignore:lth rewinds")
def test_c11_tickets_hold_what_their_name_says_as_plain_weights_in_the_models_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = learner(tmp_path / "run")
    learn.fit(3, cbs=sparsify(0.6, schedule=Schedule(sched_iterative), lth=True, save_tickets=True))
    tickets = sorted((tmp_path / "run" / "models").iterdir())
    assert [t.name for t in tickets] == [f"winning_ticket_0.{n}000.pt" for n in (2, 4, 6)]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    for ticket, counts in zip(tickets, ([12, 8], [24, 16], [36, 24]), strict=True):
        model = net()
        model.load_state_dict(torch.load(ticket, weights_only=True))
        assert zeros(model) == counts


def falling(start: float, end: float, position: float) -> float:
    return start + (end - start) * position


@pytest.mark.parametrize(
    "schedule",
    [
        one_shot,
        Schedule(sched_oneshot, start_pct=0.0),
        Schedule(falling, start_val=1.0, end_val=1.0),
        [Schedule(falling, 0.0, 0.5, 0.0, 0.5), Schedule(falling, 0.5, 1.0, 0.5, 1.0)],
        Schedule(sched_exp, start_val=0.1),
        lambda position: position**2,
        partial(iterative, n_steps=5),
        iterative,
    ],
    ids=["one_shot", "oneshot at once", "constant", "phases", "sched_exp", "function", "partial", "iterative"],
)
@pytest.mark.parametrize("batches", [1, 4])
def test_c12_all_kinds_of_schedules_end_at_the_target(tmp_path, schedule, batches):
    learn = learner(tmp_path, batches=batches)
    learn.fit(1, cbs=sparsify(schedule=schedule))
    assert zeros(learn.model) == [30, 20]


def test_c12_a_window_the_wrong_way_round_is_an_error():
    with pytest.raises(ValueError, match="start_pct"):
        Schedule(falling, start_pct=0.6, end_pct=0.5)


def test_c12_a_shared_schedule_moves_the_masks_no_more_often(tmp_path):
    schedule, moves = Schedule(sched_iterative), []
    for _ in range(2):
        learn, callback = learner(tmp_path), sparsify(schedule=schedule)
        learn.fit(3, cbs=callback)
        schedule(1.0)
        moves.append(callback.sparsifier.moves)
    assert moves == [3, 3]


def test_c14_the_sparsity_is_recorded_and_the_average_is_weighted(tmp_path, capsys):
    torch.manual_seed(0)
    learn = learner(tmp_path, nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4)))
    callback = sparsify({"0": 0.8, "1": 0.2})
    learn.fit(1, cbs=callback)
    assert learn.recorder.metric_names[-2] == "sparsity"
    # 48 of 60 and 8 of 40: 0.56, not the mean 0.5 of the two shares
    assert learn.recorder.values[-1][-1] == pytest.approx(0.56)
    assert callback.current_sparsity == pytest.approx(0.56)
    assert capsys.readouterr().out == ""


def test_c14_moments_of_pruned_weights_do_not_bring_them_back(tmp_path):
    learn, callback, steps = learner(tmp_path), sparsify(schedule=Schedule(sched_oneshot, start_pct=0.0)), Steps()
    learn.fit(3, 0.1, cbs=[callback, steps])
    assert steps.seen == [[30, 20]] * 12


def test_no_defect_in_a_loop_of_ones_own_either():
    model = net()
    keys = list(model.state_dict())
    sparsifier = Sparsifier(model, "weight", "local", "updating_movement", sparsity=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with attach(optimizer, sparsifier, total_steps=4):
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
            assert list(model.state_dict()) == keys
            pickle.loads(pickle.dumps(model))
    assert zeros(model) == [30, 20]
