"""Decisions by values: held where they are made from the same numbers, seen where they are not; and whole detectors."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fasterai.graph.channels import channel_graph
from fasterai.model.inputs import batch_of, few_samples, listed_samples, sample_count
from fasterai.prune.decisions import Decisions
from fasterai.prune.probes import probes
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import mask_channels_, remove
from fasterai.prune.small_files import load_small, save_small

IMAGES = [torch.rand(3, 32, 40, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def decided(f: Any, x: Tensor, others: Decisions | None = None) -> tuple[Any, Decisions]:
    with Decisions(others) as found:
        return f(x), found


def test_a_decision_from_equal_numbers_is_repeated() -> None:
    scores = torch.tensor([0.5, 0.5 + 1e-7, 0.1])
    swapped = torch.tensor([0.5 + 1e-7, 0.5, 0.1])
    best = lambda x: x.topk(2).indices  # noqa: E731
    first, noted = decided(best, scores)
    assert first.tolist() == [1, 0] and best(swapped).tolist() == [0, 1]
    again, found = decided(best, swapped, noted)
    assert again.tolist() == [1, 0]
    assert found.moved == pytest.approx(2e-7, rel=0.5)


def test_a_decision_from_other_numbers_shows_how_far_they_are_off() -> None:
    _, noted = decided(lambda x: x > 0, torch.tensor([1.0, 2.0]))
    _, found = decided(lambda x: x > 0, torch.tensor([1.0, 1.5]), noted)
    assert found.moved == 0.25  # 0.5 off at a scale of 2


@pytest.mark.parametrize(
    ("f", "count"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: x.floor(), 1),
        (lambda x: x.to(torch.int64) + 1, 1),
        (lambda x: x.max(0), 1),
        (lambda x: bool((x > 0).all()), 1),  # what is made of truth values is no further decision
        (lambda x: torch.zeros_like(x, dtype=torch.bool), 0),
        (lambda x: (x * 2).relu().sum(), 0),
        (lambda x: torch.arange(3) > 1, 0),
    ],
)
def test_what_counts_as_a_decision(f: Any, count: int) -> None:
    assert len(decided(f, torch.tensor([0.5, 2.0]))[1].made) == count


def test_another_way_or_another_shape_is_not_held() -> None:
    _, noted = decided(lambda x: (x > 0, x.floor()), torch.tensor([1.5, -2.5]))
    found, other = decided(lambda x: (x < 0, x.floor()), torch.tensor([7.5, -2.5]), noted)
    assert (found[0].tolist(), found[1].tolist(), other.moved) == ([False, True], [7.0, -3.0], 0.0)
    found, other = decided(lambda x: (x > 0, x.floor()), torch.tensor([7.5]), noted)
    assert (found[0].tolist(), found[1].tolist(), other.moved) == ([True], [7.0], 0.0)


def test_numbers_that_are_none_are_equal_to_their_like() -> None:
    x = torch.tensor([float("nan"), -float("inf"), 1.0])
    _, noted = decided(lambda x: x > 0, x)
    assert decided(lambda x: x > 0, x, noted)[1].moved == 0.0


class Backbone(nn.Sequential):
    out_channels = 8

    def __init__(self) -> None:
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()]
        super().__init__(*layers)


def detector(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"min_size": 32, "max_size": 48, "num_classes": 3}
    anchors = AnchorGenerator(sizes=((8, 16),), aspect_ratios=((1.0,),))
    if kind is FasterRCNN:
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

        head = {"box_head": TwoMLPHead(8 * 49, 16), "box_predictor": FastRCNNPredictor(16, 3)}
        counts = {"rpn_pre_nms_top_n_test": 30, "rpn_post_nms_top_n_test": 10, "box_score_thresh": 0.0}
        return FasterRCNN(Backbone(), rpn_anchor_generator=anchors, **head, **counts, **{**options, "num_classes": None}).eval()
    return RetinaNet(Backbone(), anchor_generator=anchors, score_thresh=0.0, topk_candidates=20, **options).eval()


def flat(found: list[dict[str, Tensor]]) -> list[Tensor]:
    return [x for one in found for x in one.values()]


@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet])
def test_a_whole_detector_loses_half_of_its_channels_exactly(kind: Any, tmp_path: Any) -> None:
    model = detector(kind).double()
    images = ([x.double() for x in IMAGES],)
    others = ([IMAGES[1].double() * 2 - 0.3, IMAGES[0].double()[:, :, :32], IMAGES[1].double()],)
    graph = channel_graph(model, images)
    assert "torch.export does not follow it" in graph.recorded
    names = {g.name for g in graph.groups}
    assert {"backbone.0.weight", "backbone.3.weight"} <= names
    assert ("backbone.0.weight", 1) in graph.pinned  # images are copied into a batch that was made to fit
    assert kind is not FasterRCNN or {"roi_heads.box_head.fc6.weight", "roi_heads.box_head.fc7.weight"} <= names
    mask_channels_(model, graph, [torch.arange(g.channels).numpy() % 2 == 0 for g in graph.groups])
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        wanted = [flat(model(*copy.deepcopy(given))) for given in (images, others)]
    removal = remove(model, images, measure=kind is RetinaNet)
    assert removal.refused == {}
    assert removal.parameters[1] < 0.45 * removal.parameters[0]
    if kind is RetinaNet:
        assert removal.comparison is not None and removal.comparison.costs["small"].batch_size == 2
    save_small(tmp_path / "small.safetensors", model)
    for small in (model, load_small(tmp_path / "small.safetensors", fresh)):
        with torch.no_grad():
            found = [flat(small.eval()(*copy.deepcopy(given))) for given in (images, others)]
        for a, b in zip(chain(*wanted), chain(*found), strict=True):
            torch.testing.assert_close(b, a)
    targets = [{"boxes": torch.tensor([[2.0, 2.0, 20.0, 20.0]]).double(), "labels": torch.tensor([1])} for _ in range(2)]
    sum(model.train()(*images, targets).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_detector_in_float32_is_not_held_up_by_the_order_of_boxes() -> None:
    removal = Pruner(detector(FasterRCNN), 0.5, "local", "large_final", example_inputs=(IMAGES,)).prune_model(measure=False)
    assert removal.refused == {} and len(removal.removed) >= 4
    assert removal.difference < 1e-5


def test_a_list_of_images_is_a_batch() -> None:
    inputs = (IMAGES, [{"labels": torch.tensor([i])} for i in range(2)])
    assert (listed_samples(inputs), sample_count(inputs), listed_samples((torch.zeros(2, 3, 4, 4),))) == (2, 2, 0)
    images, targets = batch_of(inputs, 3)
    assert [x is y for x, y in zip(images, [*IMAGES, IMAGES[0]], strict=True)] == [True] * 3
    assert [t["labels"].item() for t in targets] == [0, 1, 0]
    assert [len(x) for x in few_samples(batch_of(inputs, 5))] == [2, 2]
    assert [[tuple(x.shape) for x in images] for (images,) in list(probes((IMAGES,)))[:2]] == [
        [(3, 32, 40)] * 2,
        [(3, 32, 40)] * 3,
    ]
    assert sample_count(([torch.zeros(2, 8, 4, 4)],)) == 2  # feature maps of two samples
