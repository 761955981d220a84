import numpy as np
import pytest
import torch
from torch import nn

from fasterai.core.loop import Batch, Fit
from fasterai.model.inputs import as_tuple, batch_inputs, batch_of, few_samples, positional


class Image(torch.Tensor):
    """As fastai's batches are: a tensor with a class of its own."""


def test_the_first_two_samples_of_each_input():
    x, mask = torch.arange(12.0).reshape(4, 3), torch.tensor([True, False, True, True])
    scale, table = torch.tensor(2.0), torch.arange(7)
    inputs = few_samples((x, {"mask": mask}, scale, table, 5, None))
    assert inputs[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert inputs[1]["mask"].tolist() == [True, False]
    assert inputs[2].item() == 2.0
    assert inputs[3].tolist() == list(range(7))  # no batch dimension
    assert inputs[4:] == (5, None)


def test_they_are_copies_and_plain_tensors():
    x = torch.ones(4, 3, requires_grad=True)
    (image,) = few_samples((x.as_subclass(Image),))
    assert type(image) is torch.Tensor
    assert not image.requires_grad
    with torch.no_grad():
        x.zero_()
    assert image.tolist() == np.ones((2, 3)).tolist()


def test_a_batch_of_one():
    assert few_samples((torch.ones(1, 3),))[0].shape == (1, 3)


def test_the_inputs_of_a_part_are_what_the_whole_gives_it():
    torch.manual_seed(0)
    part = nn.Linear(5, 2)
    whole = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), part).train()
    x = torch.randn(8, 3)
    generator = torch.get_rng_state()
    (inputs,) = batch_inputs(part, Fit(1, whole, batch=Batch((x,))))
    torch.testing.assert_close(inputs, x[:2] @ whole[0].weight.T + whole[0].bias)  # eval mode: no dropout
    assert whole.training
    assert not part._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("batch", [None, Batch(())])
def test_no_batch(batch):
    with pytest.raises(ValueError, match="example_inputs must be given for a loop that shows no batch, got None"):
        batch_inputs(nn.Linear(3, 5), Fit(1, batch=batch))


def test_a_whole_that_does_not_run_on_the_batch():
    part = nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"example_inputs must be given where the whole model does not run .*got None"):
        batch_inputs(part, Fit(1, nn.Sequential(part), batch=Batch((torch.ones(2, 4),))))
    assert not part._forward_pre_hooks


def test_a_part_that_is_not_run():
    with pytest.raises(ValueError, match="model must be part of the trained model's forward pass, got one"):
        batch_inputs(nn.Linear(3, 5), Fit(1, nn.Linear(3, 5), batch=Batch((torch.ones(2, 3),))))


def test_a_wrapped_model_is_the_whole():
    model = nn.Linear(3, 5)
    (inputs,) = batch_inputs(model, Fit(1, nn.DataParallel(model), batch=Batch((torch.ones(4, 3),))))
    assert inputs.shape == (2, 3)


def test_inputs_are_a_tuple():
    x = torch.zeros(1)
    for given in (x, (x,), [x]):
        assert as_tuple(given) == positional(given) == (x,)
    assert as_tuple({"a": 1}) == ({"a": 1},)
    assert as_tuple(None) == (None,)
    with pytest.raises(ValueError, match="example_inputs must be a tensor, or a tuple of what the model takes, got None"):
        positional(None)


def test_another_batch_repeats_the_samples_in_turn():
    x, flag = torch.tensor([[1.0], [2.0]]), torch.tensor(3)
    got = batch_of((x, flag, None), 3)
    assert got[0].tolist() == [[1.0], [2.0], [1.0]]
    assert got[1] is flag
    assert got[2] is None
    assert batch_of((x,), 1)[0].tolist() == [[1.0]]
    assert batch_of((x,), None)[0] is x


def test_batches_are_what_has_a_row_for_each_sample():
    table, x = torch.arange(3), torch.tensor([1, 2])
    assert [t.tolist() for t in batch_of((table, x), 4)] == [[0, 1, 2, 0], [1, 2]]  # by the first tensor
    assert [t.tolist() for t in batch_of((table, x), 4, 2)] == [[0, 1, 2], [1, 2, 1, 2]]
    assert batch_of(({"a": x},), 3)[0]["a"].tolist() == [1, 2, 1]


@pytest.mark.parametrize("inputs", [(), ("text",), (torch.tensor(1.0),), (torch.zeros(0, 3),)])
def test_batches_of_nothing_are_refused(inputs):
    with pytest.raises(ValueError, match="example_inputs must hold a tensor with at least one sample to make batches of"):
        batch_of(inputs, 3)
