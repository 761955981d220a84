"""Features that nobody needs: small(selector(x)) is masked(x), exact counts, several readers, images, tables, files."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.core.criteria import Criterion
from fasterai.export.onnx import ONNXModel, export_onnx
from fasterai.prune.all import induce, load_small
from fasterai.prune.features.selector import InputSelector
from fasterai.sparse.sparsifier import Sparsifier
from tests.networks import perceptron

X = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    return perceptron(12, 10, 3).eval()


def masked(model: nn.Module, keep, layer="0") -> nn.Module:
    """The same model with zeros at all weights that read other features, made by hand."""
    other = copy.deepcopy(model)
    gone = [i for i in range(other.get_submodule(layer).weight.shape[1]) if i not in keep]
    with torch.no_grad():
        other.get_submodule(layer).weight[:, gone] = 0
    return other


def test_the_features_with_the_largest_weights_stay_and_the_small_network_is_the_masked_one():
    model = network()
    before = copy.deepcopy(model.state_dict())
    result = induce(model, X, 0.75)
    expected = model[0].weight.detach().abs().sum(0).argsort()[-3:].sort().values.tolist()
    assert list(result.selector.keep) == expected and result.selector.size == 12
    assert result.model[0].weight.shape == (10, 3) and result.model[0].in_features == 3
    wanted = masked(model, expected)(X)
    assert torch.allclose(result.model(result.selector(X)), wanted, atol=1e-6)
    assert torch.allclose(result.whole(X), wanted, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the model itself is unchanged


@pytest.mark.parametrize(("sparsity", "left"), [(0.0, 12), (0.5, 6), (0.3, 8), (0.9, 1), (11 / 12, 1)])
def test_counts_are_exact(sparsity, left):
    with pytest.warns(UserWarning, match="nothing was removed") if not sparsity else _nothing():
        result = induce(network(), X, sparsity, measure=False)
    assert len(result.selector.keep) == left == result.feature_counts[1]


class _nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return None


def test_the_report_counts_by_hand():
    result = induce(network(), X, 0.5, score=lambda model: float(model(X).shape[1]))
    figures = result.figures()
    assert figures["features"] == (12, 6)
    assert figures["input bytes"] == (12 * 4, 6 * 4)
    assert figures["parameters"] == (12 * 10 + 10 + 10 * 3 + 3, 6 * 10 + 10 + 10 * 3 + 3)
    assert figures["macs"] == (6 * (120 + 30), 6 * (60 + 30))
    assert figures["score"] == (3.0, 3.0) and result.accuracy == {"dense": 3.0, "small": 3.0}
    text = str(result)
    assert "48 B" in text and "24 B (50.0%)" in text and "163" in text
    assert json.dumps(result.to_dict())
    assert np.isclose(np.mean(result.scores["input"]), 1.0)


def test_features_to_keep_stay_whatever_their_weights_say():
    names = [f"f{i}" for i in range(12)]
    low = int(network()[0].weight.detach().abs().sum(0).argmin())
    for keep in ([low], [names[low]], {"input": [low]}):
        result = induce(network(), X, 11 / 12, names=names, keep=keep, measure=False)
        assert result.selector.keep == (low,) and list(result.selector.get_feature_names_out()) == [names[low]]


def test_silent_features_of_the_users_go_first_but_those_to_keep_stay():
    model = masked(network(), range(6))
    assert induce(model, X, 0.25, measure=False).selector.keep == tuple(range(6))  # more than asked are read by nobody
    assert induce(model, X, 0.5, keep=[11], measure=False).selector.keep[-1] == 11


def test_hidden_channels_go_with_the_features():
    model = network()
    result = induce(model, X, 0.5, hidden=0.5, round_to=1)
    assert result.model[0].weight.shape == (5, 6) and result.model[2].weight.shape == (3, 5)
    wide = perceptron(12, 40, 3)
    assert induce(wide, X, 0.5, "large_final", "local", hidden=0.5, measure=False).model[0].weight.shape == (24, 6)  # by 8


def test_hidden_channels_that_read_only_what_went_go_too():
    model = network()
    with torch.no_grad():
        model[0].weight[4] = 0
        model[0].weight[4, 2], model[0].bias[4], model[0].weight[:, 2] = 1e-6, 0, model[0].weight[:, 2] * 1e-6
    result = induce(model, X, 1 / 12, measure=False)
    assert 2 not in result.selector.keep and result.model[0].out_features == 9


class Two(nn.Module):
    """Two layers read the same input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.cat([self.a(x), self.b(x)], 1).relu())


def test_all_readers_of_an_input_agree():
    model, x = Two(), torch.randn(5, 6)
    with torch.no_grad():  # a prefers feature 0, b feature 5
        model.a.weight.copy_(torch.tensor([6.0, 5, 4, 3, 2, 1]).repeat(4, 1))
        model.b.weight.copy_(torch.tensor([1.0, 2, 4, 3, 5, 7]).repeat(4, 1))
    result = induce(model, x, 0.5)  # sums: 7, 7, 8, 6, 7, 8
    assert {2, 5} <= set(result.selector.keep) and len(result.selector.keep) == 3
    assert torch.allclose(
        result.whole(x), masked(masked(model, result.selector.keep, "a"), result.selector.keep, "b")(x), atol=1e-5
    )
    assert induce(model, x, 5 / 6, over_places="max", measure=False).selector.keep == (5,)


def test_channels_of_images_are_found_by_the_graph():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
    images = torch.randn(2, 4, 8, 8)
    result = induce(model, images, 0.5)
    assert result.selector.dim == 1 and result.model[0].weight.shape == (8, 2, 3, 3)
    assert torch.allclose(result.model(result.selector(images)), masked(model, result.selector.keep)(images), atol=1e-5)
    assert result.input_bytes == (4 * 64 * 4, 2 * 64 * 4)


def test_criteria_that_need_data_get_it():
    data, model = [(X, torch.arange(6) % 3)], network()
    with torch.no_grad():
        model[0].weight[:, 7] *= 50
    loud = X.clone()
    loud[:, 7] = 0  # large weights on what is always zero: magnitude keeps it, Taylor does not
    assert 7 in induce(model, loud, 0.5, measure=False).selector.keep
    taylor = induce(model, loud, 0.5, "taylor", data=[(loud, data[0][1])], loss=F.cross_entropy, measure=False)
    assert 7 not in taylor.selector.keep


def test_training_under_masks_of_features_and_then_removal_change_nothing_more():
    torch.manual_seed(0)
    model = perceptron(12, 10, 3)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    options = {"example_inputs": X, "features": {"input": 1}}
    sparsifier = Sparsifier(
        model, "coupled", "local", "large_final", sparsity={"input.1": 0.75}, schedule="one_cycle", **options
    )
    with attach(optimizer, sparsifier, total_steps=8):
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(model(X), torch.arange(6) % 3).backward()
            optimizer.step()
    kept = model[0].weight.detach().abs().sum(0).nonzero().flatten().tolist()
    assert len(kept) == 3
    result = induce(model, X, 0.75)
    assert list(result.selector.keep) == kept and torch.allclose(result.whole(X), model(X), atol=1e-6)


# --- files and exports -----------------------------------------------------------------------------------------------


def test_network_and_selector_are_one_file(tmp_path):
    result = induce(network(), X, 0.75, names=[f"f{i}" for i in range(12)], measure=False)
    result.save(tmp_path / "small.safetensors")
    small, selector = load_small(tmp_path / "small.safetensors", network()), InputSelector.load(tmp_path / "small.safetensors")
    assert selector == result.selector and selector.names is not None
    assert torch.equal(small(selector(X)), result.model(result.selector(X)))


def test_the_choice_is_read_from_a_file_that_was_saved_without_it(tmp_path):
    from fasterai.prune.small_files import save_small

    result = induce(network(), X, 0.75, measure=False)
    save_small(tmp_path / "small.safetensors", result.model)
    assert InputSelector.load(tmp_path / "small.safetensors").keep == result.selector.keep


def test_a_result_is_copied_and_the_copy_trains():
    result = copy.deepcopy(induce(network(), X, 0.5, measure=False))
    loss = result.model.train()(result.selector(X)).pow(2).mean()
    loss.backward()
    assert result.model[0].weight.grad.shape == (10, 6)


# --- fastai's tabular models -----------------------------------------------------------------------------------------

CATEGORIES = torch.stack([torch.arange(9) % n for n in (5, 7, 3)], 1)
NUMBERS = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))


def tabular(**options) -> nn.Module:
    model = pytest.importorskip("fastai.tabular.model").TabularModel([(5, 3), (7, 4), (3, 2)], 6, 2, [16, 8], **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("options", [{}, {"lin_first": False}, {"use_bn": False, "bn_cont": False}])
def test_categories_go_with_their_whole_embeddings(options):
    model = tabular(**options)
    result = induce(model, (CATEGORIES, NUMBERS), 5 / 9, measure=False)
    cat, cont = result.selectors["x_cat"], result.selectors["x_cont"]
    assert len(cat.keep) + len(cont.keep) == 4 and 1 <= len(cat.keep) < 3
    assert len(result.model.embeds) == len(cat.keep)
    wanted = model.embeds[cat.keep[0]].weight
    assert torch.equal(result.model.embeds[0].weight, wanted)
    # by hand: rows of zeros instead of embeddings, zeros behind the norm of numbers
    by_hand = copy.deepcopy(model)
    reader = next(m for m in by_hand.layers[0] if isinstance(m, nn.Linear))
    widths = [e.embedding_dim for e in model.embeds]
    starts = [sum(widths[:i]) for i in range(4)]
    gone = [c for i in range(3) if i not in cat.keep for c in range(starts[i], starts[i + 1])]
    gone += [starts[3] + i for i in range(6) if i not in cont.keep]
    with torch.no_grad():
        reader.weight[:, gone] = 0
    small = result.model(cat(CATEGORIES), cont(NUMBERS))
    assert torch.allclose(small, by_hand(CATEGORIES, NUMBERS), atol=1e-5)
    assert torch.allclose(result.whole(CATEGORIES, NUMBERS), small)


def test_a_category_whose_embedding_is_not_read_goes_first():
    model = tabular()
    with torch.no_grad():
        model.layers[0][0].weight[:, 3:7] = 1e-4  # the second embedding's columns
    result = induce(model, (CATEGORIES, NUMBERS), 1 / 9, names={"x_cat": ["a", "b", "c"]}, measure=False)
    assert list(result.selectors["x_cat"].get_feature_names_out()) == ["a", "c"] and len(result.selectors["x_cont"].keep) == 6
    kept = induce(model, (CATEGORIES, NUMBERS), 1 / 9, names={"x_cat": ["a", "b", "c"]}, keep={"x_cat": ["b"]}, measure=False)
    assert 1 in kept.selectors["x_cat"].keep
    alone = induce(model, (CATEGORIES, NUMBERS), 0.5, features={"x_cont": 1}, measure=False)
    assert list(alone.selectors) == ["x_cont"] and len(alone.model.embeds) == 3


def test_a_small_tabular_model_comes_back_from_its_file(tmp_path):
    result = induce(tabular(), (CATEGORIES, NUMBERS), 5 / 9, hidden=0.25, round_to=1, measure=False)
    result.save(tmp_path / "small.safetensors")
    small = load_small(tmp_path / "small.safetensors", tabular())
    cat, cont = (InputSelector.load(tmp_path / "small.safetensors", name) for name in ("x_cat", "x_cont"))
    assert torch.equal(small(cat(CATEGORIES), cont(NUMBERS)), result.whole(CATEGORIES, NUMBERS))
    other = tabular(lin_first=False)
    with pytest.raises(ValueError, match="model must be the dense model"):
        load_small(tmp_path / "small.safetensors", other)
    assert len(other.embeds) == 3 and other(CATEGORIES, NUMBERS).shape == (9, 2)


def test_a_small_tabular_model_is_exported_with_its_selectors(tmp_path):
    pytest.importorskip("onnxruntime")
    result = induce(tabular(), (CATEGORIES, NUMBERS), 5 / 9, measure=False)
    file = ONNXModel(export_onnx(result.whole, (CATEGORIES, NUMBERS), tmp_path / "a.onnx"))
    assert torch.allclose(file(CATEGORIES[:4], NUMBERS[:4]), result.whole(CATEGORIES[:4], NUMBERS[:4]), atol=1e-5)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"keep": [12]}, ValueError, "keep must hold indices of the 12 features, 0 to 11, got 12"),
        ({"keep": ["a"]}, ValueError, "got 'a'; pass names="),
        ({"keep": {"z": [1]}}, ValueError, "keep must be inputs, of.* 'z'"),
        (
            {"keep": list(range(4))},
            ValueError,
            "sparsity must leave the features of keep, .* takes 9 of the 8 others",
        ),
        ({"names": ["a"] * 11}, ValueError, "names must be as many as the features, 12, got 11"),
        ({"sparsity": 1.0}, ValueError, "sparsity must be below 1, got 1.0"),
        ({"sparsity": 0.99}, ValueError, "sparsity must leave at least one of the 12 features, got 0.99"),
        ({"sparsity": 75}, ValueError, "pass 0.75 for 75 %"),
        ({"hidden": 1}, ValueError, "hidden must be below 1, got 1"),
        ({"features": {"y": 1}}, ValueError, "features must be .*'y'"),
        ({"features": {"input": 0}}, ValueError, "features must not be the dimension of the samples"),
        ({"criteria": "taylor"}, ValueError, "data must be given|gradient"),
        ({"criteria": "largest"}, ValueError, "criteria must be"),
        ({"context": "nowhere"}, ValueError, "context must be"),
        ({"over_places": "median"}, ValueError, "over_places must be one of"),
        ({"round_to": 0}, ValueError, "round_to must be at least 1"),
        ({"example_inputs": None}, ValueError, "example_inputs must be"),
        ({"criteria": Criterion(lambda e: e.weight * float("nan"))}, ValueError, "finite|NaN"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_changed(options, error, words):
    model = network()
    before = copy.deepcopy(model.state_dict())
    arguments = {"example_inputs": X, "sparsity": 0.75} | options
    with pytest.raises(error, match=words):
        induce(model, **arguments)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_input_that_several_dimensions_could_mean_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"which dimension of input is meant, got none for 2x3x4, where .*\[1, 2\] may go"):
        induce(flat, torch.randn(2, 3, 4), 0.5)
    assert len(induce(flat, torch.randn(2, 12), 0.5, measure=False).selector.keep) == 6  # as flat images


def test_several_inputs_have_to_be_named():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    inputs = torch.randn(2, 4), torch.randn(2, 5)
    with pytest.raises(ValueError, match="features must say which input is meant"):
        induce(Sum(), inputs, 0.5)
    result = induce(Sum(), inputs, 0.5, features={"x": 1, "y": 1}, measure=False)
    assert sum(len(one.keep) for one in result.selectors.values()) == 5  # round(4.5) is 4
    assert result.whole(*inputs).shape == (2, 3)
    with pytest.raises(ValueError, match="selector must be that of one input, got x, y"):
        _ = result.selector
    with pytest.raises(ValueError, match=r"keep must be a dict by argument where there are several \(x, y\), got \[1\]"):
        induce(Sum(), inputs, 0.5, features={"x": 1, "y": 1}, keep=[1])
    one = induce(Sum(), inputs, 0.5, features={"y": 1}, measure=False)
    assert torch.allclose(one.whole(*inputs), one.model(inputs[0], one.selector(inputs[1])))
