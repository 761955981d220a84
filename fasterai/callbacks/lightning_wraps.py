"""Methods of a LightningModule that are wrapped for a time, where Lightning calls no callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import lightning.pytorch as pl
from torch import nn
from torch.nn.modules import module as torch_hooks
from torch.utils._pytree import tree_leaves

from fasterai.core.loop import Batch, Loop

__all__ = ["CutFirst", "StepWraps", "stop_waiting"]


class Wrapped:
    """A method that stands on a module's instance in front of the class's own; a copy of the module shares it."""

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        self.module, self.name = module, name
        self.before = vars(module).get(name)
        self.inner = getattr(module, name)
        self.around = around
        setattr(module, name, self)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.around(self.inner, *args, **keywords)

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapped:
        return self

    def remove(self) -> None:
        """Give the module its own method back."""
        if vars(self.module).get(self.name) is self:
            delattr(self.module, self.name)
            if self.before is not None:
                setattr(self.module, self.name, self.before)


class StepWraps:
    """The events of a step that Lightning's callbacks do not have: outputs, the loss, and the moment after clipping."""

    def __init__(self, module: pl.LightningModule, loop: Loop, batch: Callable[[], Batch]) -> None:
        self.loop, self.batch = loop, batch
        self.outputs: Any = None
        self.module = module
        self._wrapped: list[Wrapped] = []
        if loop.wants("after_forward", "after_loss"):
            self._wrapped.append(Wrapped(module, "training_step", self._training_step))
        if module.automatic_optimization:
            self._wrapped.append(Wrapped(module, "configure_gradient_clipping", self._clip))

    def remove(self) -> None:
        """Give the module its own methods back."""
        for wrapped in reversed(self._wrapped):
            wrapped.remove()
        self._wrapped = []

    def _training_step(self, step: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """Run the module's step; what it returns has the loss that the participants give back."""
        with self._watching():
            result = step(*args, **keywords)
        batch, self.outputs = replace(self.batch(), outputs=self.outputs), None
        if isinstance(result, Mapping):
            return {**result, "loss": self.loop.after_loss(result["loss"], batch)} if "loss" in result else result
        return result if result is None else self.loop.after_loss(result, batch)

    def _clip(self, clip: Callable[..., Any], *args: Any, **keywords: Any) -> None:
        clip(*args, **keywords)
        self.loop.before_step()

    @contextmanager
    def _watching(self) -> Any:
        """Show the result of the module that is called with the batch, in the outermost call, as the outputs.

        If none gets one of the batch's tensors (they were mixed or moved), the first call counts.
        """
        self.outputs, depth, shown = None, 0, False
        given = {id(x) for x in tree_leaves((self.batch().inputs, dict(self.batch().keywords)))}
        own = {id(m) for m in self.module.modules()}

        def enter(module: nn.Module, _: Any) -> None:
            nonlocal depth
            depth += id(module) in own

        def leave(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
            nonlocal depth, shown
            if id(module) not in own:
                return
            depth -= 1
            reads = any(id(x) in given for x in tree_leaves((args, keywords)))
            if depth == 0 and not shown and (reads or self.outputs is None):
                self.outputs, shown = output, reads
                if reads:
                    self.loop.after_forward(replace(self.batch(), outputs=output))

        handles = [
            torch_hooks.register_module_forward_pre_hook(enter),
            torch_hooks.register_module_forward_hook(leave, with_kwargs=True, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if not shown:
            self.loop.after_forward(replace(self.batch(), outputs=self.outputs))


class _Cuts(Protocol):
    def cut_as_in(self, checkpoint: Mapping[str, Any], pl_module: pl.LightningModule) -> None: ...


class CutFirst:
    """Stands on a module until a checkpoint is loaded into it, or a run begins without one.

    Lightning loads the weights before it shows a callback its state; the module's own hook comes before both.
    """

    def __init__(self, callback: _Cuts, module: pl.LightningModule, own: Any) -> None:
        self.callback, self.module, self.own = callback, module, own

    @staticmethod
    def wait(callback: _Cuts, module: pl.LightningModule) -> None:
        """Let a callback cut a module as it is in the next checkpoint that is loaded into it."""
        stop_waiting(module)
        own = vars(module).get("on_load_checkpoint")
        module.on_load_checkpoint = CutFirst(callback, module, own)  # type: ignore[method-assign]

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        stop_waiting(self.module)
        self.callback.cut_as_in(checkpoint, self.module)
        self.module.on_load_checkpoint(checkpoint)

    def __deepcopy__(self, memo: dict[int, Any]) -> CutFirst:
        return self  # a moving average copies the module while it waits


def stop_waiting(module: nn.Module) -> None:
    """Give a module its own hook back."""
    waiting = vars(module).get("on_load_checkpoint")
    if isinstance(waiting, CutFirst):
        del module.on_load_checkpoint
        if waiting.own is not None:
            module.on_load_checkpoint = waiting.own
