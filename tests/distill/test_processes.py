"""Two processes of gloo: adapters begin alike, and train with averaged gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fasterai.callbacks.plain import attach
from fasterai.distill.processes import average_, processes_of
from tests.beside import Beside, waits_for
from tests.distill.nets import X, Y, Distance, fitnet, net

ROOT = Path(__file__).parents[2]
STEPS = 3


def student() -> nn.Module:
    """A network without batch norm, whose loss on a whole batch is the mean of those on both halves."""
    model = net()
    model[1] = nn.Identity()
    return model


def trained(model: nn.Module, rank: int | None, wrapped: bool) -> dict[str, Any]:
    """Train on a half of each batch, or on all of it."""
    torch.manual_seed(5 if rank is None else 5 + rank)  # adapters are made from other numbers in each process
    distiller = fitnet(None, Distance())
    parallel: nn.Module = DistributedDataParallel(model) if wrapped else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    rows = slice(None) if rank is None else slice(3 * rank, 3 * rank + 3)
    with attach(optimizer, distiller, total_steps=STEPS, model=parallel) as handle:
        for i in range(STEPS):
            outputs = parallel(X[i][rows])
            loss = handle.loss(F.cross_entropy(outputs, Y[i][rows]), X[i][rows], Y[i][rows], outputs)
            optimizer.zero_grad()
            loss.backward()
            if rank is not None and not wrapped:
                for p in model.parameters():
                    distributed.all_reduce(p.grad)
                    p.grad /= 2
            optimizer.step()
    return {"adapter": distiller.state_dict()["adapters"][0], "student": model.state_dict()}


def joining() -> str:
    parallel = DistributedDataParallel(student())
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    handle = attach(optimizer, fitnet(), total_steps=1, model=parallel)
    try:
        with parallel.join():
            outputs = parallel(X[0])
            handle.loss(F.cross_entropy(outputs, Y[0]), X[0], Y[0], outputs).backward()
    except ValueError as error:
        return str(error)
    finally:
        handle.remove(completed=False)
    return "nothing"


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=200))
    found: dict[str, Any] = {"wrapped": trained(student(), rank, True), "bare": trained(student(), rank, False)}
    found["group"] = processes_of(None) is not None
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # threads of gloo now and then abort an interpreter that shuts down


def found_by_two(folder: Path, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.distill.test_processes", str(folder)]
    done = [subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment, stderr=subprocess.PIPE) for rank in (0, 1)]
    errors = [one.communicate(timeout=400)[1].decode() for one in done]
    assert [one.returncode for one in done] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


pytestmark = [waits_for(found_by_two)]


@pytest.mark.parametrize("run", ["wrapped", "bare"])
def test_two_processes_train_one_adapter(beside: Beside, run):
    first, second = (found[run] for found in beside(found_by_two))
    assert all(torch.equal(x, second["adapter"][n]) for n, x in first["adapter"].items())
    assert all(torch.equal(x, second["student"][n]) for n, x in first["student"].items())
    alone = trained(student(), None, False)  # from the first process's numbers, on all samples
    for name, x in alone["adapter"].items():
        torch.testing.assert_close(first["adapter"][name], x, rtol=1e-4, atol=1e-6)
    for name, x in alone["student"].items():
        torch.testing.assert_close(first["student"][name], x, rtol=1e-4, atol=1e-6)


def test_gradients_are_heard_of_only_among_processes(beside: Beside):
    assert all(found["group"] for found in beside(found_by_two))
    assert processes_of(None) is None and not fitnet().hears("after_backward") and fitnet().hears("after_loss")


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_statistics_are_averaged_with_the_gradients(one_process):
    module = nn.BatchNorm1d(2)
    module.running_mean.copy_(torch.tensor([1.0, 2.0]))
    module.weight.grad = torch.tensor([3.0, 4.0])
    average_([module], distributed.group.WORLD)
    assert module.weight.grad.tolist() == [3.0, 4.0] and module.bias.grad.tolist() == [0.0, 0.0]
    assert module.running_mean.tolist() == [1.0, 2.0] and processes_of(module) is None


def test_processes_that_may_end_early_are_refused(one_process, monkeypatch):
    monkeypatch.setattr("fasterai.distill.distiller.processes_of", lambda model: distributed.group.WORLD)
    assert "loss must need no adapter inside of join()" in joining()


if __name__ == "__main__":
    run_process(int(sys.argv[2]), sys.argv[1])
