"""The catalogue of losses of logits: what the student says of the classes against what the teacher says.

Rows are samples, tokens or places: `(B, C)`, `(B, T, C)`, `(B, C, H, W)`. All are computed in float32 and are means over
rows, so that a weight means the same for a photograph and for its map of classes. To add one: a frozen dataclass with
`of_rows`, its name in `__all__`, a row in `tests/distill/test_logits.py` and in `docs/distillation-losses.md`.

>>> import torch
>>> loss = SoftTarget(T=2)
>>> logits = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
>>> f"{loss(logits, logits):g}", f"{loss(logits, logits.flip(1)):.4f}"
('0', '1.8485')
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fasterai.core.checks import check_number, not_one_of, warn
from fasterai.distill.losses.loss import LogitLoss

__all__ = ["DIST", "DKD", "NKD", "Logits", "Mutual", "SoftTarget", "Standardised"]

#: Stands for the logarithm of 0 and leaves gradients finite.
LOG_ZERO = -1e9


@dataclass(frozen=True)
class SoftTarget(LogitLoss):
    """`T^2 KL(t || s)` of softened classes, `s = softmax(z_s / T)` and `t = softmax(z_t / T)`: the usual distillation.

    Hinton, Vinyals and Dean 2015, https://arxiv.org/abs/1503.02531, section 2; the factor `T^2` keeps gradients of one size
    while the temperature changes.

    Args:
        T: The temperature, above 0; the higher, the more the small classes say.
    """

    T: float = 5.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_number("T", self.T, above=0)

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the divergence of each row."""
        return self.T**2 * divergence(torch.log_softmax(student / self.T, 1), torch.log_softmax(teacher / self.T, 1))


@dataclass(frozen=True)
class Logits(LogitLoss):
    """`mean_c (z_s - z_t)^2`: the squared error of the logits themselves.

    Ba and Caruana 2014, https://arxiv.org/abs/1312.6184, section 2.2. Takes values without classes too.
    """

    least_classes: ClassVar[int] = 1

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the squared error of each row."""
        return (student - teacher).square().mean(1)


@dataclass(frozen=True)
class Mutual(LogitLoss):
    """`KL(t || s)` of the classes as they are, without a temperature.

    Zhang et al. 2018, Deep Mutual Learning, https://arxiv.org/abs/1706.00384. Here from the teacher to the student alone.
    """

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the divergence of each row."""
        return divergence(torch.log_softmax(student, 1), torch.log_softmax(teacher, 1))


@dataclass(frozen=True)
class DKD(LogitLoss):
    """`T^2 (alpha TCKD + beta NCKD)`: the divergence in two parts, of the right class and of the rest.

    With `p` of the right class and `N` the softmax without it, `TCKD = KL` of `(p, 1 - p)` and `NCKD = KL(N_t || N_s)`. In
    `SoftTarget`, which is `T^2 (TCKD + (1 - p_t) NCKD)`, a sure teacher silences the second.

    Zhao et al. 2022, https://arxiv.org/abs/2203.08679; `alpha`, `beta` and `T` of its CIFAR-100 settings, which also warm the
    loss up over 20 epochs: `schedule=` of the `Distiller`. For shares `y` of several classes (ours): `p = sum y_i s_i`, and
    `N` has the weights `1 - y`.

    Args:
        alpha: The factor of the right class's part, at least 0.
        beta: The factor of the part of the other classes, at least 0.
        T: The temperature, above 0.
    """

    needs_labels: ClassVar[bool] = True

    alpha: float = 1.0
    beta: float = 8.0
    T: float = 4.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_number("alpha", self.alpha, at_least=0)
        check_number("beta", self.beta, at_least=0)
        check_number("T", self.T, above=0)

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return both parts of each row, added up."""
        assert labels is not None
        shares = shares_of(labels, student)
        own, other = student / self.T, teacher / self.T
        logs = _log(shares), _log(1 - shares)
        tckd = divergence(_right_or_not(own, logs), _right_or_not(other, logs))
        nckd = divergence(_the_rest(own, logs), _the_rest(other, logs))
        return self.T**2 * (self.alpha * tckd + self.beta * nckd)


@dataclass(frozen=True)
class NKD(LogitLoss):
    """`-t_y log s_y - gamma T^2 sum_(i != y) N(t_i) log N(s_i)`, `y` the right class and `N` the softmax without it.

    Cross-entropies, so not 0 where both agree; the first part has no temperature. Yang et al. 2023,
    https://arxiv.org/abs/2303.13005, and the authors' code. The public fasterai's `DecoupledKD(normalize=True)` is not this,
    but `DKD`. For shares of several classes (ours) as in `DKD`.

    Args:
        gamma: The factor of the part of the other classes, at least 0.
        T: The temperature of that part, above 0.
    """

    needs_labels: ClassVar[bool] = True
    is_distance: ClassVar[bool] = False

    gamma: float = 1.5
    T: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_number("gamma", self.gamma, at_least=0)
        check_number("T", self.T, above=0)

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return both cross-entropies of each row, added up."""
        assert labels is not None
        shares = shares_of(labels, student)
        logs = _log(shares), _log(1 - shares)
        right = -_right_or_not(teacher, logs)[:, 0].exp() * _right_or_not(student, logs)[:, 0]
        rest = -(_the_rest(teacher / self.T, logs).exp() * _the_rest(student / self.T, logs)).sum(1)
        return right + self.gamma * self.T**2 * rest


@dataclass(frozen=True)
class DIST(LogitLoss):
    """`T^2 (beta (1 - r_rows) + gamma (1 - r_columns))`, means of Pearson's correlation of `softmax(z / T)`.

    Rows ask how classes relate within a sample, columns how samples relate within a class. It compares rows with each other,
    so it wants batches that are not small. Huang et al. 2022, https://arxiv.org/abs/2205.10536, and the authors' code.

    Args:
        beta: The factor of the rows' part, at least 0.
        gamma: The factor of the columns' part, at least 0.
        T: The temperature, above 0.
    """

    beta: float = 1.0
    gamma: float = 1.0
    T: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        check_number("beta", self.beta, at_least=0)
        check_number("gamma", self.gamma, at_least=0)
        check_number("T", self.T, above=0)

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss of all rows, a scalar."""
        own, other = torch.softmax(student / self.T, 1), torch.softmax(teacher / self.T, 1)
        rows, columns = pearson(own, other).mean(), pearson(own.T, other.T).mean()
        return self.T**2 * (self.beta * (1 - rows) + self.gamma * (1 - columns))


@dataclass(frozen=True)
class Standardised(LogitLoss):
    """Another loss, of standardised logits: `z -> (z - mean) / (std + 1e-7)` in each row, of both networks.

    The student is free in the shift and the size of its logits. Sun et al. 2024, https://arxiv.org/abs/2403.01427, and the
    authors' code: `Standardised(SoftTarget(T=2), scale=9)`.

    Args:
        loss: The loss of logits.
    """

    loss: LogitLoss = field(default=SoftTarget(T=2.0))

    def __post_init__(self) -> None:
        """Check the loss."""
        super().__post_init__()
        check_inner(self.loss)

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """Tell whether the loss needs labels."""
        return self.loss.needs_labels

    @property
    def is_distance(self) -> bool:  # type: ignore[override]
        """Tell whether the loss is a distance."""
        return self.loss.is_distance

    def of_rows(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Return the loss of the standardised rows."""
        return self.loss.scale * self.loss.of_rows(standardise(student), standardise(teacher), labels)


class DecoupledKD:
    """The public fasterai's name and order of arguments for `DKD`; called without logits, it makes that loss.

    Its `normalize=True` leaves the right class out of the softmax where the default hides it behind -1000: the same numbers.
    """

    def __new__(
        cls,
        pred: Tensor | None = None,
        teacher_pred: Tensor | None = None,
        T: float = 4.0,  # noqa: N803 - its name in the field
        alpha: float = 1.0,
        beta: float = 8.0,
        target: Tensor | None = None,
        normalize: bool = False,
        **_: Any,
    ) -> Any:
        """Return the loss of logits, or the `DKD` that computes it."""
        if normalize:
            warn("normalize=True gives the numbers of DKD, as normalize=False does; the normalised loss of its paper is NKD()")
        loss = DKD(alpha=alpha, beta=beta, T=T)
        return loss if pred is None or teacher_pred is None else loss(pred, teacher_pred, target)


# --- parts -----------------------------------------------------------------------------------------------------------


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return `KL(t || s)` of each row, of logarithms `(N, C)`."""
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of each row `(N,)`; 0 where a row is constant."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


def standardise(logits: Tensor) -> Tensor:
    """Return each row less its mean, over its standard deviation `(n - 1)`."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def shares_of(labels: Tensor, logits: Tensor) -> Tensor:
    """Return labels as shares of the logits' shape: numbers `(N,)` as 0 and 1, all 0 where there is no such class."""
    if labels.dim() == logits.dim():
        return labels.float()
    return (labels[:, None] == torch.arange(logits.shape[1], device=logits.device)).float()


def check_inner(loss: object) -> None:
    """Check that a loss is one of the logits' rows, which another one can wrap."""
    if not isinstance(loss, LogitLoss):
        raise not_one_of("loss", "a loss of logits", loss)
    if loss.is_outermost:
        name = type(loss).__name__
        raise ValueError(f"loss must be one of single rows, got {loss!r}; put it outside: {name}(Standardised(...)), say")


def _right_or_not(logits: Tensor, logs: tuple[Tensor, Tensor]) -> Tensor:
    """Return the logarithms `(N, 2)` of the right class's probability and of the rest's; `logs` are those of the shares."""
    own = torch.log_softmax(logits, 1)
    return torch.stack([torch.logsumexp(own + x, 1) for x in logs], 1)


def _the_rest(logits: Tensor, logs: tuple[Tensor, Tensor]) -> Tensor:
    """Return the logarithms `(N, C)` of the softmax without the right class."""
    return torch.log_softmax(logits + logs[1], 1)


def _log(shares: Tensor) -> Tensor:
    return shares.log().clamp(min=LOG_ZERO)
