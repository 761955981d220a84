"""Every public class is one readable line in a notebook, and what has a table is shown as one, with the same cells."""

from __future__ import annotations

import importlib
import inspect
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import fasterai
import fasterai.all as everything
from fasterai.callbacks.plain import attach
from fasterai.core.contexts import PerTarget
from fasterai.core.schedules import Custom, Phases, Position
from fasterai.display import Brief, Shown, Table, brief, one_line, settings
from fasterai.distill.losses.given import known_losses
from fasterai.distill.routes.hardness import Greedy
from fasterai.distill.routes.recorder import RouteRecorder
from fasterai.distill.routes.result import RouteResult, Stage
from fasterai.distill.routes.route import Route
from fasterai.graph.inputs import InputCut

STARS = [
    importlib.import_module(f"fasterai.{name}")
    for name in ("all", "analyze.all", "core.all", "export.all", "misc.all", "prune.all", "regularize.all", "sparse.all")
]
X, Y = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
#: Classes that hold functions or stand for several things, and are never made.
NEVER_MADE = {
    "DecoupledKD": "a name of DKD",
    "Granularities": "names of values",
    "Normalizer": "names of functions",
    "Reducer": "names of functions",
    "Schedule": "an interface",
    "Teacher": "an interface",
}


def public_classes() -> dict[str, type]:
    """The classes of all stars and of the package, those importable by name included."""
    found = {}
    for module in [*STARS, fasterai]:
        for name in {*module.__all__, *dir(module)}:
            value = getattr(module, name)
            if inspect.isclass(value) and value.__module__.startswith("fasterai"):
                found[value.__name__] = value
    return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def accuracy(model: nn.Module) -> float:
    return float((model(X).argmax(1) == Y).float().mean())


def exported(folder: Path) -> Any:
    pytest.importorskip("onnxruntime")
    return everything.ONNXModel(everything.export_onnx(nn.Linear(2, 2), torch.zeros(2, 2), folder / "a.onnx"))


def sparsifier() -> Any:
    made = everything.Sparsifier(net(), "filter", "local", "large_final", sparsity=0.5, example_inputs=X)
    made.sparsify_model()
    return made


def ticket() -> Any:
    return everything.Ticket.of(sparsifier(), net().state_dict(), note="a word")


def route() -> Any:
    return Route.from_checkpoints([net(), net()])


def ternary_report() -> Any:
    layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    return everything.find_ternary(layers, example_inputs=torch.zeros(1, 4))


def compared(latency: bool) -> Any:
    from fasterai.analyze.comparison import compare

    return compare({"dense": net(), "again": net()}, X, latency=latency, min_run_time=0.01)


def removal() -> Any:
    return everything.Pruner(net(), 0.5, "local", "large_final", example_inputs=X, round_to=1).prune_model()


def induced() -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return everything.induce(network, torch.randn(4, 6), 0.5, names=list("abcdef"))


def searched() -> Any:
    return everything.search_from_scratch(net(), [(X, Y)], everything.Budget(macs=0.5), epochs=1)


def graph() -> Any:
    return everything.channel_graph(net(), (X,))


def mixture() -> Any:
    from fasterai.study.mixtures import BlendedMixture

    return everything.expert_graph(BlendedMixture(4, 2, experts=3, hidden=4), (torch.randn(5, 4),))


def folder_of(model: nn.Module, folder: Any) -> Any:
    folder.fold(model) if hasattr(folder, "fold") else folder.decompose(model, 0.8)
    return folder


def a_function(start: float, end: float, pos: float) -> float:
    return pos


def flips() -> Any:
    masks = {"head.weight": torch.tensor([True, False, True, False])}
    return everything.sad(masks, {name: ~mask for name, mask in masks.items()})


def semi_structured() -> Any:
    from fasterai.sparse.nm.semi_structured import SemiLayer, SemiStructured

    return SemiStructured(net(), (SemiLayer("head", 2e-3, 1e-3), SemiLayer("body", kept_dense="no faster")))


def trained(participant: Any) -> Any:
    optimizer = torch.optim.SGD(participant.sparsifier.model.parameters(), 0.1)
    return attach(optimizer, participant.sparsifier, participant, total_steps=10)


def gradual() -> Any:
    model = net()
    pruner = everything.GradualPruner(model, 0.5, "local", "large_final", "agp", example_inputs=X, round_to=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attach(optimizer, pruner, total_steps=2):
        for _ in range(2):
            model(X).sum().backward()
            optimizer.step()
    return pruner


def sensitivity() -> Any:
    from fasterai.analyze.sensitivity import sensitivity

    return sensitivity(net(), accuracy, granularity="weight", sparsities=(0.5, 0.9), progress=False)


def by_layers(call: str | None) -> Any:
    analyzer = everything.SensitivityAnalyzer(net(), X, accuracy)
    return analyzer if call is None else analyzer.analyze(verbose=False)


#: Class -> how to make one of it.
MADE = {
    "ACDC": lambda _: everything.ACDC(net(), 0.5),
    "ACDCCallback": lambda _: everything.ACDCCallback(0.5, context="erk"),
    "AGP": lambda _: everything.AGP(),
    "Alternating": lambda _: everything.Alternating(dense=0.2),
    "BN_Folder": lambda _: folder_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), everything.BN_Folder()),
    "Block": lambda _: fasterai.Block(4, 4),
    "Budget": lambda _: everything.Budget(latency=0.5, batch=8),
    "CachedTeacher": lambda folder: everything.cache_teacher(net(), (X, Y), folder / "a.safetensors", top_k=2),
    "ChannelGraph": lambda _: graph(),
    "Comparison": lambda _: compared(latency=True),
    "Conv_Decomposer": lambda _: folder_of(nn.Sequential(nn.Conv2d(8, 8, 3)), everything.Conv_Decomposer()),
    "ConvolutionReport": lambda _: folder_of(nn.Sequential(nn.Conv2d(8, 8, 3)), everything.Conv_Decomposer()).report,
    "Cosine": lambda _: everything.Cosine(),
    "Cost": lambda _: compared(latency=False).costs["dense"],
    "Coupled": lambda _: everything.Coupled("mean", relative=False),
    "Criterion": lambda _: everything.Criterion(
        lambda e: e.weight, needs={"gradient", "initial", "previous"}, normalizer=torch.abs, unit_rule=lambda s, w: s
    ),
    "DSD": lambda _: everything.DSD(),
    "DecompositionReport": lambda _: folder_of(nn.Sequential(nn.Linear(8, 8)), everything.FC_Decomposer()).report,
    "Distiller": lambda _: everything.Distiller(net(), ["SoftTarget", "FitNet"], ["conv"], ["conv"], schedule="cos"),
    "EMATeacher": lambda _: everything.EMATeacher(0.99),
    "ExpertGraph": lambda _: mixture(),
    "FC_Decomposer": lambda _: folder_of(nn.Sequential(nn.Linear(8, 8)), everything.FC_Decomposer()),
    "Features": lambda _: everything.Features({"x": 1}, keep={"x": [0, 3]}),
    "FoldReport": lambda _: everything.find_folds(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()),
    "FromScratch": lambda _: searched(),
    "GradualPruner": lambda _: gradual(),
    "Greedy": lambda _: Greedy(0.8, [X]),
    "GroupLasso": lambda _: everything.GroupLasso(scaled=False),
    "Growing": lambda _: everything.Growing(alpha=2),
    "L1": lambda _: everything.L1(),
    "Slimming": lambda _: everything.Slimming(),
    "RegularizeCallback": lambda _: everything.RegularizeCallback(["large_final", "squared_final"], "weight", 1e-3),
    "Regularizer": lambda _: everything.Regularizer(net(), ["large_final", "squared_final"], ["weight", "filter"]),
    "Group": lambda _: graph().groups[0],
    "HoldCallback": lambda _: everything.HoldCallback(sparsifier()),
    "InputCut": lambda _: InputCut("x", 1, tuple(range(500)), 1000),
    "Induced": lambda _: induced(),
    "InputSelector": lambda _: everything.InputSelector(range(0, 500, 2), 500),
    "Iterative": lambda _: everything.Iterative(),
    "Keep": lambda _: fasterai.Keep("expert", "out", "in", "depth", "height", "width"),
    "KnowledgeDistillationCallback": lambda _: everything.KnowledgeDistillationCallback(net(), everything.SoftTarget),
    "Latency": lambda _: compared(latency=True).latency.models["again"],
    "LatencyComparison": lambda _: compared(latency=True).latency,
    "Linear": lambda _: importlib.import_module("fasterai.core.all").Linear(),
    "LotteryTicket": lambda _: everything.LotteryTicket(sparsifier(), reset_end=True),
    "NM": lambda _: everything.NM(),
    "NetworkTeacher": lambda _: everything.NetworkTeacher(net()),
    "ONNXModel": exported,
    "OneCycle": lambda _: everything.OneCycle(),
    "OneShot": lambda _: everything.OneShot(),
    "ParticipantCallback": lambda _: everything.ParticipantCallback(sparsifier()),
    "Piecewise": lambda _: everything.Piecewise([(i / 50, i / 50) for i in range(51)]),
    "PixelMask": lambda _: everything.PixelMask(8, 8),
    "Plan": lambda _: removal().plan,
    "PruneCallback": lambda _: everything.PruneCallback(0.5, "agp", "local", "large_final"),
    "Pruner": lambda _: everything.Pruner(net(), 0.5, "local", "large_final", example_inputs=X),
    "Removal": lambda _: removal(),
    "LayerSensitivity": lambda _: by_layers("analyze").layers[0],
    "RigL": lambda _: everything.RigL(net(), 0.5),
    "RigLCallback": lambda _: everything.RigLCallback(0.5, dt=10, distribution="uniform"),
    "Route": lambda _: route(),
    "RouteRecorder": lambda folder: RouteRecorder(folder, every=2),
    "RouteResult": lambda _: RouteResult((Stage(0, 0.5, (0.1, 0.2)), Stage(1, 0.6, (0.1,))), ("first.pt", "last.pt")),
    "SET": lambda _: everything.SET(net(), 0.5),
    "SETCallback": lambda _: everything.SETCallback(0.5),
    "STR": lambda _: everything.STR(net()),
    "STRCallback": lambda _: everything.STRCallback(decay=0.01),
    "Sensitivity": lambda _: sensitivity(),
    "SensitivityAnalyzer": lambda _: by_layers(None),
    "SensitivityResult": lambda _: by_layers("analyze"),
    "SeveralTeachers": lambda _: everything.SeveralTeachers([net(), net()]),
    "SAD": lambda _: flips(),
    "SRSTE": lambda _: everything.SRSTE(net(), 2, 4, skip=True),
    "SRSTECallback": lambda _: everything.SRSTECallback(1, 4, schedule="agp"),
    "STE": lambda _: everything.STE(net(), 2, 4, skip=True),
    "STECallback": lambda _: everything.STECallback(2, 8),
    "SemiStructured": lambda _: semi_structured(),
    "Sparsifier": lambda _: sparsifier(),
    "TernarizeCallback": lambda _: everything.TernarizeCallback(8, rule="threshold"),
    "TernaryLayer": lambda _: ternary_report().layers["1.weight"],
    "TernaryReport": lambda _: ternary_report(),
    "TernaryTraining": lambda _: everything.TernaryTraining(net(), targets="head"),
    "StaticCallback": lambda _: everything.StaticCallback(0.5),
    "StaticSparse": lambda _: everything.StaticSparse(net(), 0.5),
    "Ticket": lambda _: ticket(),
    "SparsifyCallback": lambda _: everything.SparsifyCallback({"*": 0.5}, "filter", "local", lambda w: w, "agp"),
}
MADE |= {name: (lambda _, kind=kind: kind()) for name, kind in known_losses().items()}
#: What calls return besides, and what users make without its class.
OTHERS = {
    "Custom": lambda _: fasterai.Schedule(a_function),
    "Handle": lambda _: trained(everything.LotteryTicket(sparsifier())),
    "Hold": lambda _: sparsifier().hold(),
    "LayerComparison": lambda _: compared(latency=True).layers(),
    "LayerCost": lambda _: compared(latency=False).costs["dense"].layers[0],
    "LayerRow": lambda _: compared(latency=False).layers().rows[0],
    "Measurement": lambda _: removal().measurement,
    "PerTarget": lambda _: PerTarget({f"layer{i}.weight": 0.1 for i in range(50)}),
    "Phases": lambda _: Phases((Custom(a_function),) * 9),
    "Position": lambda _: Position(lambda position: position),
    "Reached": lambda _: sparsifier().sparsity,
    "Row": lambda _: sparsifier().report().rows[0],
    "RouteTeacher": lambda _: route().one_stage(),
    "SparsityReport": lambda _: sparsifier().report(),
    "Stage": lambda _: Stage(0, 0.5, (0.1,) * 9),
    "TicketHold": lambda _: ticket().apply(net()),
    "Place": lambda _: ticket().units[0].places[0],
    "Units": lambda _: ticket().units[0],
    "Timing": lambda _: compared(latency=True).latency.models["again"].timings[0],
}
WITH_TABLES = {
    *(
        "BN_Folder",
        "Budget",
        "CachedTeacher",
        "Distiller",
        "ChannelGraph",
        "Comparison",
        "Conv_Decomposer",
        "ConvolutionReport",
        "Cost",
        "DecompositionReport",
        "ExpertGraph",
        "FC_Decomposer",
        "Features",
        "FoldReport",
        "FromScratch",
    ),
    *(
        "GradualPruner",
        "Group",
        "Induced",
        "InputCut",
        "InputSelector",
        "Latency",
        "LatencyComparison",
        "LayerComparison",
        "LotteryTicket",
        "Plan",
        "Pruner",
        "Reached",
    ),
    *("Regularizer", "Removal", "Route", "RouteRecorder", "RouteResult", "Sensitivity", "SensitivityResult", "Sparsifier"),
    *("SAD", "SRSTE", "STE", "SemiStructured", "SparsityReport", "TernaryReport", "Ticket"),
    *("ACDC", "RigL", "SET", "STR", "StaticSparse"),
}


def test_every_public_class_has_one_here() -> None:
    assert set(public_classes()) == set(MADE) | set(NEVER_MADE)


def complaints(value: object) -> list[str]:
    """What is wrong with a value's `repr`."""
    text = repr(value)
    found = [] if len(text) <= 120 else [f"{len(text)} characters"]
    found += ["several lines"] if "\n" in text else []
    return found + (["an address"] if re.search(r"\b0x[0-9a-f]{4}", text) else [])


@pytest.mark.parametrize("name", [*MADE, *OTHERS])
def test_it_is_one_line_and_its_tables_have_the_cells_of_the_text(name: str, tmp_path: Path) -> None:
    value = (MADE | OTHERS)[name](tmp_path)
    assert type(value).__name__ == name
    assert not complaints(value), repr(value)
    assert hasattr(value, "_repr_html_") == (name in WITH_TABLES)
    if name in WITH_TABLES:
        text, rows = repr(value) if name == "Budget" else str(value), cells(value._repr_html_())
        assert rows
        lost = [cell for row in rows[name in NEW_HEADS :] for cell in row if cell not in text]
        assert not lost, text


#: Whose text has sentences where the table has columns, so that only the table has heads.
NEW_HEADS = {
    "Budget",
    "FoldReport",
    "BN_Folder",
    "DecompositionReport",
    "FC_Decomposer",
    "Conv_Decomposer",
    "ConvolutionReport",
    "Plan",
    "Removal",
}


class Cells(HTMLParser):
    """Reads the cells of all tables, row by row, and the text beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.beside: list[str] = []
        self._is_cell = False

    def handle_starttag(self, tag: str, _: Any) -> None:
        self._is_cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        if self._is_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = self._is_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.rows[-1][-1] += data
        else:
            self.beside.append(data)


def cells(html: str) -> list[list[str]]:
    """The cells of a page part's tables, after a check that every tag of it is closed."""
    ElementTree.fromstring(html)
    reader = Cells()
    reader.feed(html)
    return reader.rows


@pytest.mark.parametrize("name", sorted({name for star in [*STARS, fasterai] for name in star.__all__}))
def test_values_are_one_line(name: str) -> None:
    value = next(getattr(star, name) for star in [*STARS, fasterai] if name in star.__all__)
    if not inspect.isclass(value) and not inspect.isroutine(value) and not isinstance(value, ModuleType | tuple):
        assert not complaints(value), repr(value)


def test_large_things_are_one_line_and_few_rows() -> None:
    import torchvision

    found = everything.channel_graph(torchvision.models.resnet18().eval(), (torch.zeros(1, 3, 32, 32),))
    assert repr(found).startswith("<ChannelGraph: ")
    assert not complaints(found) and not [group for group in found.groups if complaints(group)]
    assert len(str(found).splitlines()) < 60


class Three(Shown):
    def _line(self) -> str:
        return "<Three: a\nb>"

    def _parts(self) -> Any:
        yield "before <b>"
        yield Table(("name", "n"), [("a<i>", "1"), ("all", "1")], foot=1)
        yield ""
        yield Table(("what",), [("one",)], text=["one thing"])


def test_the_three_ways_to_see_a_value() -> None:
    value = Three()
    assert repr(value) == "<Three: a b>"
    assert str(value).splitlines() == ["before <b>", "name  n", "-------", "a<i>  1", "-------", "all   1", "", "one thing"]
    html = value._repr_html_()
    assert html.startswith("<div><div>before &lt;b&gt;</div><table><thead>")
    assert "<i>" not in html and "<b>" not in html
    assert cells(html) == [["name", "n"], ["a<i>", "1"], ["all", "1"], ["what"], ["one"]]
    assert html.count("<tfoot>") == 1


def test_long_lines_are_cut() -> None:
    assert one_line("x" * 120) == "x" * 120
    assert one_line("x" * 121) == "x" * 116 + " ..."
    assert one_line(" a\n b ") == "a b"


def test_values_are_described_without_addresses() -> None:
    assert brief(torch.zeros(2, 3)) == "Tensor(2, 3)"
    assert brief({"a": torch.zeros(2)}) == "{'a': Tensor(2)}"
    assert brief(("a", 1)) == "('a', 1)" and brief((1,)) == "(1,)" and brief([1, 2]) == "[1, 2]"
    assert brief(range(9)) == "range(0, 9)" and brief(tuple(range(9))) == "9 items"
    assert brief(a_function) == "a_function" and brief(object()) == "object" and brief(nn.ReLU()) == "ReLU()"
    assert brief(Net()) == "Net"
    assert settings({"a": "text", "b": [1]}).lines() == ["setting  value", "--------------", "a        text", "b        [1]"]


def test_brief_dataclasses_tell_their_fields() -> None:
    assert repr(Custom(a_function)).startswith("Custom(sched_func=a_function, start_pct=0.0")
    assert isinstance(Custom(a_function), Brief)


def test_callbacks_of_all_frameworks_tell_their_settings() -> None:
    for framework, module in (("lightning", "lightning"), ("huggingface", "transformers")):
        pytest.importorskip(module)
        callbacks = importlib.import_module(f"fasterai.callbacks.{framework}")
        made = callbacks.SparsifyCallback(0.5, "filter", "local", "large_final", "agp")
        assert repr(made) == "<SparsifyCallback: 0.5 pruned; filter, local, large_final>"
        assert repr(callbacks.ParticipantCallback(sparsifier())) == "<ParticipantCallback(Sparsifier)>"
