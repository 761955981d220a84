from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch

from fasterai.model.progress import check_same_call, keep_random_state, put_random_state_, random_state
from fasterai.model.snapshots import sum_of


def test_random_numbers_go_on():
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    state = keep_random_state()

    def drawn():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), np.random.randn(), random.random(), random.gauss(0, 1)

    first = drawn()
    assert drawn() != first
    put_random_state_(state)
    assert drawn() == first
    put_random_state_({})
    assert drawn() != first


@pytest.mark.parametrize("state", [None, [], {}, {"torch": 1}])
def test_states_of_generators_are_told_from_others(state):
    random_state("random", keep_random_state())
    with pytest.raises(TypeError, match="random must be states of generators, got"):
        random_state("random", state)


def test_a_folder_is_of_the_same_call(tmp_path):
    first, other = {"0.weight": torch.zeros(2)}, {"0.weight": torch.ones(2)}
    state = {"settings": {"rounds": "3"}, "weights": other, "start": sum_of(first)}
    kept = ("rounds of a model", "the search")
    check_same_call(tmp_path, state, {"rounds": "3"}, first, kept)
    with pytest.warns(UserWarning, match="holds rounds of a model with other first weights: the search goes on with those"):
        check_same_call(tmp_path, state, {"rounds": "3"}, other, kept)
    for words, tensors, differs in (
        ({"rounds": "4"}, first, "rounds was 3 and is 4"),
        ({"rounds": "3"}, {"0.weight": torch.zeros(3)}, "0.weight was (2,) and is (3,)"),
        ({"rounds": "3"}, {"1.weight": torch.zeros(2)}, "0.weight was (2,) and is missing"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"where {differs}; pass another folder")):
            check_same_call(tmp_path, state, words, tensors, kept)
