"""Words that people type for entries of the catalogues: further names of an entry, and hints for what has no single answer.

A word is a further name where it means one entry and nothing else; where it may mean several, or something that has no name of
its own, it gets a hint. To add one: a line in `NAMES` or `HINTS`, by the catalogue's module, and a row in the page of that
catalogue.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["ARGUMENTS", "GONE", "HINTS", "NAMES", "find_entry", "hint_for"]

#: Catalogue -> further name -> entry.
NAMES: Mapping[str, Mapping[str, str]] = {
    "criteria": {
        "abs": "large_final",
        "first_order": "taylor",
        "l1": "large_final",
        "l1_norm": "large_final",
        "l2": "squared_final",
        "l2_norm": "squared_final",
        "magnitude": "large_final",
    },
    "granularities": {
        "element": "weight",
        "elementwise": "weight",
        "unstructured": "weight",
    },
    "contexts": {
        "2:4": "two_four",
        "erdos_renyi_kernel": "erk",
        "global_": "global",
        "layerwise": "local",
        "per_layer": "local",
        "uniform": "local",
    },
    "schedules": {
        "1cycle": "one_cycle",
        "cosine": "cos",
        "cubic": "agp",
        "linear": "lin",
        "onecycle": "one_cycle",
        "oneshot": "one_shot",
    },
    "rules": {"sr_ste": "free"},
    "penalties": {
        "bn_slimming": "slimming",
        "depgraph": "growing",
        "group": "group_lasso",
        "group_norm": "group_lasso",
        "grouplasso": "group_lasso",
        "l21": "group_lasso",
        "lasso": "l1",
        "network_slimming": "slimming",
    },
    # A share of the FLOPs is the same share of the multiply-accumulates, which are half as many.
    "budgets": {"flops": "macs", "mac": "macs", "param": "params", "parameters": "params", "size": "params", "time": "latency"},
}

_ANOTHER_CURVE = "it is a function of the position: schedule=lambda position: position ** 2, say"
_GROW = "it is a rule with settings: from fasterai.units.rules import DropAndGrow; rule=DropAndGrow(every=100, fraction=0.3)"
_N_M = "N:M is a context: context='two_four', or NM(1, 4) from fasterai.core.contexts"
_OUTPUTS = (
    "an output is 'filter' of a convolution, 'row' of a matrix, Keep('out') of both; 'coupled' is one that can be removed"
)
_STRUCTURED = "structured is granularity='filter' (masks), or 'coupled' (channels that can be removed)"
_UNSTRUCTURED = "unstructured is granularity='weight'"

#: Words that belong to another argument, whatever the catalogue that they are looked up in.
_ELSEWHERE: Mapping[str, str] = {
    "2:4": _N_M,
    "filter": "filters are a granularity: granularity='filter'",
    "global": "who competes is the context: context='global'",
    "l1": "the size of a weight is a criterion: criteria='large_final'",
    "local": "who competes is the context: context='local'",
    "magnitude": "the size of a weight is a criterion: criteria='large_final'",
    "n:m": _N_M,
    "percent": "shares are fractions in [0, 1]: sparsity=0.5 for 50 %",
    "structured": _STRUCTURED,
    "unstructured": _UNSTRUCTURED,
}

#: Catalogue -> those of them that are its own entries, in another spelling.
_HOMES: Mapping[str, tuple[str, ...]] = {"granularities": ("filter",), "contexts": ("global", "local")}

#: Catalogue -> word -> what to write instead.
HINTS: Mapping[str, Mapping[str, str]] = {
    "criteria": {
        "activation": "did you mean 'wanda', |w| times the size of its input?",
        "grad": "did you mean 'snip', |g w|, or 'taylor', (g w)^2?",
        "gradient": "did you mean 'snip', |g w|, or 'taylor', (g w)^2?",
        "redundancy": "did you mean 'variety(large_final)', or of another criterion?",
        "variety": "it takes a criterion: 'variety(large_final)', say",
    },
    "granularities": {
        "block": "it has settings: Block(4, 4), from fasterai import Block",
        "channels": _OUTPUTS,
        "head": "heads of attention are coupled channels: granularity='coupled'",
        "heads": "heads of attention are coupled channels: granularity='coupled'",
        "input": "an input is 'column' of a matrix, 'shared_kernel' of a convolution, Keep('in') of both",
        "neuron": _OUTPUTS,
        "output": _OUTPUTS,
    },
    "contexts": {
        "erdos_renyi": "did you mean 'erk', which counts kernel sizes too?",
        "layer": "did you mean 'local', each target by itself? granularity='layer' takes out whole layers",
    },
    "schedules": {
        "constant": "did you mean OneShot(0), all from the start?",
        "exponential": _ANOTHER_CURVE,
        "gradual": "did you mean 'agp', or 'one_cycle'?",
        "polynomial": f"'agp' is the cubic one; for another power {_ANOTHER_CURVE}",
        "quadratic": _ANOTHER_CURVE,
        "step": "did you mean 'iterative', equal stairs?",
    },
    "rules": {
        "drop_and_grow": _GROW,
        "dropandgrow": _GROW,
        "rigl": _GROW,
        "set": _GROW,
        "static": "did you mean 'nested', with a schedule that has no further steps: OneShot(0)?",
    },
}

#: Class, of callbacks what the frameworks' ones are made of -> argument of others' calls -> what to write instead.
ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "Pruner": {"importance": "the importance of a weight is criteria=, such as criteria='large_final'"},
    "SparsifyMethod": {"end_sparsity": "the share at the end of the run is sparsity=, such as sparsity=0.5 for 50 %"},
}

_FREE = "schedules remember nothing, so there is nothing to do in its place"
_EVIDENCE = "evidence is gathered when it is needed: pass data= to the Sparsifier, or train with a callback"
_GRAPH = "fasterai.graph.channels.channel_graph(model, inputs) has the groups, and why the others stay"

#: Class -> attribute that it has in the public fasterai 0.4.1 -> what to write instead.
GONE: Mapping[str, Mapping[str, str]] = {
    "Schedule": {
        "progress": "call the schedule itself: schedule(0.3)",
        **dict.fromkeys(("changed", "pruned", "after_step", "after_pruned", "reset"), _FREE),
    },
    "Criterion": {
        "calibrate": _EVIDENCE,
        "update_weights": _EVIDENCE,
        "scale": "scores are compared as they are; criterion.using(normalizer='max') makes those of targets comparable",
        "needs_data": "criterion.needs has the names of all evidence",
        "f": "it is criterion.function",
    },
    "Sparsifier": {
        "_save_weights": "LotteryTicket(sparsifier) saves and rewinds, or lth=True in a callback",
        "_reset_weights": "LotteryTicket(sparsifier) saves and rewinds, or lth=True in a callback",
        "_apply_masks": "call apply_masks()",
        "_clean_buffers": "nothing is put on the modules; finalize() drops the copies, reset() the masks",
        "_reset_threshold": "there is no threshold to reset",
        "sparsify_batchnorm": "norms follow the data flow: pass example_inputs=, or train with a callback",
    },
    "Pruner": {
        **dict.fromkeys(("pruner", "group_importance", "restore_attention_layers"), _GRAPH),
        **dict.fromkeys(("get_ignored_layers", "get_linear_layers_to_ignore", "get_attention_layers_to_ignore"), _GRAPH),
        "num_heads": _GRAPH,
    },
}


def find_entry(catalogue: str, word: str) -> str:
    """Return the name of the entry that a word means; the word itself if it is no further name.

    Args:
        catalogue: The last part of the catalogue's module, `criteria` say.
        word: The name or word, in lower or upper case, with `-` or `_`.
    """
    return NAMES.get(catalogue, {}).get(_plain(word), word)


def hint_for(catalogue: str, word: str) -> str | None:
    """Return a sentence on what to write instead of a word; None if there is nothing to say."""
    plain = _plain(word)
    if plain in _HOMES.get(catalogue, ()):
        return f"did you mean {plain!r}?"
    if plain != "2:4" and re.fullmatch(r"\d+:\d+", plain):
        n, m = plain.split(":")
        return f"N:M is a context: NM({n}, {m}), from fasterai.core.contexts import NM"
    return HINTS.get(catalogue, {}).get(plain) or _ELSEWHERE.get(plain)


def _plain(word: str) -> str:
    return re.sub(r"[-\s]+", "_", word.strip().lower())
