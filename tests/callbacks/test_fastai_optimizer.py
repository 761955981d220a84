"""A learner that gets a new optimizer in the middle of a fit, as `learn.export` makes one."""

from __future__ import annotations

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.callbacks.fastai import ParticipantCallback
from fasterai.core.loop import Participant


class Rows(TensorDataset):
    def new_empty(self):
        return self


class Trains(Participant):
    def on_setup(self, model):
        self.own = nn.Parameter(torch.zeros(3))
        return [self.own]

    def after_loss(self, loss, batch):
        return loss + (self.own - 1).square().sum()


class Exports(Callback):
    def after_epoch(self):
        if self.epoch == 0:
            self.learn.export("middle.pkl")


@pytest.mark.filterwarnings("ignore")
def test_a_learner_that_is_exported_in_the_middle_of_a_fit_goes_on_training_all(tmp_path):
    ends = []
    for callbacks in ([], [Exports()]):
        torch.manual_seed(0)
        rows = Rows(torch.randn(32, 6), torch.arange(32) % 3)
        loaders = DataLoaders(TfmdDL(rows, bs=8, num_workers=0), TfmdDL(rows, bs=8, num_workers=0))
        learn = Learner(loaders, nn.Linear(6, 3), loss_func=CrossEntropyLossFlat(), lr=0.01, path=tmp_path)
        trains = Trains()
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, cbs=[ParticipantCallback(trains), *callbacks])
        assert [len(group) for group in learn.opt.param_lists] == [2] and "state_dict" not in vars(learn.opt)
        ends.append(trains.own.detach())
    assert torch.equal(*ends) and ends[0].min() > 0
