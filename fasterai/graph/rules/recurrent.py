"""Recurrent layers: a hidden unit is removed from every gate, direction and layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fasterai.graph.labels import FIXED, Array, Dim, is_labelled
from fasterai.graph.rules.trace import Trace, Value, all_fixed, broadcast, rule, shape_of, shapes_of, unknown, unmarked

__all__: list[str] = []


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(trace: Trace, node: Any, x: Value, *rest: Any) -> Any:
    """Follow a recurrent layer; of packed sequences, (steps of all, C), the sizes of batches stand behind them."""
    if not str(node.target).endswith(".data"):
        return _recurrent(trace, node, x, *rest)
    trace.labels.pin_all(rest[0].dims, f"{node.name} uses its values as sizes")
    states_and_weights: Any = (*rest[1:], False)
    return _recurrent(trace, node, x, *states_and_weights)


@rule("_pack_padded_sequence", "_pad_packed_sequence")
def packed(trace: Trace, node: Any, x: Value, sizes: Value, *rest: Any) -> list[Value]:
    """Carry channels from (T, N, C) to packed (steps of all, C), or back."""
    lead = 2 if "pack_padded" in str(node.target) else 1
    trace.labels.pin_all([*sizes.dims, *x.dims[:lead]], f"{node.name} uses lengths of sequences")
    shapes = shapes_of(node)
    channels = x.dims[lead:]
    made = Value(shapes[0], (*all_fixed(shapes[0][: len(shapes[0]) - len(channels)]), *channels))
    is_filled = lead == 1 and rest[1] != 0  # with what stands behind the end of shorter sequences
    return [unmarked(made) if is_filled else made, Value(shapes[1], (FIXED,))]


def _recurrent(
    trace: Trace, node: Any, x: Value, states: Any, weights: Sequence[Value], has_biases: bool, layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    labels, name = trace.labels, node.name
    directions, per_cell = 2 if bidirectional else 1, 4 if has_biases else 2
    is_single = not all(is_labelled(w.dims[1]) for w in weights[1::per_cell])  # one hidden unit
    if is_single or len(weights) != layers * directions * per_cell:  # or projections
        return unknown(trace, node, x, states, weights, has_biases)
    given = states if isinstance(states, list | tuple) else [states]
    for state in given:
        labels.pin_all(state.dims[:-1], f"{name} computes across it")
    labels.pin_all(x.dims[:-1], f"{name} computes across it")
    read: Dim = x.dims[-1]
    cells = [weights[i : i + per_cell] for i in range(0, len(weights), per_cell)]
    for layer in range(layers):
        hidden = [_cell(trace, name, read, cell) for cell in cells[layer * directions : (layer + 1) * directions]]
        # One hidden size for all: the same index goes in both directions, and in every layer, as the module has one number.
        read = hidden[0] if len(hidden) == 1 else np.concatenate(hidden)
    first = [_hidden(cell) for cell in cells]
    for other in [*first[1:], *(state.dims[-1] for state in given)]:
        labels.join(first[0], other, f"{name} is given its states")
    values = shapes_of(node)
    outputs = [Value(values[0], (*x.dims[:-1], read))]
    outputs += [Value(s, (FIXED, FIXED, first[0])) for s in values[1:]]
    return [unmarked(x) for x in outputs]  # the states that it was given may not be zero


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def single_step(
    trace: Trace, node: Any, x: Value, states: Any, ih: Value, hh: Value, b_ih: Value | None = None, b_hh: Value | None = None
) -> Any:  # fmt: skip
    """Follow one step of a recurrent layer: the states that it is given lose what its hidden units lose."""
    given = states if isinstance(states, list | tuple) else [states]
    if not is_labelled(hh.dims[1]):  # one hidden unit
        return unknown(trace, node, x, states, ih, hh, b_ih, b_hh)
    hidden: Dim = _cell(trace, node.name, x.dims[-1], [v for v in (ih, hh, b_ih, b_hh) if v is not None])
    batch = Value(x.shape[:-1], x.dims[:-1])
    for state in given:
        hidden = trace.labels.join(hidden, state.dims[-1], f"{node.name} is given its states")
        batch = broadcast(trace, node.name, [batch, Value(state.shape[:-1], state.dims[:-1])], batch.shape)
    if not isinstance(node.meta["val"], list | tuple):
        return unmarked(Value(shape_of(node), (*batch.dims, hidden)))
    return [unmarked(Value(shape, (*batch.dims, hidden))) for shape in shapes_of(node)]


def _hidden(cell: Sequence[Value]) -> Array:
    dim = cell[1].dims[1]
    assert isinstance(dim, np.ndarray)
    return dim


def _cell(trace: Trace, name: str, read: Dim, cell: Sequence[Value]) -> Array:
    labels = trace.labels
    labels.join(read, cell[0].dims[1], f"{name} reads a dimension of fixed size")
    trace.reads(cell[0], 1)
    trace.reads(cell[1], 1)
    hidden = _hidden(cell)
    for value in cell:
        rows = value.dims[0]
        if isinstance(rows, np.ndarray):
            labels.join(labels.unify(rows.reshape(-1, hidden.size).T), hidden, name)
    return hidden
