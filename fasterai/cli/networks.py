"""Networks that the commands train."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.cli.errors import UsageError

__all__ = [
    "check_runs",
    "choose_device",
    "classifiers",
    "depends_on_size",
    "digits_network",
    "how_to_make",
    "make_classifier",
]


def classifiers() -> list[str]:
    """List the names of torchvision's classifiers."""
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def make_classifier(arch: str, class_count: int, image_size: int) -> nn.Module:
    """Make a network of torchvision with random weights.

    Raises:
        UsageError: It cannot be built for images of that size.
    """
    import torchvision

    try:
        network: nn.Module = torchvision.models.get_model(
            arch, weights=None, num_classes=class_count, **_options(arch, image_size)
        )
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--arch {arch} cannot be built for {image_size}x{image_size} images ({error}); try another --image-size"
        ) from error
    return network


def how_to_make(arch: str, class_count: int, image_size: int) -> str:
    """Write the arguments with which `torchvision.models.get_model` makes the same network, as Python code."""
    options = {name: value for name, value in _options(arch, image_size).items() if name != "init_weights"}
    arguments = [repr(arch), f"num_classes={class_count}", *(f"{name}={value!r}" for name, value in options.items())]
    return ", ".join(arguments)


def depends_on_size(arch: str) -> bool:
    """Tell if shapes of a network's parameters depend on the side of the images."""
    return _options(arch, 32) != _options(arch, 64)


def _options(arch: str, image_size: int) -> dict[str, Any]:
    """Return the arguments that some networks need beyond the number of classes."""
    if arch in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    if arch.startswith("vit_"):
        return {"image_size": image_size}
    if arch.startswith("maxvit"):
        return {"input_size": (image_size, image_size)}
    return {}


def digits_network() -> nn.Module:
    """Make a small convolutional network for 8x8 pictures with one channel."""
    layers: dict[str, nn.Module] = {}
    for i, (inputs, outputs, stride) in enumerate(((1, 16, 1), (16, 32, 2), (32, 64, 1)), 1):
        layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{i}"] = nn.ReLU()
    layers |= {"pool": nn.AdaptiveAvgPool2d(2), "flatten": nn.Flatten(), "classifier": nn.Linear(4 * 64, 10)}
    return nn.Sequential(OrderedDict(layers))


def choose_device(name: str) -> torch.device:
    """Return the device of that name; for `auto` the machine's accelerator if there is one, else the CPU.

    Raises:
        UsageError: This machine has no such device.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device must be auto or a device of this machine, got {name!r} ({reason})") from error
    return device


def check_runs(network: nn.Module, inputs: Tensor, arch: str, training: bool = True) -> None:
    """Try one pass, so that a network that does not fit its images is refused before anything else is done.

    Args:
        network: The network; a pass of training moves its running statistics.
        inputs: Images.
        arch: Its name.
        training: True to run it as in training.

    Raises:
        UsageError: The pass fails.
    """
    try:
        with torch.set_grad_enabled(training):
            network.train(training)(inputs)
    except (RuntimeError, ValueError, AssertionError) as error:
        size = f"{inputs.shape[-1]}x{inputs.shape[-2]}"
        raise UsageError(f"--arch {arch} does not run on {size} images ({error}); pass a larger --image-size") from error
