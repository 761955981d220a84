"""fastai's checkpoints: a file with the participants' states beside each, written by `learn.save`, found by the weights.

`learn.load` comes before the fit that a callback is given to, and tells nobody of its file. So each file of states holds sums
of the weights that it belongs to, and a fit that skips epochs takes the states of the weights that it finds in the learner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from fastai.learner import Learner, SkipToEpoch
from fastai.torch_core import rank_distrib
from torch import nn

from fasterai.core.checks import warn
from fasterai.core.files import write_saved
from fasterai.model.names import plain_name, unwrap

__all__ = ["Saving", "begin_saving", "end_saving", "find_state", "skipped_epochs"]

#: What takes the place of `.pth` in the name of a checkpoint.
END = ".fasterai.pt"
FORMAT = 1


class Stateful(Protocol):
    """Callback whose state is saved."""

    @property
    def key(self) -> str: ...

    def state_dict(self) -> dict[str, Any]: ...


class Saving:
    """Stand-in for `learn.save` during a fit: fastai's own, then the callbacks' states beside its file."""

    def __init__(self, learn: Learner) -> None:
        self.learn = learn
        self.before: Callable[..., Any] | None = vars(learn).get("save")
        self.callbacks: list[Stateful] = []

    def __call__(self, file: Any, **options: Any) -> Any:
        """Save the learner, and return the path of its file."""
        path = type(self.learn).save(self.learn, file, **options) if self.before is None else self.before(file, **options)
        if isinstance(path, str | Path) and not rank_distrib():
            self._write(Path(path).with_name(Path(path).stem + END))
        return path

    def _write(self, path: Path) -> None:
        states = {key: state for key, one in _by_key(self.callbacks).items() if (state := one.state_dict())["participants"]}
        if states:
            write_saved(path, {"format": FORMAT, "weights": _sums(self.learn.model), "states": states})
        else:
            path.unlink(missing_ok=True)  # it was of other weights


def begin_saving(learn: Learner, callback: Stateful) -> None:
    """Let `learn.save` write a callback's state beside the checkpoint."""
    saving = vars(learn).get("save")
    if not isinstance(saving, Saving):
        learn.save = saving = Saving(learn)
    saving.callbacks.append(callback)


def end_saving(learn: Learner, callback: Stateful) -> None:
    """Undo `begin_saving`; with the last callback `learn.save` is what it was."""
    saving = vars(learn).get("save")
    if not isinstance(saving, Saving):
        return
    saving.callbacks = [one for one in saving.callbacks if one is not callback]
    if not saving.callbacks:
        del learn.save
        if saving.before is not None:
            learn.save = saving.before


def skipped_epochs(learn: Learner) -> int:
    """Return `start_epoch` of the fit under way."""
    return max((int(one._skip_to) for one in learn.cbs if isinstance(one, SkipToEpoch)), default=0)


def find_state(learn: Learner, callback: Stateful, saving: Sequence[Stateful], named: Any = None) -> Mapping[str, Any] | None:
    """Find a callback's state that belongs to the weights in the learner; without one, warn and return None.

    Args:
        learn: The learner, whose fit skips epochs.
        callback: The callback.
        saving: All callbacks whose states are in the files, in their order.
        named: The name of a checkpoint, as for `learn.load`; any in the learner's folder if left out.

    Raises:
        ValueError: The checkpoint that was named has no states or others, or the states are of another epoch or batch size.
    """
    folder = Path(learn.path, learn.model_dir)
    files = sorted(folder.glob(f"*{END}")) if named is None else [_beside(folder / named)]
    sums = _sums(learn.model)
    found = [(file, content) for file in files if (content := _read(file)) and _are_alike(content["weights"], sums)]
    if not found:
        wanted = "resume_from must be a checkpoint with a file of states of the weights in the learner"
        if named is not None:
            raise ValueError(f"{wanted}, got {named!r}: {files[0]} is {'of others' if files[0].exists() else 'not there'}")
        warn(
            f"the fit goes on at epoch {skipped_epochs(learn)}, and none of the {len(files)} files of states in {folder} is of "
            "the weights in the learner: the participants begin afresh"
        )
        return None
    file, content = min(found, key=lambda one: not _is_of_epoch(learn, one[1]))
    key = next(key for key, one in _by_key(saving).items() if one is callback)
    if key not in content["states"]:
        warn(f"{file} holds {', '.join(content['states'])}, and no {key}, which begins afresh")
        return None
    state: Mapping[str, Any] = content["states"][key]
    _check_epoch(learn, state, file)
    return state


def _is_of_epoch(learn: Learner, content: Mapping[str, Any]) -> bool:
    return all(_epochs_done(learn, state) == skipped_epochs(learn) for state in content["states"].values())


def _epochs_done(learn: Learner, state: Mapping[str, Any]) -> int:
    per_epoch = state.get("steps_per_epoch") or len(learn.dls.train)  # files of earlier versions do not say
    return math.ceil(int(state["step"]) / per_epoch)  # the last batches of an epoch may have had no step


def _check_epoch(learn: Learner, state: Mapping[str, Any], file: Path) -> None:
    done, asked, now = _epochs_done(learn, state), skipped_epochs(learn), len(learn.dls.train)
    step, before = state["step"], state.get("steps_per_epoch")
    if before not in (None, now):
        raise ValueError(
            f"the learner's batches must be those of the interrupted fit, which had {before} an epoch, got {now}: {file} is of "
            f"step {step}, the end of epoch {done}; give the learner's data the batch size of before, and start_epoch={done}"
        )
    if done != asked:
        doubt = "" if before else f", if the batch size is that of before: it is of step {step}, and an epoch has {now} now"
        raise ValueError(
            f"start_epoch must be {done} for the weights in the learner, whose states {file} holds, got {asked}{doubt}"
        )


def _beside(checkpoint: Path) -> Path:
    name = checkpoint.name
    return checkpoint if name.endswith(END) else checkpoint.with_name(name.removesuffix(".pth") + END)


def _read(file: Path) -> dict[str, Any] | None:
    """Return what a file of states holds, its tensors still in the file; None for one that is no such file."""
    try:
        content = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        is_known = content["format"] == FORMAT and {"weights", "states"} <= set(content)
    except Exception:  # a broken or foreign file can fail in any of zip, pickle and torch
        return None
    return content if is_known else None


def _by_key(callbacks: Sequence[Stateful]) -> dict[str, Stateful]:
    found: dict[str, Stateful] = {}
    for one in callbacks:
        count = sum(key.partition(":")[0] == one.key for key in found)
        found[f"{one.key}:{count + 1}" if count else one.key] = one
    return found


def _sums(model: nn.Module) -> dict[str, float]:
    """Return the sum of each tensor's magnitudes, by which two states of a training are told apart."""
    return {plain_name(n): float(x.detach().cpu().double().abs().sum()) for n, x in unwrap(model).state_dict().items()}


def _are_alike(saved: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Tell if sums are those of the same weights, on another device too."""
    return saved.keys() == now.keys() and all(math.isclose(saved[n], now[n], rel_tol=1e-6, abs_tol=1e-9) for n in saved)
