"""Things that Hugging Face's `Trainer` does not tell its callbacks."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fasterai.core.joined import innermost

__all__ = ["batches_of_step", "checkpoint_folder", "is_training", "returned_loss", "unscale"]


def is_training(callback: object) -> bool:
    """Tell if the Trainer that has a callback is training: one that was interrupted has told nobody.

    Its `train` is looked for among the callers. Threads of `DataParallel` have none, and are believed.
    """
    if threading.current_thread() is not threading.main_thread():
        return True
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "train":
            handler = getattr(frame.f_locals.get("self"), "callback_handler", None)
            if any(one is callback for one in getattr(handler, "callbacks", ())):
                return True
    return False


def batches_of_step(args: Any, state: Any, batches: int) -> int:
    """Count the batches of the step under way: the last one of an epoch may have fewer.

    Args:
        args: The Trainer's arguments.
        state: The Trainer's state.
        batches: Batches of an epoch; 0 if nobody knows.
    """
    count: int = args.gradient_accumulation_steps
    steps = math.ceil(batches / count)
    is_last = steps > 0 and state.global_step % steps == steps - 1
    return batches - count * (steps - 1) if is_last else count


def unscale(optimizer: Any) -> None:
    """Divide the gradients by the scale of half precision, if the Trainer has not done so for its clipping."""
    scaler, inner = getattr(optimizer, "scaler", None), innermost(optimizer)
    if scaler is not None and scaler._per_optimizer_states[id(inner)]["stage"].name == "READY":
        scaler.unscale_(inner)


def returned_loss(output: Any, *_: Any) -> Tensor:
    """Return the loss that a model has worked out itself.

    Raises:
        ValueError: Its result has none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple | list) else None
    if not isinstance(loss, Tensor) or loss.dim():
        raise ValueError(
            f"model must return its loss for participants that need it, got {type(output).__name__} without one; give it "
            "labels in each batch"
        )
    return loss


def checkpoint_folder(output_dir: str | None, step: int) -> Path:
    """Return the folder that the Trainer writes a step's checkpoint into."""
    return Path(output_dir or ".") / f"checkpoint-{step}"
