"""STR: soft thresholds that are learned, one for each layer; the sparsity is what comes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.checks import check_number
from fasterai.core.saved import check_parts, mapping_of, tensor, texts
from fasterai.core.types import Target
from fasterai.display import Shown, Table, counted
from fasterai.model.targets import LayerTypes, TargetsLike, find_targets
from fasterai.sparse.goal import check_sources
from fasterai.sparse.latent import LatentWeights
from fasterai.sparse.report import Reached

__all__ = ["STR"]


class STR(Shown, LatentWeights):
    """Soft threshold reparametrisation: the model shows `sign(W) relu(|W| - sigmoid(s))`, with one learned s for each layer.

    Kusupati et al. 2020 (arXiv 2002.03231). W and s train with the loop's optimizer. The gradient g of a shown weight goes to
    its W where `|W| > sigmoid(s)`, and to s goes the sum of `-sigmoid'(s) sign(W) g` over these. Both are there before the
    gradients are clipped. The sparsity is not asked for: weight decay pulls s up to 0, where the threshold is one half, and
    how far it comes depends on the decay, the learning rate and the length of the training. It is in `sparsity`. The decay is
    that of the optimizer's last group, which s joins: where this has none, pass `decay`. Frozen layers stay as they are until
    they train, unless they are named.

    Args:
        model: The model.
        s_init: The s that every layer begins with, below 0: the published -3200 is for 100 epochs of ImageNet at a weight decay
            of 2e-5. The default is ours.
        decay: The decay of s, at least 0, besides the optimizer's own: `decay * s` is added to its gradient.
        targets: Names of parameters, modules or containers, globs, or a predicate; instead of the default.
        layer_type: Module classes whose weights are the targets, instead of the default ones.

    Raises:
        ValueError: An argument is out of range, or no target is found.
        TypeError: An argument is of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        s_init: float = -10.0,
        decay: float = 0.0,
        targets: TargetsLike | None = None,
        layer_type: LayerTypes | None = None,
    ) -> None:
        super().__init__()
        self.check_settings(s_init=s_init, decay=decay)
        check_sources(model, None, None)
        self.model, self.s_init, self.decay = model, s_init, decay
        found = find_targets(model, fits=lambda t: None, coarse=False, targets=targets, layer_type=layer_type)
        self.targets, self._trained = found.targets, set(found.named)  # frozen layers are left as they are until they train
        self._s = {t.name: nn.Parameter(torch.full((), float(s_init), device=t.parameter.device)) for t in self.targets}

    @staticmethod
    def check_settings(*, s_init: float = -10.0, decay: float = 0.0, **others: Any) -> None:
        """Refuse settings that are wrong for every model.

        Raises:
            ValueError: One is out of range.
            TypeError: One is of the wrong type.
        """
        if check_number("s_init", s_init) >= 0:
            raise ValueError(f"s_init must be below 0, got {s_init!r}; at 0 the threshold is one half")
        check_number("decay", decay, at_least=0.0)

    # --- the method --------------------------------------------------------------------------------------------------

    def on_setup(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return s of each layer, to train with the weights."""
        for target in self.targets:
            self._s[target.name].data = self._s[target.name].data.to(target.parameter.device)
        return list(self._s.values())

    def _threshold(self, target: Target) -> Tensor:
        return self._s[target.name].detach().sigmoid()

    def show_(self, target: Target, weight: Tensor, kept: Tensor | None) -> Tensor:
        latent = weight.clone() if kept is None else kept.copy_(weight)
        if target.parameter.requires_grad:
            self._trained.add(target.name)
        if target.name in self._trained:
            weight.copy_(latent.sign() * (latent.abs() - self._threshold(target)).relu())
        return latent

    def pull_(self, target: Target, gradient: Tensor, kept: Tensor) -> None:
        s, threshold = self._s[target.name], self._threshold(target)
        gradient.mul_(kept.abs() > threshold)
        slope = threshold * (1 - threshold)
        s.grad = self.decay * s.detach() - slope * (kept.sign() * gradient).sum(dtype=s.dtype)

    # --- what comes of it --------------------------------------------------------------------------------------------

    @property
    def thresholds(self) -> dict[str, float]:
        """The threshold of each layer now: target's name -> sigmoid(s)."""
        return {t.name: float(self._threshold(t)) for t in self.targets}

    @property
    def sparsity(self) -> Reached:
        """The share of zeros among the weights that the model shows, per target and overall."""
        zeros = {t.name: t.parameter.numel() - int(torch.count_nonzero(t.parameter.detach())) for t in self.targets}
        counts = {t.name: t.parameter.numel() for t in self.targets}
        overall = sum(zeros.values()) / max(1, sum(counts.values()))
        return Reached(overall, overall, {name: zeros[name] / max(1, n) for name, n in counts.items()})

    def metrics(self) -> dict[str, float]:
        """Return the share of weights that are zero now, in [0, 1]."""
        return {"sparsity": self.sparsity.overall}

    def _line(self) -> str:
        return f"<STR: {self.sparsity.overall:.1%} of the weights zero in {counted(len(self.targets), 'target')}>"

    def _parts(self) -> Iterable[Table | str]:
        reached, thresholds = self.sparsity, self.thresholds
        rows = [(t.name, f"{thresholds[t.name]:.4g}", f"{reached[t.name]:.2%}") for t in self.targets]
        yield Table(("target", "threshold", "zeros"), [*rows, ("all targets", "", f"{reached.overall:.2%}")], foot=1)

    # --- saving and going on -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the latent weights and s of each layer, as copies by parameter name, and which have trained."""
        own = {"s": {name: s.detach().clone() for name, s in self._s.items()}, "trained": sorted(self._trained)}
        return {**super().state_dict(), **own}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over saved latent weights and s; the model shows from now on what follows from them.

        Raises:
            ValueError: A name is missing, or a shape differs. Nothing is changed then.
        """
        check_parts(state, "STR", {"s": mapping_of(tensor), "trained": texts})
        if set(state["s"]) != set(self._s):
            name = sorted(set(state["s"]) ^ set(self._s))[0]
            raise ValueError(f"state must hold the s of each target, got another set of targets: {name}")
        before, trained = {name: s.detach().clone() for name, s in self._s.items()}, self._trained
        self._trained = trained | set(state["trained"])
        for name, s in self._s.items():
            s.copy_(state["s"][name])
        try:
            super().load_state_dict(state)
        except Exception:
            for name, s in self._s.items():
                s.copy_(before[name])
            self._trained = trained
            raise
