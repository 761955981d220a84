"""The study of transformers: what is trained, for how long, and that the small one is the file that was written."""

from __future__ import annotations

import sys

import pytest
import torch

from fasterai.study import transformers as study
from fasterai.study.description import Size
from fasterai.study.streams import Widths, load_both, make_llama, make_vit
from fasterai.study.transformers import DENSE, LLAMA, LONGER, SCRATCH, SMALL, VIT, trial

SIZE = Size("tiny", 64, 40, 8, epochs=2, batch_size=32)


@pytest.fixture(scope="module")
def data():
    return load_both(None, SIZE)


@pytest.fixture
def seen(monkeypatch):
    """Kind, parameters and steps of the trainings, none of which is done."""
    found = []

    def note(network, optimizer, batches, loss, participants, *, lr, steps):
        found.append((sum(p.numel() for p in network.parameters()), steps, len(participants), len(list(batches))))

    monkeypatch.setattr(study, "take_steps", note)
    monkeypatch.setattr(study, "_figures", lambda *_: {"accuracy": 1.0})
    return found


def test_half_from_scratch_trains_as_long_or_at_the_cost_of_the_dense_one(data, seen):
    for what in (DENSE, SCRATCH, LONGER):
        trial({"network": VIT, "what": what}, 0, SIZE, data)
    (dense, steps, *_), (half, as_many, *_), (same, more, *_) = seen
    assert 0.2 < half / dense < 0.3 and same == half
    assert steps == as_many == 2 * (64 // 32)
    assert 3 * steps <= more <= 4 * steps  # a quarter of the matrices, and all of the attention's scores of a half
    assert all(drawn == asked for _, asked, _, drawn in seen)


def test_the_llama_reads_half_as_many_sequences_for_half_as_many_epochs(data, seen):
    pytest.importorskip("transformers")
    trial({"network": LLAMA, "what": DENSE}, 0, SIZE, data)
    assert seen[0][1] == 1 * (len(data.text.train[0]) // 16)


def test_what_is_removed_has_half_of_all_widths_and_the_widths_of_a_new_half_one(data):
    found = trial({"network": VIT, "what": SMALL}, 0, SIZE, data)
    half = make_vit(data.images, Widths().halved())
    assert found["parameters"] == sum(p.numel() for p in half.parameters())
    assert found["moved"] < 1e-5 and found["refused"] == 0
    assert {f"{name}_batch{n}_ms" for name in ("dense", "small", "scratch") for n in (1, 8)} <= found.keys()


def test_texts_are_cut_into_characters_and_the_next_ones(data):
    (x, y), characters = data.text.train, data.text.characters
    assert torch.equal(x[0, 1:], y[0, :-1]) and y[0, -1] == x[1, 0]
    assert len(set(characters)) == len(characters) > 90 and int(x.max()) < len(characters)
    assert data.fingerprint == load_both(None, SIZE).fingerprint


def test_a_llama_without_transformers_names_the_extra(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"network 'Llama' needs transformers: pip install '\.\[huggingface\]'"):
        make_llama(data.text, Widths())
