"""Notes of flips: counted from look to look, as often as asked, and the same after a resume."""

from __future__ import annotations

import torch

from fasterai.sparse.nm.flips import FlipNotes

MASKS = [torch.tensor(x, dtype=torch.bool) for x in ([1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1])]


def run(notes: FlipNotes, first: int = 1, last: int = 5) -> FlipNotes:
    for i in range(first, last):
        notes.see(i / 4, i, {"w": MASKS[i]})
    return notes


def test_each_look_compares_with_the_one_before_by_hand():
    """Neighbours differ in 2, 2, 2, 0 places; every second mask in 2 (1100 and 1001) and 2 (1001 and 0101)."""
    every = FlipNotes(4)
    every.begin({"w": MASKS[0]})
    assert run(every).read() == {"w": [2, 2, 2, 0]} and every.steps == [1, 2, 3, 4]
    second = FlipNotes(2)
    second.begin({"w": MASKS[0]})
    assert run(second).read() == {"w": [2, 2]} and second.steps == [2, 4]
    none = FlipNotes(0)
    none.begin({"w": MASKS[0]})
    assert run(none).read() == {} and none.steps == []


def test_masks_are_noted_as_they_were_and_a_resumed_count_goes_on():
    mask = MASKS[0].clone()
    notes = FlipNotes(4)
    notes.begin({"w": mask})
    mask.logical_not_()
    notes.see(0.25, 1, {"w": mask})
    assert notes.read() == {"w": [4]}
    first = FlipNotes(4)
    first.begin({"w": MASKS[0]})
    run(first, 1, 3)
    again = FlipNotes(4)
    again.begin({"w": MASKS[4]})
    again.load_state_dict(first.state_dict(), {"w": MASKS[0]})
    assert run(again, 3).read() == {"w": [2, 2, 2, 0]}
    assert first.read() == {"w": [2, 2]}


def test_masks_of_another_size_are_looked_at_anew():
    notes = FlipNotes(4)
    notes.begin({"w": MASKS[0]})
    notes.forget_masks()
    notes.see(0.25, 1, {"w": MASKS[1][:2]})
    notes.see(0.5, 2, {"w": ~MASKS[1][:2]})
    assert notes.read() == {"w": [0, 2]}
