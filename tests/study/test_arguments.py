"""Arguments of the command, and what they mean."""

from __future__ import annotations

import pytest

from fasterai.study.arguments import read_only

SETTINGS = [{"a": 1, "sparsity": 0.9, "b": "x"}, {"a": 2, "sparsity": 0.97, "c": None}]


def test_text_means_the_value_that_is_written_so():
    found = read_only(["sparsity=0.9", "sparsity=.97", "b=x", "c=None", "a=2"], SETTINGS)
    assert found == {"sparsity": [0.9, 0.97], "b": ["x"], "c": [None], "a": [2]}


def test_what_is_unknown_stays_text_and_is_refused_later():
    assert read_only(["a=9", "d=1"], SETTINGS) == {"a": ["9"], "d": ["1"]}


def test_text_without_a_sign_is_refused():
    with pytest.raises(ValueError, match="--only must be AXIS=VALUE, got 'sparsity'"):
        read_only(["sparsity"], SETTINGS)
