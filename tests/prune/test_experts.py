"""Whole experts go: what is left computes what the model did with their gates closed, and trains, saves and loads on."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from fasterai.core.granularities import Block, Keep
from fasterai.graph.experts import expert_graph
from fasterai.prune.experts import expert_scores, remove_experts, without_experts
from fasterai.prune.pruner import Pruner
from fasterai.prune.small_files import load_small, save_small
from fasterai.prune.surgery.operate import apply_plan_
from fasterai.prune.surgery.plan import Plan
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.mixtures import BlendedMixture
from tests.graph.test_experts import Blended, Chosen, Stacked, blend_matrix, blend_sum, blend_tensordot
from tests.prune.test_gates import X, blended, by_numpy

STACKS = ["layers.0.weight", "layers.1.weight", "layers.2.weight"]


def test_what_is_left_is_the_softmax_over_the_rest():
    model = blended()
    wanted, whole = by_numpy(model, X, [0, 3]), sum(p.numel() for p in model.parameters())
    parameters = [*model.parameters()]
    result = remove_experts(model, X, which=[1, 2])
    np.testing.assert_allclose(model(X).detach().numpy(), wanted, atol=1e-12)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    # 6 x 7 + 6, 6 x 6 + 6, 3 x 6 + 3 of each expert, and 16 + 1 of the gate, twice
    assert result.parameters == (whole, whole - 2 * (48 + 42 + 21 + 17))
    assert result.removed == {"gate.2.weight": (4, 2)}
    assert model.gate[2].out_features == 2
    assert result.difference < 1e-12
    assert "gate.2.weight: 4 -> 2 experts" in str(result) and "1 of 1 group lost experts" in repr(result)
    assert result.comparison.share("small", "parameters") == pytest.approx(1 - 256 / whole)


FORMS = [lambda: Blended(blend_tensordot), lambda: Blended(blend_sum), lambda: Blended(blend_matrix), Stacked, Chosen]


@pytest.mark.parametrize("make", FORMS, ids=["tensordot", "sum", "matrix", "stacked", "chosen"])
def test_any_form_of_the_product_can_lose_experts(make):
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(6, 5, dtype=torch.float64)
    with without_experts(model, x, [2]):
        wanted = model(x).detach()
    dense = model(x).detach()
    assert remove_experts(model, x, which=[2], measure=False).difference < 1e-9
    torch.testing.assert_close(model(x).detach(), wanted, atol=1e-12, rtol=0)
    assert not torch.allclose(wanted, dense)
    assert [p.shape[0] for n, p in model.named_parameters() if n in "wv"] == [3, 3]


def test_experts_go_one_after_the_other():
    model = blended()
    wanted = by_numpy(model, X, [3])
    for which in ([0], [0, 1]):
        remove_experts(model, X, which=which, measure=False)
    np.testing.assert_allclose(model(X).detach().numpy(), wanted, atol=1e-12)


# --- which go --------------------------------------------------------------------------------------------------------


def test_usage_is_the_mean_of_what_the_gate_gives():
    model = blended()
    logits = model.gate(X[:, -3:]).detach()
    wanted = (logits.exp() / logits.exp().sum(1, keepdim=True)).mean(0)
    torch.testing.assert_close(expert_scores(model, X)["gate.2.weight"], wanted.float())
    batches = [(X[:2], X[:2]), (X[2:], X[2:])]  # of unequal sizes: every row counts alike
    torch.testing.assert_close(expert_scores(model, X[:1], data=batches)["gate.2.weight"], wanted.float())


def test_usage_of_experts_that_are_chosen_counts_where_they_are():
    torch.manual_seed(0)
    model, x = Chosen(), torch.randn(9, 5)
    shares = (x @ model.router).softmax(1).detach().numpy()
    given = np.where(shares >= np.sort(shares, 1)[:, [-2]], shares, 0)
    given /= given.sum(1, keepdims=True)
    np.testing.assert_allclose(expert_scores(model, x)["router"].numpy(), given.mean(0), rtol=1e-6)


def test_a_criterion_of_the_catalogue_scores_the_stacks():
    model = blended()
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            layer.weight.copy_((torch.tensor([3.0, -1.0, 4.0, 2.0]) * (i + 1))[:, None, None].expand(layer.weight.shape))
    scores = expert_scores(model, X, "large_final")
    assert scores["gate.2.weight"].tolist() == [18.0, 6.0, 24.0, 12.0]  # |w| of the three stacks, 1 + 2 + 3 times
    taken = remove_experts(model, X, 2, criteria="large_final", measure=False)
    assert taken.plan.keep["gate.2.weight", 0].tolist() == [0, 2]


def test_criteria_that_read_data_score_experts():
    model, data = blended(), [(X, torch.zeros(5, 3, dtype=torch.float64))]
    scores = expert_scores(model, X, "taylor", data=data, loss=nn.functional.mse_loss)["gate.2.weight"]
    assert scores.shape == (4,) and bool((scores > 0).all())
    assert all(p.grad is None for p in model.parameters())


def test_the_lowest_go_and_equal_ones_in_their_order():
    model = blended()
    with torch.no_grad():
        model.gate[2].weight.zero_()
        model.gate[2].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    kept = remove_experts(model, X, 2, measure=False).plan.keep
    assert kept["layers.1.weight", 0].tolist() == [0, 3]


# --- what comes along ------------------------------------------------------------------------------------------------


def test_optimizer_copies_masks_and_evidence_go_along():
    torch.manual_seed(0)
    model = blended()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    sparsifier = Sparsifier(model, "weight", "global", "movement", targets=STACKS)
    sparsifier.sparsify_model(0.5)
    model(X).square().mean().backward()
    optimizer.step()
    sparsifier.apply_masks()
    average = copy.deepcopy(model)
    masks = sparsifier.masks
    remove_experts(model, X, which=[1], optimizer=optimizer, copies=average, measure=False)
    assert optimizer.state[model.layers[0].weight]["exp_avg"].shape == model.layers[0].weight.shape == (3, 6, 7)
    assert torch.equal(sparsifier.masks["layers.0.weight"], masks["layers.0.weight"][[0, 2, 3]])
    assert torch.equal(average(X), model(X))
    model(X).square().mean().backward()
    optimizer.step()
    sparsifier.apply_masks()
    assert not model.layers[0].weight[~sparsifier.masks["layers.0.weight"]].any()


def test_hidden_units_that_no_expert_uses_go_before_and_after():
    model = blended()
    pruner = Pruner(model, 0.5, "local", "large_final", example_inputs=X, round_to=1)
    remove_experts(model, X, which=[0], measure=False)
    removal = pruner.prune_model(measure=False)
    assert removal.refused == {} and removal.difference < 1e-9
    assert [tuple(layer.weight.shape) for layer in model.layers] == [(3, 3, 7), (3, 3, 3), (3, 3, 3)]
    assert [tuple(layer.bias.shape) for layer in model.layers] == [(3, 3), (3, 3), (3, 3)]
    wanted = by_numpy(model, X, [2])
    remove_experts(model, X, which=[0, 1], measure=False)
    np.testing.assert_allclose(model(X).detach().numpy(), wanted, atol=1e-12)


def test_what_is_left_is_saved_loaded_and_repeated(tmp_path):
    model, fresh, other = blended(), BlendedMixture(7, 3, experts=4, hidden=6).double(), blended()
    result = remove_experts(model, X, which=[0, 2], measure=False)
    save_small(tmp_path / "small.safetensors", model)
    assert torch.equal(load_small(tmp_path / "small.safetensors", fresh)(X), model(X))
    plan = Plan.from_dict(json.loads(json.dumps(result.plan.to_dict())))
    apply_plan_(other, plan)
    assert torch.equal(other(X), model(X))
    assert torch.equal(copy.deepcopy(model)(X), model(X))


# --- Mixtral ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    numbers = {"num_hidden_layers": 2, "num_local_experts": 5, "num_experts_per_tok": 2, "vocab_size": 20}
    config = transformers.MixtralConfig(**widths, **numbers, max_position_embeddings=32, use_cache=False, initializer_range=0.5)
    return transformers.MixtralForCausalLM(config).eval()


TOKENS = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))


def rest_of(model, rest: list[int]):
    """A Mixtral of some of the experts, put together by hand."""
    config = copy.deepcopy(model.config)
    config.num_local_experts = len(rest)
    small = type(model)(config).eval()
    cut = {n: t[rest] if ".mlp." in n else t for n, t in model.state_dict().items()}
    small.load_state_dict(cut)
    return small


def test_mixtral_is_the_mixtral_of_the_experts_that_are_left(mixtral, tmp_path):
    model, wanted = copy.deepcopy(mixtral), rest_of(mixtral, [0, 2, 4])
    with torch.no_grad(), without_experts(model, TOKENS, [1, 3]):
        torch.testing.assert_close(model(TOKENS).logits, wanted(TOKENS).logits)
    with torch.no_grad():
        result = remove_experts(model, TOKENS, which=[1, 3], measure=False)
        torch.testing.assert_close(model(TOKENS).logits, wanted(TOKENS).logits, atol=0, rtol=0)
        assert not torch.allclose(model(TOKENS).logits, mixtral(TOKENS).logits)
    assert len(result.removed) == 2 and result.difference < 1e-5
    assert model.config.num_local_experts == model.num_experts == 3 and mixtral.config.num_local_experts == 5
    assert {m.num_experts for n, m in model.named_modules() if n.endswith((".gate", ".experts"))} == {3}
    loss = model(TOKENS, labels=TOKENS, output_router_logits=True)
    assert torch.isfinite(loss.loss) and torch.isfinite(loss.aux_loss)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    save_small(tmp_path / "small.safetensors", model)
    loaded = load_small(tmp_path / "small.safetensors", copy.deepcopy(mixtral))
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_mixtral_keeps_as_many_experts_as_a_token_is_sent_to(mixtral):
    with pytest.raises(ValueError, match=r"count must leave .*gate.weight at least the 2 experts .*chooses, got 4 of 5"):
        remove_experts(mixtral, TOKENS, 4)
    assert expert_graph(mixtral, (TOKENS,)).experts == {f"model.layers.{i}.mlp.gate.weight": 5 for i in range(2)}


def test_mixtral_with_other_numbers_in_each_layer_runs_and_says_what_its_config_cannot_tell(mixtral):
    model = copy.deepcopy(mixtral)
    with pytest.warns(UserWarning, match="different numbers of experts, which config.num_local_experts cannot tell"):
        remove_experts(model, TOKENS, which={"model.layers.1.mlp.gate.weight": [0]}, measure=False)
    assert [layer.mlp.experts.num_experts for layer in model.model.layers] == [5, 4]
    assert model.config.num_local_experts == 5 and torch.isfinite(model(TOKENS).logits).all()


# --- what is refused -------------------------------------------------------------------------------------------------


class Divided(Blended):
    """Divides by the number of its experts, which differs without some of them."""

    def forward(self, x):
        return super().forward(x) / len(self.w)


class Numbered(Blended):
    """Has the number of its experts in its code."""

    def forward(self, x):
        return super().forward(x) + 0 * (self.w * torch.ones(4)[:, None, None]).sum()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Divided, "model must compute the same without experts as with their gates closed"),
        (Numbered, "model must run with fewer experts, got .*: a number of experts that it keeps"),
    ],
)
def test_a_model_that_would_compute_something_else_stays_as_it_was(kind, message):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(6, 5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        remove_experts(model, x, 1)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "count must be given, or which instead, got count=None and which=None"),
        ({"count": 1, "which": [0]}, ValueError, r"count must be given, or which instead, got count=1 and which=\[0\]"),
        ({"count": 0}, ValueError, "count must be .*, got 0"),
        ({"count": 4}, ValueError, "count must leave gate.2.weight at least one expert, got 4 of 4"),
        ({"count": 0.5}, TypeError, "count must be .*, got 0.5"),
        ({"which": [7]}, ValueError, "which must be experts 0 to 3 of gate.2.weight, got 7"),
        ({"count": 1, "criteria": "used"}, ValueError, "criteria must be .*, got 'used'"),
    ],
)
def test_bad_arguments_change_nothing(options, error, message):
    model = blended()
    dense = model(X).detach()
    with pytest.raises(error, match=message):
        remove_experts(model, X, **options)
    assert torch.equal(model(X), dense)


def test_a_model_without_mixtures_is_refused():
    with pytest.raises(ValueError, match="model must hold a mixture"):
        remove_experts(nn.Linear(5, 2), torch.randn(3, 5), 1)
    with pytest.raises(ValueError, match="model must hold a mixture"):
        expert_scores(nn.Linear(5, 2), torch.randn(3, 5))


# --- granularities of stacks -----------------------------------------------------------------------------------------

#: Granularity, units of a stack (4, 6, 6), and whether each expert decides alone.
UNITS = [
    ("weight", 144, True),
    ("row", 24, True),
    ("column", 24, True),
    (Block(2, 3), 24, True),
    (Keep("expert"), 4, True),
    (Keep("out", "in"), 36, False),
    (Keep("out"), 6, False),
    (Keep("in"), 6, False),
]


@pytest.mark.parametrize(("granularity", "units", "is_apart"), UNITS, ids=str)
def test_units_of_stacks_are_of_one_expert_or_shared_by_all(granularity, units, is_apart):
    model = blended()
    sparsifier = Sparsifier(model, granularity, "local", "large_final", targets="layers.1.weight")
    sparsifier.sparsify_model(0.5)
    mask = model.layers[1].weight != 0
    assert sparsifier.report().rows[0].units == units
    assert int((~mask).sum()) == 72  # half of the units, all of a size, are half of 4 x 6 x 6 weights
    assert torch.equal(mask, mask[:1].expand_as(mask)) is not is_apart
    blend = torch.einsum("be,eoi->boi", torch.rand(5, 4, dtype=torch.float64), model.layers[1].weight)
    zero_in_all = int((~mask.any(0)).sum())
    assert int((blend[0] == 0).sum()) == zero_in_all and (zero_in_all == 18) is not is_apart
