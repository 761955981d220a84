"""Pools by granularity: what inputs have to show, and that a further granularity is one more maker."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fasterai.core.granularities import Block, Coupled, Granularity, Keep, filter, weight
from fasterai.core.loop import Batch, Fit, Loop
from fasterai.model.targets import find_targets
from fasterai.sparse.record import MaskRecord
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.channel_pools import ChannelPool
from fasterai.units.making import ChannelMaker, TargetMaker, maker_of
from fasterai.units.target_pools import TargetPool

X = torch.ones(2, 3, 8, 8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(80, 2))


def selection_of(model, coarse=True):
    return find_targets(model, fits=lambda t: None, coarse=coarse)


@pytest.mark.parametrize("granularity", [weight, filter, Block(2, 2), Keep("in")])
def test_each_target_is_a_pool_and_no_inputs_are_needed(granularity):
    model, maker = net(), maker_of(granularity)
    selection, pools = maker.make(model, selection_of(model))
    assert [p.name for p in pools] == [t.name for t in selection.targets] == ["0.weight", "3.weight"]
    assert all(isinstance(p, TargetPool) for p in pools)
    assert not maker.needs_inputs
    assert not maker.is_seen
    maker.check_seen()


def test_inputs_show_norms_that_read_a_filter():
    model, maker = net(), maker_of(filter)
    assert [n for n, _ in maker.make(model, selection_of(model))[1][0].vectors(torch.ones(4, 1, 1, 1))] == ["0.bias"]
    maker.look(model, (X,))
    assert maker.is_seen
    (first, _) = maker.make(model, selection_of(model))[1]
    assert [n for n, _ in first.vectors(torch.ones(4, 1, 1, 1))] == ["0.bias", "1.weight", "1.bias"]


def test_inputs_show_coupled_channels_and_what_is_left_out():
    model, maker = net(), maker_of(Coupled())
    assert isinstance(maker, ChannelMaker)
    selection = selection_of(model, coarse=False)
    assert maker.make(model, selection) == (selection, ())
    with pytest.raises(ValueError, match="example_inputs must be given for granularity 'coupled', got None"):
        maker.check_seen()
    maker.look(model, (X,))
    selection, pools = maker.make(model, selection)
    maker.check_seen()
    assert all(isinstance(p, ChannelPool) for p in pools)
    assert [(p.name, p.count) for p in pools] == [("0.weight", 4), ("3.weight", 5)]
    assert [t.name for t in selection.targets] == ["0.weight", "3.weight", "5.weight"]


def test_a_batch_shows_the_same():
    model = net()
    batch = Fit(1, model, batch=Batch((X,)))
    for granularity in (filter, Coupled()):
        maker = maker_of(granularity)
        maker.look_at_batch(model, batch)
        found = maker.make(model, selection_of(model))
        given = maker_of(granularity)
        given.look(model, (X,))
        wanted = given.make(model, selection_of(model))
        assert [p.name for p in found[1]] == [p.name for p in wanted[1]]
        assert maker.is_seen


def test_a_batch_that_shows_nothing_is_a_warning_for_targets_and_an_error_for_channels():
    model = net()
    fit = Fit(1, model, batch=Batch((torch.ones(1),)))
    maker = maker_of(filter)
    with pytest.warns(UserWarning, match="the loop's batch does not show the data flow"):
        maker.look_at_batch(model, fit)
    assert not maker.is_seen
    with pytest.raises(ValueError, match="example_inputs must be"):
        maker_of(Coupled()).look_at_batch(model, fit)


def test_a_record_asks_its_granularitys_maker():
    model = net()
    record = MaskRecord(model, Coupled(), selection_of(model))
    assert record.pools == ()
    record.look((X,))
    assert [p.name for p in record.pools] == ["0.weight", "3.weight"]


def test_a_runs_first_batch_shows_what_sparsities_and_earlier_weights_are_of():
    model = net()
    sparsifier = Sparsifier(model, "coupled", criteria="movement", sparsity={"3": 0.4}, targets=["0", "3"], round_to=1)
    loop = Loop([sparsifier])
    loop.start(Fit(1, model, torch.optim.SGD(model.parameters(), 0.1), batch=Batch((X,))))
    assert [t.name for t in sparsifier.targets] == ["0.weight", "3.weight", "5.weight"], "the last reads what the others make"
    assert set(sparsifier.state_dict()["initial"]) == {"0.weight", "3.weight", "5.weight"}
    loop.before_step()
    loop.after_step()
    loop.end(completed=True)
    assert dict(sparsifier.sparsity) == {"0.weight": 0.0, "3.weight": 0.4}


def test_a_further_granularity_is_one_more_maker():
    """Units of every second target, as a granularity of somebody else's might make them."""

    @dataclass(frozen=True)
    class Second(Granularity):
        def fits(self, layout):
            return True

        def unit_shape(self, layout):
            return filter.unit_shape(layout)

        def reduce(self, scores, layout, reducer="mean"):
            return filter.reduce(scores, layout, reducer)

        def expand(self, keep, layout):
            return keep

    class SecondMaker(TargetMaker):
        needs_inputs = True

        def look(self, model, inputs):
            self.flow = object()

        def make(self, model, selection):
            if self.flow is None:
                return selection, ()
            kept = selection.targets[1::2]
            return replace(selection, targets=kept), tuple(TargetPool(t, self.granularity) for t in kept)

    maker_of.register(Second, SecondMaker)
    sparsifier = Sparsifier(net(), Second(), example_inputs=X)
    sparsifier.sparsify_model(0.4)
    assert [t.name for t in sparsifier.targets] == ["3.weight"]
    assert sparsifier.sparsity["3.weight"] == 0.4
    assert int(sparsifier.masks["3.weight"].flatten(1).any(1).sum()) == 3


class OfWords(nn.Module):
    """A stream that an embedding and a raw parameter make."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(5, 8), nn.Linear(8, 2)
        self.raw = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        y = self.words(x)
        return self.out(y + y.relu() @ self.raw)


def test_a_raw_parameter_brings_the_channels_of_an_embedding_with_it() -> None:
    model = OfWords()
    sparsifier = Sparsifier(model, "coupled", "local", sparsity=0.5, example_inputs=torch.tensor([[0, 1, 2]]))
    sparsifier.sparsify_model()
    gone = (model.words.weight == 0).all(0)
    assert int(gone.sum()) == 4 and torch.equal(gone, (model.raw == 0).all(0))
