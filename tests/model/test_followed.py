from __future__ import annotations

import pytest
from torch import nn

from fasterai.model.followed import as_followed


class Plain(nn.Linear):
    pass


class Told(nn.Linear):
    follows = Plain


class Below(Told):
    """It has `follows` of a class that it inherits from, and is followed as it is."""


def test_classes_change_for_a_while_and_come_back_after_an_error() -> None:
    net = nn.Sequential(Told(1, 1), Below(1, 1), nn.Linear(1, 1))
    with as_followed(net):
        assert [type(module) for module in net] == [Plain, Below, nn.Linear]
    with pytest.raises(IndexError), as_followed(net):
        net[3]
    assert [type(module) for module in net] == [Told, Below, nn.Linear]
