"""Exports by several threads at a time, of torch's own transformers, and failed ones."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from fasterai.export.program import export_program
from fasterai.graph.channels import channel_graph
from fasterai.model.exporting import exporting
from fasterai.prune.pruner import Pruner
from fasterai.sparse.sparsifier import Sparsifier
from tests.networks import Sloping

MASK = nn.Transformer.generate_square_subsequent_mask(5)
TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, mask=mask))


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.head = nn.Transformer(16, 2, 1, 2, 32, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.transformer(x, y, tgt_mask=mask))


def transformers() -> list[tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    other = torch.zeros(5, 5).masked_fill(torch.eye(5).bool().roll(2, 1), -torch.inf)
    return [
        (Encoder().eval(), (TOKENS, MASK), (TOKENS, other)),
        (Seq2Seq().eval(), (TOKENS, TOKENS.flip(1), MASK), (TOKENS, TOKENS.flip(1), other)),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["encoder", "encoder and decoder"])
def test_a_transformer_with_a_mask_is_pruned_and_masked(which: int) -> None:
    model, inputs, others = transformers()[which]
    pruner = Pruner(model, 0.5, "local", "large_final", example_inputs=inputs)
    removal = pruner.prune_model()
    hidden = [name for name in removal.removed if name.endswith("linear1.weight")]
    assert [removal.removed[name] for name in hidden] == [(32, 16)] * len(hidden) != []
    assert removal.refused == {}
    with torch.no_grad():
        assert torch.isfinite(model(*others)).all()  # what was removed depends on no mask's values
    model, inputs, _ = transformers()[which]
    Sparsifier(model, "coupled", "local", sparsity=0.5, example_inputs=inputs).sparsify_model()


def test_an_exported_transformer_holds_for_other_masks_than_that_of_the_example(tmp_path) -> None:
    model, inputs, others = transformers()[0]
    path = export_program(model, inputs, tmp_path / "net.pt2")
    with torch.no_grad():
        wanted, got = model(*others), torch.export.load(path).module()(*others)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_hints_of_masks_are_followed_and_torch_is_as_before() -> None:
    before = transformer._detect_is_causal_mask, torch.Tensor.as_subclass, sys.stderr
    with exporting():
        assert transformer._detect_is_causal_mask(MASK, None, 5) is False
        assert transformer._detect_is_causal_mask(MASK, True, 5) is True
        assert transformer._detect_is_causal_mask(MASK, False, 5) is False
        there: list[object] = []
        thread = threading.Thread(target=lambda: there.append(transformer._detect_is_causal_mask(MASK, None, 5)))
        thread.start()
        thread.join()
    assert there == [True]  # another thread asks as ever
    assert (transformer._detect_is_causal_mask, torch.Tensor.as_subclass, sys.stderr) == before


def look(model: nn.Module) -> int:
    return len(channel_graph(model, (torch.randn(2, 3, 8, 8),)).groups)


def mask(model: nn.Module) -> int:
    sparsifier = Sparsifier(model, "coupled", "local", sparsity=0.5, example_inputs=torch.randn(2, 3, 8, 8))
    sparsifier.sparsify_model()
    return sum(int((p == 0).all(dim=tuple(range(1, p.dim()))).sum()) for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("act", [look, mask])
def test_threads_do_not_disturb_each_other(act: Callable[[nn.Module], int]) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        convs = [m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
        return nn.Sequential(nn.Conv2d(3, 8, 1), *convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    wanted = act(net())
    models = [net() for _ in range(4)]
    found: list[object] = [None] * len(models)

    def run(i: int) -> None:
        try:
            found[i] = act(models[i])
        except Exception as error:  # threads swallow what they raise
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [wanted] * len(models)


def test_a_failed_export_prints_nothing_and_says_where_and_what_to_do(capfd: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.__stderr__)
    logging.getLogger("torch").addHandler(handler)
    try:
        with pytest.raises(ValueError, match=r"(?s)torch.export can read.*line \d+ of networks.py.*remove branches") as caught:
            channel_graph(Sloping(nn.Linear(3, 3)), (torch.randn(2, 3),))
    finally:
        logging.getLogger("torch").removeHandler(handler)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_other_threads_may_print_while_one_exports(capsys: pytest.CaptureFixture[str]) -> None:
    with exporting():
        print("mine", file=sys.stderr)
        thread = threading.Thread(target=lambda: print("theirs", file=sys.stderr))
        thread.start()
        thread.join()
    print("later", file=sys.stderr)
    assert capsys.readouterr().err == "theirs\nlater\n"
