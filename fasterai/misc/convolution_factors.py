"""Factors of a convolution's weight `(O, I, *K)`: kernels of several convolutions that compute the same one after the other.

| method | kernels | exact at |
|---|---|---|
| `tucker` | `1x1 I->r`, `K r->s`, `1x1 s->O`: Tucker-2 (Kim et al. 2016, arXiv 1511.06530) | s = O, r = I |
| `svd` | `K I->r`, `1x1 r->O` (Zhang et al. 2016, arXiv 1505.06798) | r = min(O, I K) |
| `spatial` | `h x 1 I->r`, `1 x w r->O` (Tai et al. 2016, arXiv 1511.06067) | r = min(I h, O w) |
| `cp` | `1x1 I->r`, `h x 1` and `1 x w` of each channel, `1x1 r->O` (Lebedev et al. 2015, arXiv 1412.6553) | not known |

`svd` and `spatial` are the best of their rank. `tucker` begins at the truncated higher-order singular vectors and goes on by
orthogonal iteration, which gets no worse. `cp` goes by alternating least squares, which gets no worse either, and may end above
the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["METHODS", "factors_of", "full_ranks", "product_of", "ranks_by_energy"]

METHODS = ("tucker", "svd", "spatial", "cp")
#: What least squares add to the diagonal, as a share of its mean: columns that are nearly parallel have an answer then.
RIDGE = 1e-10


def full_ranks(weight: Tensor, method: str) -> tuple[int, ...]:
    """Return the highest rank of each kind; for `cp`, whose exact rank is not known, the smaller number of channels."""
    outs, ins, *kernel = weight.shape
    if method == "tucker":
        return outs, ins
    if method == "svd":
        return (min(outs, ins * math.prod(kernel)),)
    if method == "spatial":
        return (min(ins * kernel[0], outs * kernel[1]),)
    return (min(outs, ins),)


def ranks_by_energy(weight: Tensor, method: str, energy: float) -> tuple[int, ...]:
    """Return the smallest ranks that keep a share of the sum of squared singular values, of each unfolding for `tucker`."""
    if method == "tucker":
        spectra = [_basis(_unfolded(weight, mode))[1] for mode in (0, 1)]
    else:
        matrix = _across(weight) if method == "spatial" else weight.flatten(1)
        spectra = [torch.linalg.svdvals(matrix).square()]
    return tuple(_rank_of(squares, energy) for squares in spectra)


def _rank_of(squares: Tensor, energy: float) -> int:
    # With a threshold of 1 the zeros of a low-rank weight, which rounding has made small numbers, must go too.
    kept = squares.cumsum(0)
    return min(int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1, len(squares))


def factors_of(weight: Tensor, method: str, ranks: Sequence[int], sweeps: int, tol: float) -> list[Tensor]:
    """Return the kernels of the convolutions that replace one, in the order in which they run.

    Args:
        weight: `(O, I, *K)` in float64.
        method: One of `METHODS`.
        ranks: As many as `full_ranks` gives.
        sweeps: The most rounds of the iterations of `tucker` and `cp`.
        tol: The change of the relative error from one round to the next at which they stop.
    """
    make: dict[str, Callable[[], list[Tensor]]] = {
        "tucker": lambda: _tucker(weight, (ranks[0], ranks[1]), sweeps, tol),
        "svd": lambda: _svd(weight, ranks[0]),
        "spatial": lambda: _spatial(weight, ranks[0]),
        "cp": lambda: _cp(weight, ranks[0], sweeps, tol),
    }
    return make[method]()


def product_of(kernels: Sequence[Tensor], method: str) -> Tensor:
    """Return the weight of the one convolution that kernels amount to."""
    if method == "tucker":
        first, core, last = kernels
        return torch.einsum("or,rs...,si->oi...", last.flatten(1), core, first.flatten(1))
    if method == "svd":
        return torch.einsum("or,ri...->oi...", kernels[1].flatten(1), kernels[0])
    if method == "spatial":
        return torch.einsum("rih,orw->oihw", kernels[0].squeeze(-1), kernels[1].squeeze(-2))
    parts = [part.flatten(1) for part in kernels]
    return torch.einsum("ri,rh,rw,or->oihw", *parts)


def _unfolded(weight: Tensor, mode: int) -> Tensor:
    return weight.movedim(mode, 0).flatten(1)


def _across(weight: Tensor) -> Tensor:
    """Lay out `(O, I, h, w)` to `(I h, O w)`: what a column of weights reads by what a row of them makes."""
    return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


def _basis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors of a wide matrix and the squares of its singular values, the largest first."""
    squares, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    return vectors.flip(1), squares.flip(0).clamp_min(0)


def _pointwise(matrix: Tensor, dims: int) -> Tensor:
    return matrix.reshape(*matrix.shape, *[1] * dims)


def _tucker(weight: Tensor, ranks: tuple[int, int], sweeps: int, tol: float) -> list[Tensor]:
    outs, ins = (_basis(_unfolded(weight, mode))[0][:, :rank] for mode, rank in zip((0, 1), ranks, strict=True))
    total, before = weight.square().sum(), 0.0
    for _ in range(sweeps):
        ins = _basis(_unfolded(torch.einsum("oi...,or->ri...", weight, outs), 1))[0][:, : ranks[1]]
        outs, squares = _basis(_unfolded(torch.einsum("oi...,is->os...", weight, ins), 0))
        outs, kept = outs[:, : ranks[0]], float(squares[: ranks[0]].sum() / total) if total else 1.0
        if abs(kept - before) < tol * max(1.0 - kept, tol):
            break
        before = kept
    core = torch.einsum("oi...,or,is->rs...", weight, outs, ins)
    dims = weight.dim() - 2
    return [_pointwise(ins.mT, dims), core, _pointwise(outs, dims)]


def _svd(weight: Tensor, rank: int) -> list[Tensor]:
    u, s, vt = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    root = s[:rank].sqrt()
    first = (root[:, None] * vt[:rank]).reshape(rank, *weight.shape[1:])
    return [first, _pointwise(u[:, :rank] * root, weight.dim() - 2)]


def _spatial(weight: Tensor, rank: int) -> list[Tensor]:
    outs, ins, height, width = weight.shape
    u, s, vt = torch.linalg.svd(_across(weight), full_matrices=False)
    root = s[:rank].sqrt()
    first = (u[:, :rank] * root).mT.reshape(rank, ins, height, 1)
    second = (root[:, None] * vt[:rank]).reshape(rank, outs, 1, width).transpose(0, 1)
    return [first, second]


def _cp(weight: Tensor, rank: int, sweeps: int, tol: float) -> list[Tensor]:
    """Find factors for `w[o,i,h,w] = sum_r a[o,r] b[i,r] c[h,r] d[w,r]` by alternating least squares.

    The columns of all factors but one have length 1; at the end each takes an equal part of a column's size.
    """
    factors = _first_factors(weight, rank)
    total, before = float(weight.square().sum()), math.inf
    for _ in range(sweeps if total else 0):
        for mode in range(4):
            grams = [f.mT @ f for n, f in enumerate(factors) if n != mode]
            gram = grams[0] * grams[1] * grams[2]
            ridge = RIDGE * gram.diagonal().mean() * torch.eye(rank, dtype=gram.dtype)
            wanted = _against(weight, factors, mode)
            solved = torch.linalg.solve(gram + ridge, wanted.mT).mT
            sizes = solved.norm(dim=0).clamp_min(1e-300)
            factors[mode] = solved / sizes
        left = total - 2 * float((wanted * solved).sum()) + float((gram * (solved.mT @ solved)).sum())
        error = math.sqrt(max(left, 0.0) / total)
        if before - error < tol * error:
            break
        before = error
    factors[3] = factors[3] * (sizes if total else 0.0)
    size = torch.stack([f.norm(dim=0) for f in factors]).prod(0) ** 0.25
    outs, ins, height, width = (f / f.norm(dim=0).clamp_min(1e-300) * size for f in factors)
    return [ins.mT[:, :, None, None], height.mT[:, None, :, None], width.mT[:, None, None, :], outs[:, :, None, None]]


def _first_factors(weight: Tensor, rank: int) -> list[Tensor]:
    """Return the leading singular vectors of each unfolding; columns beyond are drawn, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    factors = []
    for mode, size in enumerate(weight.shape):
        vectors = _basis(_unfolded(weight, mode))[0][:, :rank]
        more = torch.randn(size, max(rank - size, 0), generator=generator, dtype=weight.dtype)
        factors.append(torch.cat([vectors, more / more.norm(dim=0).clamp_min(1e-300)], 1))
    return factors


def _against(weight: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """Return the unfolded weight times the joined columns of the other factors, `(size of the mode, rank)`."""
    outs, ins, height, width = factors
    if mode == 0:
        return torch.einsum("ohwr,hr,wr->or", torch.einsum("oihw,ir->ohwr", weight, ins), height, width)
    read = torch.einsum("oihw,or->ihwr", weight, outs)
    if mode == 1:
        return torch.einsum("ihwr,hr,wr->ir", read, height, width)
    kernel = torch.einsum("ihwr,ir->hwr", read, ins)
    return torch.einsum("hwr,wr->hr", kernel, width) if mode == 2 else torch.einsum("hwr,hr->wr", kernel, height)
