"""The average of the student as its teacher."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fasterai.core.batch import Batch
from fasterai.distill.average import EMATeacher, tensors_of
from fasterai.model.cuts import announce
from tests.distill.nets import X, hooks, net


def moved(model, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    model.train()(X[seed])  # moves the statistics


def test_it_is_the_average_of_torch():
    student = net()
    teacher, oracle = EMATeacher(0.9), AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    teacher.begin(student, ["1"])
    oracle.update_parameters(student)
    for i in range(3):
        moved(student, i)
        teacher.after_step()
        oracle.update_parameters(student)
    own = tensors_of(teacher.model)
    for name, x in oracle.module.state_dict().items():
        torch.testing.assert_close(own[name].to(x.dtype), x) if x.is_floating_point() else None
    assert int(own["1.num_batches_tracked"]) == 3  # whole numbers are taken over
    answers = teacher.answer(Batch((X[0],), outputs=torch.zeros(6, 4)))
    torch.testing.assert_close(answers.logits, oracle.module.eval()(X[0]))
    assert not any(p.requires_grad for p in teacher.model.parameters()) and hooks(student) == 0


def test_a_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        EMATeacher(1.5)


def test_a_further_run_and_a_saved_state_go_on():
    student = net()
    teacher = EMATeacher(0.5)
    teacher.begin(student, [])
    moved(student, 0)
    teacher.after_step()
    state = teacher.state_dict()
    values = {n: x.clone() for n, x in tensors_of(teacher.model).items()}
    assert teacher.model is not student and not torch.equal(values["0.weight"], student[0].weight)
    teacher.end()
    assert teacher.model is None
    others = [teacher, EMATeacher(0.5), copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher)), EMATeacher(0.5)]
    others[1].load_state_dict(state)
    for one in others[:4]:
        one.begin(student, [])
    others[4].begin(student, [])
    others[4].load_state_dict(state)  # in a run
    for one in others:
        assert all(torch.equal(x, values[n]) for n, x in tensors_of(one.model).items())
    moved(student, 1)
    others[4].after_step()
    assert all(torch.equal(x, values[n]) for n, x in state["average"].items())  # the caller's is a copy


def test_an_average_of_another_student_is_refused():
    teacher = EMATeacher()
    teacher.begin(net(), [])
    teacher.end()
    with pytest.raises(ValueError, match=r"got 0.bias of shape \(5,\) where the average has \(4,\); take a new EMATeacher"):
        teacher.begin(net(5), [])
    with pytest.raises(TypeError, match="state's average of 0 must be a tensor, got 'x'"):
        teacher.check_state({"average": {"0": "x"}})


def test_it_follows_a_cut_exactly_and_one_that_is_undone():
    student = net()
    teacher = EMATeacher(0.5)
    teacher.begin(student, ["0"])
    moved(student, 0)
    teacher.after_step()
    before = {n: x.clone() for n, x in tensors_of(teacher.model).items()}
    kept = np.array([0, 2, 3])
    cut = {("0.weight", 0): kept, ("0.bias", 0): kept, **{(f"1.{n}", 0): kept for n in ("weight", "bias")}}
    cut |= {("1.running_mean", 0): kept, ("1.running_var", 0): kept}
    cut[("5.weight", 1)] = np.concatenate([np.arange(4) + 4 * i for i in kept])

    class Failing:
        def after_cut(self, cut):
            raise RuntimeError("no")

    from fasterai.model.cuts import follow

    failing = Failing()
    follow(student, failing)
    with pytest.raises(RuntimeError, match="no"):
        announce(student, cut)
    assert all(torch.equal(x, before[n]) for n, x in tensors_of(teacher.model).items())
    del failing
    for (name, d), indices in cut.items():
        module, attribute = student.get_submodule(name.split(".")[0]), name.split(".")[1]
        getattr(module, attribute).data = getattr(module, attribute).data.index_select(d, torch.as_tensor(indices))
    announce(student, cut)
    after = tensors_of(teacher.model)
    assert torch.equal(after["0.weight"], before["0.weight"][kept]) and torch.equal(
        after["1.running_var"], before["1.running_var"][kept]
    )
    answers = teacher.answer(Batch((X[0],), outputs=torch.zeros(6, 4)))
    assert tuple(answers.features[0].shape) == (6, 3, 4, 4)
    teacher.after_step()


def test_layers_that_are_given_themselves_are_those_of_the_average():
    student = net()
    teacher = EMATeacher()
    teacher.begin(student, [student[0]])
    assert len(teacher.answer(Batch((X[0],), outputs=torch.zeros(6, 4))).features) == 1
    assert hooks(student) == 0
    teacher.end()
