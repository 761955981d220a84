"""Anchors: what trainers write is read, and what is of another network is refused by name."""

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fasterai.distill.routes.anchors import Anchor, as_anchor, find_files, fit_tensors, load_anchor_
from fasterai.distill.routes.route import Route
from tests.route_nets import Net, X, Y, anchors, teacher

STATE = anchors(1)[0]


def under(prefix, state=STATE):
    return {prefix + name: x for name, x in state.items()}


FILES = {
    "plain.pth": STATE,
    "fastai.pth": {"model": STATE, "opt": {"state": [{"step": 3}], "hypers": [{"lr": 0.1}]}},
    "lightning.ckpt": {"state_dict": under("net."), "epoch": 3, "loops": {}},
    "lightning_more.ckpt": {"state_dict": {**under("net."), "metric.total": torch.ones(2)}, "epoch": 3},
    "others.pt": {"model_state_dict": under("module."), "step": 9},
    "compiled.pt": under("_orig_mod."),
    "half.pt": {name: x.half() if x.is_floating_point() else x for name, x in STATE.items()},
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_trainers_are_read(name, zipped, tmp_path):
    torch.save(FILES[name], tmp_path / name, _use_new_zipfile_serialization=zipped)
    model = Net(8)
    load_anchor_(model, as_anchor(str(tmp_path / name), 1))
    tolerance = 1e-3 if name == "half.pt" else 0.0
    for key, x in model.state_dict().items():
        assert torch.allclose(x, STATE[key], atol=tolerance, rtol=0), key


@pytest.mark.parametrize("with_opt", [True, False])
def test_what_a_learner_saves_is_read(with_opt, tmp_path):
    data, trained = DataLoader(TensorDataset(X, Y), 16), teacher(3)
    learn = Learner(DataLoaders(data, data), trained, loss_func=CrossEntropyLossFlat(), path=tmp_path)
    learn.logger = lambda row: None
    learn.fit(1)
    path = learn.save("anchor", with_opt=with_opt)
    found = Route.from_checkpoints([path], Net(8)).load(0).state_dict()
    assert all(torch.equal(x, found[name]) for name, x in trained.state_dict().items())
    assert not [one for one in torch.serialization.get_safe_globals() if "fastcore" in str(one)], "as before"


def test_safetensors_and_folders_of_hugging_face_are_read(tmp_path):
    for number, prefix in ((10, "model."), (9, "")):
        (tmp_path / f"checkpoint-{number}").mkdir()
        save_file(under(prefix), tmp_path / f"checkpoint-{number}" / "model.safetensors")
    (tmp_path / "logs").mkdir()
    found = list(find_files(tmp_path))
    assert [path.name for path in found] == ["checkpoint-9", "checkpoint-10"]
    for path in found:
        assert torch.equal(fit_tensors(Net(8), as_anchor(path, 1))["first.weight"], STATE["first.weight"])


def test_files_are_found_in_the_order_of_their_numbers_and_hidden_parts_are_none(tmp_path):
    for name in ("epoch=10.ckpt", "epoch=9.ckpt", "epoch=2-step=40.ckpt", "last.ckpt", ".epoch=11.ckpt.a1b2.part", ".x.pt"):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in find_files(tmp_path)] == [
        "epoch=2-step=40.ckpt",
        "epoch=9.ckpt",
        "epoch=10.ckpt",
        "last.ckpt",
    ]


def test_a_network_keeps_its_tensors_and_flags():
    model = teacher(5)
    model.first.requires_grad_(False)
    before = {name: id(x) for name, x in model.state_dict(keep_vars=True).items()}
    load_anchor_(model, Anchor("a", STATE))
    assert {name: id(x) for name, x in model.state_dict(keep_vars=True).items()} == before
    assert not model.first.weight.requires_grad and model.last.weight.requires_grad
    assert torch.equal(model.norm.running_mean, STATE["norm.running_mean"])


def test_tied_tensors_may_be_there_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = self.a

    model = Tied()
    load_anchor_(model, Anchor("a", {"a.weight": torch.ones(3, 3)}))
    assert (model.b.weight == 1).all()


def test_counts_that_older_files_lack_may_lack():
    state = {name: x for name, x in STATE.items() if not name.endswith("num_batches_tracked")}
    load_anchor_(Net(8), Anchor("a", state))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            Net(6).state_dict(),
            r"got one, where first.weight is 6x4 instead of 8x4; first.bias is 6 instead of 8; .*; and 4 more",
        ),
        ({n: x for n, x in STATE.items() if n != "last.bias"}, "where last.bias is missing$"),
        ({**STATE, "extra": torch.ones(1)}, "where extra is too many$"),
        (nn.Linear(2, 2).state_dict(), "where first.weight is missing; .*"),
    ],
)
def test_another_network_is_refused_by_its_names(state, message):
    model = teacher(7)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"checkpoints must be of the network that the route is given, .*{message}"):
        load_anchor_(model, Anchor("one", state))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "that torch.load"),
        (b"not a file of weights", "that torch.load"),
        ({"epoch": 3}, "hold a state dict, got .*, which holds a dict without tensors"),
        ([1, 2], "which holds a list without tensors"),
        (Net(8), "that torch.load.path, weights_only=True. reads, got .*UnpicklingError.; write them by torch.save"),
    ],
)
def test_a_file_without_weights_is_refused(content, message, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"checkpoints must .*{message}"):
        fit_tensors(Net(8), as_anchor(path, 1))
    broken = tmp_path / "a.safetensors"
    broken.write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"checkpoints must be files of weights, got .*a.safetensors"):
        fit_tensors(Net(8), as_anchor(broken, 1))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoints must be files, got .*none.pt, which does not exist"):
        as_anchor(tmp_path / "none.pt", 1)
    with pytest.raises(TypeError, match="checkpoints must be paths, state dicts or networks, got 3"):
        as_anchor(3, 1)
