"""A sparsifier's state travels beside fastai's checkpoints by itself, and a resumed fit ends with the same bits."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from fastai.callback.all import SaveModelCallback
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.callbacks.fastai import ParticipantCallback, SparsifyCallback
from fasterai.callbacks.fastai_files import END, Saving
from fasterai.core.loop import Participant
from fasterai.core.schedules import agp, cos, dsd, iterative, lin, one_cycle, one_shot

EPOCHS, BATCHES = 4, 4


def silent(log) -> None:
    pass


def learner(path: Path, seed: int = 0, batches: int = BATCHES) -> Learner:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(8 * batches, 6, generator=g), torch.randint(4, (8 * batches,), generator=g)
    train, valid = (TfmdDL(TensorDataset(x, y), bs=8, shuffle=False, num_workers=0) for _ in range(2))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4))
    loss = CrossEntropyLossFlat()
    learn = Learner(DataLoaders(train, valid, device="cpu"), model, loss_func=loss, opt_func=Adam, path=path, lr=0.01)
    if hasattr(learn, "progress"):
        learn.remove_cb(learn.progress)
    learn.logger = silent
    return learn


def sparsify(schedule=one_cycle, criteria="movement", sparsity: float = 0.7, **options) -> SparsifyCallback:
    return SparsifyCallback(sparsity, options.pop("granularity", "weight"), "local", criteria, schedule, **options)


def saves(**options) -> SaveModelCallback:
    return SaveModelCallback(**{"every_epoch": True, "with_opt": True, **options})


class Stops(Callback):
    """Raises at the end of an epoch, after everything else."""

    order = 99

    def __init__(self, epoch: int):
        self.at = epoch

    def after_epoch(self):
        if self.epoch == self.at:
            raise KeyboardInterrupt


def interrupted(path: Path, callbacks, *, at: int = 1, saving=None, **options) -> Learner:
    learn = learner(path, **options)
    with pytest.raises(KeyboardInterrupt):
        learn.fit_one_cycle(EPOCHS, cbs=[*callbacks, saving or saves(), Stops(at)])
    return learn


def resumed(path: Path, callbacks, *, at: int = 1, name: str = "", start_epoch: int | None = None, **options) -> Learner:
    learn = learner(path, seed=7, **options)
    learn.create_opt()
    learn.load(name or f"model_{at}", with_opt=True)
    learn.fit_one_cycle(EPOCHS, cbs=callbacks, start_epoch=at + 1 if start_epoch is None else start_epoch)
    return learn


def same(one: Learner, other: Learner) -> bool:
    a, b = one.model.state_dict(), other.model.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def zeros(learn: Learner) -> list[int]:
    return [int((p == 0).sum()) for p in learn.model.parameters() if p.dim() > 1]


@pytest.mark.parametrize("schedule", [one_shot, iterative, agp, one_cycle, cos, lin, dsd], ids=str)
@pytest.mark.parametrize("criteria", ["movement", "large_final"])
def test_a_resumed_fit_ends_with_the_same_bits(tmp_path, schedule, criteria):
    whole = learner(tmp_path / "whole")
    whole.fit_one_cycle(EPOCHS, cbs=sparsify(schedule, criteria))
    for at in (0, 1, 2):
        callback = sparsify(schedule, criteria)
        interrupted(tmp_path / f"{at}", [sparsify(schedule, criteria)], at=at)
        again = resumed(tmp_path / f"{at}", callback, at=at)
        assert same(whole, again), at
        assert callback.sparsifier is not None
        assert zeros(again) == zeros(whole)
        assert zeros(whole) == [42, 28] or schedule is dsd  # which ends near none


@pytest.mark.parametrize("criteria", ["updating_movement", "snip", "wanda", "random"])
@pytest.mark.parametrize("granularity", ["weight", "row"])
def test_so_does_one_of_a_criterion_with_evidence_of_its_own(tmp_path, criteria, granularity):
    options = {"criteria": criteria, "granularity": granularity}
    whole = learner(tmp_path / "whole")
    torch.manual_seed(3)
    whole.fit_one_cycle(EPOCHS, cbs=sparsify(**options))
    torch.manual_seed(3)
    interrupted(tmp_path, [sparsify(**options)])
    again = resumed(tmp_path, sparsify(**options))
    assert zeros(again) == zeros(whole)
    if criteria != "random":  # fastai does not save the state of torch's generator
        assert same(whole, again)


def test_stopped_twice_and_saved_again_while_epochs_are_skipped(tmp_path):
    whole = learner(tmp_path / "whole")
    whole.fit_one_cycle(EPOCHS, cbs=sparsify())
    interrupted(tmp_path, [sparsify()], at=0)
    learn = learner(tmp_path, seed=7)
    learn.create_opt()
    learn.load("model_0", with_opt=True)
    with pytest.raises(KeyboardInterrupt):
        learn.fit_one_cycle(EPOCHS, cbs=[sparsify(), saves(), Stops(2)], start_epoch=1)
    assert same(whole, resumed(tmp_path, [sparsify(), saves()], at=2))


class Noted(Participant):
    """Counts its steps."""

    def __init__(self):
        self.steps = 0

    @property
    def name(self):
        return "noted"

    def after_step(self, position):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Other(Noted):
    @property
    def name(self):
        return "other"


def test_callbacks_of_one_kind_keep_their_own_states(tmp_path):
    ones = [Noted(), Noted(), Other()]
    ones[1].steps = 100
    interrupted(tmp_path, [sparsify(), *map(ParticipantCallback, ones)])
    state = torch.load(tmp_path / "models" / f"model_1{END}", weights_only=True)["states"]
    assert list(state) == [
        "SparsifyCallback",
        "ParticipantCallback(noted)",
        "ParticipantCallback(noted):2",
        "ParticipantCallback(other)",
    ]
    again = [Noted(), Noted(), Other()]
    resumed(tmp_path, [sparsify(), *map(ParticipantCallback, again)])
    assert [one.steps for one in again] == [16, 116, 16]


def test_what_the_learner_had_is_given_back(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1, cbs=sparsify())
    assert "save" not in vars(learn)
    interrupted(tmp_path, [sparsify(), ParticipantCallback(Noted())])
    own = []
    learn.save = lambda file, **options: own.append(file)
    learn.fit(1, cbs=[sparsify(), ParticipantCallback(Noted())])
    learn.save("mine")
    assert own == ["mine"]
    assert not isinstance(learn.save, Saving)


def test_a_learner_with_the_callback_inside_is_copied_pickled_and_saved_after_an_interruption(tmp_path):
    learn = learner(tmp_path)
    learn.add_cb(sparsify())
    with pytest.raises(KeyboardInterrupt):
        learn.fit_one_cycle(EPOCHS, cbs=Stops(1))
    for twin in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        twin.save("paused", with_opt=True)
        whole = learner(tmp_path / "whole")
        whole.fit_one_cycle(EPOCHS, cbs=sparsify())
        assert same(whole, resumed(tmp_path, sparsify(), name="paused"))


def test_after_a_fit_nothing_is_written_and_the_checkpoint_is_fastais_own(tmp_path):
    learn = learner(tmp_path)
    learn.fit(1, cbs=[sparsify(), saves()])
    learn.save("after")
    names = sorted(path.name for path in (tmp_path / "models").iterdir())
    assert names == ["after.pth", f"model_0{END}", "model_0.pth"]
    assert set(torch.load(tmp_path / "models" / "model_0.pth", weights_only=False)) == {"model", "opt"}


def test_a_best_model_that_is_put_back_has_its_states(tmp_path):
    interrupted(tmp_path, [sparsify()], at=2, saving=saves(every_epoch=False, fname="best", monitor="train_loss"))
    best = torch.load(tmp_path / "models" / f"best{END}", weights_only=True)
    at = best["states"]["SparsifyCallback"]["step"] // BATCHES - 1
    whole = learner(tmp_path / "whole")
    whole.fit_one_cycle(EPOCHS, cbs=sparsify())
    assert same(whole, resumed(tmp_path, sparsify(), at=at, name="best"))


# --- states that do not belong ------------------------------------------------------------------------------------------


def test_a_wrong_start_epoch_is_refused_before_anything_changes(tmp_path):
    interrupted(tmp_path, [sparsify()])
    learn = learner(tmp_path)
    learn.load("model_1")
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match=rf"start_epoch must be 2 for the weights in the learner, .*model_1{END} holds, got 3"):
        learn.fit(EPOCHS, cbs=sparsify(), start_epoch=3)
    assert all(torch.equal(before[name], x) for name, x in learn.model.state_dict().items())
    learn.fit(EPOCHS, cbs=sparsify(), start_epoch=2)
    assert zeros(learn) == [42, 28]


def test_batches_of_another_size_are_named_and_not_the_epoch(tmp_path):
    interrupted(tmp_path, [sparsify()])
    learn = learner(tmp_path, batches=2 * BATCHES)
    learn.load("model_1")
    wanted = rf"which had 4 an epoch, got 8: .*model_1{END} is of step 8, the end of epoch 2"
    with pytest.raises(ValueError, match=wanted):
        learn.fit(EPOCHS, cbs=sparsify(), start_epoch=2)


def test_a_file_that_does_not_say_how_long_an_epoch_was_leaves_the_doubt(tmp_path):
    interrupted(tmp_path, [sparsify()])
    file = next(tmp_path.rglob(f"model_1{END}"))
    content = torch.load(file, weights_only=True)
    del content["states"]["SparsifyCallback"]["steps_per_epoch"]
    torch.save(content, file)
    learn = learner(tmp_path, batches=2 * BATCHES)
    learn.load("model_1")
    with pytest.raises(ValueError, match=r"must be 1 for .* got 2, if the batch size is that of before: it is of step 8, and"):
        learn.fit(EPOCHS, cbs=sparsify(), start_epoch=2)


def test_states_of_other_weights_are_left_where_they_are(tmp_path):
    interrupted(tmp_path, [sparsify()])
    learn = learner(tmp_path, seed=5)
    callback = sparsify()
    with pytest.warns(UserWarning, match="none of the 2 files of states in .*models is of the weights in the learner"):
        learn.fit(EPOCHS, cbs=callback, start_epoch=2)
    assert zeros(learn) == [42, 28]


def test_a_named_checkpoint_must_be_that_of_the_weights(tmp_path):
    interrupted(tmp_path, [sparsify()])
    (tmp_path / "elsewhere").mkdir()
    for file in (tmp_path / "models").glob("model_1*"):
        shutil.move(file, tmp_path / "elsewhere")
    whole = learner(tmp_path / "whole")
    whole.fit_one_cycle(EPOCHS, cbs=sparsify())
    callback = sparsify()
    callback.resume_from = "model_0"
    with pytest.raises(ValueError, match=r"resume_from must be .*, got 'model_0': .*model_0\S+ is of others"):
        resumed(tmp_path, callback, name=str(tmp_path / "elsewhere" / "model_1"))
    callback.resume_from = "model_5"
    with pytest.raises(ValueError, match=r"resume_from must be .*, got 'model_5': .*model_5\S+ is not there"):
        resumed(tmp_path, callback, name=str(tmp_path / "elsewhere" / "model_1"))
    callback.resume_from = tmp_path / "elsewhere" / "model_1"
    assert same(whole, resumed(tmp_path, callback, name=str(tmp_path / "elsewhere" / "model_1")))


@pytest.mark.parametrize("content", [b"", b"broken", None])
def test_files_that_are_none_are_passed_over(tmp_path, content):
    interrupted(tmp_path, [sparsify()])
    path = tmp_path / "models" / f"model_1{END}"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    torch.save({"format": 1}, tmp_path / "models" / f"a{END}")
    with pytest.warns(UserWarning, match="none of the 3 files of states"):
        resumed(tmp_path, sparsify())
    interrupted(tmp_path, [sparsify()])
    whole = learner(tmp_path / "whole")
    whole.fit_one_cycle(EPOCHS, cbs=sparsify())
    assert same(whole, resumed(tmp_path, sparsify()))


def test_states_of_another_network_are_refused_and_of_another_callback_told(tmp_path):
    interrupted(tmp_path, [sparsify()])
    with pytest.warns(UserWarning, match=r"holds SparsifyCallback, and no ParticipantCallback\(noted\), which begins afresh"):
        resumed(tmp_path, [sparsify(), ParticipantCallback(Noted())])
    with pytest.raises(ValueError, match=r"state must be of granularity .*row.*, got .*weight"):
        resumed(tmp_path, sparsify(granularity="row"))


def test_a_state_that_was_loaded_by_hand_goes_first(tmp_path):
    interrupted(tmp_path, [sparsify()])
    state = torch.load(tmp_path / "models" / f"model_1{END}", weights_only=True)["states"]["SparsifyCallback"]
    (tmp_path / "models" / f"model_1{END}").unlink()
    callback = sparsify()
    callback.load_state_dict(state)
    whole = learner(tmp_path / "whole")
    whole.fit_one_cycle(EPOCHS, cbs=sparsify())
    assert same(whole, resumed(tmp_path, callback))
