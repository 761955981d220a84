"""Every docstring of the library opens in plain words, no function is long, and a long file says why it is one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "fasterai"
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


QUESTIONS = {"What", "How", "Whether", "Which", "Where", "When", "Who"}
#: First words of functions' docstrings: verbs in the imperative. A new one is added here knowingly.
VERBS = _words(
    "Add Adjust Answer Apply Bake Begin Call Carry Check Choose Clear Collect Combine Compare Compute Copy Count Cut",
    "Decide Decode Decompose Describe Distribute Divide Draw Drop End Evaluate Explain Export Factorise Find Fix Fold",
    "Follow Forget Give Go Hand Import Join Keep Lay Learn Leave Let List Listen Load Log Look Make Mask Match",
    "Measure Move Multiply Name Normalise Note Pair Pass Pin Plan Prepare Print Prune Put Rank Rate Read Refuse Register",
    "Remember Remove Renumber Repeat Replace Report Restore Resume Return Rewind Round Run Save Say Scale Score Seed",
    "Select Set Shift Shorten Show Shrink Skip Split Start Stop Sum Summarise Switch Take Tell Time Train Try Turn",
    "Undo Wait Walk Warn Work Write Yield",
)
MOST_LINES_OF_FUNCTION, MOST_LINES_OF_FILE = 40, 300
#: The line in a long file's head that says why it is long.
REASON = re.compile(r"^Over 300 lines, since \w", re.MULTILINE)


class Documented(NamedTuple):
    """A part of a file that may have a docstring: a module, a class, a function, or a property (a noun as well)."""

    name: str
    is_verb: bool
    text: str


def documented(tree: ast.Module) -> Iterator[Documented]:
    """Walk over a file's docstrings; overrides and small functions may have none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield Documented(getattr(node, "name", "the module"), _asks_for_verb(node), text)


def _asks_for_verb(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    is_property = any("property" in ast.unparse(one) for one in node.decorator_list)
    return not is_property and not re.fullmatch(r"__\w+__", node.name)


def riddles(source: str) -> list[str]:
    """List the docstrings that open as a question, and those of functions that open with no verb of the list."""
    found = []
    for one in documented(ast.parse(source)):
        first = re.split(r"[^\w]", one.text.strip(), maxsplit=1)[0]
        if first in QUESTIONS or (one.is_verb and first not in VERBS):
            found.append(f"{one.name}: {one.text.splitlines()[0]}")
    return found


def too_long(source: str) -> list[str]:
    """List the functions that are too long, docstring and signature aside, and the file if it is long without a reason."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = [f"{f.name}: {n} lines" for f in functions if (n := _body_lines(f)) > MOST_LINES_OF_FUNCTION]
    lines = len(source.splitlines())
    if lines > MOST_LINES_OF_FILE and not REASON.search(ast.get_docstring(tree) or ""):
        found.append(f"the file: {lines} lines, and no line 'Over 300 lines, since ...' in its head")
    return found


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("name", FILES)
def test_docstrings_open_with_a_verb_or_a_noun(name):
    found = riddles(FILES[name].read_text(encoding="utf-8"))
    assert not found, "\n".join([f"{name}: docstrings of functions begin with a verb of VERBS, none with a question", *found])


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short_and_long_files_say_why(name):
    found = too_long(FILES[name].read_text(encoding="utf-8"))
    assert not found, "\n".join([name, *found])


def test_verbs_are_imperatives():
    assert not [verb for verb in VERBS if verb.endswith(("s", "ing")) and not verb.endswith("ss")]


def test_the_search_for_riddles_finds_them():
    source = '''
"""Which channels go."""
class Pool:
    """How units are gathered."""
    @property
    def size(self):
        """Number of units."""
    def __len__(self):
        """Length."""
    def draw(self):
        """Draws a unit."""
async def wait():
    """Where all are true."""
def none(): ...
def fine():
    """Return one."""
'''
    assert [line.partition(":")[0] for line in riddles(source)] == ["the module", "Pool", "wait", "draw"]


NO_REASON = "the file: 301 lines, and no line 'Over 300 lines, since ...' in its head"


@pytest.mark.parametrize(
    ("lines", "head", "found"),
    [
        (40, "", []),
        (41, "", ["long: 41 lines"]),
        (297, "", ["long: 297 lines"]),
        (298, "", ["long: 298 lines", NO_REASON]),
        (298, "Over 300 lines, since it is a list.", ["long: 298 lines"]),
        (
            298,
            "It is over 300 lines.",
            ["long: 298 lines", "the file: 301 lines, and no line 'Over 300 lines, since ...' in its head"],
        ),
    ],
)
def test_the_search_for_length_finds_it(lines, head, found):
    body = ["    x = 1"] * lines
    source = "\n".join([f'"""{head or "Head"}"""', "def long():", '    """Do it."""', *body])
    assert too_long(source) == found
