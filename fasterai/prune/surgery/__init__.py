"""Surgery: channels are removed from a model, and can be put back."""

from fasterai.prune.surgery.operate import Surgery, apply_plan_

__all__ = ["Surgery", "apply_plan_"]
