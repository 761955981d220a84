"""Study of pre-training: what each run begins with and trains on, and checkpoints of one's own."""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fasterai.study.data import load_data
from fasterai.study.description import Size
from fasterai.study.pretraining import CLASSES, LABELLED, ROTATIONS, SCRATCH, TUNED, fit_checkpoint_, pretraining, trial
from fasterai.study.workbench import accuracy, make_mlp, train

pytest.importorskip("optuna")

module = importlib.import_module("fasterai.study.pretraining")  # the package has the function under this name
SIZE = Size("tiny", 240, 100, 8, epochs=1, batch_size=16)


@pytest.fixture(scope="module")
def data():
    return load_data(None, SIZE)


# --- the tasks ----------------------------------------------------------------------------------------------------------


def test_the_last_classes_are_kept_back_from_pre_training(data):
    before, target = module._tasks(CLASSES, data)
    assert (before.classes, target.classes) == (data.classes[:8], data.classes[8:])
    for part, first, second in ((data.train, before.train, target.train), (data.test, before.test, target.test)):
        images, labels = part
        assert torch.equal(first[0], images[labels < 8]) and torch.equal(first[1], labels[labels < 8])
        assert torch.equal(second[0], images[labels >= 8]) and torch.equal(second[1], labels[labels >= 8] - 8)


def test_images_are_turned_by_what_their_class_says(data):
    before, target = module._tasks(ROTATIONS, data)
    assert len(before.classes) == 4 and not before.flip
    images, turns = before.train
    assert set(turns.tolist()) == {0, 1, 2, 3}
    for image, turned, k in zip(data.train[0][:20], images, turns, strict=False):
        assert torch.equal(torch.rot90(turned, -int(k), (1, 2)), image)
    count = round(LABELLED * 240)
    assert torch.equal(target.train[0], data.train[0][:count]) and torch.equal(target.train[1], data.train[1][:count])
    assert target.test is data.test and target.classes == data.classes


def test_fewer_than_four_classes_cannot_be_shared_out(data):
    few = module._of_classes(data, range(3))
    with pytest.raises(ValueError, match="data must have at least 4 classes, of which two are kept back, got 3"):
        trial({"task": CLASSES, "start": TUNED, "sparsity": 0.5}, 0, SIZE, few)


# --- the runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [SCRATCH, TUNED])
def test_a_run_begins_with_what_it_says_and_ends_as_sparse_as_asked_for(data, monkeypatch, start):
    seen = []

    def noted(network, images, participants=(), **how):
        begins = {n: x.clone() for n, x in network.state_dict().items()}
        train(network, images, participants, **how)
        seen.append((begins, network, images, how["lr"]))

    for cached in (module._checkpoint, module._dense):
        cached.cache_clear()
    monkeypatch.setattr(module, "train", noted)
    found = trial({"task": CLASSES, "start": start, "sparsity": 0.75}, 3, SIZE, data)
    assert len(seen) == (3 if start == TUNED else 2)
    _, target = module._tasks(CLASSES, data)
    (first, dense, one, lr), (second, pruned, two, lower) = seen[-2:]
    assert one is two is target and lower == lr / 2
    torch.manual_seed(3)
    fresh = module.make_residual(target).state_dict()
    own = seen[0][1].state_dict() if start == TUNED else fresh
    assert all(torch.equal(first[n], own[n]) for n in fresh if not n.startswith("8."))
    assert torch.equal(first["8.weight"], fresh["8.weight"])  # the last layer is of other classes
    assert all(torch.equal(second[n], x) for n, x in dense.state_dict().items())
    assert float((pruned[0].weight == 0).float().mean()) == 0.75
    assert found == {"accuracy": accuracy(pruned, target), "unpruned_accuracy": accuracy(dense, target)}


def test_all_sparsities_of_a_seed_prune_the_same_network(data):
    module._dense.cache_clear()
    runs = [trial({"task": ROTATIONS, "start": SCRATCH, "sparsity": s}, 0, SIZE, data) for s in (0.0, 0.5, 0.9)]
    assert len({found["unpruned_accuracy"] for found in runs}) == 1
    assert module._dense.cache_info().misses == 1


# --- a checkpoint of one's own ------------------------------------------------------------------------------------------


def net(classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, classes))


def test_all_but_the_last_layer_is_taken_from_a_checkpoint():
    tensors, network = net(7).state_dict(), net(3)
    head = network[4].weight.clone()
    fit_checkpoint_(network, tensors)
    assert torch.equal(network[1].weight, tensors["1.weight"]) and torch.equal(network[4].weight, head)
    fit_checkpoint_(network, {n: x for n, x in tensors.items() if not n.startswith("4.") and "num_batches" not in n})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.pop("1.weight"), r"1\.weight is missing$"),
        (lambda t: t.update({"1.weight": torch.zeros(12, 63)}), r"1\.weight is \(12, 63\) and not \(12, 64\)$"),
        (lambda t: t.update({"9.weight": torch.zeros(2)}), r"9\.weight is none of its tensors$"),
        (lambda t: t.clear(), r"1\.bias is missing, 1\.weight is missing, 2\.bias is missing, and 3 more$"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_and_changes_nothing(tmp_path, spoil, said):
    tensors, network = net(7).state_dict(), net(3)
    spoil(tensors)
    before = {n: x.clone() for n, x in network.state_dict().items()}
    with pytest.raises(ValueError, match=f"checkpoint must be of the same network, less its last layer, .* where {said}"):
        fit_checkpoint_(network, tensors)
    assert all(torch.equal(x, before[n]) for n, x in network.state_dict().items())
    if tensors:
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=r"got .*other\.safetensors, where"):
            pretraining(net, tmp_path / "other.safetensors", folder=tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("network", "name", "options", "error", "said"),
    [
        (net(3), "w.pt", {}, TypeError, "network must be a function that makes one for a number of classes, got a Sequential"),
        (net, "none.pt", {}, ValueError, r"checkpoint must be a file, got .*none\.pt, which does not exist"),
        (net, "w.pt", {"sparsities": [80]}, ValueError, "sparsities must be .* got 80"),
        (net, "text.pt", {}, ValueError, r"checkpoint must be a state dict that torch\.save wrote"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, network, name, options, error, said):
    torch.save(net(3).state_dict(), tmp_path / "w.pt")
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(error, match=said):
        pretraining(network, tmp_path / name, folder=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_study_of_ones_own_is_resumed_and_another_checkpoint_is_another_study(tmp_path):
    def weights(seed):
        torch.manual_seed(seed)
        return net(5).state_dict()

    torch.save(weights(1), tmp_path / "w.pt")
    calls = []

    def made(classes):
        calls.append(classes)
        return net(classes)

    sizes = {"tiny": SIZE}
    how = {"folder": tmp_path / "out", "size": "tiny", "sizes": sizes, "sparsities": [0.0, 0.8], "progress": False}
    result = pretraining(made, tmp_path / "w.pt", **how)
    assert (result.failures, len(result.rows), calls) == ({}, 4, [2, 10, 10, 10, 10])
    assert len({row.settings["start"] for row in result.rows}) == 2
    assert (tmp_path / "out" / "picture.png").is_file()
    again = pretraining(made, tmp_path / "w.pt", **how)
    assert again.done == result.done and calls[5:] == [2]
    torch.save(weights(2), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="settings"):
        pretraining(made, tmp_path / "w.pt", **how)


def test_the_networks_of_the_workbench_take_their_own_checkpoints(data):
    network = make_mlp(data)
    fit_checkpoint_(network, make_mlp(module._of_classes(data, range(4))).state_dict())
    assert accuracy(network, data) >= 0
