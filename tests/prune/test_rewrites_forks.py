"""Removal where sizes are written into code that decides by sizes, and into functions that `torch.fx` leaves whole."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.prune.removal import Removal, remove
from fasterai.prune.small_files import load_small, save_small
from fasterai.prune.surgery.operate import Surgery
from fasterai.prune.surgery.plan import Plan
from fasterai.prune.surgery.rewriting import Edit, Rewrite
from fasterai.prune.surgery.traced_copies import rewrite_of
from tests.prune.test_rewrites import Net, X, built, masked

WINDOW = 4


def attend(x: Tensor, qkv: Tensor, proj: Tensor, heads: int) -> Tensor:
    """As in Swin: padded to windows, moved where there are several, and cut again where it was padded."""
    B, N, C = x.shape
    pad = (WINDOW - N % WINDOW) % WINDOW
    x = F.pad(x, (0, 0, 0, pad))
    is_moved = x.shape[1] > WINDOW
    if is_moved:
        x = x.roll(1, 1)
    x = x.view(-1, WINDOW, C)
    q, k, v = F.linear(x, qkv).reshape(-1, WINDOW, 3, heads, C // heads).permute(2, 0, 3, 1, 4).unbind(0)
    x = ((q * (C // heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    x = F.linear(x.transpose(1, 2).reshape(-1, WINDOW, C), proj).view(B, N + pad, C)
    if is_moved:
        x = x.roll(-1, 1)
    if pad > 0:
        x = x[:, :N].contiguous()
    return x


torch.fx.wrap("attend")


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count, self.qkv, self.proj = 4, nn.Linear(12, 36, bias=False), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, self.qkv.weight, self.proj.weight, self.count)


class Tables(Windows):
    """A table that the first run at a size fills; it is in no file."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1, 1).double(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.linspace(0, 1, int(x.shape[1])).double()[:, None]
        return super().forward(x) + self.table


class Further(Windows):
    """Something else on long inputs, with the width written into it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.reshape(x.shape[0], -1, 2 * x.shape[2]).reshape(x.shape) if x.shape[1] > 29 else y


def of_length(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2 + n % 2, n, 6, dtype=torch.float64, generator=generator) for n in lengths]


#: The ways of the example and of the probes (5, 10 and 2), and others: both decisions otherwise, and one of each.
LENGTHS = of_length(5, 10, 2, 8, 4, 31)


def removed(make: Any, inputs: list[Tensor]) -> tuple[Net, Removal, list[Tensor]]:
    net = built(make)
    masked(net)
    wanted = [net(x) for x in inputs]
    return net, remove(net, X, measure=False), wanted


def agree(net: Any, wanted: list[Tensor], inputs: list[Tensor]) -> bool:
    return all(torch.allclose(net(x), y, rtol=0, atol=1e-12) for x, y in zip(inputs, wanted, strict=True))


@pytest.fixture(scope="module")
def slim() -> tuple[Net, Removal, list[Tensor]]:
    return removed(Windows, LENGTHS)


def test_what_decides_by_sizes_loses_its_heads_and_goes_all_ways(slim: tuple[Net, Removal, list[Tensor]]) -> None:
    net, removal, wanted = slim
    assert removal.refused == {} and net.part.qkv.weight.shape == (18, 6) and type(net.part).__name__ == "TracedWindows"
    assert removal.plan.rewrites["part"].ways == ((True, True, True), (False, False, True))
    assert agree(copy.deepcopy(net), wanted, LENGTHS)
    net.train()
    net(LENGTHS[3]).sum().backward()
    assert net.part.qkv.weight.grad is not None
    net.eval()


def test_a_way_of_other_operations_raises_an_error_that_says_what_to_do() -> None:
    long = of_length(30)
    net, removal, wanted = removed(Further, [*LENGTHS[:3], *long])
    assert removal.refused == {} and agree(net, wanted[:3], LENGTHS[:3])
    message = r"at which Further goes a way that its removal was checked on, got others \(\w+ was not met\); remove"
    with pytest.raises(ValueError, match=message):
        net(long[0])
    net = built(Further)
    masked(net, x=long[0])
    wanted = [net(x) for x in (X, *long)]
    remove(net, long[0], measure=False)  # with an example of that size
    assert agree(net, wanted, [X, *long])


def test_what_becomes_of_it_is_data_and_is_undone(slim: tuple[Net, Removal, list[Tensor]], tmp_path: Path) -> None:
    net, removal, wanted = slim
    plan = Plan.from_dict(json.loads(json.dumps(removal.plan.to_dict())))
    assert plan.rewrites == removal.plan.rewrites
    save_small(tmp_path / "small.safetensors", net)
    loaded = load_small(tmp_path / "small.safetensors", built(Windows))
    for other in (loaded, pickle.loads(pickle.dumps(net)), copy.deepcopy(loaded)):
        assert rewrite_of(other.part) == rewrite_of(net.part) and agree(other, wanted, LENGTHS)
    fresh = built(Windows)
    dense = [fresh(x) for x in LENGTHS]
    surgery = Surgery(fresh, plan)
    assert fresh.part.qkv.weight.shape == (18, 6) and type(fresh.part) is not Windows
    surgery.undo()
    assert type(fresh.part) is Windows and agree(fresh, dense, LENGTHS)


def test_a_second_removal_looks_at_all_ways_again(slim: tuple[Net, Removal, list[Tensor]]) -> None:
    net = copy.deepcopy(slim[0])
    masked(net, 3)
    wanted = [net(x) for x in LENGTHS]
    removal = remove(net, X, measure=False)
    assert removal.removed["part.qkv.weight"] == (2, 1) and agree(net, wanted, LENGTHS)
    assert {e.after for e in rewrite_of(net.part).edits if e.kind == "factor"} == {3**-0.5}


def test_exports_and_compiles_on_ways_that_were_met_and_others(slim: tuple[Net, Removal, list[Tensor]]) -> None:
    torch._dynamo.reset()
    net, _, wanted = slim
    program = torch.export.export(net, (LENGTHS[3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert agree(program.module(), wanted[3:4], LENGTHS[3:4])
    fresh = pickle.loads(pickle.dumps(net))
    assert agree(torch.compile(fresh, backend="eager"), wanted[3:4], LENGTHS[3:4])
    file = io.BytesIO()
    torch.onnx.export(copy.deepcopy(net).float(), (X.float(),), file, dynamo=False)
    assert file.getbuffer().nbytes > 0


def test_a_table_that_a_first_run_fills_is_filled(tmp_path: Path) -> None:
    net, removal, wanted = removed(Tables, LENGTHS[:2])  # of a probe's length the second time: nothing is filled
    net.part.table = built(Tables).part.table
    assert removal.refused == {} and [*removal.plan.rewrites] == ["part"]
    save_small(tmp_path / "small.safetensors", net)
    loaded = load_small(tmp_path / "small.safetensors", built(Tables))
    assert loaded.part.table.shape == (1, 1) and agree(loaded, wanted, LENGTHS[:2]) and loaded.part.table.shape == (10, 1)


def test_a_rewrite_has_its_ways_as_data() -> None:
    rewrite = Rewrite((), (Edit("mul", "factor", ("args", 1), None, 0.5),), ((True, False), (3,)))
    data = rewrite.to_dict()
    assert data["ways"] == [[True, False], [3]] and Rewrite.from_dict(json.loads(json.dumps(data))) == rewrite
    assert "ways" not in Rewrite().to_dict() and Rewrite.from_dict({"given": [], "edits": []}).ways is None
    for wrong in ([True], [["left"]], "ways"):
        with pytest.raises(ValueError, match="ways of a rewrite must be lists of truth values and whole numbers"):
            Rewrite.from_dict({**data, "ways": wrong})
    with pytest.raises(ValueError, match="numbers must be whole numbers"):
        Edit.from_list(["mul", "size", ["args", 1], None, 0.5])
