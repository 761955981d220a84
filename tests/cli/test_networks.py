from __future__ import annotations

import pytest
import torch
from torch import nn

from fasterai.cli.errors import UsageError
from fasterai.cli.networks import check_runs, choose_device, classifiers, digits_network, how_to_make, make_classifier


def test_classifiers_are_classifiers() -> None:
    known = classifiers()
    assert {"resnet18", "vit_b_16", "squeezenet1_1", "swin_t"} <= set(known)
    assert not {"raft_small", "fcn_resnet50", "r3d_18", "ssd300_vgg16"} & set(known)


# One of each family that needs something of its own, at the smallest size that it takes.
@pytest.mark.parametrize(("arch", "size"), [
    ("resnet18", 32), ("squeezenet1_1", 32), ("vit_b_16", 32), ("maxvit_t", 224), ("googlenet", 64), ("inception_v3", 75),
])  # fmt: skip
def test_classifiers_are_made_for_the_size_and_the_classes(arch: str, size: int) -> None:
    with torch.device("meta"):
        network = make_classifier(arch, 7, size)
        assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(("arch", "size"), [("vit_b_16", 30), ("maxvit_t", 32)])
def test_a_size_that_a_network_cannot_be_built_for(arch: str, size: int) -> None:
    with torch.device("meta"), pytest.raises(UsageError, match=f"--arch {arch} cannot be built for {size}x{size} images"):
        make_classifier(arch, 2, size)


def test_a_network_too_large_for_its_images() -> None:
    with pytest.raises(UsageError, match=r"--arch big does not run on 8x8 images .*pass a larger --image-size"):
        check_runs(nn.Conv2d(3, 1, 9), torch.zeros(2, 3, 8, 8), "big")


def test_digits_network_answers_for_ten_digits() -> None:
    network = digits_network()
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    # 1x16x9 + 16x32x9 + 32x64x9 + 256x10 weights, 10 biases, 2x112 in norms
    assert sum(p.numel() for p in network.parameters()) == 144 + 4608 + 18432 + 2560 + 10 + 224


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps", "xpu")


@pytest.mark.parametrize("name", ["gpu0", "meta", "cuda:99"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device must be auto or a device of this machine, got '{name}'"):
        choose_device(name)


def test_a_trial_run_moves_running_statistics_only_in_training() -> None:
    norm = nn.BatchNorm2d(3)
    check_runs(norm, torch.randn(2, 3, 4, 4), "norm", training=False)
    assert (norm.num_batches_tracked.item(), norm.training) == (0, False)
    check_runs(norm, torch.randn(2, 3, 4, 4), "norm")
    assert norm.num_batches_tracked.item() == 1


@pytest.mark.parametrize(("arch", "text"), [
    ("resnet18", "'resnet18', num_classes=7"),
    ("vit_b_16", "'vit_b_16', num_classes=7, image_size=64"),
    ("googlenet", "'googlenet', num_classes=7, aux_logits=False"),
])  # fmt: skip
def test_how_to_make_the_same_network(arch: str, text: str) -> None:
    assert how_to_make(arch, 7, 64) == text
