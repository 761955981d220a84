from __future__ import annotations

import pytest
from torch import nn

from fasterai.core.criteria import Criterion
from fasterai.model.targets import all_targets
from fasterai.units.evidence import Source
from fasterai.units.own_evidence import gather


def breaks(model, targets, source):
    raise KeyError("inside")


def test_an_error_of_a_gatherer_says_whose_it_is():
    layer = nn.Linear(2, 2)
    criterion = Criterion(lambda e: e.gathered["breaks"], needs={breaks})
    with pytest.raises(KeyError, match="inside") as caught:
        gather(criterion, layer, all_targets(layer), Source())
    assert caught.value.__notes__ == ["raised by the gatherer breaks of criterion <lambda>"]
