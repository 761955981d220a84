"""Several processes: two of gloo on this machine, and what one process can show of sharded models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fasterai.callbacks.plain import attach
from fasterai.core import criteria
from fasterai.core.criteria import Criterion, Random
from fasterai.core.loop import Fit, Loop
from fasterai.sparse.dynamic.regrow import SET, RigL
from fasterai.sparse.ranks import _is_users
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.units.rules import DropAndGrow
from tests.beside import Beside, waits_for
from tests.participants import PARTICIPANTS

ROOT = Path(__file__).parents[2]
X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


# --- two processes: what each of them runs ------------------------------------------------------------------------------


def drawn(weight: torch.Tensor) -> torch.Tensor:
    """Scores that differ from process to process."""
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(distributed.get_rank()))


class Counted:
    """Counts the broadcasts of decisions, which go through the name in the module under test; DDP has its own way."""

    def __init__(self) -> None:
        self.calls, self.broadcast = 0, distributed.broadcast

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self.broadcast(*args, **options)


def trained(rank: int, criterion: Any, wrap: bool) -> dict[str, Any]:
    """Train on own data with masks for three steps; gradients are averaged by DDP or by hand."""
    model = net()
    parallel: nn.Module = DistributedDataParallel(model) if wrap else model
    generator = torch.Generator().manual_seed(10 + rank)
    data = [(torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)) for _ in range(3)]
    options: dict[str, Any] = {"data": data[:1], "loss": F.mse_loss, "example_inputs": data[0][0]}
    sparsifier = Sparsifier(parallel, "weight", "global", criterion, sparsity=0.5, schedule="lin", **options)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    counted = distributed.broadcast = Counted()
    with attach(optimizer, sparsifier, total_steps=3):
        for x, y in data:
            optimizer.zero_grad()
            F.mse_loss(parallel(x), y).backward()
            for p in () if wrap else model.parameters():
                distributed.all_reduce(p.grad)
                p.grad /= 2
            optimizer.step()
    distributed.broadcast = counted.broadcast
    return {"masks": sparsifier.masks, "weights": dict(model.named_parameters()), "broadcasts": counted.calls}


def regrown(rank: int) -> dict[str, Any]:
    """Drop and grow weights on own data, whose gradients DDP averages: what grows by them the processes agree on."""
    found = {}
    for method in (RigL, SET):
        parallel = DistributedDataParallel(net())
        run = method(parallel, 0.5, alpha=lambda position: 0.4, dt=1, until=1.0)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.1, momentum=0.9)
        torch.manual_seed(rank)  # the global generator decides nothing
        with attach(optimizer, run, total_steps=3):
            for _ in range(3):
                optimizer.zero_grad()
                F.mse_loss(parallel(torch.randn(4, 5)), torch.randn(4, 3)).backward()
                optimizer.step()
        found[method.__name__] = {"masks": run.masks, "weights": dict(parallel.named_parameters()), "moves": run.moves}
    return found


BARE = ("taylor", "wanda", "grasp", "synflow", "random", "movement", "updating_movement", "large_final")
WRAPPED = ("taylor", "wanda", "large_final", "movement", "random", "drawn")


def criterion_of(name: str) -> Any:
    return drawn if name == "drawn" else name


def features(rank: int) -> dict[str, Any]:
    """Prune at once by activations, which order the four inputs one way here and the other way there."""
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    sparsifier = Sparsifier(model, "weight", "local", "wanda", data=[x.flip(1) if rank else x])
    sparsifier.sparsify_model(0.5)
    return {"weight": model.weight.detach().clone()}


def uneven(rank: int, criterion: Any = "large_final") -> dict[str, Any]:
    """Train two steps here and five there, as `join` allows; the first process is done early."""
    model = net()
    model[1] = nn.Identity()  # batch norms' buffers are no matter of join
    parallel = DistributedDataParallel(model)
    sparsifier = Sparsifier(parallel, "weight", "local", criterion, sparsity=0.5, schedule="lin", loss=F.mse_loss)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
    handle = attach(optimizer, sparsifier, total_steps=5)
    with parallel.join():
        for _ in range(5 if rank else 2):
            optimizer.zero_grad()
            parallel(X).square().mean().backward()
            optimizer.step()
    handle.remove(completed=True)
    return {"masks": sparsifier.masks, "weights": dict(model.named_parameters())}


def uneven_by_movement(rank: int) -> dict[str, Any]:
    """The same by a criterion whose choices depend on when they were made."""
    return uneven(rank, "movement")


def uneven_by_data(rank: int) -> dict[str, Any]:
    """The same by criteria that processes have to agree on."""
    return {name: said(lambda name=name: uneven(rank, criterion_of(name))) for name in ("taylor", "drawn")}


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def by_gradients(gradient: float | None) -> Sparsifier:
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    if gradient is not None:
        model.weight.grad = torch.tensor([[4.0, 3.0, 2.0, 1.0]]) * gradient
    return Sparsifier(model, "weight", "local", "taylor", sparsity=0.5, schedule="lin")


def failing(rank: int) -> dict[str, Any]:
    """Fail in one process alone: the other neither waits nor goes another way."""
    first, second, other = by_gradients(1.0 if rank else None), by_gradients(None if rank else 1.0), by_gradients(1.0)
    found: dict[str, Any] = {"first": said(first.sparsify_model), "second": said(second.sparsify_model)}
    found |= {"first masks": first.masks["weight"], "second masks": second.masks["weight"]}

    def broken(evidence: Any) -> torch.Tensor:
        raise OSError("no such file")

    other.criteria = other._scorer.criterion = Criterion(broken, frozenset({"gradient"})) if rank else criteria.taylor
    found["error of its own"] = said(other.sparsify_model)

    late = by_gradients(1.0 if rank else 0.0)  # all gradients zero: not yet
    loop = Loop([late])
    loop.start(Fit(2))
    moves = []
    for _ in range(2):
        loop.before_step()
        loop.after_step()
        moves.append(late.moves)
        late.model.weight.grad = torch.ones(1, 4)
    loop.end(completed=True)
    return {**found, "moves": moves, "late": late.masks["weight"]}


def sharded(rank: int) -> dict[str, Any]:
    """Hand over models that are sharded over the two processes."""
    found, cpu = {}, torch.device("cpu")
    for original in (False, True):
        model = FullyShardedDataParallel(net(), device_id=cpu, use_orig_params=original)
        found[f"flat {original}"] = said(lambda model=model: Sparsifier(model))
    images = FullyShardedDataParallel(nn.Sequential(nn.Conv2d(3, 4, 3)), device_id=cpu, use_orig_params=True)
    found["images"] = said(lambda: Sparsifier(images))
    found["part"] = said(lambda: Sparsifier(images.module[0]))
    with FullyShardedDataParallel.summon_full_params(images):
        found["summoned"] = said(lambda: Sparsifier(images, "filter"))
    pruned = net()
    sparsifier = Sparsifier(pruned, "weight", sparsity=0.5)
    sparsifier.sparsify_model()
    flat = FullyShardedDataParallel(pruned, device_id=cpu, use_orig_params=True)
    optimizer = torch.optim.SGD(flat.parameters(), 0.1)
    found["later"] = said(lambda: sparsifier.hold(optimizer))
    found["new"] = said(lambda: Sparsifier(fully_shard(net(), mesh=init_device_mesh("cpu", (2,)))))
    return found


#: Participants that train the model, in the table of all.
TOGETHER = ("SRSTE", "STE", "RigL", "SET", "StaticSparse", "ACDC", "STR", "TernaryTraining", "Regularizer, proximal")


def together(rank: int) -> dict[str, Any]:
    """Train each participant with own data under DDP; return what the model shows, and the participant's state."""
    found = {}
    for name in TOGETHER:
        torch.manual_seed(0)
        model = DistributedDataParallel(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        )
        participant = PARTICIPANTS[name](model)
        torch.manual_seed(10 + rank)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        with attach(optimizer, participant, total_steps=4, model=model):
            for _ in range(4):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.randn(8, 8)), torch.arange(8) % 4).backward()
                optimizer.step()
        state = participant.state_dict()
        found[name] = {"shown": dict(model.module.named_parameters()), **{n: v for n, v in state.items() if n in PARTS}}
    return found


#: Parts of states that have to be equal in all processes.
PARTS = ("latent", "keep", "s")


def work(rank: int, folder: str) -> None:
    """Run everything as one of two processes, and write down what came of it."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=200))
    found: dict[str, Any] = {f"bare {name}": trained(rank, criterion_of(name), wrap=False) for name in BARE}
    found |= {f"wrapped {name}": trained(rank, criterion_of(name), wrap=True) for name in WRAPPED}
    more = (features, uneven, uneven_by_movement, failing, sharded, regrown, uneven_by_data, together)
    found |= {one.__name__: one(rank) for one in more}
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # threads of gloo now and then abort an interpreter that shuts down


def found_by_two(folder: Path, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.sparse.test_ranks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


pytestmark = [waits_for(found_by_two)]


@pytest.fixture
def both(beside: Beside) -> list[dict[str, Any]]:
    """The findings of the two processes."""
    return beside(found_by_two)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(x, second[n]) for n, x in first.items())


@pytest.mark.parametrize("run", [*(f"bare {name}" for name in BARE), *(f"wrapped {name}" for name in WRAPPED)])
def test_two_processes_end_with_the_same_masks_and_weights(both, run):
    first, second = (found[run] for found in both)
    assert sum(int((~m).sum()) for m in first["masks"].values()) == 32  # of 40 + 24 weights
    assert same(first["masks"], second["masks"])
    assert same(first["weights"], second["weights"])


@pytest.mark.parametrize("run", [*(f"bare {name}" for name in BARE), *(f"wrapped {name}" for name in WRAPPED)])
def test_only_what_could_differ_is_sent(both, run):
    sent = run.split()[1] in ("taylor", "wanda", "grasp", "synflow", "drawn")
    assert [found[run]["broadcasts"] for found in both] == ([3, 3] if sent else [0, 0])  # one message for each move


@pytest.mark.parametrize("method", ["RigL", "SET"])
def test_two_processes_grow_the_same_weights(both, method):
    first, second = (found["regrown"][method] for found in both)
    assert first["moves"] == second["moves"] == 4
    assert same(first["masks"], second["masks"]) and same(first["weights"], second["weights"])


def test_the_decision_is_that_of_the_first_process(both):
    for found in both:
        assert found["features"]["weight"].tolist() == [[1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("run", ["uneven", "uneven_by_movement"])
def test_a_process_that_is_done_early_does_not_stop_the_others(both, run):
    first, second = (found[run] for found in both)
    assert same(first["weights"], second["weights"])
    assert same(first["masks"], second["masks"])
    assert [int((~m).sum()) for m in first["masks"].values()] == [20, 12]


@pytest.mark.parametrize("criterion", ["taylor", "drawn"])
def test_a_process_that_may_be_done_early_cannot_agree_with_the_others(both, criterion):
    for found in both:
        assert found["uneven_by_data"][criterion].startswith("ValueError: criteria must read weights alone inside of join()")


def test_an_error_of_the_first_process_is_one_of_all(both):
    assert both[0]["failing"]["first"].startswith("ValueError: criteria needs gradients, and weight has none")
    assert both[1]["failing"]["first"].startswith("ValueError: the first process could not choose what is pruned")
    assert all(found["failing"]["first masks"].all() for found in both)


def test_an_error_of_another_process_hangs_none(both):
    for found in both:
        assert found["failing"]["second"] == "nothing"
        assert found["failing"]["second masks"].tolist() == [[True, True, False, False]]
    assert [found["failing"]["error of its own"] for found in both] == ["nothing", "OSError: no such file"]


def test_evidence_that_the_first_process_lacks_is_waited_for_by_all(both):
    for found in both:
        assert found["failing"]["moves"] == [0, 1]
    assert torch.equal(both[0]["failing"]["late"], both[1]["failing"]["late"])


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("flat False", "_fsdp_wrapped_module._flat_param, a flat parameter of FSDP"),
        ("flat True", "_fsdp_wrapped_module.0.weight, a flat parameter of FSDP"),
        ("images", "_fsdp_wrapped_module.0.weight, a flat parameter of FSDP"),
        ("part", "weight, a flat parameter of FSDP"),
        ("later", "0.weight, a flat parameter of FSDP"),
        ("new", "0.weight, a DTensor (Shard(dim=0))"),
    ],
)
def test_sharded_models_are_refused_in_every_process(both, case, what):
    for found in both:
        assert f"model must hold its weights as plain, whole tensors, got {what}; prune before" in found["sharded"][case]


def test_parameters_that_fsdp_has_put_together_for_a_while_are_targets(both):
    assert [found["sharded"]["summoned"] for found in both] == ["nothing", "nothing"]


# --- one process --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def fsdp(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def tensor_parallel(model: nn.Module) -> nn.Module:
    return parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})


def flat(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


SHARD = [
    (fsdp, r"0\.weight, a DTensor \(Shard\(dim=0\)\)"),
    (tensor_parallel, r"0\.weight, a DTensor \(Shard\(dim=0\)\)"),
    (flat, r"\S*, a flat parameter of FSDP"),
]


@pytest.mark.parametrize(("shard", "what"), SHARD)
@pytest.mark.parametrize("options", [{}, {"granularity": "row"}, {"targets": "*0"}, {"granularity": "coupled"}])
def test_a_sharded_model_is_refused_whatever_is_named(one_process, shard, what, options):
    with pytest.raises(ValueError, match=f"got {what}; prune before the model is sharded"):
        Sparsifier(shard(net()), example_inputs=X, **options)


USES: dict[str, Callable[[Sparsifier, torch.optim.Optimizer], object]] = {
    "sparsify_model": lambda s, o: s.sparsify_model(0.7),
    "sparsify_layer": lambda s, o: s.sparsify_layer(s.model[0], 0.7),
    "apply_masks": lambda s, o: s.apply_masks(),
    "finalize": lambda s, o: s.finalize(),
    "hold": lambda s, o: s.hold(o),
    "hold of a participant": lambda s, o: s.hold(),
    "attach": lambda s, o: attach(o, s, total_steps=2),
    "start": lambda s, o: s.on_fit_start(Fit(2, s.model, o)),
}


@pytest.mark.parametrize(("shard", "what"), SHARD)
@pytest.mark.parametrize("use", USES)
def test_a_model_that_was_sharded_after_its_masks_is_refused_before_anything_changes(one_process, shard, what, use):
    model = net()
    sparsifier = Sparsifier(model, "weight", sparsity=0.5)
    sparsifier.sparsify_model()
    masks = sparsifier.masks
    whole = shard(model)
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    before = [p.detach().clone() for p in whole.parameters()]
    with pytest.raises(ValueError, match=f"got {what}; prune before the model is sharded"):
        USES[use](sparsifier, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, whole.parameters(), strict=True))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    kept = sparsifier.state_dict()["keep"] if shard is not flat else sparsifier._record.keep
    assert all(torch.equal(kept[n], m) for n, m in masks.items())


def test_a_hold_that_was_taken_before_the_sharding_is_refused_at_the_start_of_a_run(one_process):
    model = net()
    sparsifier = Sparsifier(model, "weight")
    sparsifier.sparsify_model(0.5)
    hold = sparsifier.hold()
    optimizer = torch.optim.SGD(fsdp(model).parameters(), 0.1)
    with pytest.raises(ValueError, match=r"got 0\.weight, a DTensor"):
        attach(optimizer, hold, total_steps=2)


@pytest.mark.parametrize("granularity", ["filter", "coupled"])
def test_vectors_that_fall_silent_with_a_filter_count_too(one_process, granularity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    sparsifier = Sparsifier(model, granularity, example_inputs=torch.randn(1, 3, 8, 8))
    fsdp(model[1])
    weight = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"got 1\.weight, a DTensor"):
        sparsifier.sparsify_model(0.5)
    assert torch.equal(model[0].weight, weight)


def test_one_process_sends_nothing(one_process, monkeypatch):
    monkeypatch.setattr(distributed, "broadcast", None)
    model = nn.Linear(4, 1, bias=False)
    for one in (model, DistributedDataParallel(model)):
        sparsifier = Sparsifier(one, "weight", "local", "wanda", data=[torch.ones(1, 4)])
        sparsifier.sparsify_model(0.5)
        assert sparsifier.sparsity.overall == 0.5


@pytest.mark.parametrize(
    ("sparsified", "run"),
    [
        (lambda ddp: ddp, lambda ddp: None),
        (torch.compile, lambda ddp: None),
        (lambda ddp: ddp.module, lambda ddp: ddp),
        (lambda ddp: ddp.module[0], lambda ddp: ddp),
        (lambda ddp: ddp.module[0], torch.compile),
        (lambda ddp: ddp.module, lambda ddp: None),
    ],
)
def test_the_group_is_that_of_ddp_and_the_default_one_of_a_bare_model(one_process, monkeypatch, sparsified, run):
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(4, 1, bias=False)), process_group=distributed.new_group([0]))
    decided = torch.tensor([True, False, True, False])
    groups = []

    def broadcast(message, group_src, group):
        groups.append((group_src, group))
        message[1:] = decided

    monkeypatch.setattr(distributed, "broadcast", broadcast)
    monkeypatch.setattr(distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda group: 1)
    sparsifier = Sparsifier(sparsified(ddp), "weight", criteria="wanda", sparsity=0.5, schedule="lin", data=[torch.ones(1, 4)])
    for _ in range(2):  # what belongs to a run ends with it
        sparsifier.on_fit_start(Fit(1, run(ddp)))
        sparsifier.after_step(1.0)
        sparsifier.on_fit_end(completed=True)
        assert torch.equal(next(iter(sparsifier.masks.values()))[0], decided)
        sparsifier.reset()
        decided = ~decided
    bare = sparsified(ddp) is ddp.module and run(ddp) is None
    assert set(groups) == {(0, distributed.group.WORLD if bare else ddp.process_group)}
    assert sparsifier._parallel is None


def test_what_grows_by_data_is_agreed_on_as_well(one_process, monkeypatch):
    groups = []
    monkeypatch.setattr(distributed, "broadcast", lambda message, group_src, group: groups.append(group))
    monkeypatch.setattr(distributed, "get_world_size", lambda group: 2)
    bare = nn.Sequential(nn.Linear(4, 1, bias=False))
    for rule, sends in (("nested", False), (DropAndGrow(), True), (DropAndGrow(grow="random"), False)):
        Sparsifier(bare, "weight", rule=rule).sparsify_model(0.5)
        assert bool(groups) == sends
        groups.clear()


@pytest.mark.parametrize("name", TOGETHER)
def test_participants_show_the_same_and_have_the_same_latent_weights_and_masks(both, name):
    first, second = both[0]["together"][name], both[1]["together"][name]
    assert len(first) == (1 if name.startswith("Regularizer") else 2 + (name in ("SRSTE", "STE", "STR")))
    for part in first:
        assert first[part].keys() == second[part].keys() and first[part]
        assert all(torch.equal(first[part][n], second[part][n]) for n in first[part]), part


@pytest.mark.parametrize("criterion", [getattr(criteria, name) for name in criteria.__all__ if name != "fpgm"])
def test_the_catalogue_is_alike_where_it_reads_weights_alone(criterion):
    assert not _is_users(criterion)


@pytest.mark.parametrize(
    ("criterion", "users"),
    [
        (Random(3), False),
        (criteria.large_final.using(reducer="sum"), False),
        (torch.rand_like, True),
        (criteria.large_final.using(normalizer=torch.sqrt), True),
        (criteria.large_final.using(unit_rule=lambda scores, weights: scores), True),
        (criteria.fpgm, True),
        (criteria.variety("large_final"), True),  # of products that may be summed in another order elsewhere
    ],
)
def test_a_function_of_the_users_may_draw_numbers(criterion, users):
    made = Sparsifier(net(), "row", criteria=criterion).criteria
    assert _is_users(made) is users


if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")  # two imports less
