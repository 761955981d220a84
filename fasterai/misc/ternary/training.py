"""Fine-tuning of ternary groups: the optimizer trains dense weights, and the model computes with their ternary values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fasterai.core.types import Target
from fasterai.display import counted, one_line
from fasterai.misc.ternary.groups import Group, check_group, divide
from fasterai.misc.ternary.optimum import check_rule, ternary_of
from fasterai.misc.ternary.report import TernaryReport
from fasterai.misc.ternary.selection import Ignored, choose_targets
from fasterai.misc.ternary.ternarize import report_of
from fasterai.model.names import unwrap
from fasterai.model.targets import TargetsLike
from fasterai.sparse.latent import LatentWeights

__all__ = ["TernaryTraining"]


class TernaryTraining(LatentWeights):
    """A participant that trains a model with ternary groups, straight through.

    The gradient of a ternary weight is taken for that of the dense one behind it (Bengio et al. 2013,
    https://arxiv.org/abs/1308.3432). Forward passes, validation and checkpoints meet the
    ternary weights; the dense ones are `latent`, and in the saved state. Batch norms train as usual.

    Args:
        model: The model, wrapped or not; it becomes ternary with the run's first step.
        group: Number of weights of a group along the inputs, `filter` or `tensor`, as in `ternarize`.
        rule: `exact` or `threshold`.
        targets: Names of weights or layers, globs, or a predicate; by default as in `ternarize`.
        ignored_layers: Layers, their names or globs, that stay dense.
        example_inputs: A tensor or tuple by which the first and the last layer are found; without it they are those of the
            parameters' order.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, a name matches nothing, no weight is left, or one is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group = 4,
        *,
        rule: str = "exact",
        targets: TargetsLike | None = None,
        ignored_layers: Ignored = None,
        example_inputs: Any = None,
    ) -> None:
        super().__init__()
        self.group, self.rule = check_group(group), check_rule(rule)
        self.model = model
        self._selection = choose_targets(model, targets, ignored_layers, example_inputs)
        self.targets = self._selection.targets
        if not self.targets:
            reasons = "; ".join(f"{name}: {why}" for name, why in self._selection.left_out.items())
            raise ValueError(
                f"targets must leave a weight besides the first and the last layer, got none ({reasons}); name some"
            )

    @staticmethod
    def check_settings(group: object, rule: object, **_: Any) -> None:
        """Refuse settings that no model makes right."""
        check_group(group)
        check_rule(rule)

    def __repr__(self) -> str:
        return one_line(f"<TernaryTraining: {counted(len(self.targets), 'weight')} in groups ({self.group}, {self.rule})>")

    def show_(self, target: Target, weight: Tensor, kept: Tensor | None) -> Tensor:
        """Put the ternary weights in the place of the dense ones, which are kept."""
        dense = weight.clone() if kept is None else kept.copy_(weight)
        weight.copy_(ternary_of(weight, divide(target.layout, self.group), self.rule))
        return dense

    def metrics(self) -> dict[str, float]:
        """Return the share of the ternary weights that are zero, in [0, 1]."""
        weights = [t.parameter for t in self.targets]
        return {"zeros": 1 - sum(int(torch.count_nonzero(w)) for w in weights) / sum(w.numel() for w in weights)}

    def report(self, example_inputs: Any = None) -> TernaryReport:
        """Report the ternary weights, with their distance to the dense ones behind them.

        Args:
            example_inputs: A tensor or tuple that the model runs on, to count multiplications with.
        """
        latent = self.latent

        def found(target: Target) -> tuple[Tensor, Tensor]:
            dense = latent.get(target.name, target.parameter.detach())
            return dense, ternary_of(dense, divide(target.layout, self.group), self.rule)

        return report_of(unwrap(self.model), self._selection, self.group, self.rule, found, example_inputs)
