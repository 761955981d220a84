"""What must hold where pruners are known to go wrong: one case, or more, for each known defect.

D-P.. are about the pruner and its callback, D-S.., D-G.. and D-C.. the same defects as of the sparsifier where channels go.
"""

import copy
import pickle
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.all import Callback, SaveModelCallback
from fastai.callback.schedule import Learner
from fastai.data.core import DataLoaders, TfmdDL
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import TensorDataset
from torchvision.models import shufflenet_v2_x0_5
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from fasterai.callbacks.fastai import HoldCallback, PruneCallback, SparsifyCallback
from fasterai.callbacks.plain import attach
from fasterai.core import criteria
from fasterai.core.all import Criteria, Schedule, grad_crit, large_final, sched_cos, wanda
from fasterai.core.schedules import OneShot, agp, cos, lin, one_shot
from fasterai.prune.gradual import GradualPruner
from fasterai.prune.pruner import Pruner
from fasterai.prune.removal import remove
from fasterai.prune.small_files import load_small, save_small
from fasterai.sparse.sparsifier import Sparsifier
from tests.beside import waits_for
from tests.networks import Sloping, perceptron

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))

pytestmark = [
    pytest.mark.filterwarnings("ignore:all scores of"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm"),
]


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


def block(inputs: int, outputs: int, **options) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, **options), nn.BatchNorm2d(outputs), nn.ReLU())


def net(*tail: nn.Module) -> nn.Sequential:
    body = nn.Sequential(block(3, 8), block(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10), *tail)
    for norm in (body[0][1], body[1][1]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
    return body.eval()


def pruned(model, ratio=0.5, context="local", criterion=large_final, x=X, **options):
    return Pruner(model, ratio, context, criterion, example_inputs=x, **options).prune_model(measure=False)


def run(model: nn.Module, *inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(*inputs)


DIRECTIONS = ("weight_v", "weight.original1")


def masked(dense: nn.Module, removal) -> nn.Module:
    """A copy of the dense model with zeros where the plan has nothing left: what the small one must compute.

    A weight norm's lengths are zeroed in place of its directions, which have none where they are zero.
    """
    parameters = dict((twin := copy.deepcopy(dense)).named_parameters())
    with torch.no_grad():
        for (name, d), kept in removal.plan.keep.items():
            if name in parameters and not (d == 0 and name.endswith(DIRECTIONS)):
                gone = sorted(set(range(parameters[name].shape[d])) - set(kept.tolist()))
                parameters[name].index_fill_(d, torch.tensor(gone), 0.0)
    return twin


def computes_the_same(small: nn.Module, dense: nn.Module, removal, *inputs) -> None:
    expected, got = run(masked(dense, removal), *inputs), run(small, *inputs)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- the output stays (D-P1) -------------------------------------------------------------------------------------------


class Ending(nn.Module):
    def __init__(self, ending):
        super().__init__()
        self.body, self.ending = net(), ending

    def forward(self, x):
        return self.ending(self.body(x))


ENDINGS = {
    "log_softmax": (partial(F.log_softmax, dim=1), (4, 10)),
    "sigmoid": (torch.sigmoid, (4, 10)),
    "view": (lambda y: y.view(-1, 2, 5), (4, 2, 5)),
    "scaled": (lambda y: 3 * y, (4, 10)),
    "a branch on the shape": (lambda y: y.relu() if y.shape[1] > 3 else y, (4, 10)),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_classes_stay_whatever_follows_the_last_layer(name):
    """D-P1: of 10 classes 5 were left."""
    ending, shape = ENDINGS[name]
    model = Ending(ending)
    dense = copy.deepcopy(model)
    removal = pruned(model)
    assert removal.removed == {"body.0.0.weight": (8, 4), "body.1.0.weight": (16, 8)}
    assert run(model, X).shape == shape
    computes_the_same(model, dense, removal, X)


def test_a_head_that_is_a_convolution_stays():
    """D-P1: of 21 maps 10 were left."""
    model = nn.Sequential(block(3, 8), nn.Conv2d(8, 21, 1))
    assert pruned(model).removed == {"0.0.weight": (8, 4)}
    assert run(model, X).shape == (4, 21, 8, 8)


def test_ignored_layers_come_on_top_of_what_stays_anyway():
    """D-P1: a list of one's own took the place of the automatic one."""
    model = net()
    assert pruned(model, ignored_layers=[model[0][0]]).removed == {"1.0.weight": (16, 8)}
    assert run(model, X).shape == (4, 10)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (nn.Conv2d(3, 8, 3), TypeError, r"ignored_layers must be several modules or names, got Conv2d.*; pass a list"),
        ("0", TypeError, r"ignored_layers must be several modules or names, got '0'; pass a list"),
        ([nn.Linear(1, 1)], ValueError, r"ignored_layers must be modules of the model or their names, of .*got 'Linear"),
        (["0", "1"], ValueError, r"ignored_layers must leave some channels.*got all layers that make them \(0\.0\.weight"),
    ],
)
def test_ignored_layers_that_are_none_are_named(layers, error, message):
    """D-P1."""
    with pytest.raises(error, match=message):
        Pruner(net(), 0.5, "local", large_final, example_inputs=X, ignored_layers=layers)


def test_a_branch_on_values_keeps_the_classes():
    """D-P1: a branch on values lost half of the classes, with a printed line."""
    model = Ending(lambda y: y * 2 if y.sum() > 0 else y)
    dense = copy.deepcopy(model)
    removal = pruned(model)
    assert removal.removed == {"body.0.0.weight": (8, 4), "body.1.0.weight": (16, 8)}
    assert "recorded from runs" in str(removal)
    for last in (model.body[4], dense.body[4]):
        with torch.no_grad():
            last.bias -= 100.0  # the other way
    computes_the_same(model, dense, removal, X)
    assert (run(model, X) < -50).all()


def test_a_model_that_cannot_be_read_is_refused_with_the_line_and_left_alone():
    """D-P1: neither an export nor a run shows what code does that asks for values and for a gradient."""
    model = Ending(lambda y: y * 2 if y.sum() > 0 else y)
    model.body = Sloping(net())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"model must be one that torch\.export can read.*line \d+ of networks\.py"):
        pruned(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# --- families (D-P2, D-P5, and the list at the head of the section) ----------------------------------------------------


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_grouped_convolutions_lose_the_same_channels_in_each_group(groups):
    """D-P2: an index error. With 8 groups the convolution is depthwise."""
    model = nn.Sequential(block(3, 8), block(8, 8, groups=groups), nn.Conv2d(8, 4, 1)).eval()
    dense = copy.deepcopy(model)
    removal = pruned(model)
    assert (model[1][0].in_channels, model[1][0].out_channels) == (4, 4)
    computes_the_same(model, dense, removal, X)


@pytest.mark.parametrize(("ratio", "heads"), [(0.25, 3), (0.3, 3), (0.5, 2)])
def test_attention_loses_whole_heads(ratio, heads):
    """D-P5: at 0.3 the width was 22 with 4 heads. round(0.3 x 4) = 1 head goes, of 8 dimensions each."""
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    dense, x = copy.deepcopy(model), torch.randn(2, 5, 32)
    removal = pruned(model, ratio, x=x, round_to=1)
    assert removal.removed["self_attn.in_proj_weight"] == (4, heads)
    assert model.self_attn.in_proj_weight.shape == (3 * 8 * heads, 32)
    assert run(model, x).shape == (2, 5, 32)
    computes_the_same(model, dense, removal, x)


class Fused(nn.Module):
    """Attention with one projection for query, key and value."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_fused_projection_beside_ignored_layers():
    """D-P5: a KeyError."""
    model = nn.Sequential(nn.Linear(6, 16), Fused(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    dense, x = copy.deepcopy(model), torch.randn(2, 5, 6)
    removal = pruned(model, x=x, ignored_layers=[model[2]])
    assert removal.removed["1.qkv.weight"] == (4, 2)
    assert model[1].qkv.out_features == 3 * 2 * 4
    assert model[2].out_features == 12
    computes_the_same(model, dense, removal, x)


FAMILIES = {
    "vit": lambda: VisionTransformer(16, 4, 2, 4, 16, 32, num_classes=10),
    "swin": lambda: SwinTransformer([4, 4], 16, [1, 1], [2, 4], [2, 2], num_classes=10, stochastic_depth_prob=0.0),
    "shufflenet": lambda: shufflenet_v2_x0_5(num_classes=10),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_crash_or_hang_elsewhere(name):
    """The head of the section: a ViT failed in its forward pass, a ShuffleNet on a division, a Swin gave no answer."""
    model = FAMILIES[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)  # a ViT's head begins with zeros
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 16 if name == "vit" else 32, 16 if name == "vit" else 32)
    removal = pruned(model, x=x, round_to=1)
    assert removal.removed
    assert run(model, x).shape == (2, 10)
    computes_the_same(model, dense, removal, x)


# --- schedules and the callback (D-P3, D-P4, D-P7) ---------------------------------------------------------------------


def learner(path, model: nn.Module | None = None, data: torch.Tensor | None = None, batches: int = 16) -> Learner:
    g = torch.Generator().manual_seed(1)
    xs = torch.randn(4 * batches, 6, generator=g) if data is None else data
    pairs = TensorDataset(xs, torch.randint(4, (len(xs),), generator=g))
    loaders = [TfmdDL(pairs, bs=4, num_workers=0) for _ in range(2)]
    learn = Learner(DataLoaders(*loaders, device="cpu"), model or mlp(), loss_func=CrossEntropyLossFlat(), path=path)
    if hasattr(learn, "progress"):
        learn.remove_cb(learn.progress)
    learn.logger = lambda log: None
    return learn


def mlp() -> nn.Sequential:
    return perceptron(6, 16, 4)


class Widths(Callback):
    order = 90
    run_valid = False

    def __init__(self):
        self.seen = []

    def after_step(self):
        self.seen.append(self.learn.model[0].out_features)


WINDOWS = {
    # The position is the one after a step: 8 / 16 after the eighth.
    "one_shot": (one_shot, [16] * 7 + [8] * 9),
    # (1 - cos(pi (9/16 - 0.5) / 0.1)) / 2 = 0.69 of the 8 that go, 5.5, after the ninth.
    "cos": (Schedule(sched_cos, 0.5, 0.6), [16] * 8 + [10] + [8] * 7),
    # From 0.2 on, so not in the first three steps.
    "agp": (agp, [16] * 3),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_the_window_of_a_schedule_is_kept(tmp_path, name):
    """D-P3: `one_shot` pruned everything in the first of 16 steps, `agp` began at 0, a cosine's window was not looked at."""
    schedule, expected = WINDOWS[name]
    widths = Widths()
    learn = learner(tmp_path)
    learn.fit(1, cbs=[PruneCallback(0.5, schedule, "local", large_final), widths])
    assert widths.seen[: len(expected)] == expected
    assert learn.model[0].out_features == 8


def test_images_of_one_channel_need_no_example_inputs(tmp_path):
    """D-P4: the callback ran the model on 3 x 224 x 224."""
    model = nn.Sequential(block(1, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    learn = learner(tmp_path, model, torch.randn(16, 1, 5, 5))
    learn.fit(1, cbs=PruneCallback(0.5, lin, "local", large_final))
    assert (model[0][0].out_channels, model[3].in_features) == (4, 4)


def imported_after_a_seed(folder, environment):
    code = "import torch; torch.manual_seed(0); a = torch.rand(3); torch.manual_seed(0); import fasterai.prune.all; "
    code += "raise SystemExit(not torch.equal(a, torch.rand(3)))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False).returncode


@waits_for(imported_after_a_seed)
def test_nothing_is_drawn_at_random_by_an_import(beside):
    """D-P4: `torch.manual_seed` before the import gave other numbers."""
    assert beside(imported_after_a_seed) == 0


def test_pruning_leaves_the_random_generators_where_they_were():
    """D-P4."""
    model = net()
    before = torch.get_rng_state()
    pruned(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_example_inputs_are_asked_for():
    """D-P4: there is no guess."""
    with pytest.raises(ValueError, match=r"example_inputs must be a tensor, .*got None"):
        Pruner(net(), 0.5, "local", large_final)


def test_lr_find_leaves_the_model_as_it_is(tmp_path):
    """D-P7: it failed, and left 12 of 16."""
    learn = learner(tmp_path)
    learn.add_cb(PruneCallback(0.5, lin, "local", large_final))
    before = copy.deepcopy(learn.model.state_dict())
    learn.lr_find(num_it=8, show_plot=False)
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())
    learn.fit(1)
    assert learn.model[0].out_features == 8


class Worsens(Callback):
    """Validation losses of 0.1 after the first epoch, and 0.9 after the second."""

    order = 51  # behind the Recorder

    def after_validate(self):
        self.learn.recorder.log[2] = [0.1, 0.9][self.learn.epoch]


@pytest.mark.parametrize("with_opt", [False, True])
def test_the_best_model_is_put_back_at_the_end(tmp_path, with_opt):
    """D-P7: a size mismatch. The best epoch was before the last removal: what is put back is the best one since."""
    learn = learner(tmp_path)
    learn.fit(2, cbs=[PruneCallback(0.5, lin, "local", large_final), SaveModelCallback(with_opt=with_opt), Worsens()])
    assert learn.model[0].out_features == 8
    saved = torch.load(tmp_path / "models" / "model.pth", weights_only=False)
    assert tuple((saved["model"] if with_opt else saved)["0.weight"].shape) == (8, 6)
    learn.fit(1)


def test_a_second_fit_with_the_same_callback_takes_no_more(tmp_path):
    """D-P7: 16, 8, 4. In the last fit the head is frozen, so that the channels are counted anew."""
    learn, callback = learner(tmp_path), PruneCallback(0.5, lin, "local", large_final)
    widths = []
    for trains in (True, True, False):
        learn.model[2].requires_grad_(trains)
        learn.fit(1, cbs=callback)
        widths.append(learn.model[0].out_features)
    assert widths == [8, 8, 8]


# --- ratios (D-P6) -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:asked to prune")
@pytest.mark.parametrize(
    ("ratio", "left"), [(0.9, (1, 2)), (0.75, (2, 4)), (0.5, (4, 8)), (0.1, (7, 14)), (0.98, (1, 1)), (0.0, (8, 16))]
)
def test_the_ratio_is_met_to_the_channel(ratio, left):
    """D-P6: at 0.9 eight channels stayed eight. round(0.9 x 8) = 7 go, round(0.9 x 16) = 14; one of each layer stays."""
    model = net()
    pruned(model, ratio)
    assert (model[0][0].out_channels, model[1][0].out_channels) == left


def test_nearly_all_says_what_stays_and_all_is_refused():
    """D-P6: nothing happened, silently."""
    model = nn.Sequential(block(3, 8), nn.Conv2d(8, 4, 1))
    with pytest.raises(ValueError, match=r"pruning_ratio must be below 1, got 1.0"):
        pruned(model, 1.0)
    with pytest.warns(UserWarning, match="asked to prune 8 of 8 units, pruned 7"):
        pruned(model, 0.99)


def test_nothing_is_reported_gone_before_it_is(capsys):
    """D-P6: a reduction of 1.81 % before the first call."""
    pruner = Pruner(net(), 0.5, "local", large_final, example_inputs=X)
    pruner.print_sparsity()
    assert capsys.readouterr().out == "0.0.weight: 8 of 8 channels\n1.0.weight: 16 of 16 channels\n"
    pruner.prune_model(measure=False)
    pruner.print_sparsity()
    assert capsys.readouterr().out == "0.0.weight: 4 of 8 channels\n1.0.weight: 8 of 16 channels\n"


# --- criteria (D-P8, D-G11, D-G12, D-S2, D-S6, D-S8, D-S9) -------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in criteria.__all__ if getattr(criteria, n).needs & {"initial", "previous"}])
def test_criteria_with_memory(name):
    """D-P8: an AttributeError. Weights that have not moved tie, and the first ones by position go."""
    model = net()
    pruned(model, criterion=name)
    assert (model[0][0].out_channels, model[1][0].out_channels) == (4, 8)


def test_movement_is_what_was_moved_since_the_pruner_was_made():
    """D-P8: the four channels that moved most towards their sign stay."""
    model = nn.Sequential(nn.Linear(2, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    pruner = Pruner(model, 0.5, "local", "movement", example_inputs=torch.randn(3, 2))
    far = torch.tensor([3.0, 0.0, 1.0, 2.0, 0.0, 0.5, 0.0, 0.0])[:, None]
    with torch.no_grad():
        model[0].weight.add_(model[0].weight.sign() * far)
    kept = model[0].weight.detach()[[0, 2, 3, 5]].clone()
    pruner.prune_model(measure=False)
    assert torch.equal(model[0].weight, kept)


def test_a_dict_needs_the_context_local_in_both():
    """D-P8: one took it with `global`, the other did not."""
    message = r"pruning_ratio must be one number for context Global\(\), got a dict"
    with pytest.raises(ValueError, match=message):
        Pruner(net(), {"0.0": 0.5}, "global", large_final, example_inputs=X)
    with pytest.raises(ValueError, match=message):
        PruneCallback({"0.0": 0.5}, lin, "global", large_final)


def test_activations_need_data_and_are_no_plain_magnitude():
    """D-G11: without data they were magnitude. The inputs of the second channel of each pair are zero."""
    with pytest.raises(ValueError, match="data must be given for a criterion that needs activations"):
        pruned(net(), criterion=wanda)
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 9.0], [2.0, 0.0], [0.0, 8.0]]))
        model[2].weight.fill_(1.0)
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0]])  # rows 1 and 3 are never active
    pruned(model, criterion=wanda, x=x, data=[(x, x)])
    assert model[0].weight.tolist() == [[1.0, 0.0], [2.0, 0.0]]


def test_the_gradient_criterion_works():
    """D-G12: an unexpected keyword. |weight x gradient| is large in the last two of four channels, small in weight."""
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[9.0], [8.0], [1.0], [2.0]]))
        model[1].weight.copy_(torch.tensor([[0.0, 0.001, 1.0, 1.0]]))
    data = [(torch.ones(1, 1), torch.zeros(1, 1))]
    pruned(model, criterion=grad_crit, x=torch.ones(1, 1), data=data, loss=F.mse_loss)
    assert model[0].weight.flatten().tolist() == [1.0, 2.0]


def test_a_misspelt_context_is_refused_at_once():
    """D-G12."""
    with pytest.raises(ValueError, match=r"context must be .*got 'locall'; did you mean 'local'"):
        Pruner(net(), 0.5, "locall", large_final, example_inputs=X)
    with pytest.raises(ValueError, match=r"context must be .*got 'locall'; did you mean 'local'"):
        PruneCallback(0.5, lin, "locall", large_final)


@pytest.mark.parametrize("name", criteria.__all__)
def test_a_callback_with_any_criterion_pickles(name):
    """D-G12: lambdas did not, so that a learner with the callback could not be exported."""
    callback = PruneCallback(0.5, agp, "local", getattr(criteria, name))
    again = pickle.loads(pickle.dumps(callback))
    assert (again.pruning_ratio, again.pruner) == (0.5, None)


def test_ties_are_settled_by_position():
    """D-S2: constant weights lost nothing."""
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.3)
        model[0][1].bias.copy_(torch.arange(8.0))
    pruned(model)
    assert model[0][1].bias.tolist() == [4.0, 5.0, 6.0, 7.0]


def test_scoring_writes_into_no_weight():
    """D-S6: a criterion that gave back its argument shifted the weights."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    for criterion in (Criteria(lambda w: w), Criteria(lambda w: w.sub_(w.min())), lambda w: w.mul_(2)):
        Pruner(model, 0.0, "local", criterion, example_inputs=X).prune_model(measure=False)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_channels_of_half_precision_do_not_tie():
    """D-S8: scores of bfloat16 had 11 values for 512 channels. 1 + i / 1000 is four values in bfloat16."""
    model = nn.Sequential(nn.Linear(100, 8, bias=False), nn.Linear(8, 1, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        for i in range(8):
            model[0].weight[i, :i] = 1.0078125  # the next number after 1
        model[1].weight.fill_(1.0)
    pruned(model, x=torch.ones(1, 100).bfloat16())
    assert [int((row > 1).sum()) for row in model[0].weight] == [4, 5, 6, 7]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_an_error_and_nothing_goes(bad):
    """D-S9."""
    model = net()
    with torch.no_grad():
        model[1][0].weight[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"scores must be finite, got NaN or infinity for"):
        pruned(model)
    assert (model[0][0].out_channels, model[1][0].out_channels) == (8, 16)


# --- rounding and contexts (D-S10, D-S11) ------------------------------------------------------------------------------


def linears(*steepness: float, width: int = 32) -> nn.Sequential:
    """Layers in which channel i weighs `(i + 1) ** steepness`; the weights that read it are all alike."""
    layers, ins = [], 2
    for power in steepness:
        layer = nn.Linear(ins, width, bias=False)
        with torch.no_grad():
            layer.weight.copy_((torch.arange(1.0, width + 1) ** power)[:, None].expand(width, ins))
        layers, ins = [*layers, layer, nn.ReLU()], width
    nn.init.ones_((head := nn.Linear(ins, 2, bias=False)).weight)
    return nn.Sequential(*layers, head)


def widths(model: nn.Sequential) -> list[int]:
    return [m.out_features for m in list(model)[:-1] if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("powers", [(2.0, 1.0, 0.5), (0.5, 2.0, 1.0), (1.0, 0.5, 2.0)])
def test_rounding_in_the_global_context_is_of_each_layer(powers):
    """D-S10: the first layer's threshold took the place of the common one. The kept count of each is rounded up."""

    def kept(**options):
        pruned(model := linears(*powers), 0.5, "global", x=torch.ones(1, 2), **options)
        return widths(model)

    plain, rounded = kept(round_to=1), kept(round_to=8)
    assert sum(plain) == 48
    assert len(set(plain)) == 3
    assert rounded == [-(-n // 8) * 8 for n in plain]


@pytest.mark.parametrize(("width", "left"), [(10, 8), (12, 8), (6, 6)])
def test_rounding_goes_no_further_than_there_are_channels(width, left):
    """D-S10: a rank out of range."""
    model = linears(1.0, width=width)
    pruned(model, 0.5, x=torch.ones(1, 2), round_to=8)
    assert widths(model) == [left]


@pytest.mark.parametrize("scales", [(0.01, 1.0), (1.0, 0.01), (100.0, 0.01)])
def test_a_tiny_layer_is_not_emptied_by_the_global_context(scales):
    """D-S11: one of 64 filters was left of a layer scaled by 0.01. Channels are held against the mean of their own group."""
    model = linears(1.0, 1.0, width=8)
    with torch.no_grad():
        model[0].weight.mul_(scales[0])
        model[2].weight.mul_(scales[1])
        model[4].weight.mul_(scales[1])
    pruned(model, 0.5, "global", x=torch.ones(1, 2))
    assert sum(widths(model)) == 8
    assert min(widths(model)) >= 3


# --- models (D-G4 to D-G9) ---------------------------------------------------------------------------------------------


class Crossed(nn.Module):
    """Registered conv1, conv2, norm1, norm2; conv1 is read by norm2 and conv2 by norm1."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(8, affine=False)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.head(self.norm1(self.conv2(F.relu(self.norm2(self.conv1(x))))))


def test_norms_are_cut_with_what_they_read():
    """D-G4: they were paired by the order of registration; one without a scale failed."""
    model = Crossed().eval()
    dense = copy.deepcopy(model)
    removal = pruned(model)
    assert (model.norm2.num_features, model.norm1.num_features) == (4, 3)
    assert (model.norm2.running_mean.shape, model.norm1.weight.shape) == ((4,), (3,))
    computes_the_same(model, dense, removal, X)


def train(model, steps, *participants, x=X, rate=0.01):
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=0.01)
    model.train()
    with attach(optimizer, *participants, total_steps=steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    model.eval()


@pytest.mark.parametrize("granularity", ["filter", "coupled"])
def test_what_was_silent_at_the_end_of_a_training_goes_without_a_move(granularity):
    """D-G5: pruned filters came back through their batch norms, by 0.025 of the output."""
    model = net()
    sparsifier = Sparsifier(model, granularity, "local", large_final, sparsity=0.5, schedule=OneShot(0.0), example_inputs=X)
    train(model, 8, sparsifier)
    before = run(model, X)
    assert remove(model, X, measure=False).removed == {"0.0.weight": (8, 4), "1.0.weight": (16, 8)}
    assert (run(model, X) - before).abs().max() <= 1e-5 * before.abs().max()


def test_grouped_transposed_convolutions():
    """D-G6: a size mismatch of 8 and 4."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    dense = copy.deepcopy(model)
    removal = pruned(model)
    assert (model[0].out_channels, model[1].out_channels, tuple(model[1].weight.shape)) == (4, 4, (4, 2, 2, 2))
    computes_the_same(model, dense, removal, X)


class Doubled(nn.Module):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, weight):
        return 2 * weight + self.shift


RECOMPUTED = {
    "a mask of torch's own": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "one's own": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Doubled(0.1)),
}
FOLLOWED = {
    "spectral norm": (parametrizations.spectral_norm, "2.parametrizations.weight.original"),
    "old spectral norm": (nn.utils.spectral_norm, "2.weight_orig"),
    "one's own": (
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Doubled(0.0)),
        "2.parametrizations.weight.original",
    ),
}


def recomputing(change) -> nn.Module:
    model = nn.Sequential(block(3, 8), block(8, 6), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    change(model[2])
    run(model, X)  # what is worked out holds no graph of gradients, and can be copied
    return model


@pytest.mark.filterwarnings("ignore:The tensor attribute self.2.weight")
@pytest.mark.parametrize("name", RECOMPUTED)
@pytest.mark.parametrize("criterion", ["large_final", "updating_movement"])
def test_weights_that_are_worked_out_anew_stay_and_others_go(name, criterion):
    """D-G7: masks on them were lost at the next forward pass."""
    model = recomputing(RECOMPUTED[name])
    dense = copy.deepcopy(model)
    removal = pruned(model, criterion=criterion)
    assert removal.removed == {"0.0.weight": (8, 4)}
    assert {name.partition(".")[0] for name, _ in removal.pinned} >= {"2"}
    computes_the_same(model, dense, removal, X)


@pytest.mark.parametrize("name", FOLLOWED)
def test_channels_of_a_weight_that_is_worked_out_channel_by_channel_go(name, tmp_path):
    """D-G7: as above; where what is worked out is zero where the weight is, its own channels go, in training too."""
    change, weight = FOLLOWED[name]
    model, fresh = recomputing(change), recomputing(change)
    dense = copy.deepcopy(model)
    removal = pruned(model)
    assert removal.removed == {"0.0.weight": (8, 4), "1.0.weight": (6, 3), weight: (4, 2)}
    computes_the_same(model, dense, removal, X)
    assert model[2].weight.shape == (2, 3, 1, 1) and (model[2].in_channels, model[2].out_channels) == (3, 2)
    save_small(tmp_path / "small.safetensors", model)
    again = load_small(tmp_path / "small.safetensors", fresh)
    assert torch.equal(run(again, X), run(model, X))
    model(X).sum().backward()
    assert model.train()(X).shape == (*run(model, X).shape,)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:The tensor attribute self.2.weight")
@pytest.mark.parametrize(
    ("change", "length"),
    [(parametrizations.weight_norm, "2.parametrizations.weight.original0"), (nn.utils.weight_norm, "2.weight_g")],
    ids=["new", "old"],
)
@pytest.mark.parametrize("criterion", ["large_final", "updating_movement"])
def test_channels_of_a_weight_norm_go_with_their_lengths(change, length, criterion):
    """D-G7: as above; a weight norm has a length for each channel, which is zero in place of the weight."""
    model = recomputing(change)
    dense = copy.deepcopy(model)
    removal = pruned(model, criterion=criterion)
    assert removal.removed == {"0.0.weight": (8, 4), "1.0.weight": (6, 3), length: (4, 2)}
    computes_the_same(model, dense, removal, X)
    assert model[2].weight.shape == (2, 3, 1, 1)


def test_wrapped_models_are_refused_with_what_to_do():
    """D-G8: nothing was pruned, with a printed line."""
    with pytest.raises(ValueError, match=r"model must be the bare network, got torch\.compile .*prune the module inside"):
        Pruner(torch.compile(net()), 0.5, "local", large_final, example_inputs=X)
    with pytest.raises(ValueError, match=r"model must be the bare network, got torch\.compile"):
        remove(torch.compile(net()), X)


@pytest.mark.parametrize(
    ("ratios", "error", "message"),
    [
        ({"nothing": 0.5}, ValueError, r"pruning_ratio's keys must be .*0\.0\.weight, 1\.0\.weight, got 'nothing'"),
        ({3: 0.5}, TypeError, r"pruning_ratio's keys must be names or modules of the model, got 3 \(int\)"),
        ({nn.Linear(1, 1): 0.5}, TypeError, r"got Linear.* \(Linear\)"),
        ({"0.0": 50}, ValueError, r"pruning_ratio must be in \[0, 1\], got 50; pass 0\.5"),
    ],
)
def test_keys_that_name_no_layer_are_errors(ratios, error, message):
    """D-G8: they were passed over, or printed at every step."""
    with pytest.raises(error, match=message):
        Pruner(net(), ratios, "local", large_final, example_inputs=X)


@pytest.mark.parametrize("by_module", [False, True])
def test_layers_of_a_dict_are_named_or_given(by_module):
    """D-G8, D-P8: only the named layer loses channels."""
    model = net()
    pruned(model, {model[1][0] if by_module else "1.0": 0.25})
    assert (model[0][0].out_channels, model[1][0].out_channels) == (8, 12)


class Tied(nn.Module):
    """A head with the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        y = self.words(x)
        return self.head(y + self.down(F.relu(self.up(y))))


def test_a_tied_weight_is_cut_once_and_stays_tied():
    """D-G9."""
    model, x = Tied().eval(), torch.arange(6).view(2, 3)
    dense = copy.deepcopy(model)
    removal = pruned(model, x=x)
    assert model.head.weight is model.words.weight
    assert tuple(model.words.weight.shape) == (20, 4)
    assert removal.parameters == (20 * 8 + 8 * 16 + 16 + 16 * 8 + 8, 20 * 4 + 4 * 8 + 8 + 8 * 4 + 4)
    computes_the_same(model, dense, removal, x)


# --- a sparsifier and a pruner (D-P9, D-C13) ---------------------------------------------------------------------------


def test_a_pruner_takes_what_a_sparsifier_has_silenced():
    """D-P9: one filter that was not zero went too, and the output moved by 0.026. Those that read the silent ones are large."""
    model = net()
    sparsifier = Sparsifier(model, "filter", "local", large_final, example_inputs=X)
    sparsifier.sparsify_model(0.5)
    with torch.no_grad():
        model[1][0].weight.mul_(torch.where(sparsifier.masks["0.0.weight"].flatten(1).any(1), 1.0, 1000.0)[:, None, None])
    before = run(model, X)
    pruned(model)
    assert (model[0][0].out_channels, model[1][0].out_channels) == (4, 8)
    assert (run(model, X) - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("granularity", ["weight", "row", "coupled"])
def test_both_callbacks_in_one_fit(tmp_path, order, granularity):
    """D-C13: a size mismatch, in either order."""
    learn = learner(tmp_path)
    masks = SparsifyCallback(0.5, granularity, "local", large_final, cos)
    learn.fit(1, cbs=[masks, PruneCallback(0.5, cos, "local", large_final)][::order])
    assert learn.model[0].out_features == 8
    for name, keep in masks.sparsifier.masks.items():
        weight = learn.model.get_parameter(name)
        assert keep.shape == weight.shape
        assert not weight[~keep].any()
    learn.fit(1, cbs=HoldCallback(masks.sparsifier))


def test_masks_that_are_held_follow_a_pruner():
    """D-C13: the masks kept their sizes, and the next step failed with 8 and 16."""
    model = net()
    sparsifier = Sparsifier(model, "weight", "local", large_final)
    sparsifier.sparsify_model(0.5)
    pruned(model)
    train(model, 2, sparsifier.hold())
    masks = sparsifier.masks
    assert {name: tuple(keep.shape) for name, keep in masks.items()}["1.0.weight"] == (8, 4, 3, 3)
    assert all(not model.get_parameter(name)[~keep].any() for name, keep in masks.items())


# --- the life of a run (D-C3 to D-C9), with channels that go -----------------------------------------------------------


def test_an_interrupted_run_leaves_a_model_that_goes_on(tmp_path):
    """D-C3."""

    class Stops(Callback):
        order = 95

        def after_step(self):
            if self.learn.train_iter == 6:
                raise KeyboardInterrupt

    learn, callback = learner(tmp_path), PruneCallback(0.5, lin, "local", large_final)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=[callback, Stops()])
    assert 8 < learn.model[0].out_features < 16
    assert {name for name, _ in learn.model.named_buffers()} == set()
    learn.fit(1, cbs=callback)
    assert learn.model[0].out_features == 8


def test_validation_is_no_run(tmp_path):
    """D-C4."""
    learn = learner(tmp_path)
    learn.add_cb(PruneCallback(0.5, OneShot(0.0), "local", large_final))
    first = learn.validate()
    learn.get_preds()
    assert learn.validate() == first
    assert learn.model[0].out_features == 16


def test_a_frozen_layer_stays_until_it_trains(tmp_path):
    """D-C5: a frozen body was pruned without being trained."""
    learn = learner(tmp_path)
    learn.model[0].requires_grad_(False)
    callback = PruneCallback(0.5, lin, "local", large_final)
    learn.fit(1, cbs=callback)
    assert learn.model[0].out_features == 16
    learn.model[0].requires_grad_(True)
    learn.fit(1, cbs=callback)
    assert learn.model[0].out_features == 8


def test_what_is_gone_stays_gone(tmp_path):
    """D-C6: nothing held the sparsity in a further fit."""
    learn = learner(tmp_path)
    learn.fit(1, cbs=PruneCallback(0.5, lin, "local", large_final))
    learn.fit(1)
    assert learn.model[0].out_features == 8


def test_the_model_gains_no_buffers_and_no_hooks(tmp_path):
    """D-C1, D-C7: buffers stayed in the checkpoint for ever."""
    learn = learner(tmp_path)
    keys = list(learn.model.state_dict())
    learn.fit(1, cbs=PruneCallback(0.5, lin, "local", "updating_movement"))
    assert list(learn.model.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in learn.model.modules())


class Texts(nn.Module):
    """A classifier of texts, of layers without a bias, or without a weight matrix."""

    def __init__(self):
        super().__init__()
        self.words, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 12, batch_first=True)
        self.act, self.head = nn.PReLU(12), nn.Linear(12, 4, bias=False)

    def forward(self, x):
        states, _ = self.lstm(self.words(x))
        return self.head(self.act(states[:, -1]))


def test_a_classifier_of_texts_is_pruned_in_a_plain_loop():
    """D-C9, D-G3: layers without a bias, and an LSTM. Each gate of the LSTM loses the same units."""
    model, x = Texts(), torch.randint(20, (6, 5))
    train(model, 4, GradualPruner(model, 0.5, "local", "large_final", lin, example_inputs=x), x=x)
    assert tuple(model.words.weight.shape) == (20, 4)
    assert model.lstm.hidden_size == 6
    assert tuple(model.lstm.weight_ih_l0.shape) == (4 * 6, 4)
    assert tuple(model.act.weight.shape) == (6,)
    assert run(model, x).shape == (6, 4)
