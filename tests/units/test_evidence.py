"""What criteria need beyond the weight: the numbers, and that gathering leaves no trace."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.core.loop import Batch
from fasterai.core.types import EVIDENCE
from fasterai.model.inputs import as_batch
from fasterai.model.targets import find_targets
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units import evidence
from fasterai.units.evidence import GATHERERS, NotYetError, Source
from tests.networks import TwoNames, perceptron

X = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3


def targets_of(model, *names):
    return find_targets(model, fits=lambda t: None, coarse=False, targets=names or None).targets


def gather(what, model, source, *names):
    return GATHERERS[what](model, targets_of(model, *names), source)


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


DATA = Source(data=[(X, Y), (X + 1, Y)], loss=F.cross_entropy, inputs=(X,))


def test_every_kind_of_evidence_has_a_gatherer():
    assert set(GATHERERS) == set(EVIDENCE) - {"initial", "previous"}


@pytest.mark.parametrize("what", GATHERERS)
def test_gathering_leaves_no_trace(what):
    model = cnn()
    model[3].eval()
    model(X).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    before = {n: x.clone() for n, x in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    found = gather(what, model, DATA)
    assert list(found) == ["0.weight", "6.weight"]
    assert all(torch.isfinite(x).all() for x in found.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("what", GATHERERS)
def test_a_failing_batch_leaves_no_trace(what):
    model = cnn()
    modes = [m.training for m in model.modules()]
    wrong = torch.ones(2, 7, 5, 5)
    with pytest.raises(RuntimeError):
        gather(what, model, Source(data=[(wrong, Y)], loss=F.cross_entropy))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("what", GATHERERS)
def test_wrapped_and_partly_compiled_models_give_the_same(what):
    model = cnn().eval()
    plain = gather(what, model, DATA)
    wrapped = gather(what, nn.DataParallel(model), DATA)
    assert all(torch.equal(plain[n], wrapped[n]) for n in plain)
    model[0] = torch.compile(model[0], backend="eager")
    parts = gather(what, model, DATA)
    for n in plain:
        torch.testing.assert_close(plain[n], parts[n])


# --- gradients ---------------------------------------------------------------------------------------------------------


def test_gradients_are_those_that_backward_left():
    model = nn.Linear(3, 1)
    model(torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert gather("gradient", model, Source())["weight"].tolist() == [[1.0, 2.0, 3.0]]


def test_gradients_of_one_batch_and_the_root_mean_square_over_several():
    model = nn.Linear(2, 1, bias=False)

    def total(output):
        return output.sum()

    one = Source(data=[torch.tensor([[3.0, -4.0]])], loss=total)
    assert gather("gradient", model, one)["weight"].tolist() == [[3.0, -4.0]]
    several = Source(data=[torch.tensor([[3.0, -4.0]]), torch.tensor([[1.0, 2.0]])], loss=total)
    # sqrt((9 + 1) / 2), sqrt((16 + 4) / 2)
    torch.testing.assert_close(gather("gradient", model, several)["weight"], torch.tensor([[5.0**0.5, 10.0**0.5]]))
    assert model.weight.grad is None


def test_gradients_agree_with_backward_in_the_models_own_mode():
    for training in (True, False):
        model = cnn().train(training)
        model[3].p = 0.0
        found = gather("gradient", model, Source(data=[(X, Y)], loss=F.cross_entropy))
        F.cross_entropy(model(X), Y).backward()
        torch.testing.assert_close(found["0.weight"], model[0].weight.grad)
        torch.testing.assert_close(found["6.weight"], model[6].weight.grad)


def test_a_weight_that_the_loss_does_not_read_has_gradient_zero():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    source = Source(data=[(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))], loss=F.cross_entropy)
    for what in ("gradient", "hessian_gradient"):
        assert gather(what, Idle(), source)["idle.weight"].tolist() == [[0, 0], [0, 0]]


def test_frozen_weights_have_gradients_of_data_too():
    model = cnn().requires_grad_(False)
    assert float(gather("gradient", model, DATA)["0.weight"].abs().sum()) > 0
    assert not any(p.requires_grad for p in model.parameters())


# --- GraSP -------------------------------------------------------------------------------------------------------------


def test_the_hessian_times_the_gradient_by_hand():
    # L = (w x / 200 - y)^2 with x = 100, y = 1, w = 4: g = 2 (2 - 1) / 2 = 1, H = 2 / 4, so Hg = 1 / 2.
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 4.0)
    source = Source(data=[(torch.tensor([[100.0]]), torch.tensor([[1.0]]))], loss=lambda o, y: (o - y).square().sum())
    assert gather("hessian_gradient", model, source)["weight"].tolist() == [[0.5]]
    twice = Source(data=[*source.data, *source.data], loss=source.loss)
    assert gather("hessian_gradient", model, twice)["weight"].tolist() == [[1.0]]


# --- SynFlow -----------------------------------------------------------------------------------------------------------


def test_second_derivatives_by_hand_where_they_have_no_others_beside_them():
    # Inputs of one feature each: the loss is a sum of squares of single weights, whose second derivatives are 2 x^2.
    model = nn.Linear(3, 1, bias=False)
    batches = [(torch.diag(torch.tensor(x)), torch.zeros(3, 1)) for x in ([1.0, 2.0, 3.0], [3.0, 0.0, 1.0])]
    source = Source(data=batches, loss=lambda o, y: (o - y).square().sum())
    assert gather("hessian_diagonal", model, source)["weight"].tolist() == [[10.0, 4.0, 10.0]]


def test_second_derivatives_in_the_mean_over_signs_are_those_of_the_whole_hessian(monkeypatch):
    monkeypatch.setattr(evidence, "DRAWS", 1500)
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 3).double(), torch.randn(6, 3).double(), torch.randint(0, 3, (6,))
    found = gather("hessian_diagonal", model, Source(data=[(x, y)], loss=F.cross_entropy))["weight"]

    def loss(weight):
        return F.cross_entropy(F.linear(x, weight, model.bias), y)

    wanted = torch.autograd.functional.hessian(loss, model.weight.detach()).reshape(9, 9).diagonal().view(3, 3)
    assert torch.allclose(found, wanted, rtol=0.15, atol=0.02)


def test_synaptic_flow_by_hand():
    # R = 1^T |W2| |W1| 1: dR/d|W1|_ij = the sum of |W2| over column i, dR/d|W2|_ki = the sum of |W1| over row i.
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [-3.0, 4.0]]))
        model[2].weight.copy_(torch.tensor([[-5.0, 6.0]]))
    found = gather("synaptic_flow", model, Source(inputs=(torch.randn(7, 2),)))
    assert found["0.weight"].tolist() == [[5.0, 5.0], [6.0, 6.0]]
    assert found["2.weight"].tolist() == [[3.0, 7.0]]
    assert model[0].weight.tolist() == [[1.0, -2.0], [-3.0, 4.0]]
    # The shape is all that is needed of the loop's batch.
    assert gather("synaptic_flow", model, Source(batch=Batch((X[0, 0, :, :2],))))["2.weight"].tolist() == [[3.0, 7.0]]


def test_synaptic_flow_is_that_of_evaluation():
    """In training, dropout lets through nothing, or ten times as much."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Dropout(0.9)).train()
    assert gather("synaptic_flow", model, Source(inputs=(torch.ones(1, 2),)))["0.weight"].tolist() == [[1.0, 1.0]]


class Structured(nn.Module):
    """Outputs in a dict: of one linear layer, and twice the same, besides which class it is."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        y = self.linear(x)
        return {"logits": y, "twice": (2 * y,), "best": y.argmax(1)}


@pytest.mark.parametrize("what", ["synaptic_flow", "hessian_gradient"])
def test_outputs_in_a_dict_are_added_up(what):
    linear = nn.Linear(2, 3, bias=False).double()
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    plain = Source(inputs=(x,), data=[(x, y)], loss=lambda out, y: F.cross_entropy(3 * out, y))
    nested = Source(inputs=(x,), data=[(x, y)], loss=lambda out, y: F.cross_entropy(out["logits"] + out["twice"][0], y))
    found = gather(what, Structured(linear), nested)["linear.weight"]
    alone = gather(what, linear, plain)["weight"]
    torch.testing.assert_close(found, 3 * alone if what == "synaptic_flow" else alone)


def test_synaptic_flow_needs_outputs_of_floats():
    class Classes(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(1)

    with pytest.raises(ValueError, match="model must return tensors of floats for synflow, which adds them up, got none"):
        gather("synaptic_flow", Classes(2, 3), Source(inputs=(torch.randn(4, 2),)))


def test_synaptic_flow_does_not_overflow_in_deep_networks():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(40)))
    for linear in model:
        nn.init.constant_(linear.weight, 100.0)
    found = gather("synaptic_flow", model, Source(inputs=(torch.ones(1, 64),)))
    assert all(torch.isfinite(x).all() for x in found.values())


def test_synaptic_flow_needs_tensors_of_floats():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="example_inputs must be tensors of floats for synflow"):
        gather("synaptic_flow", model, Source(inputs=(torch.tensor([1, 2]),)))


# --- Wanda -------------------------------------------------------------------------------------------------------------


def norms(x, dim):
    """2-norms of the features in a dimension."""
    return x.movedim(dim, -1).flatten(0, -2).double().square().sum(0).sqrt().float()


@pytest.mark.parametrize("shape", [(3, 5), (3, 7, 5), (5,), (2, 5, 5)])
def test_norms_of_linear_inputs_over_batch_and_positions(shape):
    x = torch.randn(shape)
    found = gather("activation", nn.Linear(5, 2), Source(data=[x]))["weight"]
    torch.testing.assert_close(found.expand(2, 5)[0], norms(x.reshape(-1, 5), -1))


CONVS = {
    "plain": (nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    "unbatched": (nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "1d": (nn.Conv1d(4, 6, 3), (2, 4, 5)),
    "3d": (nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "grouped, transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", CONVS)
def test_norms_stand_at_the_input_channel_that_the_weight_reads(name):
    layer, shape = CONVS[name]
    x = torch.randn(shape)
    found = gather("activation", layer, Source(data=[x]))["weight"].expand(layer.weight.shape)
    channels = norms(x, x.dim() - layer.weight.dim() + 1)
    groups, (first, second) = layer.groups, layer.weight.shape[:2]
    for i in range(first):
        for j in range(second):
            channel = i if layer.transposed else i // (first // groups) * second + j
            torch.testing.assert_close(found[i, j], channels[channel].expand(found[i, j].shape))


def test_norms_add_up_over_batches_as_if_they_were_one():
    model, x = nn.Linear(5, 2), torch.randn(6, 5)
    whole = gather("activation", model, Source(data=[x]))["weight"]
    torch.testing.assert_close(gather("activation", model, Source(data=[x[:2], x[2:]]))["weight"], whole)


def test_norms_of_packed_attention_and_a_named_refusal_where_inputs_cannot_be_watched():
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(2, 3, 4)
    found = gather("activation", model, Source(data=[((x, x, x),)]), "in_proj_weight")["in_proj_weight"]
    torch.testing.assert_close(found.expand(12, 4)[0], norms(x, -1))
    y = x + 1
    for query, key, value in ((x, y, x), (x, x, y), (y, x, x)):
        with pytest.raises(ValueError, match=r"whose inputs can be watched, got in_proj_weight; leave it out with targets="):
            gather("activation", model, Source(data=[((query, key, value),)]), "in_proj_weight")
    with pytest.raises(ValueError, match=r"whose inputs can be watched, got out_proj\.weight"):
        gather("activation", model, Source(data=[((x, x, x),)]), "out_proj")


def test_attention_called_by_keywords_is_refused_by_name():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(query=x, key=x, value=x)[0]

    with pytest.raises(ValueError, match=r"whose inputs can be watched, got attention\.in_proj_weight"):
        gather("activation", Called(), Source(data=[torch.randn(2, 3, 4)]), "attention.in_proj_weight")


def test_half_precision_inputs_are_summed_in_float32():
    model = nn.Linear(2, 2).half()
    x = torch.full((4096, 2), 10.0, dtype=torch.float16)  # the squares add up to 409,600, beyond float16
    assert gather("activation", model, Source(data=[x]))["weight"][0].tolist() == [640.0, 640.0]


# --- sources -----------------------------------------------------------------------------------------------------------


def test_what_a_loader_yields_becomes_a_batch():
    a, b, y = torch.ones(1), torch.zeros(1), torch.arange(2)
    assert as_batch(a) == Batch((a,))
    assert as_batch((a, y)) == Batch((a,), (y,))
    assert as_batch([a, y, b]) == Batch((a,), (y, b))
    assert as_batch(((a, b), y)) == Batch((a, b), (y,))
    batch = Batch((a,))
    assert as_batch(batch) is batch


def test_given_data_comes_before_the_loops_batch():
    source = Source(data=[X], batch=Batch((Y,)))
    assert source.batches("anything")[0].inputs[0] is X
    assert Source(batch=Batch((Y,))).batches("anything")[0].inputs[0] is Y


@pytest.mark.parametrize("source", [Source(), Source(data=[])])
def test_no_data_is_an_error_that_says_what_to_pass(source):
    with pytest.raises(ValueError, match=r"data must be given for a criterion that needs activations: data=\[batch, \.\.\.\]"):
        gather("activation", nn.Linear(2, 2), source)


def test_no_loss_is_an_error_that_says_what_to_pass():
    for what in ("gradient", "hessian_gradient"):
        with pytest.raises(ValueError, match=r"loss must be given for a criterion that needs gradients of data"):
            gather(what, nn.Linear(5, 2), Source(data=[(torch.ones(1, 5), Y[:1])]))


def test_gradients_that_are_not_there_yet_say_when_they_are():
    with pytest.raises(
        ValueError, match=r"needs gradients, and weight has none: they exist after loss\.backward\(\) and before optimizer"
    ):
        gather("gradient", nn.Linear(5, 2), Source())


@pytest.mark.parametrize("wild", [float("inf"), float("-inf"), float("nan")])
def test_gradients_of_an_overflow_are_waited_for(wild):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].weight.grad[0, 1] = wild
    with pytest.raises(NotYetError, match=r"criteria needs finite gradients, and 1\.weight has one that is infinite or NaN"):
        gather("gradient", model, Source())


def test_gradients_that_are_all_zero_are_none():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(
        NotYetError, match=r"needs gradients, and all of them are zero: they exist after loss\.backward\(\) and"
    ):
        gather("gradient", model, Source())
    model[1].weight.grad[0, 1] = 1.0
    found = gather("gradient", model, Source())
    assert [g.tolist() for g in found.values()] == [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]]


def test_gradients_of_a_weight_that_is_frozen_may_come_later():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="weight has none") as missing:
        gather("gradient", model, Source())
    assert not isinstance(missing.value, NotYetError)
    model.requires_grad_(False)
    with pytest.raises(NotYetError, match="weight has none"):
        gather("gradient", model, Source(), "weight")


def test_gradients_that_are_missing_of_a_weight_that_trains_will_not_come_with_those_of_a_frozen_one():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight has none") as missing:
        gather("gradient", model, Source(), "0.weight", "1.weight")
    assert not isinstance(missing.value, NotYetError)


def test_gradients_that_one_weight_lacks_and_others_have_may_come_later():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0](torch.ones(1, 2)).sum().backward()
    with pytest.raises(NotYetError, match=r"1\.weight has none"):
        gather("gradient", model, Source(), "0.weight", "1.weight")


@pytest.mark.parametrize(("name", "expected"), [("activation_max", [3.0, 4.0]), ("activation_mean", [2.0, 2.0])])
def test_other_statistics_of_the_inputs_are_of_the_magnitude(name, expected):
    model = nn.Linear(2, 1)
    target = find_targets(model, fits=lambda _: None, coarse=False).targets
    data = [torch.tensor([[-1.0, 4.0]]), torch.tensor([[3.0, 0.0]])]
    assert GATHERERS[name](model, target, Source(data=data))["weight"].flatten().tolist() == expected


@pytest.mark.parametrize("what", GATHERERS)
def test_a_layer_under_two_names_keeps_its_parameters(what):
    model = TwoNames()
    model(torch.ones(3, 4)).sum().backward()
    before = dict(model.named_parameters(remove_duplicate=False))
    source = Source(data=[(torch.ones(3, 4), Y[:3])], loss=F.cross_entropy, inputs=(torch.ones(3, 4),))
    gather(what, model, source, "stem.weight")
    after = {name: model.get_parameter(name) for name in before}
    assert all(after[name] is parameter for name, parameter in before.items())


def test_gradients_through_a_layer_under_two_names_and_a_shared_weight_are_those_of_backward():
    torch.manual_seed(0)
    model, x = TwoNames(), torch.randn(3, 4)
    found = gather("gradient", model, Source(data=[(x, Y[:3])], loss=F.cross_entropy), "stem.weight")
    F.cross_entropy(model(x), Y[:3]).backward()
    torch.testing.assert_close(found["stem.weight"], model.stem.weight.grad)


def test_synaptic_flow_counts_both_uses_of_a_shared_weight():
    """R = sum |W| (|W| 1) in each output, biases zero, W of ones: each of 16 weights has 4 paths in either place."""
    model = TwoNames()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() > 1 else 0.0)
    found = gather("synaptic_flow", model, Source(inputs=(torch.zeros(2, 4),)), "stem.weight")
    # R = sum_i sum_j W_ij sum_k W_jk; dR/dW_ij = sum_k W_jk (as the last) + sum_k W_ki (as the first) = 4 + 4
    assert found["stem.weight"].tolist() == [[8.0] * 4] * 4


def test_a_loss_that_is_no_function_is_refused_by_name():
    message = r"loss must be a function \(output, \*targets\), got 'ce'; loss=F.cross_entropy, say"
    with pytest.raises(TypeError, match=message):
        Sparsifier(perceptron(6, 10, 4), "weight", "local", "taylor", loss="ce")
    with pytest.raises(TypeError, match=message):
        Pruner(perceptron(6, 10, 4), 0.5, "local", "taylor", example_inputs=torch.randn(2, 6), loss="ce")
