"""Routes: anchors in their order, one network for all of them, and a teacher that goes the route during one training."""

import copy
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasterai.distill.routes.anchors as anchors_module
from fasterai.callbacks.plain import attach
from fasterai.core.loop import Participant
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.logits import SoftTarget
from fasterai.distill.routes.hardness import Greedy
from fasterai.distill.routes.route import Route
from tests.callbacks.test_own_method import FRAMEWORKS
from tests.callbacks.test_own_method import Net as FrameworkNet
from tests.route_nets import Net, X, Y, anchors, route, student, teacher, train

pytestmark = pytest.mark.filterwarnings("ignore")


def place(network, count=8):
    """Which of the anchors a network holds, from 0."""
    states = anchors(count)
    return next(i for i, state in enumerate(states) if torch.equal(network.first.weight, state["first.weight"]))


# --- anchors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "k", "wanted"),
    [
        (8, 2, [1, 3, 5, 7]),
        (8, 1, [*range(8)]),
        (8, 3, [2, 5, 7]),
        (8, 8, [7]),
        (8, 9, [7]),
        (7, 2, [1, 3, 5, 6]),
        (1, 1, [0]),
    ],
)
def test_every_k_th_anchor_and_the_last_by_hand(count, k, wanted):
    found = route(count).every(k)
    assert [place(found.load(i)) for i in range(len(found))] == wanted


def test_anchors_are_read_from_a_folder_in_their_order(tmp_path):
    for i, state in enumerate(anchors(3)):
        torch.save({"model": state}, tmp_path / f"teacher_{8 + i}.pth")
    found = Route.from_folder(tmp_path, teacher())
    assert [one.name for one in found.anchors] == ["teacher_8.pth", "teacher_9.pth", "teacher_10.pth"]
    assert [place(found.load(i)) for i in range(3)] == [0, 1, 2]


def test_networks_are_their_own_anchors():
    networks = [teacher(100), teacher(101)]
    found = Route.from_checkpoints(networks)
    assert found.load(0) is networks[0] and found.load(1) is networks[1]
    network = teacher(7)
    loaded = Route.from_checkpoints(networks, network).load(1)
    assert loaded is network and place(network) == 1 and place(networks[0]) == 0


def test_one_network_holds_all_anchors_in_turn(tmp_path, monkeypatch):
    class Alone(Net):
        def __deepcopy__(self, memo):
            raise AssertionError("no copy of the teacher")

    read, refs = anchors_module.read_tensors, []

    def watched(path):
        assert not any(ref() is not None for ref in refs), "the anchor before is gone"
        found = read(path)
        refs.extend(weakref.ref(x) for x in found.values())
        return found

    monkeypatch.setattr(anchors_module, "read_tensors", watched)
    for i, state in enumerate(anchors(4)):
        torch.save(state, tmp_path / f"{i}.pt")
    network = Alone(8)
    own = {name: x.data_ptr() for name, x in network.state_dict().items()}
    found = Route.from_folder(tmp_path, network)
    train(student(), [Distiller(found.one_stage(), SoftTarget(T=2))])
    found.distil(train, student(), choose=Greedy(0.8, [(X, Y)]))
    assert len(refs) > 8 * len(own) and {name: x.data_ptr() for name, x in network.state_dict().items()} == own


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (([],), ValueError, "checkpoints must hold an anchor at least, got none"),
        ((anchors(1), None), TypeError, "model must be the teacher's network, for checkpoints that are no networks"),
        ((anchors(1), "resnet"), TypeError, "model must be the teacher's network, got 'resnet'"),
        ((anchors(1), Net(6)), ValueError, "got anchor 1, where first.weight is 8x4 instead of 6x4"),
        (([*anchors(1), Net(6).state_dict()], Net(8)), ValueError, "got anchor 2, where first.weight is 6x4 instead of 8x4"),
        (("route.pt",), TypeError, r"checkpoints must be a list, got a str; pass \[it\], or Route.from_folder"),
        ((["none.pt"], Net(8)), ValueError, "checkpoints must be files, got none.pt, which does not exist"),
    ],
)
def test_bad_checkpoints_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        Route.from_checkpoints(*given)


def test_bad_folders_and_intervals_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder must hold checkpoints .*, got .*, which holds none"):
        Route.from_folder(tmp_path, teacher())
    with pytest.raises(ValueError, match=r"folder must be one of checkpoints, got .*none"):
        Route.from_folder(tmp_path / "none", teacher())
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        route().every(0)


# --- one stage --------------------------------------------------------------------------------------------------------


class Watching(Participant):
    """Notes which anchor the network holds as each step is taken."""

    def __init__(self, network):
        self.network, self.places = network, []

    def after_forward(self, batch):
        self.places.append(place(self.network))


@pytest.mark.parametrize(
    ("count", "steps", "wanted"),
    [
        (4, 8, [0, 0, 1, 1, 2, 2, 3, 3]),
        (3, 8, [0, 0, 0, 1, 1, 1, 2, 2]),  # floor(3 * step / 8)
        (4, 4, [0, 1, 2, 3]),
        (8, 4, [0, 2, 4, 6]),  # fewer steps than anchors
        (1, 4, [0, 0, 0, 0]),
        # A student that trains longer than its teacher, where others index anchors by its epoch, and fail.
        (2, 12, [0] * 6 + [1] * 6),
    ],
)
def test_anchors_change_at_the_steps_by_hand(count, steps, wanted):
    found = route(count)
    watching = Watching(found.model)
    train(student(), [watching, Distiller(found.one_stage(), SoftTarget(T=2))], steps=steps)
    assert watching.places == wanted


def test_the_loss_of_a_step_by_numpy():
    """The task has one softmax and the distillation one logarithm: others apply both twice."""
    found, model = route(2), student().eval()
    z, t = model(X), teacher(100)(X)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, Distiller(found.one_stage(), SoftTarget(T=4), weight=0.9), total_steps=2, model=model) as handle:
        loss = handle.loss(F.cross_entropy(z, Y), X, Y, z)
        optimizer.step()
        optimizer.step()
    z, t, y = z.detach().numpy().astype(np.float64), t.detach().numpy().astype(np.float64), Y.numpy()

    def softmax(x):
        x = np.exp(x - x.max(1, keepdims=True))
        return x / x.sum(1, keepdims=True)

    task = -np.log(softmax(z)[np.arange(32), y]).mean()
    p, q = softmax(t / 4), softmax(z / 4)
    kl = (p * (np.log(p) - np.log(q))).sum(1).mean()
    assert float(loss) == pytest.approx(0.1 * task + 0.9 * 16 * kl, rel=1e-5)


def test_the_teacher_is_in_eval_mode_without_gradients_and_gets_its_modes_back():
    found = route()
    found.model.train()
    found.model.norm.eval()
    modes = []

    class Modes(Participant):
        def after_forward(self, batch):
            modes.append([module.training for module in found.model.modules()])

    train(student(), [Modes(), Distiller(found.one_stage(), SoftTarget(T=2))])
    assert not any(any(one) for one in modes)
    assert found.model.training and not found.model.norm.training
    assert all(p.grad is None and p.requires_grad for p in found.model.parameters())
    assert all(torch.equal(x, anchors()[3][name]) for name, x in found.model.state_dict().items()), "the last one, unchanged"


def test_features_of_each_anchor_are_read():
    found = Route.from_checkpoints([copy.deepcopy(Net(6)).state_dict() for _ in range(2)], Net(6))
    from tests.distill.plain_losses import Squares

    train(student(), [Distiller(found.one_stage(), Squares(), ["first"], ["first"])])
    networks = Route.from_checkpoints([Net(6), Net(6)])
    train(student(), [Distiller(networks.one_stage(), Squares(), ["first"], ["first"])])
    assert not any(module._forward_hooks for one in networks.anchors for module in one.source.modules())


def framework_route():
    torch.manual_seed(5)
    states = []
    for _ in range(4):
        network = FrameworkNet()
        nn.init.normal_(network.body.weight)
        states.append(network.state_dict())
    return Route.from_checkpoints(states, FrameworkNet())


@pytest.mark.parametrize("run", FRAMEWORKS)
def test_one_stage_resumes_bit_for_bit_in_every_framework(run, tmp_path):
    whole, stopped, resumed = FrameworkNet(), FrameworkNet(), FrameworkNet()

    def given():
        return [Distiller(framework_route().one_stage(), SoftTarget(T=2), weight=0.9)]

    run(whole, given(), tmp_path / "whole", stop=False, resume=False)
    (tmp_path / "parts").mkdir()
    run(stopped, given(), tmp_path / "parts", stop=True, resume=False)
    run(resumed, given(), tmp_path / "parts", stop=False, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_states_of_a_longer_route_are_refused():
    teacher = route(2).one_stage()
    with pytest.raises(ValueError, match="state's anchor must be one of the route's 2, got 4"):
        teacher.load_state_dict({"anchor": 3})
    with pytest.raises(TypeError, match="state's anchor must be a whole number"):
        teacher.load_state_dict({"anchor": "x"})


def test_a_student_that_is_the_teacher_s_network_is_refused_before_it_is_written_into():
    network = teacher(7)
    before = network.first.weight.clone()
    found = Route.from_checkpoints(anchors(), network)
    for call in (
        lambda: found.distil(train, network),
        lambda: found.hardness(network, [(X, Y)]),
        lambda: train(network, [Distiller(found.one_stage(), SoftTarget(T=2))]),
    ):
        with pytest.raises(ValueError, match=r"model must share no parameter with the student.*; pass copy.deepcopy\(model\)"):
            call()
    assert torch.equal(network.first.weight, before)


def test_copies_go_their_own_way():
    found = route()
    other = copy.deepcopy(found.one_stage())
    train(student(), [Distiller(other, SoftTarget(T=2))])
    assert place(other.route.model) == 3 and other.route.model is not found.model


def test_shown():
    assert repr(route()) == "<Route: 4 anchors, anchor 1 to anchor 4>" and len(route()) == 4
    assert repr(route().one_stage()) == "<RouteTeacher: anchor 1 of 4>"
    assert str(route(1)).splitlines()[0] == "Route of 1 anchor"
