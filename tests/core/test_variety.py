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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fasterai.core.variety.BLOCK", data.draw(st.sampled_from([2, 256])))
        found = order_of_removal(torch.tensor(scores), torch.from_numpy(vectors), similarity).tolist()
    assert found == greedy(scores, vectors, similarity)


@by_similarity
def test_blocks_change_nothing(monkeypatch, similarity):
    scores, vectors = drawn(23, 4, 5)
    whole = order_of_removal(scores, vectors, similarity), similarities(vectors, similarity)
    monkeypatch.setattr("fasterai.core.variety.BLOCK", 4)
    assert torch.equal(order_of_removal(scores, vectors, similarity), whole[0])
    torch.testing.assert_close(similarities(vectors, similarity), whole[1])


@by_similarity
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_choice_is_the_same_whatever_the_order_of_the_filters(similarity, data):
    scores, vectors = drawn(12, 6, data.draw(st.integers(0, 9)))
    vectors[3], vectors[7], vectors[9] = vectors[1] * 2, vectors[1], -vectors[4]
    scores[5] = scores[8] = scores[2]  # equal scores of filters that differ
    order = torch.tensor(data.draw(st.permutations(range(12))))
    wanted = order_of_removal(scores, vectors, similarity).tolist()
    assert order[order_of_removal(scores[order], vectors[order], similarity)].tolist() == wanted


@by_similarity
def test_similarities_are_those_of_the_book(similarity):
    _, vectors = drawn(9, 5, 0)
    found = similarities(vectors, similarity)
    if similarity == "pearson":
        torch.testing.assert_close(found, torch.corrcoef(vectors))
    elif similarity == "euclidean":
        spread = (vectors - vectors.mean(0)).square().sum(1).mean().sqrt()
        torch.testing.assert_close(found.float(), -torch.cdist(vectors, vectors) / spread, atol=1e-3, rtol=0)
    else:
        cosines = torch.cosine_similarity(vectors[:, None], vectors, dim=2)
        torch.testing.assert_close(found, cosines.abs() if similarity == "abs_cosine" else cosines)


@by_similarity
def test_duplicates_go_first(similarity):
    scores, vectors = drawn(16, 9, 1)
    vectors[[2, 7, 11]] = vectors[5].clone()
    copies = sorted([2, 7, 11, 5], key=lambda i: scores[i])
    assert order_of_removal(scores, vectors, similarity).tolist()[:3] == copies[:3]  # the best of the four stays


@pytest.mark.parametrize("similarity", ["abs_cosine", "cosine", "pearson"])
def test_an_outlier_of_small_norm_stays(similarity):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 8, generator=generator) + 0.1 * torch.randn(10, 8, generator=generator)
    vectors[4] = 1e-3 * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1])
    scores = vectors.norm(dim=1)
    assert scores.argmin() == 4
    assert order_of_removal(scores, vectors, similarity).tolist().index(4) >= 8
    largest = vectors * 1e25  # whose squares are no numbers
    assert torch.equal(order_of_removal(scores, largest, similarity), order_of_removal(scores, vectors, similarity))


@pytest.mark.parametrize("similarity", ["abs_cosine", "cosine", "euclidean"])
def test_it_is_the_criterion_where_all_are_equally_similar(similarity):
    scores = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7])
    given = torch.eye(5) * 2
    assert torch.equal(Variety(similarity)(scores, given), scores.double())
    assert order_of_removal(scores, given, similarity).tolist() == scores.argsort().tolist()


def test_scores_are_dealt_out_anew_and_told_apart():
    vectors = torch.tensor([[1.0, 0], [0, 1], [1, 0.01], [0, -1]])
    scores = torch.tensor([4.0, 3, 2, 1])
    assert Variety()(scores, vectors).tolist() == [4, 3, 1, 2]  # the third is a copy of the first, and goes first
    tied = Variety()(torch.ones(4), vectors)
    assert len(set(tied.tolist())) == 4 and torch.allclose(tied, torch.ones(4, dtype=torch.float64), rtol=1e-9)
    assert Variety()(torch.zeros(4), vectors).unique().numel() == 4
    assert scores.tolist() == [4, 3, 2, 1]


def test_zeros_keep_their_scores_and_stand_beside_no_other():
    scores, vectors = drawn(8, 5, 3)
    vectors[[1, 6]] = 0
    others = [0, 2, 3, 4, 5, 7]
    found = Variety()(scores, vectors)
    assert found[[1, 6]].tolist() == scores.double()[[1, 6]].tolist()
    assert torch.equal(found[others], Variety()(scores[others], vectors[others]))
    assert not {1, 6} & set(order_of_removal(scores, vectors).tolist())


def test_a_single_unit_and_units_of_one_weight_keep_their_scores():
    for shape in [(1, 5), (4, 1)]:
        scores = torch.rand(shape[0])
        assert torch.equal(Variety("pearson")(scores, torch.ones(shape)), scores.double())


def test_scores_that_are_not_finite_are_left_to_the_choice():
    found = Variety()(torch.tensor([1.0, math.nan, 0.0]), torch.eye(3))
    assert found.isnan().tolist() == [False, True, False]


def test_half_precision_and_doubles():
    scores, vectors = drawn(10, 6, 4)
    wanted = order_of_removal(scores, vectors.half().float())
    assert torch.equal(order_of_removal(scores.double(), vectors.half()), wanted)
    assert Variety()(scores.half(), vectors.half()).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Variety("angle"), "similarity must be one of abs_cosine, cosine, euclidean, pearson, got 'angle'"),
        (lambda: Variety(on="inputs"), "on must be one of activations, weights, got 'inputs'"),
        (lambda: similarities(torch.eye(2), "angle"), "similarity must be one of .* got 'angle'"),
        (
            lambda: similarities(torch.tensor([[1.0, 0], [0, 0]])),
            "must have a direction to be compared by cosine, got units of norm 0: number 1 of 2; a unit of zeros is similar",
        ),
        (
            lambda: similarities(torch.tensor([[1.0, 2], [3, 3]]), "pearson"),
            "must have a direction to be compared by pearson, got units constant: number 1 of 2; take another similarity",
        ),
        (lambda: Variety()(torch.ones(3), torch.zeros(3, 4)), "must have a direction .* got units of norm 0: 3 of them"),
        (lambda: Variety("euclidean")(torch.ones(3), torch.zeros(3, 4)), "must have a direction .* 3 of them"),
        (lambda: Variety()(torch.ones(2), torch.tensor([[1.0, math.inf], [0, 1]])), "must be finite to be compared"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("units", "seconds"), [(512, 0.15), (2048, 2.0)])
def test_wide_layers_take_no_loop_over_pairs(units, seconds):
    scores, vectors = drawn(units, 4608, 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(3):
            start = time.process_time()
            Variety()(scores, vectors)
            times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(times) < seconds


def test_memory_beyond_the_vectors_grows_with_the_units_alone(monkeypatch):
    held = []
    plain = np.round
    monkeypatch.setattr(np, "round", lambda x, *a: held.append(x.size) or plain(x, *a))
    order_of_removal(*drawn(3000, 4, 0))
    assert max(held) <= 256 * 3000 and len(held) == math.ceil(3000 / 256)
