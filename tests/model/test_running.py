"""Running a model without leaving traces in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fasterai.model.inputs import positional
from fasterai.model.running import at_rest, copies, device_of, evaluating, in_mode, undisturbed, without_fast_path
from fasterai.model.supported import check_model


def test_fused_attention_comes_back() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    with without_fast_path():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    return model


def test_every_module_comes_back_in_its_own_mode() -> None:
    model = net()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]
    with in_mode(model, True):
        assert all(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, True, False]


def test_random_numbers_go_on_as_if_none_had_been_drawn() -> None:
    model = net()
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    with undisturbed(model):
        torch.rand(7)
    assert torch.equal(torch.rand(3), wanted)


class Restless(nn.Module):
    """Writes into its buffers, replaces one, adds one, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("seen", torch.tensor([1.0, float("nan")]))
        self.register_buffer("last", torch.zeros(2))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.seen += 1
        self.last = torch.rand(2)
        self.register_buffer("more", torch.ones(1), persistent=False)
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails):
    model = nn.Sequential(Restless(), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()
    seen, last, state, rng = model[0].seen, model[0].last, model.state_dict(), torch.get_rng_state()
    values = {name: tensor.clone() for name, tensor in state.items()}
    try:
        with at_rest(model):
            assert not any(m.training for m in model.modules())
            assert not torch.is_grad_enabled()
            model(torch.ones(3, 2))
            assert model[0].seen[0] == 2
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()
    assert model[0].seen is seen and model[0].last is last
    assert list(dict(model.named_buffers())) == ["0.seen", "0.last", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7), values[name].nan_to_num(7)), name
    assert torch.equal(torch.get_rng_state(), rng)


def test_inputs_are_positional_arguments():
    x = torch.zeros(1)
    assert positional(x) == (x,)
    assert positional([x, 2]) == (x, 2)
    assert positional({"a": x}) == ({"a": x},)


def test_copies_share_no_memory_and_keep_the_format():
    x = torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last)
    ((copy, others),) = copies(((x, {"k": [x, "text"]}),))
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr() and others["k"][0].data_ptr() != x.data_ptr()
    assert copy.is_contiguous(memory_format=torch.channels_last)
    assert others["k"][1] == "text"


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("resnet", TypeError, r"net must be a torch.nn.Module, got 'resnet' \(str\)"),
        (nn.LazyLinear(3), ValueError, "net must be initialised, got weight without a shape"),
        (nn.Linear(2, 3, device="meta"), ValueError, "net must hold its weights, got weight on the meta device"),
    ],
)
def test_models_without_values_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        check_model(model, "net", holds_values=True)


def test_modes_and_generators_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.ReLU().eval())
    state = torch.get_rng_state()

    def fail() -> None:
        with undisturbed(model), evaluating(model):
            assert not model[0].training
            torch.rand(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [True, True, False]


def test_the_device_is_read_off_the_first_parameter_alone():
    class Many(nn.Module):
        def parameters(self, recurse=True):
            yield nn.Parameter(torch.zeros(1, device="meta"))
            raise AssertionError("a large model has many")

    assert device_of(Many(), ()).type == "meta"
    assert device_of(nn.Flatten(), ({"x": torch.zeros(1, device="meta")},)).type == "meta"
    assert device_of(nn.Flatten(), ()).type == "cpu"


class CodeBook(nn.Module):
    """Follows what it sees while it trains, as vector quantisers do: by a new tensor, or in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.book, self.in_place = nn.Linear(3, 3, bias=False), in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.in_place:
            self.book.weight.data.mul_(0.5)
        elif self.training:
            self.book.weight.data = self.book.weight.data * 0.5
        return self.book(x)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_training_mode_writes_into_parameters_is_given_back(in_place: bool) -> None:
    model = CodeBook(in_place).eval()
    before, place = model.book.weight.detach().clone(), model.book.weight.data_ptr()
    with in_mode(model, True), torch.no_grad():
        model(torch.randn(2, 3))
        assert not torch.equal(model.book.weight, before)
    assert torch.equal(model.book.weight, before) and model.book.weight.data_ptr() == place and not model.training
