"""A module imports from lower layers only; within a layer from its own package only, and never in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fasterai"
PAGE = PACKAGE.parent / "docs" / "architecture.md"


def read_layers(page: str) -> dict[str, int]:
    """Module or package -> layer, of the rows `| L2 | `core/loop.py`, `model/` | its job |`."""
    rows = re.findall(r"^\| L(\d+) \| ([^|]+) \|", page, re.MULTILINE)
    paths = [(int(layer), path) for layer, cell in rows for path in re.findall(r"`([^`]+)`", cell)]
    return {path.removesuffix(".py").rstrip("/").replace("/", "."): layer for layer, path in paths}


LAYERS = read_layers(PAGE.read_text(encoding="utf-8"))
CATALOGUES = {"core.criteria", "core.granularities", "core.schedules", "core.contexts"}


def is_re_export(module: str) -> bool:
    """Tell if a module holds names of star imports for notebooks, or is the old home of names that have moved."""
    return module.startswith("moved") or module == "all" or module.endswith(".all")


def layer_of(module: str) -> int | None:
    """The layer of a module or of the package that it is in; None if the table has neither."""
    parts = module.split(".")
    return next((LAYERS[key] for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in LAYERS), None)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_sources() -> dict[str, str]:
    return {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def at_run_time(tree: ast.AST) -> Iterator[ast.stmt]:
    """All import statements, those inside functions too, less those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from at_run_time(ast.Module([other], []))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from at_run_time(node)


@cache
def names_of(source: str, module: str) -> tuple[str, ...]:
    """The names that a module imports, those from modules as `module.name`."""
    found: list[str] = []
    for node in at_run_time(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            assert not node.level, f"{module} must import by absolute names, got line {node.lineno}"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def imported(source: str, module: str, modules: set[str]) -> set[str]:
    """Which of the package's modules a module imports."""
    found = set()
    for name in names_of(source, module):
        if name == "fasterai" or name.startswith("fasterai."):
            inner = name.removeprefix("fasterai").lstrip(".")
            # `from a.b import c`: c is a module or a name in the module a.b
            found.add(inner if inner in modules else inner.rpartition(".")[0])
    return found


def complaints(sources: Mapping[str, str]) -> list[str]:
    """What is wrong with the imports of a package, given as module name -> source."""
    modules = set(sources)
    graph = {m: imported(source, m, modules) - {m} for m, source in sources.items() if m and not is_re_export(m)}
    result = []
    for module, others in graph.items():
        own = layer_of(module)
        if own is None and sources[module].strip() and module != "core":
            result.append(f"{module} is in no layer")
        for other in sorted(others):
            theirs = layer_of(other)
            same_package = module.partition(".")[0] == other.partition(".")[0]
            if other == "" and own == LAYERS["cli"]:
                continue  # the front door stands above all but the command line
            if is_re_export(other) or theirs is None:
                result.append(f"{module} imports {other or 'fasterai'}, which only re-exports")
            elif own is not None and (theirs > own or (theirs == own and not same_package)):
                result.append(f"{module} (L{own}) imports {other} (L{theirs})")
            if module in CATALOGUES and other in CATALOGUES:
                result.append(f"the catalogue {module} imports the catalogue {other}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        result.append(f"circle: {' -> '.join(error.args[1])}")
    return result


def test_no_module_imports_what_lies_above_it():
    assert complaints(read_sources()) == []


def test_the_table_names_what_there_is():
    modules = set(read_sources())
    core = {m for m in modules if m.startswith("core.") and not is_re_export(m)}
    assert core == {m for m in LAYERS if m.startswith("core.")}
    assert set(LAYERS) <= modules
    assert modules >= CATALOGUES


def test_re_exports_define_nothing():
    """What is exempt from the table must be worth it: imports, `__all__` and assignments, no function and no class."""
    for module, source in read_sources().items():
        if is_re_export(module):
            kinds = {type(node) for node in ast.walk(ast.parse(source))}
            assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda}, module


def test_the_front_door_imports_no_module_at_run_time():
    assert imported(read_sources()[""], "", set(read_sources())) == set()


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("core.types", "import fasterai.core.loop", "core.types (L0) imports core.loop (L2)"),
        ("model.cuts", "from fasterai.core.criteria import Criterion", "model.cuts (L1) imports core.criteria (L2)"),
        (
            "core.criteria",
            "from fasterai.core import schedules",
            "the catalogue core.criteria imports the catalogue core.schedules",
        ),
        ("core.contexts", "def f():\n    import fasterai.callbacks.plain", "core.contexts (L2) imports callbacks.plain (L8)"),
        ("sparse.report", "from fasterai.testing import LAYOUTS", "sparse.report (L6) imports testing (L9)"),
        ("sparse.pace", "from fasterai.sparse.sparsifier import Sparsifier", "circle: "),
        ("core.loop", "from fasterai.core.all import agp", "core.loop imports core.all, which only re-exports"),
        ("callbacks.plain", "import fasterai", "callbacks.plain imports fasterai, which only re-exports"),
        ("callbacks.plain", "from fasterai.testing import promises", "callbacks.plain (L8) imports testing.promises (L9)"),
        ("core.extra", "", "core.extra is in no layer"),
    ],
)
def test_a_planted_import_is_found(module, line, complaint):
    sources = read_sources()
    sources[module] = sources.get(module, '"""New."""') + "\n" + line
    assert any(c.startswith(complaint) for c in complaints(sources)), complaints(sources)


def test_an_import_for_type_checkers_alone_is_no_import():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fasterai.core.criteria import Criterion\n"
    modules = {"core.criteria", "core.loop"}
    assert imported(source, "model.masks", modules) == set()
    assert imported(source + "else:\n    import fasterai.core.loop", "model.masks", modules) == {"core.loop"}
