"""Selectors of inputs: by hand, against scikit-learn's own, and in every place that feeds a network."""

import copy
import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted
from torch import nn

from fasterai.prune.features.selector import InputSelector
from fasterai.prune.small_files import load_small, save_small

X = torch.arange(10.0).view(2, 5)
NAMES = ("a", "b", "c", "d", "e")


def selector(**options):
    return InputSelector([3, 1], 5, **options)


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [[3, 1], (1, 3), ["d", "b"], np.array([1, 3]), torch.tensor([3, 1]), X[0] % 2 == 1])
def test_features_are_named_by_indices_names_or_flags(keep):
    assert InputSelector(keep, 5, names=NAMES).keep == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1, 5], 5), ValueError, "keep must hold indices of the 5 features, 0 to 4, got 5"),
        (([-1], 5), ValueError, "0 to 4, got -1"),
        (([1, 1], 5), ValueError, "keep must hold each feature once, got 1 twice"),
        (([], 5), ValueError, "keep must hold at least one feature, got none"),
        (([True, False], 5), ValueError, "flags of all 5 features, got 2 flags"),
        ((["b"], 5), ValueError, "got 'b'; pass names="),
        ((["z"], 5, 1, NAMES), ValueError, "keep must be one of a, b, c, d, e, got 'z'"),
        (([1.5], 5), TypeError, "keep must hold indices or names, got 1.5"),
        ((3, 5), TypeError, "keep must be a list of indices or names, got 3"),
        (([1], 5, 1, NAMES[:4]), ValueError, "names must be as many as the features, 5, got 4"),
        (([1], 5, 1, "abcde"), TypeError, "names must be a list of names, got 'abcde'"),
        (([1], 5, 1, ["a", "b", "a", "d", "e"]), ValueError, "names must be different ones, got 'a' twice"),
        (([1], 5, 0), ValueError, "dim must be at least 1, got 0"),
        (([0], 0), ValueError, "size must be at least 1, got 0"),
    ],
)
def test_bad_choices_are_refused(arguments, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        InputSelector(*arguments)


# --- data ------------------------------------------------------------------------------------------------------------


def test_tensors_arrays_and_tables_stay_what_they_are():
    found = selector()(X)
    assert torch.equal(found, torch.tensor([[1.0, 3.0], [6.0, 8.0]]))
    assert np.array_equal(selector()(X.numpy()), found.numpy())
    assert np.array_equal(selector()(X.tolist()), found.numpy())
    assert np.array_equal(selector()(sparse.csr_matrix(X.numpy())).toarray(), found.numpy())
    assert torch.equal(selector().item(X[1]), found[1])
    images = torch.randn(2, 4, 5, 3)
    assert torch.equal(selector(dim=2)(images), images[:, :, [1, 3]])
    assert np.array_equal(selector(dim=2)(images.numpy()), images[:, :, [1, 3]].numpy())


def test_the_way_back_puts_zeros_at_what_went():
    expected = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0], [0.0, 6.0, 0.0, 8.0, 0.0]])
    assert torch.equal(selector().inverse_transform(selector()(X)), expected)
    assert np.array_equal(selector().inverse_transform(selector()(X.numpy())), expected.numpy())
    frame = selector(names=NAMES).inverse_transform(pd.DataFrame([[1.0, 3.0]], columns=["b", "d"]))
    assert list(frame.columns) == list(NAMES) and frame.to_numpy().tolist() == [[0, 1, 0, 3, 0]]
    images = torch.randn(2, 4, 2)
    whole = selector(dim=2).inverse_transform(images)
    assert torch.equal(whole[..., [1, 3]], images) and not whole[..., [0, 2, 4]].any()


def test_tables_are_read_by_names_in_any_order():
    frame = pd.DataFrame(X.numpy(), columns=list(NAMES)[::-1])
    found = selector(names=NAMES)(frame)
    assert list(found.columns) == ["b", "d"] and found["b"].tolist() == [3.0, 8.0]
    assert list(selector()(frame).columns) == ["d", "b"]  # by position where it has no names
    with pytest.raises(ValueError, match="x must have the columns b, d, got none of the name 'b'"):
        selector(names=NAMES)(frame.drop(columns="b"))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 6), "x must have 5 features in dimension 1, got 6"),
        (np.zeros((2, 2)), "got 2 .*; it seems to be selected already"),
        (torch.zeros(5), r"x must have features in dimension 1, got the shape \(5,\)"),
        (pd.DataFrame(np.zeros((2, 4))), "x must have 5 features in dimension 1, got 4"),
    ],
)
def test_data_of_another_width_is_refused(x, words):
    with pytest.raises(ValueError, match=words):
        selector()(x)
    with pytest.raises(ValueError, match="x must have"):
        selector().inverse_transform(np.zeros((2, 3)))


SAMPLES = [(X[i % 2], torch.tensor(i)) for i in range(6)]


def test_datasets_and_loaders_give_the_kept_features_alone():
    data = selector().dataset(SAMPLES)
    assert len(data) == 6 and torch.equal(data[3][0], torch.tensor([6.0, 8.0])) and data[3][1] == 3
    loaders = [
        torch.utils.data.DataLoader(data, 4),
        selector().loader(torch.utils.data.DataLoader(SAMPLES, 4)),
        torch.utils.data.DataLoader(SAMPLES, 4, collate_fn=selector().collate()),
    ]
    for loader in loaders:
        assert [x.tolist() for x, _ in loader] == [[[1, 3], [6, 8]] * 2, [[1, 3], [6, 8]]]
        assert len(loader) == 2 and loader.batch_size == 4
    assert SAMPLES[0][0].shape == (5,)


def test_workers_of_a_loader_get_it():
    loader = torch.utils.data.DataLoader(selector().dataset(SAMPLES), 4, num_workers=1)
    assert next(iter(loader))[0].tolist() == [[1, 3], [6, 8]] * 2
    for one in (selector().dataset(SAMPLES), selector().loader(SAMPLES), selector().collate()):
        assert type(pickle.loads(pickle.dumps(one))) is type(one)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(SAMPLES)


def test_streams_are_wrapped_as_streams():
    data = selector().dataset(Stream())
    assert isinstance(data, torch.utils.data.IterableDataset)
    assert [x.tolist() for x, _ in torch.utils.data.DataLoader(data, 6)] == [[[1, 3], [6, 8]] * 3]
    with pytest.raises(TypeError, match="dataset must be a dataset of torch's, got generator"):
        selector().dataset(x for x in SAMPLES)


def test_a_part_is_found_by_position_key_or_path():
    x, y = X[0], torch.tensor(1)
    assert selector().dataset([{"x": x, "y": y}], "x")[0]["x"].tolist() == [1, 3]
    assert selector().dataset([((y, x), y)], (0, 1))[0][0][1].tolist() == [1, 3]
    assert selector().dataset([x])[0].tolist() == [1, 3]
    for item, where, words in [((x, y), 2, "one of 0, 1, got 2"), ({"x": x}, "z", "one of 'x', got 'z'"), (x, 1, "a Tensor")]:
        with pytest.raises(ValueError, match=f"argument must be a place in what the data gives.*{words}"):
            selector().dataset([item], where)[0]


def test_fastai_takes_it_for_items_and_for_batches():
    fastai = pytest.importorskip("fastai.data.core")
    for options in ({"after_item": selector().item_transform()}, {"after_batch": selector().batch_transform()}):
        dls = fastai.DataLoaders.from_dsets(SAMPLES, SAMPLES, bs=6, num_workers=0, **options)
        x, y = dls.valid.one_batch()
        assert x.tolist() == [[1, 3], [6, 8]] * 3 and y.tolist() == list(range(6))
    assert pickle.loads(pickle.dumps(selector().batch_transform()))((X, 0))[0].shape == (2, 2)


# --- scikit-learn ----------------------------------------------------------------------------------------------------


def test_it_answers_as_one_of_scikit_learns_own():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), np.arange(40) % 2
    x[:, [1, 3]] += 3 * y[:, None]
    theirs = SelectKBest(k=2).fit(x, y)
    ours = InputSelector(theirs.get_support(), 5).fit(x, y)
    assert np.array_equal(ours.get_support(), theirs.get_support())
    assert np.array_equal(ours.get_support(indices=True), theirs.get_support(indices=True))
    assert np.array_equal(ours.transform(x), theirs.transform(x))
    assert np.array_equal(ours.fit_transform(x, y), theirs.transform(x))
    assert np.array_equal(ours.inverse_transform(ours.transform(x)), theirs.inverse_transform(theirs.transform(x)))
    assert ours.get_feature_names_out().tolist() == theirs.get_feature_names_out().tolist()
    assert ours.get_feature_names_out(NAMES).tolist() == theirs.get_feature_names_out(NAMES).tolist()
    assert ours.n_features_in_ == theirs.n_features_in_ == 5


def test_it_stands_in_a_pipeline():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), np.arange(40) % 2
    pipeline = make_pipeline(selector(names=NAMES), LogisticRegression()).fit(x, y)
    assert np.array_equal(pipeline.predict(x), LogisticRegression().fit(x[:, [1, 3]], y).predict(x[:, [1, 3]]))
    assert pipeline[:-1].get_feature_names_out().tolist() == ["b", "d"]
    assert clone(pipeline).fit(x, y).score(x, y) == pipeline.score(x, y)
    assert Pipeline([("s", selector())]).get_params()["s__keep"] == (1, 3)
    check_is_fitted(pipeline)
    assert get_tags(selector()).requires_fit is False
    with pytest.raises(ValueError, match="x must have 5 features"):
        pipeline.predict(x[:, :4])
    with pytest.raises(ValueError, match="input_features must be a, b, c, d, e"):
        selector(names=NAMES).get_feature_names_out(["v", "w", "x", "y", "z"])


# --- networks and files ----------------------------------------------------------------------------------------------


def test_a_module_selects_in_front_of_a_network():
    network = nn.Linear(2, 3)
    whole = selector().in_front(network)
    assert torch.equal(whole(X), network(X[:, [1, 3]]))
    assert torch.equal(copy.deepcopy(whole)(X), whole(X))
    assert whole[0].selector == selector() and list(whole[0].state_dict()) == ["keep"]
    with pytest.raises(ValueError, match=r"x must have 5 features in dimension 1, got 2 .*selected already"):
        whole(X[:, :2])


def test_it_is_exported_to_onnx_with_the_network(tmp_path):
    pytest.importorskip("onnxruntime")
    from fasterai.export.onnx import ONNXModel, export_onnx

    whole = selector().in_front(nn.Linear(2, 3)).eval()
    file = ONNXModel(export_onnx(whole, X, tmp_path / "a.onnx"))
    batch = torch.randn(7, 5)
    assert torch.allclose(file(batch), whole(batch), atol=1e-6)


def test_it_comes_back_from_a_file_of_its_own_and_from_the_models(tmp_path):
    own, small = tmp_path / "selector.json", tmp_path / "small.safetensors"
    selector(names=NAMES).save(own)
    assert InputSelector.load(own) == selector(names=NAMES)
    torch.manual_seed(0)
    network = nn.Linear(2, 3)
    save_small(small, network, selector=selector())
    assert InputSelector.load(small) == selector()
    assert torch.equal(load_small(small, nn.Linear(2, 3)).weight, network.weight)
    save_small(small, network, selector={"x": selector(), "z": selector(dim=2)})
    assert InputSelector.load(small, "z").dim == 2
    with pytest.raises(ValueError, match=r"argument must be one of those in .*, 'x', 'z', got ''"):
        InputSelector.load(small)


def test_files_without_a_selector_or_with_a_spoiled_one_are_refused(tmp_path):
    path = tmp_path / "file"
    save_small(path, nn.Linear(2, 3))
    for content in (None, b"{}", b"\xff\x00", b"[1]", b'{"format": "fasterai-selector-1", "selectors": {"": {"keep": [1]}}}'):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="path must be a file with a selector, got"):
            InputSelector.load(path)
    selector().save(path)
    path.write_text(path.read_text().replace("[1, 3]", "[1, 9]"))
    with pytest.raises(ValueError, match="keep must hold indices of the 5 features, 0 to 4, got 9"):
        InputSelector.load(path)
    with pytest.raises(TypeError, match="selector must be an InputSelector, or a dict of them, got 3"):
        save_small(path, nn.Linear(2, 3), selector={"": 3})


def test_a_changed_selector_in_a_models_file_is_told(tmp_path):
    path = tmp_path / "small.safetensors"
    save_small(path, nn.Linear(2, 3), selector=selector())
    path.write_bytes(path.read_bytes().replace(b"[1, 3]", b"[1, 2]"))
    with pytest.raises(ValueError, match="whose header was changed"):
        load_small(path, nn.Linear(2, 3))


def test_it_is_copied_pickled_and_written_as_plain_data():
    one = selector(names=NAMES)
    assert copy.deepcopy(one) == one == pickle.loads(pickle.dumps(one))
    assert InputSelector.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert one.share == 0.4 and repr(one) == "<InputSelector: 2 of 5 features kept, dimension 1>"
