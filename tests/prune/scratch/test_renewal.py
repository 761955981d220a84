import pytest
import torch
from torch import nn

from fasterai.prune.scratch.renewal import check_renews, renewed
from tests.prune.scratch.nets import make


class Token(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.body = nn.Parameter(torch.zeros(3)), nn.Linear(3, 2)


def test_all_weights_are_drawn_anew_from_the_seed_alone() -> None:
    model, x = make("depthwise")
    model(x)  # moves the statistics
    state = torch.get_rng_state()
    first = {n: t.clone() for n, t in renewed(model, None, 3).state_dict().items()}
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, torch.zeros(8, dtype=torch.float64))
    again = renewed(model, None, 3).state_dict()
    assert all(torch.equal(first[n], t) for n, t in again.items())
    assert not torch.equal(first["0.weight"], renewed(model, None, 4).state_dict()["0.weight"])


def test_a_linear_layer_is_as_torch_makes_it() -> None:
    torch.manual_seed(5)
    wanted = nn.Linear(7, 3)
    found = renewed(nn.Linear(7, 3), None, 5)
    assert torch.equal(found.weight, wanted.weight)
    assert torch.equal(found.bias, wanted.bias)


def test_a_weight_that_nothing_sets_is_named() -> None:
    with pytest.raises(ValueError, match=r"reset must set every weight .* got token left; pass reset="):
        renewed(Token(), None, 0)
    found = renewed(Token(), lambda model: nn.init.ones_(model.token), 0)
    assert found.token.tolist() == [1, 1, 1]


def test_frozen_weights_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="model must train as a whole, got bias, which is frozen"):
        check_renews(model)
