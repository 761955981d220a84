"""Rules of operations: the effect of each operation of an exported network on the labels of tensor dimensions.

A rule is a function `(trace, node, *arguments, **keywords) -> value` under the operation's name in `RULES`; tensors among
the arguments come as `Value`s. An operation without a rule pins all that it reads, by its name. To add one: a function with
`@rule("aten.name", ...)` in the file of its kind, and a case in `tests/graph/rules/`.
"""

from __future__ import annotations

from fasterai.graph.rules import (  # noqa: F401
    attention,
    consumers,
    einsum,
    elementwise,
    moving,
    norms,
    parts,
    recurrent,
    reshaping,
    spatial,
    spectral,
    values,
    weights,
    writing,
)
from fasterai.graph.rules.trace import RULES, Trace, Value, rule, unknown

__all__ = ["RULES", "Trace", "Value", "rule", "unknown"]
