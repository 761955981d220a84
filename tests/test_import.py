"""Importing fasterai loads torch and nothing heavier, and the star imports give what notebooks expect."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import fasterai
from tests.beside import waits_for

HEAVY = ("fastai", "lightning", "matplotlib", "onnx", "optuna", "pandas", "scipy", "sklearn", "torchvision", "transformers")

CRITERIA = [
    "large_final",
    "squared_final",
    "small_final",
    "large_init",
    "small_init",
    "large_init_large_final",
    "small_init_small_final",
    "magnitude_increase",
    "movement",
    "updating_magnitude_increase",
    "updating_movement",
    "updating_movmag",
    "wanda",
]
# Familiar from the public fasterai's core: granularity, criteria (all but `random`), schedule.
FAMILIAR = [
    *CRITERIA,
    *["Granularities", "Criteria", "Reducer", "Normalizer", "EPS", "grad_crit", "criterias", "available_criterias"],
    *["magnitude_criteria", "init_based_criteria", "update_based_criteria", "activation_criteria"],
    *["Schedule", "sched_oneshot", "sched_iterative", "sched_agp", "sched_onecycle", "sched_dsd"],
    *["one_shot", "iterative", "agp", "one_cycle", "cos", "lin", "dsd", "schedules", "available_schedules"],
]


def in_a_fresh_interpreter(code: str, folder: Path, environment: Mapping[str, str]) -> dict:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


#: What is loaded after three imports, and whether the generators are as before: all in one interpreter, for its time.
IMPORTS = """
import json, random, sys, numpy, torch
torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
import fasterai
loaded = {"fasterai": sorted(sys.modules)}
from fasterai import *
loaded["the public names"] = sorted(sys.modules)
from fasterai.core.all import *; from fasterai.sparse import sparsifier
import random, torch
same = [torch.equal(before[0], torch.get_rng_state()), before[1] == random.getstate()]
same.append(before[2] == numpy.random.get_state()[1].tolist())
import matplotlib
loaded["matplotlib"] = sorted(sys.modules)
print(json.dumps({"loaded": loaded, "same": same}))
"""
TIMES = """
import json, time, torch
a = time.process_time()
import fasterai
b = time.process_time()
[getattr(fasterai, n) for n in fasterai.__all__]
c = time.process_time()
print(json.dumps([b - a, c - a]))
"""


def best_times(folder: Path, environment: Mapping[str, str]) -> list[float]:
    return min((in_a_fresh_interpreter(TIMES, folder, environment) for _ in range(2)), key=sum)


def heavy(modules: list[str]) -> list[str]:
    return [name for name in modules if name.partition(".")[0] in HEAVY]


@waits_for(in_a_fresh_interpreter, IMPORTS)
def test_importing_loads_nothing_heavy_and_leaves_the_generators_alone(beside):
    found = beside(in_a_fresh_interpreter, IMPORTS)
    assert heavy(found["loaded"]["fasterai"]) == heavy(found["loaded"]["the public names"]) == []
    assert "fasterai.sparse.sparsifier" in found["loaded"]["the public names"]
    assert "matplotlib" in heavy(found["loaded"]["matplotlib"]), "the test would see a heavy module"
    assert found["same"] == [True, True, True]


@waits_for(best_times)
def test_importing_takes_less_than_three_tenths_of_a_second_beyond_torch(beside):
    package, names = beside(best_times)
    assert package < 0.3
    assert names < 0.3  # with every public name loaded as well


@pytest.mark.parametrize("name", [*fasterai.__all__, "Block", "Pruner"])
def test_every_public_name_resolves(name):
    assert getattr(fasterai, name).__name__ == name
    assert name in dir(fasterai)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'Sparsifer'; it has Block, .*Sparsifier"):
        fasterai.Sparsifer  # noqa: B018
    assert not hasattr(fasterai, "sparsify")


def star(module: str) -> dict:
    names: dict = {}
    exec(f"from {module} import *", names)
    del names["__builtins__"]
    return names


WITH_CORE = ["fasterai.core.all", "fasterai.sparse.all", "fasterai.prune.all", "fasterai.analyze.all", "fasterai.all"]
STARS = [*WITH_CORE, "fasterai.regularize.all", "fasterai.misc.all", "fasterai.export.all", "fasterai"]


@pytest.mark.parametrize("module", WITH_CORE)
def test_star_imports_give_the_familiar_names(module):
    names = star(module)
    assert [n for n in FAMILIAR if n not in names] == []
    assert "Learner" not in names and "torch" not in names


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ("fasterai.core.all", "AGP OneCycle Iterative Piecewise Keep Coupled NM Random Criterion register_axes"),
        ("fasterai.sparse.all", "Sparsifier SparsifyCallback HoldCallback ParticipantCallback LotteryTicket attach"),
        ("fasterai.sparse.all", "find_ticket Ticket"),
        ("fasterai.prune.all", "Pruner PruneCallback GradualPruner Budget fit_budget remove save_small load_small"),
        ("fasterai.prune.all", "channel_graph apply_plan_ Sparsifier SparsifyCallback HoldCallback attach"),
        ("fasterai.analyze.all", "analyze Sparsifier"),
        ("fasterai.regularize.all", "RegularizeCallback Regularizer attach remove large_final one_cycle Keep Coupled"),
        ("fasterai.regularize.all", "l1 L1 group_lasso GroupLasso growing Growing slimming Slimming"),
        ("fasterai.misc.all", "BN_Folder FC_Decomposer fold_batchnorms find_folds decompose_linear"),
        ("fasterai.misc.all", "ternarize find_ternary TernaryTraining TernarizeCallback save_ternary load_ternary"),
        ("fasterai.export.all", "export_onnx ONNXModel verify_onnx export_program"),
    ],
)
def test_star_imports_give_what_a_notebook_needs(module, wanted):
    assert [n for n in wanted.split() if n not in star(module)] == []
    assert [n for n in wanted.split() if n not in star("fasterai.all")] == []


def test_the_star_import_of_the_whole_is_that_of_its_parts():
    parts = [star(module) for module in STARS]
    assert set(star("fasterai.all")) == set().union(*parts)
    assert all(part[name] is star("fasterai.all")[name] for part in parts for name in part)


# Of a catalogue, its `__all__` and the classes that make its entries, the star imports leave out:
LEFT_OUT = {
    "global_": "given as 'global'",
    "random": "Python's module; given as 'random' or Random(seed)",
    "Linear": "torch.nn.Linear",
    "sched_cos": "fastai's",
    "sched_lin": "fastai's",
    "Context": "an interface, for contexts of one's own",
    "ERK": "takes no settings: erk",
    "FarFromOthers": "the rule of fpgm",
    "Global": "takes no settings: 'global'",
    "LAMP": "takes no settings: lamp",
    "Local": "takes no settings: local",
    "PerTarget": "made from a dict of sparsities",
    "WeightFunction": "made from a function of the weight",
    "Custom": "made by Schedule(function)",
    "Phases": "made from a list of schedules",
    "Position": "made from a function of the position",
}
CATALOGUES = ["fasterai.core.contexts", "fasterai.core.criteria", "fasterai.core.schedules", "fasterai.familiar"]


def entries(catalogue: str) -> set[str]:
    """The names of a catalogue's `__all__`, of its own classes, and of its functions for `Schedule(function)`."""
    module = importlib.import_module(catalogue)
    classes = {n for n, c in vars(module).items() if isinstance(c, type) and c.__module__ == catalogue and n[0] != "_"}
    return {*module.__all__, *classes, *(n for n in vars(module) if n.startswith("sched_"))}


@pytest.mark.parametrize("module", WITH_CORE)
def test_the_catalogues_come_whole_but_for_what_has_a_reason(module):
    names = star(module)
    assert {n for catalogue in CATALOGUES for n in entries(catalogue) if n not in names} == set(LEFT_OUT)


@pytest.mark.parametrize("module", WITH_CORE)
def test_granularities_are_given_by_name(module):
    """`filter` is Python's, and `weight`, `layer`, `row` are a notebook's own words."""
    from fasterai.core import granularities

    names = star(module)
    assert not set(granularities.__all__) & set(names)
    makers = {n for n, c in vars(granularities).items() if isinstance(c, type) and c.__module__ == granularities.__name__}
    assert {n for n in makers if n not in names} == {"Granularity", "Named", "Block"}


PLANTS = f"""
import importlib, json
for i, name in enumerate({CATALOGUES}):
    m = importlib.import_module(name)
    m.__all__.append(f"planted{{i}}"), setattr(m, f"planted{{i}}", i)
stars = [importlib.import_module(name).__all__ for name in {WITH_CORE}]
from fasterai.all import *
found = [[f"planted{{i}}" in star for i in range(4)] for star in stars]
print(json.dumps([*found, [planted0, planted1, planted2, planted3]]))
"""


@waits_for(in_a_fresh_interpreter, PLANTS)
def test_a_new_entry_reaches_the_star_imports_by_itself(beside):
    assert beside(in_a_fresh_interpreter, PLANTS) == [[True] * 4] * 5 + [[0, 1, 2, 3]]


# What users have before the star import, and what of it may be another thing after it.
OTHERS = [
    *["builtins", "math", "numpy", "matplotlib.pyplot"],
    *["torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch.utils.data"],
    *["torchvision.models", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.ops"],
    *["fastai.vision.all", "fastai.text.all", "fastai.tabular.all", "fastai.callback.all", "lightning.pytorch"],
]
THE_SCHEDULE = "the public fasterai's name for the schedule: `schedule=cos` stands in its notebooks"
ALLOWED = {("cos", "math"): THE_SCHEDULE, ("cos", "numpy"): THE_SCHEDULE, ("cos", "torch"): THE_SCHEDULE}


def had(other: str) -> dict:
    """The public names of a module, those that `import *` leaves out as well."""
    return {n: value for n, value in vars(importlib.import_module(other)).items() if not n.startswith("_")} | star(other)


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before.keys() & after.keys() if before[name] is not after[name]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", OTHERS)
def test_no_star_import_changes_what_a_user_has(other):
    before = had(other)
    assert len(before) > 5
    found = {name for module in STARS for name in changed(before, star(module))}
    assert found == {name for name, where in ALLOWED if where == other}


def test_a_name_that_clashes_would_be_found():
    from fasterai.core.schedules import Linear

    assert changed(had("torch.nn"), {"Linear": Linear, "agp": 1}) == {"Linear"}
    assert changed(had("builtins"), {"filter": "filter", "len": len}) == {"filter"}


@pytest.mark.parametrize("module", STARS)
def test_star_imports_bring_no_general_words_and_no_modules(module):
    general = "Block Comparison Cost Group Latency Plan Position Removal Sensitivity compare cost latency plan sensitivity"
    names = star(module)
    assert not set(general.split()) & set(names)
    assert [n for n, value in names.items() if inspect.ismodule(value)] == ["analyze"] * ("analyze" in names)
    assert not {name for name in names if name in sys.stdlib_module_names}


def test_what_left_the_star_imports_is_importable_by_name():
    from fasterai import Block
    from fasterai.analyze.all import (
        Comparison,
        Cost,
        Latency,
        LatencyComparison,
        Sensitivity,
        analyze,
        compare,
        compare_latency,
        cost,
        latency,
        sensitivity,
    )
    from fasterai.core import all as core
    from fasterai.misc.all import DecompositionReport, FoldReport
    from fasterai.prune.all import ChannelGraph, Group, Plan, Removal

    classes = [Comparison, Cost, Latency, LatencyComparison, Sensitivity, DecompositionReport, FoldReport]
    classes += [Block, ChannelGraph, Group, Plan, Removal]
    assert all(isinstance(c, type) for c in classes)
    functions = {"compare": compare, "compare_latency": compare_latency, "cost": cost}
    functions |= {"latency": latency, "sensitivity": sensitivity}
    assert all(getattr(analyze, name) is function for name, function in functions.items())
    assert core.Block is Block
    assert (core.Linear(), core.sched_cos(0, 1, 0.5), core.sched_lin(0, 1, 0.25)) == (core.lin, 0.5, 0.25)


@pytest.mark.parametrize("name", ["sched_cos", "sched_lin"])
@pytest.mark.parametrize("position", [0, 0.2, 0.5, 1])
def test_fastais_functions_do_as_well(name, position):
    from fastai.callback import all as theirs

    from fasterai.core import schedules

    ours, other = getattr(schedules, name), getattr(theirs, name)
    assert ours is not other
    assert schedules.Schedule(other)(position) == pytest.approx(schedules.Schedule(ours)(position), abs=1e-15)


@pytest.mark.parametrize("module", STARS)
def test_star_imports_leave_the_standard_random_module_alone(module):
    names: dict = {}
    exec(f"import random\nfrom {module} import *\nx = random.random()", names)
    assert 0 <= names["x"] < 1


@pytest.mark.parametrize("module", ["fasterai.sparse.all", "fasterai.all"])
def test_the_sparse_star_import_has_the_sparsifier_and_fastais_callback(module):
    from fasterai.callbacks.fastai import SparsifyCallback
    from fasterai.sparse.sparsifier import Sparsifier

    names = star(module)
    assert names["Sparsifier"] is Sparsifier
    assert names["SparsifyCallback"] is SparsifyCallback


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("fasterai.core.schedule", "Schedule", "fasterai.core.schedules"),
        ("fasterai.core.schedule", "sched_onecycle", "fasterai.core.schedules"),
        ("fasterai.core.granularity", "Granularities", "fasterai.familiar"),
        ("fasterai.sparse.sparsify_callback", "SparsifyCallback", "fasterai.callbacks.fastai"),
        ("fasterai.regularize.regularize_callback", "RegularizeCallback", "fasterai.callbacks.fastai"),
    ],
)
def test_old_homes_go_on_working(old, name, new):
    assert getattr(importlib.import_module(old), name) is getattr(importlib.import_module(new), name)


def test_deep_paths_of_criteria_go_on_working():
    from fasterai.core.criteria import large_final, random, wanda

    assert large_final is not wanda
    assert random.needs == frozenset()
