"""The share of the parameters that each reason keeps, by hand, and its words."""

from __future__ import annotations

import numpy as np
import pytest

from fasterai.graph.channels import ChannelGraph, Group
from fasterai.graph.reasons import kept_shares, plain_reason, shares_in_words, summed_reasons

#: a reads an input of 4 and makes 8 channels; b reads 6 of them and makes 2 outputs; its kernel is 3.
SHAPES = {"a.weight": (8, 4), "a.bias": (8,), "b.weight": (2, 8, 3)}
ROWS = np.arange(6)[:, None]
GRAPH = ChannelGraph(
    (Group({("a.weight", 0): ROWS, ("a.bias", 0): ROWS, ("b.weight", 1): ROWS}, "a.weight"),),
    {("a.weight", 1): "linear_1 reads an input", ("b.weight", 0): "it is an output", ("b.weight", 2): "conv1d's kernel size"},
    frozenset(),
    partly={("a.weight", 0): "add_3 meets a size", ("a.bias", 0): "add_3 meets a size"},
)


def test_a_weight_counts_in_equal_parts_for_its_dimensions_and_kernel_sizes_do_not() -> None:
    # 88 numbers. Columns of a: 32 / 2. Rows of b: 48 / 2. Two of eight rows of a and of its bias: (16 + 8) / 4.
    # As much of what b reads, which has no reason of its own: 24 / 4.
    expected = {"it is an output": 24 / 88, "linear reads an input": 16 / 88, "add meets a size": 6 / 88, "of others": 6 / 88}
    assert kept_shares(SHAPES, GRAPH, otherwise="of others") == pytest.approx(expected)
    assert list(kept_shares(SHAPES, GRAPH)) == [*list(expected)[:3], "it goes only with what stays"]


def test_what_the_check_put_back_counts_for_the_share_of_it() -> None:
    stayed = {"a.weight": (0.5, "3 of its 6 silent channels stay (0, 1, 2): the model fails without them: RuntimeError: 12")}
    # Half of the three quarters of 16 + 8 + 24 that are in the group.
    assert kept_shares(SHAPES, GRAPH, stayed)["a size is written into its code"] == pytest.approx(18 / 88)


def test_reasons_lose_what_belongs_to_one_place() -> None:
    assert plain_reason("view_12 cuts it at fixed positions (view_12)") == "view cuts it at fixed positions"
    assert summed_reasons(["view_1 cuts it", "view_23 cuts it"])[1] == "  2 because view cuts it"


def test_only_the_largest_are_in_words() -> None:
    assert shares_in_words({"a": 0.5, "b": 0.25, "c": 0.1, "d": 0.05}, 2) == "50 % because a, 25 % because b"
