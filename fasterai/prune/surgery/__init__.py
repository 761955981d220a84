"""Taking channels out of a model, and back."""

from fasterai.prune.surgery.operate import Surgery, apply_plan_

__all__ = ["Surgery", "apply_plan_"]
