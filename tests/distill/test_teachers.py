"""Teachers: in eval mode, without gradients, in the student's precision; as they were after every end."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fasterai.core.batch import Batch
from fasterai.distill.cache.caching import cache_teacher
from fasterai.distill.maps import attention_maps
from fasterai.distill.matching import match_feature_layers
from fasterai.distill.routes.route import Route
from fasterai.distill.teachers import NetworkTeacher, SeveralTeachers, Teacher, as_teacher
from tests.distill.nets import CLASSES, Named, X, Y, hooks, net


def batch(outputs=None, **keywords) -> Batch:
    return Batch((X[0],), (Y[0],), keywords, torch.zeros(6, 4) if outputs is None else outputs)


def begun(model: nn.Module, layers=(), student=None) -> NetworkTeacher:
    teacher = NetworkTeacher(model)
    teacher.begin(net() if student is None else student, layers)
    return teacher


def test_it_answers_in_eval_mode_and_nothing_of_it_changes():
    model = net(6)
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    teacher = begun(model, ["1", "0"])
    assert not any(m.training for m in model.modules())
    answers = teacher.answer(batch())
    assert torch.equal(answers.logits, copy.deepcopy(model).eval()(X[0])) and not answers.logits.requires_grad
    assert [tuple(x.shape) for x in answers.features] == [(6, 6, 4, 4)] * 2
    assert torch.equal(answers.features[0], model[1](answers.features[1]))
    teacher.end()
    teacher.end()
    assert [m.training for m in model.modules()] == modes and hooks(model) == 0
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and [p.requires_grad for p in model.parameters()] == flags


def test_a_network_that_two_ask_gets_its_modes_back_when_both_are_done():
    model = net()
    first, second = begun(model), begun(model)
    first.end()
    assert not model.training
    second.end()
    assert model.training and model[1].training


@pytest.mark.parametrize("tie", ["object", "part", "memory"])
def test_a_teacher_that_shares_a_parameter_with_the_student_is_refused(tie):
    student, teacher = net(), net(seed=1)
    if tie == "object":
        teacher = student
    elif tie == "part":
        teacher[5] = student[5]
    else:
        teacher[5].weight = nn.Parameter(student[5].weight.data)
    with pytest.raises(
        ValueError, match=r"teacher must share no parameter with the student, .* got one that shares \d.weight; "
    ):
        begun(teacher, student=student)
    assert teacher.training and hooks(teacher) == 0


def test_an_unknown_layer_leaves_it_as_it_was():
    model = net()
    with pytest.raises(ValueError, match="activations_teacher must be layers of the model"):
        begun(model, ["nine"])
    assert model.training and hooks(model) == 0


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (lambda x: x, True),
        (lambda x: (x, None), True),
        (lambda x: {"logits": x}, True),
        (lambda x: {"hidden": x}, False),
        (lambda x: None, False),
    ],
)
def test_logits_of_results_of_any_kind(output, found):
    answers = begun(Named(output)).answer(batch())
    assert (answers.logits is not None) == found


def test_all_inputs_are_handed_on_but_labels():
    class Asks(nn.Module):
        def forward(self, x, *, scale, labels):
            return x.sum((2, 3)) * scale + labels[:, None]

    teacher = begun(named := Named())
    two = teacher.answer(Batch((X[0], 2.0), (), {"labels": Y[0]}, torch.zeros(6, 4))).logits
    assert torch.equal(two, named(X[0], 2.0))
    asked = begun(Asks()).answer(batch(scale=torch.ones(1), labels=Y[0])).logits
    assert torch.equal(asked, X[0].sum((2, 3)) + Y[0][:, None])


def test_labels_are_not_given_to_one_that_can_do_without():
    class Watching(nn.Module):
        def forward(self, x, labels=None):
            assert labels is None
            return x.mean((2, 3))

    begun(Watching()).answer(batch(labels=Y[0]))


def test_it_works_in_the_precision_of_the_student():
    teacher = begun(net(6), ["0"])
    assert teacher.answer(batch(torch.zeros(6, 4).bfloat16())).features[0].dtype == torch.bfloat16
    assert teacher.answer(batch()).features[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher.answer(batch()).features[0].dtype == torch.bfloat16
    half = begun(net(6).bfloat16(), ["0"])
    assert half.answer(batch()).features[0].dtype == torch.bfloat16  # its inputs are float32


class Elsewhere(nn.Module):
    """Refuses tensors that were not moved to its own device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3, device="meta"))

    def forward(self, x, *, mask=None):
        assert x.is_meta and mask.is_meta
        return torch.zeros(6, 4)


def test_inputs_go_to_its_device():
    answers = begun(Elsewhere()).answer(batch(mask=torch.ones(6)))
    assert answers.logits.device == X.device


def test_several_are_averaged():
    models = [net(6, seed=1), net(6, seed=2)]
    teacher = as_teacher(models)
    teacher.begin(net(), ["0"])
    answers = teacher.answer(batch())
    a, b = (m(X[0]) for m in models)
    torch.testing.assert_close(answers.logits, (a + b) / 2)
    torch.testing.assert_close(answers.features[0], (models[0][0](X[0]) + models[1][0](X[0])) / 2)
    teacher.end()
    assert all(m.training and not hooks(m) for m in models)


def test_several_of_other_shapes_are_refused_by_name():
    teacher = SeveralTeachers([net(6), net(8)])
    teacher.begin(net(), ["0"])
    with pytest.raises(
        ValueError, match=r"teacher must be several of one shape of outputs of layer 0 .*\(6, 6, 4, 4\) and \(6, 8"
    ):
        teacher.answer(batch())
    teacher = SeveralTeachers([net(classes=4), net(classes=5)])
    teacher.begin(net(), [])
    with pytest.raises(ValueError, match=r"several of one shape of logits, got \(6, 4\) and \(6, 5\); distil from one of them"):
        teacher.answer(batch())


def test_several_of_which_one_refuses_are_as_they_were():
    models = [net(6), net(6)]
    models[1][0] = nn.Identity()
    teacher = SeveralTeachers([models[0], nn.Sequential(nn.Linear(2, 2))])
    with pytest.raises(ValueError, match="activations_teacher"):
        teacher.begin(net(), ["5"])
    assert models[0].training and not hooks(models[0])


def test_one_that_stands_twice_gets_its_modes_back():
    model = net()
    teacher = SeveralTeachers([model, model])
    teacher.begin(net(), ["0"])
    teacher.end()
    assert model.training and not hooks(model)


def test_one_that_two_runs_share_answers_each_with_its_own_layers():
    shared, student = NetworkTeacher(net(6)), net()
    first, second = as_teacher(shared), as_teacher(shared)
    first.begin(student, ["0"])
    second.begin(student, ["5"])
    shapes = [tuple(one.answer(batch()).features[0].shape) for one in (first, second)]
    assert shapes == [(6, 6, 4, 4), (6, CLASSES)]
    first.end()
    assert not shared.model.training
    second.end()
    assert shared.model.training


def test_a_network_that_is_put_into_training_mode_in_between_answers_in_eval_mode():
    teacher = begun(net(6), [])
    expected, mean = teacher.answer(batch()).logits, teacher.model[1].running_mean.clone()
    teacher.model.train()
    assert torch.equal(teacher.answer(batch()).logits, expected)
    assert torch.equal(teacher.model[1].running_mean, mean) and teacher.model.training


def test_several_hear_of_each_step_and_of_the_position():
    heard = []

    class Hears(NetworkTeacher):
        def after_step(self):
            heard.append("step")

        def at_position(self, position):
            heard.append(position)

    several = SeveralTeachers([Hears(net()), Hears(net())])
    several.after_step()
    several.at_position(0.5)
    assert heard == ["step", "step", 0.5, 0.5]


def test_what_an_earlier_pass_has_left_is_no_answer():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.runs = nn.Identity(), True

        def forward(self, x):
            return self.body(x) if self.runs else x

    teacher = begun(Sometimes(), ["body"])
    with torch.no_grad():
        teacher.model(X[0])
    teacher.model.runs = False
    with pytest.raises(ValueError, match="activations_teacher must be layers that run in each forward pass"):
        teacher.answer(batch())


def test_what_can_be_a_teacher():
    one = NetworkTeacher(net())
    several = SeveralTeachers([one])
    assert as_teacher(several) is several and isinstance(as_teacher(net()), Teacher)
    assert as_teacher(one).model is one.model
    with pytest.raises(TypeError, match=r"teacher must be a network, a Teacher or a list of such, got 3 \(int\)$"):
        as_teacher(3)
    with pytest.raises(TypeError, match=r"got 'net.pth' \(str\); load its weights into a network: model.load_state_dict"):
        as_teacher("net.pth")
    with pytest.raises(TypeError, match=r"got <Route: 1 anchor, .* \(Route\); pass route.one_stage\(\)"):
        as_teacher(Route.from_checkpoints([net()]))
    with pytest.raises(ValueError, match="teacher must be a network or several, got none"):
        as_teacher([])
    with pytest.raises(ValueError, match="state must be of 2 teachers, got 1"):
        SeveralTeachers([net(), net()]).check_state({"teachers": [{}]})


class Trainer:
    """As that of Hugging Face."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model


@pytest.mark.parametrize(("kind", "word"), [(Learner, "learn"), (Trainer, "trainer")])
def test_a_learner_for_its_network_is_refused_with_the_repair(kind, word, tmp_path):
    data = DataLoader(TensorDataset(X[0], Y[0]), 6)
    given = Learner(DataLoaders(data, data), net(), loss_func=nn.CrossEntropyLoss()) if kind is Learner else Trainer(net())
    state = net().state_dict()
    for argument, call in {
        "teacher": lambda: as_teacher(given),
        "student": lambda: match_feature_layers(given, net(), X[0]),
        "teacher must be a torch.nn.Module": lambda: match_feature_layers(net(), given, X[0]),
        "model must be a torch.nn.Module": lambda: attention_maps(given, X[0], ["0"]),
        "teacher must be a network": lambda: cache_teacher(given, data, tmp_path / "cache.safetensors"),
        "model must be the teacher's network": lambda: Route.from_checkpoints([state], given),
        "checkpoints": lambda: Route.from_checkpoints([given]),
        "student must be": lambda: Route.from_checkpoints([net()]).distil(print, given),
    }.items():
        with pytest.raises(TypeError, match=rf"^{argument}.* \({kind.__name__}\); pass {word}\.model$"):
            call()
    assert not list(tmp_path.iterdir())


def test_it_can_be_copied_in_a_run():
    teacher = begun(net(6), ["0"])
    for one in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        one.end()
        one.begin(net(), ["0"])
        assert torch.equal(one.answer(batch()).logits, teacher.answer(batch()).logits)
