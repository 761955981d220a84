from __future__ import annotations

from fasterai.analyze import all as everything
from fasterai.analyze.cost import cost


def test_the_star_import_has_what_a_notebook_needs():
    names: dict = {}
    exec("from fasterai.analyze.all import *", names)
    functions = {"compare", "compare_latency", "cost", "latency", "sensitivity"}
    assert all(callable(getattr(names["analyze"], name)) for name in functions)
    assert not functions & set(names)  # plain words, which a notebook has uses of its own for
    assert {"Sparsifier", "large_final", "agp"} <= set(names)
    assert not {"torch", "random"} & set(names)
    assert len(set(everything.__all__)) == len(everything.__all__)


def test_the_module_gives_the_functions_without_a_star():
    import fasterai.analyze.all as analyze

    assert analyze is everything
    assert analyze.cost is cost
