"""Methods of a LightningModule that are wrapped for a time, where Lightning calls no callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.modules import module as torch_hooks
from torch.utils._pytree import tree_leaves

from fasterai.core.checks import warn
from fasterai.core.loop import Batch, Loop

__all__ = ["CutFirst", "StepWraps", "stop_waiting"]


class Wrapped:
    """A method that stands on a module's instance in front of the class's own, or of another that stands there.

    A copy of the module, and one that is saved whole, has its own method again.
    """

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        self.module, self.name = module, name
        self.before = vars(module).get(name)
        self.inner = getattr(module, name)
        self.around = around
        setattr(module, name, self)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.around(self.inner, *args, **keywords)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method itself, whose arguments and code Lightning looks at."""
        found: Callable[..., Any] = getattr(self.inner, "__wrapped__", self.inner)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return (getattr, (self.module, self.name)) if self.before is None else (_as_is, (self.before,))

    def remove(self) -> None:
        """Give the module back what was there, whatever has been put in front since."""
        top = vars(self.module).get(self.name)
        if top is self:
            delattr(self.module, self.name)
            if self.before is not None:
                setattr(self.module, self.name, self.before)
            return
        while isinstance(top, Wrapped) and top.before is not self:
            top = top.before
        if isinstance(top, Wrapped):
            top.before, top.inner = self.before, self.inner


def _as_is(method: Any) -> Any:
    return method


class StepWraps:
    """The events of a step that Lightning's callbacks do not have: outputs, the loss, and the moment after clipping.

    Args:
        module: The module, whose methods are wrapped.
        loop: The loop that hears of the events.
        batch: A function that gives the batch under way.
        is_active: Tells if the steps are those of the run; those of a search for a learning rate in its middle are not.
    """

    def __init__(
        self, module: pl.LightningModule, loop: Loop, batch: Callable[[], Batch], is_active: Callable[[], bool]
    ) -> None:
        self.loop, self.batch, self.is_active = loop, batch, is_active
        self.outputs: Any = None
        self.module = module
        self._wrapped: list[Wrapped] = []
        if loop.wants("after_forward", "after_loss"):
            self._wrapped.append(Wrapped(module, "training_step", self._training_step))
            if _is_compiled(module):
                warn(
                    "training_step runs without torch.compile, because participants look at what it computes inside; "
                    "compile the network in the module, not the module"
                )
        elif loop.wants("after_skip") and module.automatic_optimization:
            self._wrapped.append(Wrapped(module, "training_step", self._bare_step))
        if module.automatic_optimization:
            self._wrapped.append(Wrapped(module, "configure_gradient_clipping", self._clip))
            self._wrapped.append(Wrapped(module, "optimizer_step", self._optimizer_step))

    def remove(self) -> None:
        """Give the module its own methods back."""
        for wrapped in reversed(self._wrapped):
            wrapped.remove()
        self._wrapped = []

    def _training_step(self, step: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """Run the module's step; what it returns has the loss that the participants give back."""
        if not self.is_active():
            return step(*args, **keywords)
        self.loop.settle()  # a closure is called again in one step
        watch = _Watch(self.module, self.batch(), self.loop.after_forward)
        with watch, torch.compiler.set_stance("force_eager") if _is_compiled(self.module) else nullcontext():
            result = step(*args, **keywords)
        if result is None:  # Lightning leaves the batch out
            return None
        batch = watch.shown()
        if isinstance(result, Mapping):
            return {**result, "loss": self.loop.after_loss(result["loss"], batch)} if "loss" in result else result
        return self.loop.after_loss(result, batch)

    def _bare_step(self, step: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        if self.is_active():
            self.loop.settle()
        return step(*args, **keywords)

    def _optimizer_step(self, step: Callable[..., Any], *args: Any, **keywords: Any) -> None:
        step(*args, **keywords)
        if self.is_active():
            self.loop.settle()  # it was skipped

    def _clip(self, clip: Callable[..., Any], *args: Any, **keywords: Any) -> None:
        clip(*args, **keywords)
        if self.is_active():
            self.loop.before_step()


class _Watch:
    """Shows the result of the module that is called with the batch, in the outermost call, as the outputs.

    The inputs are then those of that call: a step may take them out of a dict, or flatten them. If none gets one of the
    batch's tensors (they were mixed or moved), the first call counts. Below the outermost call no hook is there: what is
    compiled stays compiled.
    """

    def __init__(self, module: nn.Module, batch: Batch, show: Callable[[Batch], None]) -> None:
        self.batch, self.show = batch, show
        self._given = {id(x) for x in tree_leaves((batch.inputs, dict(batch.keywords)))}
        self._own = {id(m): name for name, m in module.named_modules()}
        self._is_done = False
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        self._handles = [torch_hooks.register_module_forward_pre_hook(self._enter)]

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, module: nn.Module, _: Any) -> None:
        if id(module) in self._own:
            self.__exit__()
            self._handles = [module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)]

    def _leave(self, module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
        self.__exit__()
        reads = any(id(x) in self._given for x in tree_leaves((args, keywords)))
        if reads or self.batch.outputs is None:
            part = self._own[id(module)]
            self.batch = replace(self.batch, inputs=tuple(args), keywords=dict(keywords), outputs=output, part=part)
        if reads:
            self.shown()
        else:
            self.__enter__()

    def shown(self) -> Batch:
        """Show the batch, if it has not been; return it with its outputs."""
        if not self._is_done:
            self._is_done = True
            self.show(self.batch)
        return self.batch


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiler_ctx", None) is not None


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
