"""Pictures of filters: the numbers that they show, read off the drawn figure."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt

from fasterai.analyze.filters import by_clusters, plot_filters, plot_similarity
from fasterai.core.variety import similarities


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def two_kinds(inputs=3):
    """Eight filters, in turns of one and of another kind."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, inputs, 3, 3, generator=generator)
    return kinds.repeat(4, 1, 1, 1) + 0.05 * torch.randn(8, inputs, 3, 3, generator=generator)


def test_neighbours_in_the_order_are_of_one_kind():
    order = by_clusters(similarities(two_kinds().flatten(1)))
    assert sorted(order) == list(range(8))
    assert {i % 2 for i in order[:4]} in ({0}, {1}) and {i % 2 for i in order[4:]} in ({0}, {1})
    assert by_clusters(torch.eye(2)) == [0, 1]


@pytest.mark.parametrize("similarity", ["cosine", "abs_cosine", "pearson", "euclidean"])
def test_all_similarities_are_drawn_and_those_of_the_kept(similarity):
    weight = two_kinds()
    keep = torch.tensor([True, True, False, False, True, False, True, False])
    figure = plot_similarity(weight, keep.view(-1, 1, 1, 1).expand_as(weight), similarity)
    whole, left = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert sorted(whole.ravel()) == pytest.approx(
        sorted(similarities(weight.flatten(1), similarity).ravel().tolist()), abs=1e-5
    )
    assert left.shape == (4, 4)
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["8 all filters", "4 kept filters"]


def test_the_nearest_other_is_told():
    figure = plot_similarity(torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
    assert figure.axes[0].get_xlabel() == "to the most similar other: 0.67 on the mean, 1.00 at most"


@pytest.mark.parametrize("inputs", [1, 3])
def test_filters_are_images_kept_ones_above(inputs):
    weight = two_kinds(inputs)
    keep = torch.arange(8) < 5
    figure = plot_filters(weight, keep, columns=4)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["5 kept", "3 removed"]
    above, below = (axes.images[0].get_array() for axes in figure.axes)
    assert above.shape == (7, 15, 3) and below.shape == (3, 15, 3)
    for sheet, of in ((above, weight[:5]), (below, weight[5:])):
        first = of[by_clusters(similarities(of.flatten(1)))[0]]
        shown = (first - first.min()) / (first.max() - first.min())
        np.testing.assert_allclose(np.asarray(sheet[:3, :3]), shown.expand(3, 3, 3).permute(1, 2, 0).numpy(), atol=1e-6)


def test_filters_that_are_constant_or_all_kept_are_drawn():
    figure = plot_filters(torch.zeros(3, 1, 2, 2), torch.ones(3, dtype=torch.bool))
    assert len(figure.axes) == 1 and float(figure.axes[0].images[0].get_array()[0, 0, 0]) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_similarity(torch.ones(3)), r"weight must have filters of several weights, .* got shape \(3,\)"),
        (lambda: plot_similarity(torch.eye(3) - torch.eye(3)), "must have a direction to be compared by cosine"),
        (lambda: plot_similarity(torch.eye(3), torch.ones(2, dtype=torch.bool)), r"keep must be bool of 3 filters.*\(2,\)"),
        (lambda: plot_similarity(torch.eye(3), torch.ones(3)), "keep must be bool of 3 filters, .* got torch.float32"),
        (lambda: plot_similarity(torch.eye(3), torch.zeros(3, dtype=torch.bool)), "keep must keep a filter, got none"),
        (
            lambda: plot_filters(torch.ones(3, 2, 3, 3), torch.ones(3, dtype=torch.bool)),
            r"1 or 3 inputs.*got shape \(3, 2, 3, 3",
        ),
        (lambda: plot_filters(two_kinds(), torch.ones(8, dtype=torch.bool), columns=0), "columns must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
