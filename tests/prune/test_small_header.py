"""Headers that somebody has changed: refused with the model as it was, or the outputs are the right ones."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import remove
from fasterai.prune.small_files import load_small, save_small
from fasterai.prune.small_header import SIZES, stamp

IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    """Attention of one's own, with the size of a head as a number or worked out when it runs."""

    def __init__(self, knows: bool):
        super().__init__()
        self.num_heads, self.inner_dim = 4, 16
        if knows:
            self.head_dim = 4
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).reshape(n, length, -1))


class Torchs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x, x, x, need_weights=False)[0]


def tokens(attention: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), attention(), nn.LayerNorm(16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def grouped() -> nn.Sequential:
    layers = nn.Conv2d(3, 12, 3), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 18, 3, groups=3), nn.BatchNorm2d(18), nn.ReLU()
    return nn.Sequential(*layers, nn.ConvTranspose2d(18, 6, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))


def depthwise() -> nn.Sequential:
    layers = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
    return nn.Sequential(*layers, nn.Conv2d(8, 6, 1), nn.PReLU(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "depthwise": (depthwise, IMAGES),
    "grouped": (grouped, IMAGES),
    "own attention": (lambda: tokens(lambda: Own(False)), TOKENS),
    "own attention with the size of a head": (lambda: tokens(lambda: Own(True)), TOKENS),
    "torch's attention": (lambda: tokens(Torchs), TOKENS),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]().eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Of each network a file, and the small one's outputs."""
    found = {}
    for name, (_, inputs) in NETWORKS.items():
        model, path = build(name), tmp_path_factory.mktemp("small") / "small.safetensors"
        Pruner(model, 0.5, "local", "large_final", example_inputs=inputs, round_to=1).prune_model(measure=False)
        save_small(path, model)
        found[name] = path, model(inputs)
    return found


def content_of(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def everything(model: nn.Module) -> list[Any]:
    """All that a load might change."""
    own = [{k: v for k, v in vars(m).items() if isinstance(v, int | float | str | tuple | list)} for m in model.modules()]
    return [[type(m) for m in model.modules()], copy.deepcopy(own), [x.clone() for x in model.state_dict().values()]]


def is_same(one: list[Any], other: list[Any]) -> bool:
    return one[:2] == other[:2] and all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


def mutants(header: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Headers with one thing changed: each number of sizes and of heads, and names that are no sizes."""
    for part in ("sizes", "slim"):
        entries = json.loads(header[part])
        for module, own in entries.items():
            for attribute, value in own.items() if part == "sizes" else [("", own)]:
                for other in others_than(value):
                    changed = copy.deepcopy(entries)
                    if part == "sizes":
                        changed[module][attribute] = other
                    else:
                        changed[module] = other
                    yield f"{module}.{attribute or part} {value} -> {other}", header | {part: json.dumps(changed)}
    for attribute, value in STRANGE.items():
        entries = json.loads(header["sizes"])
        next(iter(entries.values()))[attribute] = value
        yield f"{attribute} = {value}", header | {"sizes": json.dumps(entries)}


STRANGE: dict[str, Any] = {
    "stride": [2, 2],
    "eps": 9.0,
    "forward": 3,
    "_parameters": {},
    "_forward_hooks": [],
    "training": 1,
    "__class__": 2,
    "num_heads": 2,
    "weight": 3,
    "bias": None,
    "padding": [0, 0],
    "groups": 2,
    "channels": 1,
    "nf": 4,
}


def refusal(path: Path, model: nn.Module) -> str:
    """What `load_small` says when it refuses a file, or nothing."""
    try:
        load_small(path, model)
    except ValueError as error:
        return str(error)
    return ""


def others_than(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [[2 * n for n in value], [max(1, n // 2) for n in value], [], [*value, 1], ["8"], 8, None]
    return [value * 2, value // 2, value + 1, value - 1, 1, 0, -value, -1, str(value), float(value), True, None, [value], 2**70]


#: The dense number of heads of one's own module: weights alone do not tell what went, heads or what they read; the stamp does.
UNTOLD = {"1.num_heads 2 -> 4"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_header_with_one_number_changed_is_refused_or_the_outputs_are_right(name, saved, tmp_path):
    path, expected = saved[name]
    header, tensors = content_of(path)
    del header["stamp"]  # as files of before, and those of who writes it anew
    refused = loaded = 0
    for what, changed in mutants(header):
        if changed == header or what in UNTOLD:
            continue
        save_file(tensors, tmp_path / "changed.safetensors", changed)
        model = build(name)
        before = everything(model)
        if told := refusal(tmp_path / "changed.safetensors", model):
            assert told.startswith(("path must be", "model must be the dense model")), what
            assert is_same(everything(model), before), what
            refused += 1
        else:
            assert torch.equal(model(NETWORKS[name][1]), expected), what
            loaded += 1
    assert refused > 60
    assert loaded <= refused / 20


@pytest.mark.parametrize("name", NETWORKS)
def test_any_change_of_a_header_is_told_by_its_stamp(name, saved, tmp_path):
    header, tensors = content_of(saved[name][0])
    for _, changed in mutants(header):
        save_file(tensors, tmp_path / "changed.safetensors", changed)
        if changed != header:
            with pytest.raises(ValueError, match=r"as save_small wrote it, got .* whose header was changed"):
                load_small(tmp_path / "changed.safetensors", build(name))


def test_a_header_of_anything_else_is_refused(saved, tmp_path):
    path = tmp_path / "changed.safetensors"
    name = "torch's attention"
    header, tensors = content_of(saved[name][0])
    chance = random.Random(0)
    broken = [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"a"',
        '{"": 3}',
        '{"1": {"a": {}}}',
        '{"0": [1]}',
        "[" * 100_000,
        '{"0": {"dim": NaN}}',
    ]
    for part in ("sizes", "slim", "traits", "dense"):
        cut = [header[part][: chance.randrange(1, len(header[part]))] for _ in range(5)]
        for text in broken + cut:
            changed = header | {part: text}
            changed["stamp"] = stamp(changed, {n: tuple(x.shape) for n, x in tensors.items()})
            save_file(tensors, path, changed)
            model = build(name)
            before = everything(model)
            if told := refusal(path, model):
                assert told.startswith(("path must be", "model must be the dense model")), (part, text)
                assert is_same(everything(model), before)
            else:
                assert torch.equal(model(TOKENS), saved[name][1]), (part, text)
        del changed[part], changed["stamp"]
        save_file(tensors, path, changed)
        if part in ("sizes", "slim"):
            with pytest.raises(ValueError, match=r"path must be a file that save_small wrote"):
                load_small(path, build(name))


def test_the_size_that_was_found_by_hand(tmp_path):
    """Four heads that the file calls two: accepted once, with outputs off by 0.03."""
    model = tokens(Torchs).eval()
    save_small(tmp_path / "small.safetensors", model)
    header, tensors = content_of(tmp_path / "small.safetensors")
    sizes = json.loads(header["sizes"])
    sizes["1.a"]["num_heads"] = 2
    header = header | {"sizes": json.dumps(sizes)}
    header["stamp"] = stamp(header, {n: tuple(x.shape) for n, x in tensors.items()})
    save_file(tensors, tmp_path / "changed.safetensors", header)
    with pytest.raises(ValueError, match=r"1\.a\.num_heads is 2 in the file, whose weights have 4"):
        load_small(tmp_path / "changed.safetensors", tokens(Torchs))


def test_groups_that_went_and_channels_of_the_others_after_them(tmp_path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 2, 1)).eval()

    model = net()
    for gone in (range(4), (0, 1, 4, 5, 8, 9)):
        with torch.no_grad():
            for tensor in (*model[0].parameters(), *model[1].parameters()):
                tensor[list(gone)] = 0
        remove(model, IMAGES, measure=False)
    assert (model[1].num_groups, model[1].num_channels) == (3, 6)
    save_small(tmp_path / "small.safetensors", model)
    assert torch.equal(load_small(tmp_path / "small.safetensors", net())(IMAGES), model(IMAGES))


class Counting(nn.Module):
    """Notes sizes when it first runs, as torchvision's box pools do."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self.layer, self.scales, self.width, self.limit = nn.Linear(4, 3), None, None, limit
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.scales, self.width, self.seen = [0.25, 0.5], x.shape[1], [*self.seen, 1]
        return self.layer(x)


def test_what_a_first_run_fills_stops_no_load(tmp_path):
    ran, fresh, x = nn.Sequential(Counting()), nn.Sequential(Counting()), torch.randn(2, 4)
    expected = ran(x)
    save_small(tmp_path / "ran.safetensors", ran)
    save_small(tmp_path / "fresh.safetensors", fresh)
    loaded = load_small(tmp_path / "ran.safetensors", nn.Sequential(Counting()))
    assert loaded[0].width is None
    assert torch.equal(loaded(x), expected)
    load_small(tmp_path / "ran.safetensors", ran)
    with pytest.raises(ValueError, match=r"0\.limit is 3 here and None in the file"):
        load_small(tmp_path / "ran.safetensors", nn.Sequential(Counting(limit=3)))


def test_tied_weights_and_shared_modules_come_back(tmp_path):
    def tied() -> nn.Module:
        torch.manual_seed(0)
        shared = nn.Linear(8, 8)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)
        )
        model[6].weight = shared.weight
        return model.eval()

    model, x = tied(), torch.randn(3, 4)
    Pruner(model, 0.5, "local", "large_final", example_inputs=x, round_to=1).prune_model(measure=False)
    save_small(tmp_path / "small.safetensors", model)
    assert torch.equal(load_small(tmp_path / "small.safetensors", tied())(x), model(x))


def test_the_sizes_are_named_once():
    assert {"num_heads", "in_channels", "normalized_shape", "nf"} <= set(SIZES)
    assert not set(STRANGE) - {"num_heads", "groups", "channels", "nf"} & set(SIZES)
