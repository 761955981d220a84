"""Draws every picture of the docs again: `python docs/pictures.py` writes `docs/images/`, in about a minute.

`python docs/pictures.py --data FOLDER` draws the attention maps instead, of networks trained on a folder of images (CIFAR-10
for the page) for some minutes, and prints the figures beside them.

The catalogues' pictures are those of `fasterai.analyze.catalogues`; the demo's are of a run of `fasterai demo`, whose times are
this machine's; those of filters and of a route are of small networks trained on scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fasterai.analyze.catalogues import (
    plot_contexts,
    plot_criteria,
    plot_granularities,
    plot_schedules,
)
from fasterai.analyze.filters import plot_filters, plot_similarity
from fasterai.callbacks.plain import attach
from fasterai.cli import main
from fasterai.core.criteria import large_final, variety
from fasterai.core.schedules import Piecewise
from fasterai.display import INK, SERIES, dress, new_axes, save_figure, styled
from fasterai.distill.distiller import Distiller
from fasterai.distill.losses.features import Attention
from fasterai.distill.losses.logits import DIST, DKD, NKD, SoftTarget, Standardised
from fasterai.distill.maps import attention_maps, cosines, plot_attention_maps
from fasterai.distill.routes.hardness import Greedy
from fasterai.distill.routes.recorder import RouteRecorder
from fasterai.distill.routes.route import Route
from fasterai.prune.choice.budget import Budget
from fasterai.prune.features.induce import induce
from fasterai.prune.scratch.search import search_from_scratch
from fasterai.regularize.penalties import GroupLasso
from fasterai.regularize.regularizer import Regularizer
from fasterai.sparse.nm.sad import sad
from fasterai.sparse.nm.srste import SRSTE
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.study.data import Data, load_data
from fasterai.study.sizes import Size
from fasterai.study.workbench import accuracy, make_residual, train
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn

IMAGES = Path(__file__).parent / "images"
CATALOGUES = {
    "contexts": plot_contexts,
    "criteria": plot_criteria,
    "granularities": plot_granularities,
    "schedules": plot_schedules,
}


def draw_catalogues(folder: Path) -> None:
    """Draw the picture of each catalogue."""
    for name, plot in CATALOGUES.items():
        save_figure(plot(), folder / f"{name}.png")
        shrink(folder / f"{name}.png")


def draw_demo(folder: Path) -> None:
    """Run the demo, and take over two of its pictures."""
    with tempfile.TemporaryDirectory() as run:
        main(["demo", "-o", f"{run}/demo"])
        for name in ("small", "training"):
            shutil.copy(Path(run, "demo", f"{name}.png"), folder / f"demo-{name}.png")
            shrink(folder / f"demo-{name}.png")


def draw_variety(folder: Path) -> None:
    """Train 48 filters on the digits, mask half of them, and draw them before and after."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    first = nn.Conv2d(1, 48, 5, padding=2, bias=False)
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10)]
    network = nn.Sequential(first, nn.BatchNorm2d(48), nn.ReLU(), *head)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(network(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    trained = first.weight.detach().clone()
    for name, criterion in (("alone", large_final), ("variety", variety(large_final))):
        with torch.no_grad():
            first.weight.copy_(trained)
        sparsifier = Sparsifier(
            network, "filter", "local", criterion, example_inputs=x[:2]
        )
        sparsifier.sparsify_layer(first, 0.5)
        mask = sparsifier.masks["0.weight"]
        _save(plot_similarity(trained, mask), folder / f"similarity-{name}.png")
        _save(plot_filters(trained, mask), folder / f"filters-{name}.png")


def draw_regularization(folder: Path) -> None:
    """Train a network of the digits with a growing group lasso, and draw the norms."""
    torch.manual_seed(0)
    images, y = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 8 - 1).float().view(-1, 1, 8, 8), torch.tensor(y)
    parts = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    parts += [nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)]
    parts += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    network, schedule = nn.Sequential(*parts), ((0, 0), (0.6, 1), (0.6, 0.1))
    regularizer = Regularizer(
        network,
        granularity="coupled",
        weight=0.007,
        schedule=Piecewise(schedule),
        penalty=GroupLasso(alpha=4),
        how="proximal",
        example_inputs=x[:2],
    )
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    with attach(optimizer, regularizer, total_steps=10 * 28, model=network):
        for _ in range(10):
            for rows in torch.randperm(len(x)).split(64)[:28]:
                optimizer.zero_grad()
                F.cross_entropy(network(x[rows]), y[rows]).backward()
                optimizer.step()
    _save(regularizer.plot().figure, folder / "regularization-effect.png")


def draw_features(folder: Path) -> None:
    """Draw the pixels that a network of the digits keeps, and the columns of a table."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32)
    result = induce(_trained(x, labels, masked=True), x, 0.75, measure=False)
    _save(result.plot(x, shape=(8, 8)), folder / "features-digits.png")
    table = load_breast_cancer()
    columns = torch.tensor((table.data - table.data.mean(0)) / table.data.std(0))
    network, names = _trained(columns.float(), table.target), list(table.feature_names)
    result = induce(network, columns.float(), 0.75, names=names, measure=False)
    _save(result.plot(), folder / "features-table.png")


def draw_scratch(folder: Path) -> None:
    """Draw the widths of a residual network that are found on random weights and the digits."""
    torch.manual_seed(0)
    data = load_data(None, Size("small", None, None, None, epochs=1))
    images, labels = data.train
    batches = [
        (images[rows], labels[rows]) for rows in torch.randperm(len(images)).split(64)
    ]
    result = search_from_scratch(
        make_residual(data),
        batches,
        Budget(macs=0.5),
        lr=0.02,
        expand=1.25,
        progress=False,
    )
    _save(result.plot(), folder / "pruning-from-scratch.png")


def draw_route(folder: Path) -> None:
    """Draw how hard a teacher's anchors are for a student that follows its route."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen, held_out = rows[:1500], rows[1500:]

    def train(network: nn.Module, taking_part: Any, epochs: int = 8) -> float:
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        steps = {"epochs": epochs, "steps_per_epoch": 24, "model": network}
        with attach(optimizer, *taking_part, **steps) as handle:
            for _ in range(epochs):
                for one in seen[torch.randperm(1500)].split(64):
                    outputs = network(x[one])
                    loss = F.cross_entropy(outputs, y[one])
                    optimizer.zero_grad()
                    handle.loss(loss, x[one], y[one], outputs).backward()
                    optimizer.step()
        with torch.no_grad():
            right = network(x[held_out]).argmax(1) == y[held_out]
        return float(right.float().mean())

    def network(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    torch.manual_seed(0)
    teacher, student = network(128), network(8)
    with tempfile.TemporaryDirectory() as route:
        train(teacher, [RouteRecorder(route)])
        found = Route.from_folder(route, teacher).distil(
            train, student, choose=Greedy(3, [x[held_out]])
        )
    _save(found.plot().figure, folder / "route-hardness.png")


@styled()
def draw_nm(folder: Path) -> None:
    """Draw how the masks of a network flip that trains at 2:4 on the digits."""
    data = load_data(None, Size("digits", None, None, None, epochs=6))
    training = SRSTE(_residual(data, 16), 2, 4)
    train(training.model, data, [training], epochs=6, lr=0.1, seed=0)
    figure = sad(training).plot().figure
    assert isinstance(figure, Figure)
    _save(figure, folder / "nm-sad.png")


def draw_losses(folder: Path) -> None:
    """Draw what losses of logits ask of a student, for one digit: the way down by class."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)
    networks = [
        _classifier(x, y, width, steps) for width, steps in ((64, 300), (8, 60))
    ]
    other, own = (network(x).detach() for network in networks)
    sure = torch.softmax(other, 1).amax(1)
    chosen = int((sure - 0.95).abs().argmin())  # the teacher is 95 % sure of it
    order = other[chosen].argsort(descending=True)
    losses = {
        "SoftTarget(T=1)": SoftTarget(T=1),
        "SoftTarget(T=4)": SoftTarget(T=4),
        "DKD()": DKD(),
        "NKD()": NKD(),
        "DIST()": DIST(),
        "Standardised()": Standardised(),
    }
    axes = new_axes(7.6, 3.4)
    for i, (name, loss) in enumerate(losses.items()):
        logits = own.clone().requires_grad_()
        loss(logits, other, y).backward()
        way = -logits.grad[chosen, order]
        places = torch.arange(10) + (i - 2.5) * 0.13
        heights = way / way.abs().max()
        axes.bar(places, heights, width=0.13, color=SERIES[i], label=name)
    axes.axhline(0, color=INK, linewidth=0.6)
    shares = torch.softmax(other, 1)[chosen, order]
    names = [f"{int(c)}\n{p:.1%}" for c, p in zip(order, shares, strict=True)]
    axes.set_xticks(range(10), names)
    axes.set(
        xlabel="class, and what the teacher gives it", ylabel="share of the largest"
    )
    dress(axes, "Where losses push a student's logits, for one digit", grid="y")
    axes.legend(ncols=2, loc="upper right")
    _save(axes.figure, folder / "distillation-losses.png")


def _classifier(x: torch.Tensor, y: torch.Tensor, width: int, steps: int) -> nn.Module:
    """Train a network of one hidden layer on digits."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        F.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
    return network.eval()


def _trained(x: torch.Tensor, labels: Any, masked: bool = False) -> nn.Module:
    """Train a small network, under masks on three quarters of the features or not."""
    torch.manual_seed(0)
    y = torch.tensor(labels)
    layers = [nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, int(y.max()) + 1)]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.1)
    axes = (network, "coupled", "local", "large_final")
    options = {"sparsity": {"input.1": 0.75}, "schedule": "one_cycle"}
    options |= {"features": {"input": 1}, "example_inputs": x[:2]}
    taking_part = [Sparsifier(*axes, **options)] if masked else []
    with attach(optimizer, *taking_part, total_steps=300) if masked else nullcontext():
        for _ in range(300):
            rows = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    return network.eval()


#: Images to train on and to measure on, of which side, and how long the students train.
PICTURED = Size("pictured", 3_000, 1_000, 32, epochs=5)
BLOCKS = {"3": "first block", "4": "second block", "5": "third block"}


def draw_attention(folder: Path, images: Path) -> None:
    """Train a student with its teacher's attention maps and one alone, and draw all."""
    data = load_data(images, PICTURED)
    teacher, alone, taught = (_residual(data, width) for width in (16, 8, 8))
    settings = {"lr": PICTURED.lr, "seed": 0}
    train(teacher, data, epochs=2 * PICTURED.epochs, **settings)
    train(alone, data, epochs=PICTURED.epochs, **settings)
    layers = list(BLOCKS)
    loss = Attention(scale=1000)
    distiller = Distiller(teacher, loss, layers, layers, weight=0.5)
    train(taught, data, [distiller], epochs=PICTURED.epochs, **settings)
    named = {"teacher": teacher, "student": taught, "student alone": alone}
    x = data.test[0]
    maps = {name: attention_maps(one, x, layers) for name, one in named.items()}
    for name, one in named.items():
        alike = [
            cosines(a, b) for a, b in zip(maps[name], maps["teacher"], strict=True)
        ]
        means = [f"{float(values.mean()):.3f}" for values in alike]
        found = f"{name}: accuracy {accuracy(one, data):.1%}, cosines {means}"
        print(found)  # noqa: T201 - the figures of the page
    rows = torch.arange(0, len(x), len(x) // 5)[:5]
    last = {name: one[1][rows] for name, one in maps.items()}
    title = f"Attention maps of the {BLOCKS[layers[1]]}"
    _save(plot_attention_maps(x[rows], last, title), folder / "attention-maps.png")


def _residual(data: Data, width: int) -> nn.Module:
    torch.manual_seed(0)
    return make_residual(data, width)


def _save(figure: Figure, path: Path) -> None:
    save_figure(figure, path)
    shrink(path)


def shrink(path: Path) -> None:
    """Write a picture with 64 colours, which is more than it shows: a third of the bytes."""
    Image.open(path).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder of images, as of CIFAR-10")
    if images := parser.parse_args().data:
        draw_attention(IMAGES, images)
    else:
        draw_catalogues(IMAGES)
        draw_variety(IMAGES)
        draw_features(IMAGES)
        draw_regularization(IMAGES)
        draw_scratch(IMAGES)
        draw_losses(IMAGES)
        draw_nm(IMAGES)
        draw_route(IMAGES)
        draw_demo(IMAGES)
