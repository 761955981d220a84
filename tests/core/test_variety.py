"""Which of similar units go first, against greedy pairs written down plainly."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fasterai.core.variety import SIMILARITIES, STEP, Variety, order_of_removal, similarities

by_similarity = pytest.mark.parametrize("similarity", SIMILARITIES)


def alike(a, b, similarity):
    """The similarity of two vectors, as a book has it."""
    if similarity == "euclidean":
        return -math.dist(a, b)
    if similarity == "pearson":
        a, b = a - a.mean(), b - b.mean()
    cosine = float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    return abs(cosine) if similarity == "abs_cosine" else cosine


def greedy(scores, vectors, similarity):
    """Greedy pairs in three nested loops: the closest pair left, of equal ones that with the lowest unit; the lower goes."""
    vectors = np.asarray(vectors, np.float64)
    scale = 1.0
    if similarity == "euclidean":
        scale = math.sqrt(np.mean([math.dist(v, vectors.mean(0)) ** 2 for v in vectors])) or 1.0
    ranks = {unit: rank for rank, unit in enumerate(sorted(range(len(scores)), key=lambda i: (scores[i], i)))}
    left, gone = set(range(len(scores))), []
    while len(left) > 1:
        best = None
        for i, j in itertools.combinations(sorted(left), 2):
            low = min(i, j, key=ranks.get)
            key = (round(alike(vectors[i], vectors[j], similarity) / scale / STEP), -ranks[low])
            if best is None or key > best[0]:
                best = (key, low)
        left.discard(best[1])
        gone.append(best[1])
    return gone + sorted(left)


def drawn(units, features, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(units, generator=generator), torch.randn(units, features, generator=generator)


@by_similarity
@pytest.mark.parametrize(("units", "features", "seed"), [(2, 3, 0), (7, 2, 1), (24, 5, 2), (40, 12, 3)])
def test_the_order_is_that_of_greedy_pairs(similarity, units, features, seed):
    scores, vectors = drawn(units, features, seed)
    assert order_of_removal(scores, vectors, similarity).tolist() == greedy(scores.tolist(), vectors.numpy(), similarity)


@by_similarity
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_it_is_greedy_where_many_pairs_are_equally_similar(similarity, data):
    vectors = data.draw(arrays(np.float32, (6, 3), elements=st.sampled_from([0.0, 1.0, 2.0, -1.0])))
    own = vectors - vectors.mean(1, keepdims=True) if similarity == "pearson" else vectors
    vectors[~(np.abs(own) > 1e-6).any(1)] = [1.0, 2.0, 4.0]
    scores = data.draw(st.permutations(range(6)))
    found = order_of_removal(torch.tensor(scores), torch.from_numpy(vectors), similarity).tolist()
    assert found == greedy(scores, vectors, similarity)
