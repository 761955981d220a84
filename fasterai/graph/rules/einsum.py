"""Einstein's sums: letters stand for dimensions, and those that the result lacks are summed over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fasterai.graph.labels import FREE, Dim, is_labelled
from fasterai.graph.rules.trace import Trace, Value, blend, rule, shape_of, zero_in_either
from fasterai.graph.rules.weights import read_by

__all__: list[str] = []

DOTS = "..."


@rule("einsum")
def einsum(trace: Trace, node: Any, equation: str, operands: Sequence[Value], **keywords: Any) -> Value:
    """Join the dimensions of one letter, in one operand too; one of size 1 is repeated along the others of its letter."""
    terms, output = _read(equation, [len(value.shape) for value in operands])
    sizes: dict[str, int] = {}
    for letter, size in (
        pair for letters, x in zip(terms, operands, strict=True) for pair in zip(letters, x.shape, strict=True)
    ):
        sizes[letter] = max(size, sizes.get(letter, 1))
    carried: dict[str, Dim] = {}
    weighed: set[str] = set()
    for letters, value, reads in zip(terms, operands, read_by(operands), strict=True):
        for d, (letter, dim) in enumerate(zip(letters, value.dims, strict=True)):
            if value.shape[d] < sizes[letter]:
                trace.labels.pin(dim, f"{node.name} repeats it along a larger dimension")
                continue
            either = zero_in_either(carried.get(letter, FREE), dim)
            joined = trace.labels.join(carried.get(letter, FREE), dim, f"{node.name} meets a dimension of fixed size")
            carried[letter] = either if is_labelled(joined) else joined
            if reads and letter not in output:
                weighed.add(letter)
                trace.reads(value, d)
    for letter, dim in carried.items():
        if letter not in output and letter not in weighed:
            trace.sums(node, dim, f"{node.name} sums over it without a weight", is_product=True)
    made = Value(shape_of(node), tuple(carried[letter] for letter in output))
    origins = [list(_origins(letters, x, output, sizes)) for letters, x in zip(terms, operands, strict=True)]
    return blend(operands, origins, made) if all(len(set(letters)) == len(letters) for letters in terms) else made


def _read(equation: str, dims: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Read an equation for operands of so many dimensions: the letters of each, and of the result.

    What dots stand for is counted from the right, and gets numbers for letters; without an arrow the letters that stand once
    are the result, in their order.

    >>> _read("b...c,dc->b...d", [4, 2])
    ([['b', '2', '1', 'c'], ['d', 'c']], ['b', '2', '1', 'd'])
    >>> _read("ij,jk", [2, 2])
    ([['i', 'j'], ['j', 'k']], ['i', 'k'])
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    texts = inputs.split(",")
    hidden = [n - len(text.replace(DOTS, "")) for text, n in zip(texts, dims, strict=True)]
    terms = [_spelled(text, n) for text, n in zip(texts, hidden, strict=True)]
    if arrow:
        return terms, _spelled(result, max(hidden))
    letters = [letter for text in texts for letter in text.replace(DOTS, "")]
    return terms, [*_spelled(DOTS, max(hidden)), *sorted(one for one in letters if letters.count(one) == 1)]


def _spelled(text: str, hidden: int) -> list[str]:
    """List the letters of a term, with numbers for its dots."""
    before, dots, after = text.partition(DOTS)
    return [*before, *(map(str, range(hidden, 0, -1)) if dots else ()), *after]


def _origins(letters: Sequence[str], value: Value, output: Sequence[str], sizes: dict[str, int]) -> Iterator[int | None]:
    """Yield the dimension of an operand that each dimension of the result is; None where it has none of that size."""
    for letter in output:
        d = letters.index(letter) if letter in letters else None
        yield d if d is not None and value.shape[d] == sizes[letter] else None
