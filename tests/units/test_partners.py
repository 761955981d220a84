"""What falls silent with a pruned output."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from fasterai.core.granularities import Granularity, Keep, filter, kernel, layer
from fasterai.core.types import Layout
from fasterai.model.norms import Flow, watch
from fasterai.model.targets import Selection, find_targets
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.testing import check_granularity
from fasterai.units.partners import find_partners, kept_outputs, revive_, without_outputs

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def select(model, coarse=True, **options):
    return find_targets(model, fits=lambda t: None, coarse=coarse, **options)


def net():
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, bias=False))


def partners(model, granularity, flow=None, **options):
    return find_partners(model, select(model, **options), granularity, flow)


def test_biases_and_norms_are_partners_of_the_outputs():
    model = net()
    found = partners(model, filter, watch(model, (X,)))
    assert [(p.name, p.target) for p in found] == [("0.bias", "0.weight"), ("1.weight", "0.weight"), ("1.bias", "0.weight")]
    assert [p.parameter for p in found] == [model[0].bias, model[1].weight, model[1].bias]


def test_without_the_data_flow_only_biases_are_known():
    assert [p.name for p in partners(net(), filter)] == ["0.bias"]


def test_a_whole_layer_takes_its_partners_along_and_kernels_do_not():
    model = net()
    flow = watch(model, (X,))
    assert [p.name for p in partners(model, layer, flow)] == ["0.bias", "1.weight", "1.bias"]
    assert partners(model, kernel, flow) == ()


def test_the_root_module_and_attention_have_partners_with_their_names():
    assert [p.name for p in partners(nn.Conv2d(4, 8, 3), filter)] == ["bias"]
    model = nn.MultiheadAttention(4, 2)
    found = partners(model, Keep("out"), targets=["in_proj_weight", "out_proj"])
    assert [(p.name, p.target) for p in found] == [
        ("in_proj_bias", "in_proj_weight"),
        ("out_proj.bias", "out_proj.weight"),
    ]


def test_a_vector_of_another_length_is_no_partner():
    model = nn.Linear(4, 6)
    model.bias = nn.Parameter(torch.ones(1))
    assert partners(model, Keep("out")) == ()


FLOW = Flow({}, frozenset({"3.weight"}))


@pytest.mark.parametrize("granularity", [filter, layer, Keep("out")])
def test_what_makes_the_output_is_left_out_where_outputs_go(granularity):
    selection = without_outputs(select(net()), granularity, FLOW)
    assert [t.name for t in selection.targets] == ["0.weight"]
    assert selection.left_out["3.weight"] == "it makes the model's output"


def test_what_makes_the_output_stays_where_it_was_named_or_is_alone_or_no_output_goes():
    both = ["0.weight", "3.weight"]
    assert [t.name for t in without_outputs(select(net()), kernel, FLOW).targets] == both
    named = select(net(), targets=["0", "3"])
    assert [t.name for t in without_outputs(named, filter, FLOW).targets] == both
    alone = select(nn.Sequential(nn.Conv2d(4, 8, 3)))
    flow = Flow({}, frozenset({"0.weight"}))
    with pytest.warns(UserWarning, match=r"every target makes the model's output \(0\.weight\), so that outputs go silent"):
        assert without_outputs(alone, filter, flow) is alone


@pytest.mark.filterwarnings("error")
def test_no_target_at_all_is_no_reason_to_warn():
    assert without_outputs(Selection(()), filter, FLOW) == Selection(())


def test_what_was_named_and_what_was_left_out_before_is_still_known():
    selection = replace(select(net()), left_out={"1.weight": "a norm"}, named=frozenset({"0.weight"}))
    found = without_outputs(selection, filter, FLOW)
    assert [t.name for t in found.targets] == ["0.weight"]
    assert found.left_out == {"1.weight": "a norm", "3.weight": "it makes the model's output"}
    assert found.named == {"0.weight"}


@dataclass(frozen=True)
class Pairs(Granularity):
    """Two neighbouring outputs of a linear layer."""

    def fits(self, layout: Layout) -> bool:
        return len(layout.shape) == 2 and "out" in layout.axes[0] and layout.shape[0] % 2 == 0

    def unit_shape(self, layout: Layout) -> tuple[int, ...]:
        return (layout.shape[0] // 2, 1)

    def reduce(self, scores: Tensor, layout: Layout, reducer: str = "mean") -> Tensor:
        units = scores.reshape(layout.shape[0] // 2, -1)
        return (units.mean(1) if reducer == "mean" else units.sum(1))[:, None]

    def expand(self, keep: Tensor, layout: Layout) -> Tensor:
        return keep.repeat_interleave(2, 0)

    def drops_outputs(self, layout: Layout) -> bool:
        return True


def test_units_of_several_outputs_take_their_biases_along():
    check_granularity(Pairs(), [select(nn.Linear(3, 6)).targets[0].layout])
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 3, 1, 1, 2, 2])[:, None].expand(6, 3))
        model[0].bias.fill_(1.0)
    sparsifier = Sparsifier(model, Pairs(), targets=["0.weight"], example_inputs=torch.ones(1, 3))
    sparsifier.sparsify_model(1 / 3)
    assert (model[0].weight != 0).any(1).tolist() == [True, True, False, False, True, True]
    assert model[0].bias.tolist() == [1, 1, 0, 0, 1, 1]


def test_kept_outputs_are_in_the_order_of_the_layers_outputs():
    # Two groups of three outputs each: the second group's first output is number 3.
    model = nn.Conv2d(4, 6, 3, groups=2)
    (target,) = select(model).targets
    keep = torch.ones(filter.unit_shape(target.layout), dtype=torch.bool)
    assert keep.shape == (2, 3, 1, 1, 1)
    keep[1, 0] = False
    assert kept_outputs(keep, target, filter).tolist() == [True, True, True, False, True, True]
    (target,) = select(nn.ConvTranspose2d(4, 6, 3, groups=2)).targets
    keep = torch.ones(filter.unit_shape(target.layout), dtype=torch.bool)
    assert keep.shape == (2, 1, 3, 1, 1)
    keep[1, 0, 0] = False
    assert kept_outputs(keep, target, filter).tolist() == [True, True, True, False, True, True]
    assert kept_outputs(torch.zeros(1, 1, 1, 1, 1, dtype=torch.bool), target, layer).tolist() == [False] * 6


def mask(*flags):
    return torch.tensor(flags, dtype=torch.bool)


def test_partners_are_noted_when_outputs_go_and_given_back_when_they_return():
    model = net()
    scale = next(p for p in partners(model, filter, watch(model, (X,))) if p.name == "1.weight")
    with torch.no_grad():
        scale.parameter.copy_(torch.arange(8.0) + 2)
    everything, some = mask(*[True] * 8), mask(False, True, True, False, True, True, True, True)
    noted = {}
    revive_(iter([("1.weight", scale.parameter, everything, some)]), noted)
    assert noted["1.weight"][[0, 3]].tolist() == [2.0, 5.0]
    with torch.no_grad():
        scale.parameter.mul_(some).add_(some * 10.0)  # masked, and the others have trained on
    back = mask(True, True, True, False, True, True, True, True)
    revive_(iter([("1.weight", scale.parameter, some, back)]), noted)
    assert scale.parameter.tolist() == [2.0, 13.0, 14.0, 0.0, 16.0, 17.0, 18.0, 19.0]
    revive_(iter([("1.weight", scale.parameter, back, everything)]), noted)
    assert scale.parameter.tolist() == [2.0, 13.0, 14.0, 5.0, 16.0, 17.0, 18.0, 19.0]


class Sliced(nn.Module):
    """The first four of eight filters, and a norm of four."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(torch.conv2d(x, self.conv.weight[:4])).relu()


def test_a_norm_of_a_part_of_the_outputs_is_no_partner():
    model = Sliced()
    flow = watch(model, (X,))
    assert dict(flow.norms) == {"conv.weight": (("norm.weight", "norm.bias"),)}
    assert partners(model, filter, flow) == ()
