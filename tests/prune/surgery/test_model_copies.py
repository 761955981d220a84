import copy

import pytest
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fasterai.prune.surgery.model_copies import check_copies, matching_copies


def net(hidden: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, 2))


class Holder(nn.Module):
    """A moving average as timm keeps it."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Whole(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part, self.other = part, nn.Linear(2, 2)


def test_none_one_several_and_functions():
    model, a, b = net(), net(), net()
    assert matching_copies(None, model) == []
    assert matching_copies(a, model) == [a]
    assert matching_copies([a, b], model) == [a, b]
    assert matching_copies(lambda: a, model) == [a]
    assert matching_copies(lambda: None, model) == []
    assert matching_copies([a, lambda: (b,)], model) == [a, b]


def test_what_an_average_holds_is_found():
    model = net()
    average = AveragedModel(model)
    assert matching_copies(average, model) == [average.module]
    held = Holder(Holder(net()))
    assert matching_copies(held, model) == [held.module.module]


def test_the_part_of_a_copy_of_the_whole_is_found():
    whole = Whole(net())
    other, average = copy.deepcopy(whole), AveragedModel(whole)
    assert matching_copies([other, average], whole.part, "part") == [other.part, average.module.part]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (net(5), r"got Sequential where 0.weight is \(5, 3\), in the model \(4, 3\)"),
        (nn.Sequential(nn.Linear(3, 4)), r"got Sequential where 1.weight is missing, in the model \(4,\)"),
        (nn.Sequential(*net(), nn.Linear(2, 2)), r"got Sequential where 3.weight is \(2, 2\), in the model missing"),
        (Holder(net(5)), r"got Holder where 0.weight is \(5, 3\)"),
    ],
)
def test_another_structure_is_refused(other, message):
    with pytest.raises(ValueError, match=f"copies must be modules of the model's structure, {message}"):
        matching_copies([other], net())


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"copies must be modules of the model's structure, or a function .*, got 'ema'"):
        check_copies("ema")
    with pytest.raises(TypeError, match=r"copies must give modules .*, got 3 \(int\)"):
        matching_copies(lambda: 3, net())
    given = [net(), net]
    assert check_copies(given) is given
    assert check_copies(None) is None
