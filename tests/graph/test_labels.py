from __future__ import annotations

import numpy as np

from fasterai.graph.labels import FIXED, FREE, Labels, is_labelled


def test_new_labels_are_never_given_twice() -> None:
    labels = Labels()
    assert labels.new(3).tolist() == [0, 1, 2]
    assert labels.new(2).tolist() == [3, 4]
    assert labels.count == 5


def test_only_arrays_carry_labels() -> None:
    assert is_labelled(np.arange(2))
    assert not is_labelled(FIXED)
    assert not is_labelled(FREE)
    assert (repr(FIXED), repr(FREE)) == ("FIXED", "FREE")


def test_what_is_joined_by_any_path_is_one_component() -> None:
    labels = Labels()
    a, b, c, d = (labels.new(2) for _ in range(4))
    labels.join(a, b, "")
    labels.join(b, c, "")
    of = labels.components().of
    assert of[a].tolist() == of[b].tolist() == of[c].tolist()
    assert of[a[0]] != of[a[1]]
    assert not set(of[d]) & set(of[a])


def test_without_edges_every_label_is_alone() -> None:
    labels = Labels()
    labels.new(3)
    assert sorted(labels.components().of.tolist()) == [0, 1, 2]


def test_a_fixed_dimension_pins_what_meets_it_and_a_free_one_does_not() -> None:
    labels = Labels()
    a, b = labels.new(2), labels.new(2)
    assert labels.join(a, FIXED, "first") is FIXED
    assert np.array_equal(labels.join(FREE, b, "never"), b)
    components = labels.components()
    assert {components.pinned[int(n)] for n in components.of[a]} == {"first"}
    assert components.free(b).size == 2
    assert components.free(a).size == 0


def test_what_stands_for_two_dimensions_without_labels() -> None:
    labels = Labels()
    assert labels.join(FREE, FREE, "") is FREE
    assert labels.join(FREE, FIXED, "") is FIXED
    assert labels.join(FIXED, FREE, "") is FIXED


def test_a_pin_reaches_all_of_a_component_and_the_first_reason_counts() -> None:
    labels = Labels()
    a, b = labels.new(2), labels.new(2)
    labels.join(a, b, "")
    labels.pin(a[:1], "first")
    labels.pin_all([b, FIXED], "second")
    components = labels.components()
    assert components.pinned == {int(components.of[b[0]]): "first", int(components.of[b[1]]): "second"}


def test_rows_are_unified() -> None:
    labels = Labels()
    rows = labels.new(6).reshape(2, 3)
    assert labels.unify(rows).tolist() == [0, 3]
    of = labels.components().of
    assert len(set(of[:3])) == len(set(of[3:])) == 1
    assert of[0] != of[3]
    assert labels.unify(rows[:, :1]).tolist() == [0, 3]


def test_free_components_are_listed_once() -> None:
    labels = Labels()
    a, b = labels.new(2), labels.new(2)
    labels.join(a, b, "")
    components = labels.components()
    assert components.free(np.concatenate([a, b])).tolist() == sorted({int(n) for n in components.of[a]})
    assert components.free(a[:0]).size == 0
