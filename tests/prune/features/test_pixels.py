"""A mask over pixels: exact counts, data without the others, in every loop, resumed bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.callbacks.plain import attach
from fasterai.prune.features.pixels import GatePenalty, PixelMask

X = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


def made(share=0.75, **options):
    """A mask in front of a small convolutional network, and what prunes it."""
    torch.manual_seed(0)
    mask = PixelMask(4, 4)
    body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return mask.in_front(body), mask.participants(share, **options)


def step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


@pytest.mark.parametrize(("share", "left"), [(0.0, 16), (0.5, 8), (0.75, 4), (0.9, 2)])
def test_an_exact_share_of_the_pixels_is_given_up(share, left):
    model, participants = made(share)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    with attach(optimizer, *participants, total_steps=6):
        for _ in range(6):
            step(model, optimizer)
            assert model[0].keep.sum() >= left
    assert int(model[0].keep.sum()) == left == len(model[0].selector.keep)


def test_images_are_stored_without_the_other_pixels_and_seen_alike():
    mask = PixelMask(4, 4)
    with torch.no_grad():
        mask.gates.zero_()
        mask.gates[1, 2], mask.gates[3, 0] = 0.5, 2.0
    packed = mask.pack(X)
    assert (
        packed.shape == (8, 2, 2)
        and torch.equal(packed[:, :, 0], X[:, :, 1, 2])
        and torch.equal(packed[:, :, 1], X[:, :, 3, 0])
    )
    whole = mask.unpack(packed)
    assert whole.shape == X.shape and int((whole != 0).sum()) == 8 * 2 * 2
    assert torch.equal(mask(whole), mask(X))
    assert mask.selector.keep == (6, 12) and mask.selector.size == 16
    assert torch.equal(mask.selector.dataset([(x.flatten(1), 0) for x in X])[0][0], packed[0])


def test_the_penalty_is_the_gradient_of_the_sum_of_sizes():
    mask = PixelMask(2, 2)
    with torch.no_grad():
        mask.gates.copy_(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))
    loss = (mask(torch.ones(1, 1, 2, 2)) ** 2).sum()
    (expected,) = torch.autograd.grad(loss + 0.1 * mask.gates.abs().sum(), mask.gates)
    (mask(torch.ones(1, 1, 2, 2)) ** 2).sum().backward()
    GatePenalty(mask, 0.1).after_backward()
    assert torch.allclose(mask.gates.grad, expected)


def test_pixels_that_do_not_matter_go_first():
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 2, 2), torch.arange(64) % 2
    x[:, 0, 0, 1] = 4.0 * (2 * y - 1)
    mask = PixelMask(2, 2)
    model = mask.in_front(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    with attach(optimizer, *mask.participants(0.75, penalty=0.01), total_steps=60):
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert mask.keep.tolist() == [[False, True], [False, False]]


def run(model, participants, since=0, state=None, saved_at=()):
    """Train to the end of six steps; return the weights and the states at given steps."""
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    states = {}
    with attach(optimizer, *participants, total_steps=6) as handle:
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            handle.load_state_dict(state["handle"])
        for i in range(since, 6):
            if i in saved_at:
                parts = {"model": model, "optimizer": optimizer, "handle": handle}
                states[i] = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
            step(model, optimizer)
    return model.state_dict(), states


def test_a_stopped_run_goes_on_bit_for_bit():
    wanted, states = run(*made(), saved_at=(1, 3, 5))
    for at, state in states.items():
        found, _ = run(*made(), since=at, state=state)
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_fastai_trains_it():
    fastai = pytest.importorskip("fastai.learner")
    from fastai.data.core import DataLoaders

    from fasterai.callbacks.fastai import ParticipantCallback

    model, participants = made(0.5)
    data = list(zip(X, Y, strict=True))
    dls = DataLoaders.from_dsets(data, data, bs=4, num_workers=0, device="cpu")
    learner = fastai.Learner(dls, model, loss_func=F.cross_entropy, cbs=ParticipantCallback(*participants))
    with learner.no_bar(), learner.no_logging():
        learner.fit(2, 0.01)
    assert int(model[0].keep.sum()) == 8


def test_a_copy_prunes_its_own_mask():
    model, participants = copy.deepcopy(made(0.5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, *participants, total_steps=2):
        step(model, optimizer)
        step(model, optimizer)
    assert int(model[0].keep.sum()) == 8 and "8 of 16 pixels kept" in repr(model[0])


def test_it_is_drawn_over_the_mean_image():
    figure = PixelMask(4, 4).plot(X)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["mean image", "kept pixels"]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: PixelMask(0, 4), ValueError, "height must be at least 1, got 0"),
        (lambda: PixelMask(4, 2.5), TypeError, "width must be a whole number"),
        (
            lambda: PixelMask(4, 4)(torch.zeros(1, 2, 4, 5)),
            ValueError,
            r"x must be images of 4x4 pixels, got the shape \(1, 2, 4, 5\)",
        ),
        (lambda: PixelMask(4, 4).participants(1.5), ValueError, "sparsity must be in"),
        (lambda: PixelMask(4, 4).participants(0.5, penalty=-1), ValueError, "penalty must be a number of at least 0, got -1"),
        (lambda: PixelMask(4, 4).participants(0.5, penalty="a"), TypeError, "penalty must be a number of at least 0, got 'a'"),
        (lambda: PixelMask(4, 4).pack(torch.zeros(1, 2, 4, 5)), ValueError, "x must have 16 features in dimension 2, got 20"),
        (lambda: PixelMask(4, 4).unpack(torch.zeros(1, 2, 4)), ValueError, "x must have 16 features in dimension 2, got 4"),
    ],
)
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
