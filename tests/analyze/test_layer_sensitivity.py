"""Sensitivity by the names of the public fasterai."""

from __future__ import annotations

import json
import sys

import matplotlib as mpl
import pytest
import torch
from torch import nn

from fasterai.analyze.sensitivity import (
    LayerSensitivity,
    SensitivityAnalyzer,
    SensitivityResult,
    analyze_sensitivity,
    sensitivity,
)

mpl.use("agg")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3))


def size(model):
    """A score that is known: how many weights are not zero."""
    return sum(int((p != 0).sum()) for p in model.parameters())


def test_a_row_for_each_layer_by_hand(capsys):
    model = network()
    result = analyze_sensitivity(model, X, size, compression="sparsity", level=0.25, verbose=False)
    # 216, 288 and 192 weights, of which a quarter goes; 8 + 4 + 3 biases
    assert result.baseline_metric == 711
    rows = [(x.name, x.layer_type, x.params, x.compressed_metric, x.delta) for x in result.layers]
    assert rows == [("0", "Conv2d", 216, 657, 54), ("2", "Conv2d", 288, 639, 72), ("4", "Linear", 192, 663, 48)]
    assert [x.name for x in result.top(2)] == ["2", "0"]
    assert [x.name for x in result.top(1, most_sensitive=False)] == ["4"]
    result.summary(top=1)
    text = capsys.readouterr().out
    assert "sparsity 25% of one layer at a time; accuracy 711 as it is, 3 layers" in text
    assert "most sensitive   2              +72.0000" in text and "least sensitive  4              +48.0000" in text
    assert size(model) == 711
    assert json.loads(json.dumps(result.as_dict()))["layers"][0] == result.layers[0].as_dict()


def test_pandas_is_asked_for_only_where_it_is_needed(monkeypatch):
    result = analyze_sensitivity(network(), X, size, verbose=False)
    pandas = pytest.importorskip("pandas")
    frame = result.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["name", "layer_type", "params", "baseline_metric", "compressed_metric", "delta"]
    assert frame["delta"].tolist() == [x.delta for x in result.layers]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_dataframe needs pandas: pip install pandas; as_dict"):
        result.to_dataframe()


def test_pruning_looks_at_the_channels_that_go_together():
    result = SensitivityAnalyzer(network(), X, lambda m: float(m(X).detach().abs().mean())).analyze(
        "pruning", 0.5, verbose=False
    )
    assert [x.name for x in result.layers] == ["0", "2"]  # the last layer makes the output
    assert result.compression_type == "pruning"


def test_a_sweep_is_one_result_for_each_level():
    results = SensitivityAnalyzer(network(), X, size).sweep(levels=[0.25, 0.5], layers=["0"], verbose=False)
    assert [(r.compression_level, r.layers[0].delta) for r in results] == [(0.25, 54), (0.5, 108)]
    assert [len(r.layers) for r in results] == [1, 1]


def test_shares_for_each_layer_are_those_of_the_measurement():
    model = network()
    result = analyze_sensitivity(model, X, size, level=0.5, verbose=False)
    measured = sensitivity(model, size, sparsities=(0.5,), progress=False)
    assert result.to_layer_targets(model, 0.4, 0.1, 0.8) == measured.to_layer_targets(model, 0.4, 0.1, 0.8)
    with pytest.raises(ValueError, match=r"gamma must be 1, got 1\.5"):
        result.to_layer_targets(model, 0.5, gamma=1.5)
    with pytest.raises(ValueError, match=r"target_pct must be in .*, got 50; pass 0.5 for 50 %"):
        result.to_layer_targets(model, target_pct=50)
    with pytest.raises(ValueError, match="measured must be what sensitivity returned, got None"):
        SensitivityResult("sparsity", 0.5, 1.0, []).to_layer_targets(model)


def test_a_loss_is_better_lower_and_what_is_not_finite_is_worst():
    result = analyze_sensitivity(network(), X, size, level=0.5, higher_is_better=False, metric_name="loss", verbose=False)
    assert [x.delta for x in result.layers] == [-108, -144, -96]
    rows = [LayerSensitivity(n, "Linear", 1, 1.0, 0.0, d) for n, d in (("a", 1.0), ("b", float("nan")), ("c", 2.0))]
    assert [x.name for x in SensitivityResult("sparsity", 0.5, 1.0, rows).top()] == ["b", "c", "a"]


def test_the_picture_has_a_bar_for_each_layer():
    axes = analyze_sensitivity(network(), X, size, level=0.25, verbose=False).plot(figsize=(6, 3))
    assert [bar.get_height() for bar in axes.patches] == [54, 72, 48]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2", "4"]
    assert tuple(axes.figure.get_size_inches()) == (6, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a: a.analyze("quantization", 8),
            "compression must be one of pruning, sparsity, got 'quantization'; there is no quant",
        ),
        (lambda a: a.analyze("prunning"), "got 'prunning'; did you mean 'pruning'"),
        (lambda a: a.analyze(level=50), "level must be in .*, got 50; pass 0.5 for 50 %"),
        (lambda a: a.sweep(levels=[25, 50]), "levels must be in .*, got 25; pass 0.25"),
    ],
)
def test_what_cannot_be_analysed_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call(SensitivityAnalyzer(network(), X, size))
