from __future__ import annotations

from fasterai.analyze import all as analyze


def test_the_star_import_has_what_a_notebook_needs():
    names: dict = {}
    exec("from fasterai.analyze.all import *", names)
    wanted = {"compare", "compare_latency", "cost", "latency", "sensitivity", "Sparsifier", "large_final", "agp"}
    assert wanted <= set(names)
    assert all(callable(names[name]) for name in wanted)
    assert not {"torch", "random"} & set(names)
    assert len(set(analyze.__all__)) == len(analyze.__all__)
