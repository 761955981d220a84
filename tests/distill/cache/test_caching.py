"""Caching: the teacher's own logits, written whole or not at all, read again where they are, refused where data changes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fasterai.core.batch import Batch
from fasterai.core.files import PART
from fasterai.distill.cache.cached import CachedTeacher, load_cached_teacher
from fasterai.distill.cache.caching import cache_teacher
from fasterai.distill.teachers import Answers, NetworkTeacher

X, Y = torch.randn(22, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(22) % 5


def network() -> nn.Module:
    torch.manual_seed(1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 5)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head)


class Maps(nn.Module):
    """Logits for each place of an image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Words(nn.Module):
    """Logits for each word, of two inputs, by keywords or by place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)

    def forward(self, input_ids: Tensor, shift: Tensor, attention_mask: Tensor | None = None) -> Any:
        return {"logits": self.head(self.words(input_ids)) + shift[:, None, None]}


IDS, SHIFT = torch.arange(66).view(22, 3) % 11, torch.arange(22) / 7
CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "images": (network, (X, Y)),
    "maps": (Maps, (X, Y)),
    "words by keywords": (Words, {"input_ids": IDS, "shift": SHIFT, "labels": IDS}),
    "words by place": (Words, ((IDS, SHIFT), IDS)),
}


def rows_of(data: Any, rows: Any) -> Batch:
    if isinstance(data, dict):
        return Batch(keywords={name: x[rows] for name, x in data.items()}, outputs=torch.empty(0))
    inputs = data[0] if isinstance(data[0], tuple) else (data[0],)
    return Batch(tuple(x[rows] for x in inputs), (data[1][rows],), outputs=torch.empty(0))


def live(model: nn.Module, batch: Batch) -> Tensor:
    teacher = NetworkTeacher(model)
    teacher.begin(nn.Module(), [])
    try:
        logits = teacher.answer(batch).logits
    finally:
        teacher.end()
    assert logits is not None
    return logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_logits_are_the_teachers(tmp_path: Path, case: str, dtype: torch.dtype):
    make, data = CASES[case]
    model = make()
    cached = cache_teacher(model, data, tmp_path / "a.safetensors", dtype=dtype, batch_size=8)
    assert len(cached) == 22
    for batch in (rows_of(data, slice(0, 8)), rows_of(data, slice(16, 22))):
        found, expected = cached.answer(batch).logits, live(model, batch)
        assert found.dtype is torch.float32
        if dtype is torch.float32:
            assert torch.equal(found, expected)
        assert torch.equal(found, expected.to(dtype).float())
    order = torch.randperm(22, generator=torch.Generator().manual_seed(2))
    for rows in order.split(5):
        batch = rows_of(data, rows)
        close = 1e-6 if dtype is torch.float32 else 2e-3
        assert torch.allclose(cached.answer(batch).logits, live(model, batch), atol=close, rtol=close)


def test_a_shuffled_loader_gives_the_same(tmp_path: Path):
    model, loader = network(), DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    cached = cache_teacher(model, loader, tmp_path / "a", dtype=torch.float32)
    batch = rows_of((X, Y), slice(None))
    assert torch.allclose(cached.answer(batch).logits, live(model, batch), atol=1e-6)
    assert len(cached) == 22


def test_the_largest_alone(tmp_path: Path):
    model = network()
    cached = cache_teacher(model, X, tmp_path / "a", dtype=torch.float32, top_k=2)
    expected, found = live(model, rows_of((X, Y), slice(None))), cached.answer(Batch((X,), outputs=torch.empty(0))).logits
    assert torch.allclose(found.topk(2).values, expected.topk(2).values, atol=1e-6)
    assert torch.allclose(found.logsumexp(1), expected.logsumexp(1), atol=1e-5)


def test_padding_to_another_length_is_the_same_sample(tmp_path: Path):
    class Mean(Words):
        def forward(self, input_ids: Tensor, shift: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            assert attention_mask is not None
            kept = attention_mask.float()[..., None]
            return self.head((self.words(input_ids) * kept).sum(1) / kept.sum(1)) + shift[:, None]

    model, length = Mean(), torch.arange(22) % 3 + 1

    def padded(width: int) -> dict[str, Tensor]:
        mask = torch.arange(width) < length[:, None]
        ids = torch.zeros(22, width, dtype=torch.long)
        ids[:, :3] = IDS
        return {"input_ids": ids * mask, "shift": SHIFT, "attention_mask": mask.long()}

    cached = cache_teacher(model, padded(3), tmp_path / "a", dtype=torch.float32)
    batch = Batch(keywords=padded(7), outputs=torch.empty(0))
    assert torch.allclose(cached.answer(batch).logits, live(model, batch), atol=1e-6)


def test_nothing_of_the_teacher_or_the_generators_changes(tmp_path: Path):
    model = network().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    random = torch.get_rng_state()
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    cache_teacher(model, loader, tmp_path / "a")
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# --- a file that is there --------------------------------------------------------------------------------------------


class Counted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def test_a_cache_that_is_there_is_read(tmp_path: Path):
    model, path = Counted(network()), tmp_path / "a"
    cache_teacher(model, X, path, batch_size=2)
    assert model.calls == 12  # one more to see that it answers alike
    time = path.stat().st_mtime_ns
    cached = cache_teacher(model, X, path, batch_size=2)
    assert model.calls == 13
    assert path.stat().st_mtime_ns == time
    assert len(cached) == 22
    cache_teacher(model, X, path, batch_size=2, overwrite=True)
    assert model.calls == 25
    assert path.stat().st_mtime_ns > time


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"model": lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 5))},
            "path must hold logits of this teacher, got .*a, of one",
        ),
        (
            {"dtype": torch.float32},
            "path must hold logits of dtype float32 and top_k None, got .*a with dtype float16 and top_k None",
        ),
        ({"top_k": 2}, "path must hold logits of dtype float16 and top_k 2, got"),
        ({"data": X + 1}, "path must hold logits of this data, got .*a, which lacks 16 of 16 samples; pass overwrite=True"),
        ({"data": torch.cat([X[:12], X[12:] + 1])}, "which lacks 4 of 16 samples"),
    ],
)
def test_a_cache_of_something_else_is_refused_and_stays(tmp_path: Path, given: dict[str, Any], message: str):
    path = tmp_path / "a"
    cache_teacher(network(), X, path)
    before = path.read_bytes()
    model = given.pop("model", network)()
    with pytest.raises(ValueError, match=message):
        cache_teacher(model, given.pop("data", X), path, batch_size=8, **given)
    assert path.read_bytes() == before


def test_a_foreign_file_is_refused_and_stays(tmp_path: Path):
    path = tmp_path / "a"
    path.write_text("mine")
    with pytest.raises(ValueError, match="path must be a file that cache_teacher wrote"):
        cache_teacher(network(), X, path)
    assert path.read_text() == "mine"


# --- data that changes -----------------------------------------------------------------------------------------------


class Noisy(Dataset):
    def __len__(self) -> int:
        return 22

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + 1e-3 * torch.rand(()), Y[i]


class NoisyBatches:
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x + torch.rand(()), y) for x, y in zip(X.split(8), Y.split(8), strict=True))


def noisy_fastai() -> Any:
    data = pytest.importorskip("fastai.data.core")

    def noise(x: Tensor) -> Tensor:
        return x + torch.rand(()) if x.is_floating_point() else x

    datasets = data.Datasets(list(range(22)), [[lambda i: X[i]], [lambda i: Y[i]]], splits=[[*range(22)], [0]])
    return datasets.dataloaders(bs=8, after_batch=[noise])


RANDOM = {"data set": lambda: DataLoader(Noisy(), batch_size=8, shuffle=True), "batches": NoisyBatches, "fastai": noisy_fastai}


@pytest.mark.parametrize("kind", RANDOM)
def test_random_augmentation_is_found_out(tmp_path: Path, kind: str):
    model = Counted(network())
    with pytest.raises(ValueError, match=r"data must give each sample the same each time, got \d+ of \d+ that differ"):
        cache_teacher(model, RANDOM[kind](), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    assert model.calls == (3 if kind == "batches" else 0)  # before the work, where the same samples can be asked for


def test_a_teacher_that_answers_by_chance_is_refused(tmp_path: Path):
    class Chance(Maps):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.conv(x))

    with pytest.raises(ValueError, match="teacher must answer alike for the same sample, got logits that differ by"):
        cache_teacher(Chance(), X, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_texts_of_several_lengths_with_a_row_for_each_word_are_refused(tmp_path: Path):
    batches = [{"input_ids": IDS[:, :n], "shift": SHIFT} for n in (3, 2)]
    with pytest.raises(ValueError, match=r"data must give logits of one shape, got \(2, 11\) after \(3, 11\); pad all samples"):
        cache_teacher(Words(), batches, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- bad input -------------------------------------------------------------------------------------------------------


class Follower(NetworkTeacher):
    def after_step(self) -> None:
        pass


class Route(NetworkTeacher):
    def at_position(self, position: float) -> None:
        pass


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * float("nan")


class OneRow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"teacher": 3}, TypeError, "teacher must be a network, got 3"),
        ({"teacher": network}, TypeError, "teacher must be a network, got <function"),
        ({"teacher": Follower(network())}, ValueError, "teacher must stay as it is in training, got a Follower, which follows"),
        ({"teacher": Route(network())}, ValueError, "teacher must stay as it is in training, got a Route, which follows"),
        ({"teacher": Nothing()}, ValueError, "teacher must return finite logits, got NaN among them"),
        ({"teacher": OneRow()}, ValueError, "teacher must answer with a row for each sample, got 1 for 22"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype must be torch.float16 or torch.float32, got torch.bfloat16"),
        ({"dtype": "float16"}, ValueError, "dtype must be torch.float16 or torch.float32, got 'float16'"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 6}, ValueError, "top_k must be at most the 5 classes, got 6"),
        ({"top_k": 0.5}, TypeError, "top_k must be a whole number"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"data": 5}, TypeError, "data must be a loader"),
        ({"data": []}, ValueError, "data must hold at least one sample, got none"),
        ({"path": "."}, ValueError, "path must be a file in a folder that is there, got"),
        ({"path": "none/a"}, ValueError, "path must be a file in a folder that is there, got"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    tmp_path: Path, given: dict[str, Any], error: type[Exception], message: str
):
    path = tmp_path / given.pop("path", "a")
    arguments = {"teacher": network(), "data": X, **given}
    with pytest.raises(error, match=message):
        cache_teacher(arguments.pop("teacher"), arguments.pop("data"), path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_cached_teacher_is_not_cached_again(tmp_path: Path):
    cached = cache_teacher(network(), X, tmp_path / "a")
    with pytest.raises(TypeError, match="teacher must be a network, got <CachedTeacher"):
        cache_teacher(cached, X, tmp_path / "b")


def test_a_teacher_of_ones_own_is_cached(tmp_path: Path):
    class Twice(NetworkTeacher):
        def answer(self, batch: Batch) -> Answers:
            return Answers(2 * super().answer(batch).logits)

    model = network()
    cached = cache_teacher(Twice(model), X, tmp_path / "a", dtype=torch.float32)
    batch = rows_of((X, Y), slice(None))
    assert torch.allclose(cached.answer(batch).logits, 2 * live(model, batch), atol=1e-6)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_an_interrupt_leaves_what_was_there_and_the_modes(tmp_path: Path):
    class Interrupted(Counted):
        def forward(self, x: Tensor) -> Tensor:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Interrupted(network()).train()
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(model, X, tmp_path / "a", batch_size=4)
    assert list(tmp_path.iterdir()) == []
    assert model.training
    model.calls = -99
    assert len(cache_teacher(model, X, tmp_path / "a", batch_size=4)) == 22


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from torch import nn
from fasterai.core.batch import Batch
from fasterai.distill.cache.cached import load_cached_teacher
from fasterai.distill.cache.caching import cache_teacher

path, x = Path(sys.argv[1]) / "a.safetensors", torch.arange(40.0).view(20, 2)
class Net(nn.Module):
    def __init__(self, factor, ends_at=99):
        super().__init__()
        self.factor, self.ends_at, self.calls = nn.Parameter(torch.tensor(factor)), ends_at, 0
    def forward(self, x):
        self.calls += 1
        if self.calls == self.ends_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return x * self.factor
def child(function):
    if (pid := os.fork()) == 0:
        function()
        os._exit(0)
    return pid
def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def read(factor):
    cached = load_cached_teacher(path)
    for _ in range(200):
        rows = torch.randperm(20)[:7]
        found = cached.answer(Batch((x[rows],), outputs=torch.empty(0))).logits
        assert torch.equal(found, factor * x[rows])
def kept():
    return sorted(one.name for one in path.parent.iterdir() if not one.name.endswith(".part"))
cache = lambda net: cache_teacher(net, x, path, batch_size=4, overwrite=True)
assert code(child(lambda: cache(Net(2.0, ends_at=3)))) == -9
assert kept() == []
cache(Net(2.0))
for at in (1, 5, 6):
    assert code(child(lambda: cache(Net(3.0, ends_at=at)))) == -9
    assert kept() == ["a.safetensors"]
    read(2.0)
readers = [child(lambda: read(2.0)) for _ in range(2)]
assert [code(one) for one in readers] == [0, 0]
print("all is well")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are ended by a signal")
def test_a_kill_leaves_what_was_there_and_processes_read_at_once(tmp_path: Path):
    folder = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=240, check=False,
    )  # fmt: skip
    assert done.stdout == "all is well\n", done.stderr
    names = sorted(one.name for one in tmp_path.iterdir())
    assert [name for name in names if not name.endswith(PART)] == ["a.safetensors"]
    assert isinstance(load_cached_teacher(tmp_path / "a.safetensors"), CachedTeacher)


def test_one_pass_over_a_generator_is_enough(tmp_path: Path):
    batches = ((x, None) for x in X.split(8))
    cached = cache_teacher(network(), batches, tmp_path / "a")
    assert len(cached) == 22
    assert list(itertools.islice(batches, 1)) == []
