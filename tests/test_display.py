from __future__ import annotations

import pytest

from fasterai.display import short, short_bytes, short_time, table


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1 k"), (999_600, "1 M"), (1_814_073_344, "1.81 G"), (2.5e15, "2.5e+03 T")],
)
def test_counts_have_three_figures(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (12, "12 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (5 * 2**30, "5 GiB")]
)
def test_bytes_are_in_powers_of_1024(number, text):
    assert short_bytes(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s"), (0.0123, "12.3 ms"), (0.001, "1 ms"), (4e-6, "4 us"), (0.0, "0 us")]
)
def test_times_have_a_unit(seconds, text):
    assert short_time(seconds) == text


def test_a_table_is_aligned():
    lines = table(("name", "n"), [("a", "1"), ("longer", "23"), ("all", "24")], foot=1)
    assert lines == ["name     n", "----------", "a        1", "longer  23", "----------", "all     24"]
