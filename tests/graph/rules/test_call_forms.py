"""Every operation with a rule, in the forms in which it may be called: none stops the pass, and removals stay exact.

YOLO's `type_as(h)` once ended in an IndexError: a rule for one form of a call is no rule for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.graph.channels import channel_graph
from fasterai.graph.following import follow
from tests.graph.rules.cases import Case, aten, goes_as_it_says, linears, side_by_side

GOES = {("a.weight", 0): 8, ("b.weight", 1): 8}
Form = Callable[[Tensor], Tensor]

#: Operations that let the channels of h (4, 8) pass, whatever second tensor they are given.
THROUGH: dict[str, Form] = {
    "type_as": lambda h: h + torch.arange(2.0).type_as(h).sum(),
    "to(other)": lambda h: h + torch.arange(2).to(h)[0],
    "to(dtype)": lambda h: h.to(dtype=torch.float32, copy=True).to("cpu", torch.float64),
    "to(other, copy)": lambda h: h.float().to(torch.zeros(3, dtype=torch.float64), copy=True),
    "new_zeros": lambda h: h + h.new_zeros(h.shape[1]) + h.new_zeros((4, 1)),
    "new_ones": lambda h: h * h.new_ones([4, h.shape[1]], dtype=torch.float32),
    "new_full": lambda h: h + h.new_full((1,), 0.5),
    "new_full of no dimension": lambda h: h + h.new_full((), 0.5),
    "new_empty": lambda h: h + h.new_empty((4, 1)).fill_(0.25),
    "zeros": lambda h: h + torch.zeros(size=h.shape[1:]) + torch.zeros(()),
    "zeros_like": lambda h: h + torch.zeros_like(h, dtype=torch.float32),
    "ones_like": lambda h: h * torch.ones_like(input=h),
    "full_like": lambda h: h + torch.full_like(h, fill_value=0.5),
    "empty_like": lambda h: torch.empty_like(h).copy_(h),
    "expand_as": lambda h: h * h.mean(0, keepdim=True).sign().expand_as(h),
    "expand_as of one column": lambda h: h * torch.full((4, 1), 2.0, dtype=h.dtype).expand_as(h),
    "expand_as, alone": lambda h: torch.full((1, 1), 2.0, dtype=h.dtype).expand_as(h),
    "ones_like, alone": torch.ones_like,
    "view_as": lambda h: h[:, None].view_as(h),
    "reshape_as": lambda h: h[None].reshape_as(h),
    "view_as of another": lambda h: torch.ones(h.numel(), dtype=h.dtype).view_as(h),
    "where, three": lambda h: torch.where(h > 0, h, 0.0),
    "where, a number first": lambda h: torch.where(h > 0, 1.0, h),
    "add, alpha": lambda h: torch.add(h, h, alpha=2),
    "add, a number": lambda h: 1 + h,
    "add, no dimension": lambda h: h + torch.tensor(2.0, dtype=h.dtype),
    "sub": lambda h: torch.sub(input=h, other=h.exp(), alpha=0.5),
    "rsub": lambda h: torch.rsub(h, h.exp(), alpha=2),
    "mul, one column": lambda h: h * torch.ones(4, 1, dtype=h.dtype),
    "div": lambda h: torch.div(h, 0.3, rounding_mode="floor"),
    "pow, a number below": lambda h: torch.pow(2.0, h),
    "pow, a tensor": lambda h: h.exp() ** torch.tensor(2.0),
    "clamp, tensors": lambda h: torch.clamp(h, min=torch.zeros(()), max=h.abs()),
    "clamp, one side": lambda h: h.clamp(max=0.5),
    "clip": lambda h: torch.clip(h, min=-1),
    "lerp": lambda h: torch.lerp(h, h.exp(), weight=torch.tensor(0.3, dtype=h.dtype)),
    "addcmul": lambda h: torch.addcmul(h, h, h.exp(), value=0.1),
    "masked_fill": lambda h: h.masked_fill(h > 0, torch.tensor(0.3, dtype=h.dtype)),
    "maximum": lambda h: torch.maximum(h, torch.zeros((), dtype=h.dtype)),
    "max of two": lambda h: torch.max(h, other=h.exp()),
    "softmax": lambda h: torch.softmax(h, dim=0) + F.softmax(h, dim=-2, dtype=torch.float64),
    "cumsum": lambda h: torch.cumsum(h, dim=0),
    "sum": lambda h: h + h.sum(0) + h.sum((0,), keepdim=True) + h.sum(dim=[-2]),
    "mean": lambda h: h + h.mean(dim=0, dtype=torch.float64),
    "var": lambda h: h + h.var(0) + torch.var(h, dim=(0,), unbiased=False) + h.var(0, correction=0, keepdim=True),
    "norm": lambda h: h + torch.norm(h, p=2, dim=0) + h.norm(dim=0, keepdim=True),
    "any": lambda h: h * (h > 0).any(0) + h * (h > 0).all(dim=0, keepdim=True),
    "max along": lambda h: h + h.max(0).values + torch.min(h, dim=0, keepdim=True)[0],
    "argmax along": lambda h: h + h.argmax(dim=0) + h.argmin(0, keepdim=True),
    "topk": lambda h: h + h.topk(1, dim=0)[0] + torch.topk(h, k=1, dim=0, largest=False).values,
    "sort": lambda h: torch.sort(h, dim=0, descending=True)[0] + h.sort(stable=True, dim=0)[0],
    "kthvalue": lambda h: h + torch.kthvalue(h, k=2, dim=0, keepdim=True)[0],
    "aminmax": lambda h: h + torch.aminmax(h, dim=0)[0],
    "var_mean": lambda h: h + torch.var_mean(h, dim=0, keepdim=True)[1],
    "flip": lambda h: h.flip(0) + h.flip([-2]),
    "roll": lambda h: torch.roll(h, 1, 0) + h.roll(shifts=(1,), dims=(0,)),
    "cat": lambda h: torch.cat([h, h], dim=0)[:4] + torch.cat((h[:2], h[2:])),
    "cat with an empty one": lambda h: torch.cat([torch.zeros(0, dtype=h.dtype), h]),
    "stack": lambda h: torch.stack([h, h.exp()], dim=-1).sum(-1) + torch.stack((h, h)).mean(0),
    "chunk": lambda h: torch.cat(h.chunk(2)) + torch.cat(torch.chunk(h, chunks=2, dim=-2)),
    "split": lambda h: torch.cat(h.split(3)) + torch.cat(torch.split(h, [1, 3], dim=0)),
    "tensor_split": lambda h: torch.cat(h.tensor_split(3)) + torch.cat(h.tensor_split([1, 2], dim=0)),
    "unbind": lambda h: torch.stack(h.unbind()) + torch.stack(torch.unbind(h, dim=0)),
    "slice": lambda h: h[:, :] + h[0:4:1] + h[..., :9],
    "select": lambda h: h + h[0] + h.select(dim=0, index=-1),
    "index": lambda h: h[torch.tensor([0, 1, 2, 3])] + h[[3, 2, 1, 0]],
    "squeeze": lambda h: h[None].squeeze(0) + h[None, ..., None].squeeze((0, -1)),
    "squeeze of nothing": lambda h: h.squeeze(0) + h.squeeze(),
    "unsqueeze": lambda h: h.unsqueeze(-1).squeeze(-1) + h.unsqueeze(dim=0)[0],
    "in place, of another shape": lambda h: h.clone().unsqueeze_(0).squeeze_(0).t_().transpose_(0, 1),
    "permute": lambda h: h.permute(1, 0).permute((1, 0)) + torch.permute(h, dims=(-1, 0)).T,
    "transpose": lambda h: h.transpose(0, 1).transpose(dim0=-1, dim1=-2) + h.swapaxes(0, 1).mT,
    "movedim": lambda h: h.movedim(0, 1).movedim((0,), (1,)),
    "expand": lambda h: h.expand(4, -1) + h[None].expand(2, -1, -1)[0] + torch.ones(1).double().expand(4, 1),
    "broadcast_to": lambda h: torch.broadcast_to(h, size=(2, *h.shape))[1],
    "repeat": lambda h: h.repeat(2, 1)[:4] + h.repeat(2, 1, 1)[0] + torch.tile(h, (2, 1))[:4] + h.tile(dims=(1,)),
    "repeat_interleave": lambda h: h.repeat_interleave(2, dim=0)[::2] + torch.repeat_interleave(h, repeats=2, dim=-2)[1::2],
    "flatten": lambda h: h.flatten(start_dim=1) + h[:, None].flatten(1, -1),
    "unflatten": lambda h: h.unflatten(0, (2, 2)).flatten(0, 1) + h.unflatten(dim=-1, sizes=(-1, 1))[..., 0],
    "pad": lambda h: F.pad(h, (0, 0, 1, 1))[1:-1] + F.pad(h, pad=[0, 0, 0, 1], value=1.0)[:4],
    "dropout": lambda h: F.dropout(h, p=0.5, training=False),
    "prelu": lambda h: F.prelu(h, torch.tensor([0.25], dtype=h.dtype)) + F.prelu(h, torch.tensor(0.1, dtype=h.dtype)),
    "gelu": lambda h: F.gelu(h, approximate="tanh") + F.softplus(h, beta=2) + F.elu(h, alpha=0.5),
    "hardtanh": lambda h: F.hardtanh(h, min_val=-2.0) + F.leaky_relu(h, negative_slope=0.2) + F.threshold(h, 0.1, 0.2),
    "logical": lambda h: h * torch.logical_and(h > 0, torch.tensor(True)) + h * torch.logical_not(h > 0),
    "compared": lambda h: h * (h > torch.tensor(0.1)) + h * torch.eq(h, other=h),
    "matmul from the left": lambda h: torch.eye(4, dtype=h.dtype) @ h,
    "einsum": lambda h: torch.einsum("nc,nm->mc", h, torch.eye(4, dtype=h.dtype)),
    "batch_norm without parts": lambda h: F.batch_norm(h, None, None, training=True),
    "copy": lambda h: torch.zeros_like(h).copy_(h) + aten.copy(h, h.exp()),
}

#: Operations that read h, or change its channels, and must be followed without an error; some or all channels stay.
READ: dict[str, Form] = {
    "where, no dimension": lambda h: torch.where(h.sum() > 1e9, h, -h),
    "unbind of one entry": lambda h: sum(h[i : i + 1].unbind(0)[0].sum() for i in range(2)) * 0 + h,
    "where(condition)": lambda h: torch.stack(torch.where(h > 1e9)).sum() + h,
    "nonzero": lambda h: h + (h > 0).nonzero().sum() * 0,
    "index of a mask": lambda h: h + h[h > 1e9].sum(),
    "rows of a mask": lambda h: h + h[h[:, 0] < 1e9].sum(0),
    "rows of a mask, cast": lambda h: h + h[h.sum(1) < 1e9].float().type_as(h).relu().sum(0),
    "masked_select": lambda h: h + torch.masked_select(h, h > 0).sum() * 0,
    "linear of a vector": lambda h: h + F.linear(h, torch.ones(8, dtype=h.dtype))[:, None],
    "argmax of all": lambda h: h + torch.argmax(h) * 0 + h.argmin(dim=None, keepdim=True) * 0,
    "softmax of all": lambda h: h.softmax(-1) + torch.log_softmax(h, dim=1),
    "numbers": lambda h: (
        h
        + sum(
            (
                *(h.sum().mean(0), h.sum().amax(0), h.sum().sum(dim=[0], keepdim=True), h.sum().logsumexp(0), h.sum().all(0)),
                *(h.sum().softmax(0), h.sum().cumsum(0), h.sum().max(0)[0], h.sum().sort(0)[0], h.sum().topk(1)[0].squeeze(0)),
                *(h.sum().squeeze(), h.sum().transpose(0, 0), h.sum().argmax(), h.sum().argmin(0)),
            )
        )
    ),
    "number as a view": lambda h: h + h.sum().view(1, 1) + h.mean().expand(4, 1) + h.sum().reshape(()) + h.sum().flatten(),
    "norm of all": lambda h: h / h.norm() + h.std() + torch.linalg.vector_norm(h, ord=1) + h.prod() * 0,
    "median of all": lambda h: h + h.median() + h.max() + h.min() + torch.aminmax(h)[1],
    "empty": lambda h: h + torch.cat([h[:0], h[:0]]).sum() + h[:0].repeat(2, 1).sum(),
    "resize_": lambda h: h + h.detach().clone().resize_(8).sum(),
    "flip of channels": lambda h: h.flip(-1) + h.roll(1),
    "repeat_interleave of counts": lambda h: h + h.repeat_interleave(torch.tensor([1, 1, 1, 1]), dim=0, output_size=4),
    "repeat_interleave of all": lambda h: h + h.repeat_interleave(2).sum(),
    "arange": lambda h: h + torch.arange(8).type_as(h) + torch.arange(0, 8, step=1, dtype=torch.float32),
    "attention of few dimensions": lambda h: F.scaled_dot_product_attention(h, h, h) + h,
    "attention, grouped": lambda h: F.scaled_dot_product_attention(
        h.view(4, 1, -1), *[h.view(1, 4, 1, -1)] * 2, enable_gqa=True
    )[0, :, 0],
    "view in another type": lambda h: h + h.view(torch.int64).sum() * 0,
    "glu": lambda h: h + F.glu(h).repeat(1, 2),
}


def form_case(name: str, form: Form) -> Case:
    return Case((name,), lambda m, x: m.b(form(m.a(x[0]))), linears(), (1, 4, 6), {}, name=name)


PASSING = [replace(form_case(name, form), goes=GOES) for name, form in THROUGH.items()]


@pytest.mark.parametrize("case", side_by_side(PASSING), ids=str)
def test_channels_pass_whatever_form_an_operation_is_called_in(case: Case) -> None:
    _no_rule_gave_up(case)
    goes_as_it_says(case)


@pytest.mark.parametrize("name", READ)
def test_an_operation_that_keeps_channels_stops_nothing(name: str) -> None:
    case = form_case(name, READ[name])
    net, x = case.net(), case.inputs()
    wanted = net(x)
    channel_graph(net, (x,))
    assert torch.equal(net(x), wanted)
    goes_as_it_says(case)


def _no_rule_gave_up(case: Case) -> None:
    graph = channel_graph(case.net(), (case.inputs(),))
    assert not [why for why in graph.pinned.values() if "is called as its rule does not know" in why]


def test_a_form_that_a_rule_does_not_know_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def narrow(*arguments: object, **keywords: object) -> None:
        raise IndexError("a form that nobody thought of")

    monkeypatch.setitem(follow.__globals__["RULES"], "gelu", narrow)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 3))
    graph = channel_graph(net, (torch.randn(4, 6),))
    assert graph.groups == ()
    assert graph.pinned["0.weight", 0] == "aten.gelu.default is called as its rule does not know (gelu, IndexError)"
