"""The calls of the public fasterai's notebooks, in our own words: each runs here, or its error says what to write instead.

By tutorial; what stands behind a call (losses, data, pictures) is left out. `RUNS` is code that runs as it is there, `SAYS`
code whose error names the replacement. What is not here at all (quantisation) is in neither.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import fastai.callback.schedule  # noqa: F401 - gives the Learner its fit_one_cycle
import matplotlib as mpl
import pytest
import torch
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fasterai.distill.matching import match_feature_layers

mpl.use("agg")
PRELUDE = """
import torch
from torch import nn
from functools import partial
from fasterai.core.all import *
from fasterai.sparse.all import *
from fasterai.prune.all import *
from fasterai.misc.all import *
from fasterai.distill.all import *
from fasterai.regularize.all import *
from fasterai.regularize.regularize_callback import RegularizeCallback
from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
from fasterai.distill.losses import ActivationBoundaries, Attention, DecoupledKD, FitNet, Logits, Mutual, Similarity, SoftTarget
from fasterai.core import criteria
from fasterai.core.granularity import Granularities
from fasterai.core.schedule import sched_agp, sched_dsd, sched_iterative, sched_onecycle, sched_oneshot
from fasterai.core.schedules import sched_cos, sched_lin
from fasterai.analyze.sensitivity import SensitivityAnalyzer, analyze_sensitivity
from fasterai.misc.conv_decomposer import Conv_Decomposer
from fasterai.misc.fc_decomposer import FC_Decomposer
from fasterai.misc.bn_folding import BN_Folder
from fasterai.sparse.sparsifier import Sparsifier
"""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    ).eval()


RUNS = {
    "quickstart, sparsifier": [
        "Sparsifier(model, 'filter', 'local', large_final).sparsify_layer(model[0], 0.7)",
        "Sparsifier(model, 'filter', 'local', criteria=large_final).sparsify_model(0.5)",
        "Sparsifier(model, 'weight', 'global', large_final).sparsify_model(0.5)",
        "Sparsifier(model, 'kernel', context='local', criteria=small_final).sparsify_model(0.5)",
        "Sparsifier(model, 'shared_weight', 'local', large_final, layer_type=nn.Conv2d).sparsify_model(0.5)",
        "Sparsifier(model, 'filter', 'local', large_final).sparsify_model(0.3, round_to=8)",
        "Sparsifier(model, 'weight', 'local', large_final).sparsify_model({'0': 0.3, '3': 0.6})",
        "Sparsifier(model, 'weight', 'local', large_final).print_sparsity()",
        "Sparsifier(model, 'column', 'local', large_final, layer_type=nn.Linear).sparsify_model(0.5)",
        "Sparsifier(model, 'weight', 'local', large_final, nm=True, targets='3').sparsify_model(0.5)",
        "Sparsifier(model, 'weight', 'local', large_final).save_model(path)",
    ],
    "criteria, wanda": [
        "Criteria(torch.frac)",
        "Sparsifier(model, 'weight', 'local', Criteria(partial(torch.pow, exponent=4))).sparsify_model(0.5)",
        "Sparsifier(model, 'weight', 'local', Criteria(lambda x: x, needs_update=True, output_fn=lambda x, y: x - y))",
        "Sparsifier(model, 'weight', 'local', wanda, data=[x]).sparsify_model(0.7)",
        "Sparsifier(model, 'weight', 'local', activation_criteria(torch.abs), data=[x]).sparsify_model(0.5)",
        "Sparsifier(model, 'filter', 'local', magnitude_criteria(torch.square)).sparsify_model(0.5)",
        "Sparsifier(model, 'weight', 'local', init_based_criteria(torch.abs, output_fn=torch.sub))",
        "Sparsifier(model, 'weight', 'local', updating_movmag)",
        "Normalizer.standardization(torch.rand(9)).max()",
        "Reducer.mean(torch.rand(2, 3, 4), [1, 2])",
        "'large_final' in available_criterias()",
        "unit_scores(model[0], large_final, 'filter', squeeze=True)",
    ],
    "granularities, transformers": [
        "Granularities.get_dim(model[0], 'filter')",
        "Granularities.available_granularities()",
        "Granularities.allowed_granularities(model[8])",
        "assert nn.Conv2d in Granularities.available_modules() and nn.Linear in Granularities.available_modules()",
        "Own = type('Own', (nn.Linear,), {}); Granularities.add_granularity(Own, Granularities._granularities_Linear)",
    ],
    "schedules": [
        "Schedule(sched_iterative, start_pct=0.25).plot(0.5)",
        "Schedule(partial(sched_iterative, n_steps=5), start_pct=0.2)(0.5)",
        "Schedule(partial(sched_onecycle, α=10, β=4))(0.5)",
        "Schedule(lambda start, end, pos: start + (end - start) * pos ** 3, 0.1, 0.9)(0.5)",
        "Schedule(sched_lin, 0.0, 0.5, start_val=0.0, end_val=0.5)(0.25)",
        "[s.plot() for s in (one_shot, iterative, agp, one_cycle, cos, lin, dsd)]",
        "sched_agp(0.0, 1.0, torch.linspace(0, 1, 5).numpy())",
        "sched_onecycle(0.0, 1.0, torch.linspace(0, 1, 5).numpy())",
        "available_schedules()",
        "SparsifyCallback(0.5, 'weight', 'local', large_final, schedule=agp)",
    ],
    "sparsify callback, lottery ticket": [
        "SparsifyCallback(sparsity=0.5, granularity='weight', context='local', criteria=large_final, schedule=one_cycle)",
        "SparsifyCallback(0.5, 'filter', 'global', large_final, cos)",
        "SparsifyCallback({'0': 0.3, '3': 0.5}, 'weight', 'local', large_final, one_shot)",
        "SparsifyCallback(0.5, 'weight', 'local', large_final, one_shot, lth=True)",
        "SparsifyCallback(0.5, 'weight', 'local', large_final, iterative, lth=True, rewind_epoch=1)",
        "SparsifyCallback(0.5, 'weight', 'local', large_final, one_shot, lth=True, reset_end=True)",
        "SparsifyCallback(0.5, 'weight', 'local', large_final, one_shot, lth=True, save_tickets=True, layer_type=nn.Conv2d)",
    ],
    "pruner, prune callback": [
        "Pruner(model, 0.3, 'local', large_final, example_inputs=x).prune_model()",
        "Pruner(model, 0.3, 'global', large_final, example_inputs=x).prune_model()",
        "Pruner(model, 0.5, 'local', criteria.random, example_inputs=x).prune_model()",
        "Pruner(model, 0.5, 'local', large_final, example_inputs=x, ignored_layers=[model[8]]).prune_model()",
        "Pruner(model, {'0': 0.25, '3': 0.5}, 'local', large_final, example_inputs=x).prune_model()",
        "p = Pruner(model, 0.5, 'local', large_final, example_inputs=x, iterative_steps=2); p.prune_model(); p.prune_model()",
        "Pruner(model, 0.3, 'local', large_final, example_inputs=x).print_sparsity()",
        "PruneCallback(pruning_ratio=0.4, context='global', criteria=large_final, schedule=one_cycle)",
        "PruneCallback(0.4, agp, 'local', large_final)",
    ],
    "regularisation": [
        "fit(RegularizeCallback(squared_final, 'weight', 1e-3, schedule=one_cycle))",
        "cb = RegularizeCallback(large_final, 'filter', 0.01, nn.Conv2d, one_cycle, False); fit(cb); cb.get_norm().item()",
        "fit(RegularizeCallback([large_final, squared_final], ['weight', 'filter'], weight=0.01, layer_types=[nn.Conv2d]))",
        "fit(RegularizeCallback(large_final, 'weight', layer_types=[nn.Conv2d, nn.Linear], verbose=True))",
    ],
    "sensitivity": [
        "analyze_sensitivity(model, x, score, compression='sparsity', level=0.5, verbose=False).summary()",
        "result().top(3, most_sensitive=True)[0].delta",
        "[f'{layer.name}: {layer.delta:.4f}' for layer in result().top(3, most_sensitive=False)]",
        "result().plot()",
        "result().plot(figsize=(14, 6))",
        "result().to_dataframe().head()",
        "result().as_dict()",
        "result().to_layer_targets(model, target_pct=0.5, min_pct=0.1, max_pct=0.8)",
        "SensitivityAnalyzer(model, x, score, criteria=large_final, higher_is_better=True, metric_name='accuracy')",
        "analyzer().analyze(compression='sparsity', level=0.5, granularity='filter', verbose=False)",
        "analyzer().analyze(compression='sparsity', level=0.5, layers=['0', '3'], verbose=False)",
        "analyzer().analyze(compression='pruning', level=0.3, verbose=False)",
        "analyzer().sweep(compression='sparsity', levels=[0.25, 0.5], verbose=False)",
    ],
    "folding, decomposing": [
        "BN_Folder().fold(model)(x)",
        "FC_Decomposer().decompose(model, percent_removed=0.5)",
        "FC_Decomposer().decompose(model, 0.7, layers=['8'])",
        "FC_Decomposer().decompose(model, energy_threshold=0.9, exclude=['8'])",
        "FC_Decomposer().SVD(model[8], 0.5)",
        "Conv_Decomposer().decompose(model, percent_removed=0.5)(x)",
        "[Conv_Decomposer().decompose(model, 0.5, method=m)[0](x[:, :3]) for m in ('tucker', 'svd', 'spatial', 'cp')]",
        "Conv_Decomposer().decompose(model, 0.5, layers=['0'])",
        "Conv_Decomposer().decompose(model, 0.5, exclude=['3'])",
        "Conv_Decomposer().Tucker(nn.Conv2d(16, 32, 3, stride=2, padding=1), 0.5)[1].stride",
        "Conv_Decomposer().SVD(model[3], 0.5)",
        "Conv_Decomposer().Spatial(model[3], 0.5)",
        "Conv_Decomposer().CP(model[3], 0.5)",
    ],
    "knowledge distillation": [
        "fit(KnowledgeDistillationCallback(teacher.model, SoftTarget))",
        "fit(KnowledgeDistillationCallback(teacher=teacher, loss=SoftTarget))",
        "fit(KnowledgeDistillationCallback(teacher.model, partial(SoftTarget, T=30)))",
        "fit(KnowledgeDistillationCallback(teacher.model, SoftTarget, weight=0.9, schedule=cos))",
        "fit(KnowledgeDistillationCallback(teacher.model, SoftTarget, None, None, 0.9, one_cycle))",
        "fit(KnowledgeDistillationCallback(teacher.model, DecoupledKD))",
        "fit(KnowledgeDistillationCallback(teacher.model, partial(DecoupledKD, T=4, alpha=1.0, beta=8.0)))",
        "fit(KnowledgeDistillationCallback(teacher.model, Mutual))",
        "fit(KnowledgeDistillationCallback(teacher.model, Logits))",
        "fit(KnowledgeDistillationCallback(teacher.model, lambda pred, teacher_pred, **kw: (pred - teacher_pred).std()))",
        "fit(KnowledgeDistillationCallback(teacher, Attention, pairs()['student'], pairs()['teacher'], weight=0.9))",
        "fit(KnowledgeDistillationCallback(teacher, partial(Attention, p=1), pairs()['student'], pairs()['teacher']))",
        "fit(KnowledgeDistillationCallback(teacher, Similarity, pairs()['student'], pairs()['teacher'], weight=0.9))",
        "fit(KnowledgeDistillationCallback(teacher, ActivationBoundaries, pairs()['student'], pairs()['teacher'], 0.9))",
        "fit(KnowledgeDistillationCallback(teacher, FitNet, ['0', '3'], ['3', '3'], weight=0.9))",
        "fit(MixUp(), SparsifyCallback(0.5, 'row', 'local', large_final, cos), KnowledgeDistillationCallback(teacher, DKD))",
        "fit(KnowledgeDistillationCallback(teacher, SoftTarget), PruneCallback(0.3, one_cycle, 'local', large_final))",
        "get_model_layers(model)",
        "get_model_layers(model, get_layer_repr=True)",
        "assert get_module_by_name(model, '3') is model[3]",
        "SoftTarget(pred, teacher_pred, T=4)",
        "DecoupledKD(pred, teacher_pred, target=target)",
        "FitNet({'3': pred}, {'3': teacher_pred})",
    ],
}

SAYS = {
    "Sparsifier(model, 'weight', 'local', large_final).sparsify_model(50)": "pass 0.5 for 50 %",
    "SparsifyCallback(50, 'weight', 'local', large_final, one_cycle)": "pass 0.5 for 50 %",
    "SparsifyCallback({'0': 30}, 'weight', 'local', large_final, one_cycle)": "pass 0.3 for 30 %",
    "Pruner(model, 30, 'local', large_final, example_inputs=x)": "pass 0.3 for 30 %",
    "PruneCallback(40, one_cycle, 'global', large_final)": "pass 0.4 for 40 %",
    "Pruner(model, 0.3, 'local', large_final)": "example_inputs",
    "one_cycle.plot(50)": "pass 0.5 for 50 %",
    "analyze_sensitivity(model, x, score, compression='sparsity', level=50)": "pass 0.5 for 50 %",
    "analyzer().sweep(compression='sparsity', levels=[25, 50, 75])": "pass 0.25 for 25 %",
    "analyzer().analyze(compression='quantization', level=8)": "there is no quantisation here",
    "result().to_layer_targets(model, target_pct=50, min_pct=10, max_pct=80)": "pass 0.5 for 50 %",
    "result().to_layer_targets(model, 0.5, gamma=2.0)": "gamma must be 1",
    "one_cycle.progress(0.3)": "call the schedule itself",
    "agp.reset()": "schedules remember nothing",
    "agp.changed": "schedules remember nothing",
    "agp.after_step()": "schedules remember nothing",
    "large_final(model[0], 'filter')": "unit_scores(m, criterion, 'filter')",
    "large_final(model[0], 'filter', squeeze=True)": "unit_scores(m, criterion, 'filter')",
    "grad_crit(model[0], 'weight')": "unit_scores(m, criterion, 'filter')",
    "wanda.calibrate(model, [x])": "evidence is gathered when it is needed",
    "wanda.scale": "criterion.using(normalizer='max')",
    "large_final.needs_data": "criterion.needs",
    "updating_movmag.update_weights(model[0])": "evidence is gathered when it is needed",
    "Criteria(torch.abs, scale={model[0]: torch.ones(3)})": "pass normalizer=",
    "Criteria(torch.abs, needs_init=True, needs_update=True)": "must not both be True",
    "Sparsifier(model, 'weight', 'local', wanda).sparsify_model(0.5)": "data=[batch, ...]",
    "Sparsifier(model, 'weight', 'global', large_final).sparsify_model({'0': 0.3})": "pass context='local'",
    "Sparsifier(model, 'weight', 'local', large_final)._clean_buffers()": "finalize()",
    "Sparsifier(model, 'weight', 'local', large_final)._save_weights()": "LotteryTicket(sparsifier)",
    "Sparsifier(model, 'weight', 'local', large_final)._reset_weights()": "LotteryTicket(sparsifier)",
    "Sparsifier(model, 'weight', 'local', large_final)._apply_masks()": "call apply_masks()",
    "Sparsifier(model, 'weight', 'local', large_final)._reset_threshold()": "no threshold",
    "Sparsifier(model, 'weight', 'local', large_final).sparsify_batchnorm(model[0], model[1])": "example_inputs=",
    "Sparsifier(model, 'filter', 'local', large_final, layer_type=nn.Linear)": "Keep('out')",
    "Granularities.get_dim(model[0], 'nonexistent')": "must be one of",
    "Pruner(model, 0.5, 'local', large_final, example_inputs=x).group_importance(None)": "channel_graph(model, inputs)",
    "Pruner(model, 0.5, 'local', large_final, example_inputs=x).pruner": "channel_graph(model, inputs)",
    "Pruner(model, 1.0, 'local', large_final, example_inputs=x)": "must be below 1",
    "FC_Decomposer().decompose(model, percent_removed=1.0)": "percent_removed must be below 1",
    "Conv_Decomposer().decompose(model, percent_removed=1.0)": "percent_removed must be below 1",
    "Conv_Decomposer().decompose(model, method='bad')": "method must be one of",
    "Conv_Decomposer().CP(model[3], energy_threshold=0.9)": "pass ranks=",
    "RegularizeCallback(large_final, 'filters')": "did you mean 'filter'",
    "RegularizeCallback(criteria.random, 'weight')": "criteria must have a gradient",
    "RegularizeCallback(small_final, 'weight')": "criteria must score no weight below 0",
    "RegularizeCallback(large_final, 'filter').get_norm()": "after the first batch of a run",
    "KnowledgeDistillationCallback(teacher, SoftTarget, weight=90)": "pass 0.9 for 90 %",
    "KnowledgeDistillationCallback(teacher, 'soft_targets')": "did you mean",
    "fit(KnowledgeDistillationCallback(teacher, Attention, ['layer1'], ['3']))": "activations_student must be",
    "KnowledgeDistillationCallback(teacher, Attention, ['0', '3'], ['3'])": "as many",
    "KnowledgeDistillationCallback(teacher, Attention)": "activations_student",
}
ALL_RUN = [call for calls in RUNS.values() for call in calls]


def distilling(model: nn.Module, x: torch.Tensor, folder: Any) -> dict[str, Any]:
    """What a tutorial of distillation has: a teacher in its learner, a fit of the student, and layers that match."""
    y = torch.arange(4) % 10

    def learner(network: nn.Module) -> Learner:
        rows = torch.utils.data.TensorDataset(x, y)
        dls = DataLoaders(*(TfmdDL(rows, bs=4, num_workers=0) for _ in range(2)), device="cpu")
        return Learner(dls, network, loss_func=CrossEntropyLossFlat(), path=folder)

    def fit(*callbacks: Any) -> None:
        learn = learner(model.train())
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, cbs=list(callbacks))

    def pairs() -> dict[str, list[str]]:
        return match_feature_layers(model, teacher.model, torch.randn(1, 3, 8, 8))

    teacher = learner(network())
    logits = {"pred": torch.randn(4, 10), "teacher_pred": torch.randn(4, 10), "target": y}
    return {"fit": fit, "pairs": pairs, "teacher": teacher, "MixUp": MixUp, **logits}


@pytest.fixture
def names(tmp_path: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(PRELUDE, found)
    model, x = network(), torch.randn(4, 3, 8, 8)
    score = lambda m: float(m(x).detach().abs().mean())  # noqa: E731
    analyzer = partial(found["SensitivityAnalyzer"], model, x, score)
    result = lambda: analyzer().analyze(verbose=False)  # noqa: E731
    found |= distilling(model, x, tmp_path)
    return found | {"model": model, "x": x, "score": score, "analyzer": analyzer, "result": result, "path": tmp_path / "m.pth"}


@pytest.mark.parametrize("call", ALL_RUN)
def test_it_runs(call, names):
    with warnings.catch_warnings(action="ignore"):
        exec(call, names)


@pytest.mark.parametrize("call", SAYS)
def test_its_error_says_what_to_write(call, names):
    with warnings.catch_warnings(action="ignore"), pytest.raises((ValueError, TypeError, AttributeError)) as caught:
        exec(call, names)
    assert SAYS[call] in str(caught.value)


def test_how_many_there_are():
    assert (len(ALL_RUN), len(SAYS)) == (len(set(ALL_RUN)), len(set(SAYS)))
    assert len(ALL_RUN) + len(SAYS) >= 100
