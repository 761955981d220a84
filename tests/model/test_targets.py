from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fasterai.core.types import Layout
from fasterai.model.layouts import by_dimensions, read_module, register_axes
from fasterai.model.targets import all_targets, find_targets, match, resolve
from fasterai.sparse.sparsifier import Sparsifier


class Mixed(nn.Module):
    """One of each kind, with a raw parameter and stacked experts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.rnn = nn.GRU(4, 5)
        self.experts = nn.Parameter(torch.zeros(2, 5, 4))
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(5, 3)


def find(model, *, coarse=False, fits=lambda t: None, **options):
    return find_targets(model, fits=fits, coarse=coarse, **options)


def names(model, **options):
    return [t.name for t in find(model, **options).targets]


def axes(layout: Layout) -> list[str]:
    return ["+".join(sorted(a)) for a in layout.axes]


def layout_of(module, name="weight"):
    return read_module(module).layouts[name]


# --- how dimensions are read ---


@pytest.mark.parametrize(
    ("module", "name", "shape", "read"),
    [
        (nn.Linear(4, 8), "weight", (8, 4), ["out", "in"]),
        (nn.Conv1d(4, 8, 3), "weight", (8, 4, 3), ["out", "in", "width"]),
        (nn.Conv2d(4, 8, (3, 5)), "weight", (8, 4, 3, 5), ["out", "in", "height", "width"]),
        (nn.Conv3d(4, 8, (1, 3, 5)), "weight", (8, 4, 1, 3, 5), ["out", "in", "depth", "height", "width"]),
        (nn.ConvTranspose1d(4, 8, 3), "weight", (4, 8, 3), ["in", "out", "width"]),
        (nn.ConvTranspose2d(4, 8, 3), "weight", (4, 8, 3, 3), ["in", "out", "height", "width"]),
        (nn.ConvTranspose3d(4, 8, 3), "weight", (4, 8, 3, 3, 3), ["in", "out", "depth", "height", "width"]),
        (nn.Conv2d(6, 8, 3, groups=2), "weight", (2, 4, 3, 3, 3), ["in+out", "out", "in", "height", "width"]),
        (nn.Conv1d(6, 6, 3, groups=6), "weight", (6, 1, 1, 3), ["in+out", "out", "in", "width"]),
        (nn.ConvTranspose2d(6, 8, 3, groups=2), "weight", (2, 3, 4, 3, 3), ["in+out", "in", "out", "height", "width"]),
        (nn.Embedding(7, 4), "weight", (7, 4), ["in", "out"]),
        (nn.EmbeddingBag(7, 4), "weight", (7, 4), ["in", "out"]),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", (12, 4), ["out", "in"]),
        (nn.MultiheadAttention(4, 2, kdim=3), "k_proj_weight", (4, 3), ["out", "in"]),
        (nn.LSTM(4, 5), "weight_ih_l0", (20, 4), ["out", "in"]),
        (nn.LSTM(4, 5, proj_size=2), "weight_hr_l0", (2, 5), ["out", "in"]),
        (nn.GRUCell(4, 5), "weight_hh", (15, 5), ["out", "in"]),
        (nn.Bilinear(3, 4, 5), "weight", (5, 3, 4), ["out", "in", "in"]),
    ],
)
def test_modules_are_read(module, name, shape, read):
    layout = layout_of(module, name)
    assert layout.shape == shape
    assert axes(layout) == read
    module._parameters[name].view(shape)  # the view is valid


def test_a_grouped_view_puts_each_output_where_its_group_is():
    conv = nn.Conv2d(6, 8, 1, groups=2)
    view = conv.weight.view(layout_of(conv).shape)
    assert torch.equal(view[1, 2, 0], conv.weight[4 + 2, 0])
    transposed = nn.ConvTranspose2d(6, 8, 1, groups=2)
    view = transposed.weight.view(layout_of(transposed).shape)
    assert torch.equal(view[1, 2, 3], transposed.weight[3 + 2, 3])


@pytest.mark.parametrize(
    ("shape", "read"),
    [
        ((3,), ["out"]),
        ((3, 4), ["out", "in"]),
        ((2, 3, 4), ["expert", "out", "in"]),
        ((3, 4, 5, 6), ["out", "in", "height", "width"]),
        ((3, 4, 5, 6, 7), ["out", "in", "depth", "height", "width"]),
    ],
)
def test_raw_parameters_are_read_by_their_dimensions(shape, read):
    assert axes(by_dimensions(shape)) == read


@pytest.mark.parametrize("shape", [(), (1, 2, 3, 4, 5, 6)])
def test_other_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match="a target must have 1 to 5 dimensions, got shape"):
        by_dimensions(shape)


# --- kinds ---


def test_every_parameter_with_its_kind():
    assert {t.name: t.kind for t in all_targets(Mixed())} == {
        "experts": "other",
        "embedding.weight": "embedding",
        "conv.0.weight": "convolution",
        "conv.0.bias": "other",
        "conv.1.weight": "other",
        "conv.1.bias": "other",
        "attention.in_proj_weight": "attention",
        "attention.in_proj_bias": "other",
        "attention.out_proj.weight": "linear",
        "attention.out_proj.bias": "other",
        "rnn.weight_ih_l0": "recurrent",
        "rnn.weight_hh_l0": "recurrent",
        "rnn.bias_ih_l0": "other",
        "rnn.bias_hh_l0": "other",
        "head.weight": "linear",
        "head.bias": "other",
    }


def test_targets_stand_in_the_order_of_the_parameters():
    model = Mixed()
    order = [n for n, p in model.named_parameters() if p.dim()]
    assert [t.name for t in all_targets(model)] == order


# --- default targets ---

FINE = [
    "conv.0.weight",
    "attention.in_proj_weight",
    "rnn.weight_ih_l0",
    "rnn.weight_hh_l0",
    "attention.out_proj.weight",
    "head.weight",
]


def test_the_default_at_weight_is_every_known_weight_and_the_rest_says_why_not():
    selection = find(Mixed())
    assert {t.name for t in selection.targets} == set(FINE)
    assert selection.left_out == {
        "experts": "raw parameters only when named in targets=",
        "embedding.weight": "embeddings only when named in targets=",
    }
    assert selection.named == frozenset()


def test_the_default_at_coarse_is_the_convolutions():
    selection = find(Mixed(), coarse=True)
    assert [t.name for t in selection.targets] == ["conv.0.weight"]
    assert selection.left_out["head.weight"] == "at this granularity the convolution weights are the default"


def test_without_convolutions_the_default_at_coarse_is_linear_and_attention():
    model = Mixed()
    del model.conv
    selection = find(model, coarse=True)
    assert {t.name for t in selection.targets} == {"attention.in_proj_weight", "attention.out_proj.weight", "head.weight"}
    assert selection.left_out["rnn.weight_ih_l0"] == "at this granularity the linear and attention weights are the default"


def test_frozen_parameters_are_found_too():
    model = nn.Linear(3, 2).requires_grad_(False)
    assert names(model) == ["weight"]


def test_a_target_that_does_not_fit_is_left_out_at_weight_and_an_error_at_coarse():
    def odd(target):
        return "it is odd" if target.name == "0.weight" else None

    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    assert names(model, fits=odd) == ["1.weight"]
    assert find(model, fits=odd).left_out == {"0.weight": "it is odd"}
    for options in ({"coarse": True}, {"targets": "0"}):
        with pytest.raises(ValueError, match=r"it is odd, for 0\.weight"):
            find(model, fits=odd, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), "no targets found in ReLU (it has no parameters); name some with targets="),
        (nn.Embedding(3, 2), "no targets found in Embedding (weight: embeddings only when named in targets=)"),
        (nn.Sequential(nn.LazyLinear(3)), "model must have run once before, since lazy layers have no weights"),
    ],
)
def test_nothing_to_prune_is_an_error(model, message):
    with pytest.raises(ValueError) as error:
        find(model)
    assert str(error.value).startswith(message)


def test_nothing_that_fits_is_an_error_with_the_reasons():
    with pytest.raises(ValueError, match=r"no targets found in Linear \(.*weight: too small.*\)"):
        find(nn.Linear(3, 2), fits=lambda t: "too small")


# --- by type ---


def test_layer_type_takes_a_class_or_several():
    model = Mixed()
    assert names(model, layer_type=nn.Conv2d) == ["conv.0.weight"]
    assert names(model, layer_type=[nn.Conv2d, nn.Linear], coarse=True) == [
        "conv.0.weight",
        "attention.out_proj.weight",
        "head.weight",
    ]
    assert names(model, layer_type=(nn.Embedding,)) == ["embedding.weight"]
    assert names(model, layer_type=nn.GRU) == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert find(model, layer_type=nn.Linear).left_out["conv.0.weight"] == "not of layer_type"


@pytest.mark.parametrize(
    ("layer_type", "error", "message"),
    [
        (nn.Conv1d, ValueError, "layer_type must match a layer of the model, got Conv1d; it has BatchNorm2d, Conv2d, .*GRU"),
        ([nn.Conv1d, nn.LSTM], ValueError, "got Conv1d, LSTM"),
        (["Conv2d"], TypeError, "layer_type must be module classes, got 'Conv2d'"),
        (torch.Tensor, TypeError, "layer_type must be module classes, got <class 'torch.Tensor'>"),
    ],
)
def test_a_layer_type_that_is_not_there_is_refused(layer_type, error, message):
    with pytest.raises(error, match=message):
        find(Mixed(), layer_type=layer_type)


# --- by name ---


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("head.weight", ["head.weight"]),
        ("head", ["head.weight"]),  # a module stands for its weights
        ("head.bias", ["head.bias"]),  # a bias has to be named itself
        (["head", "experts"], ["experts", "head.weight"]),
        ("conv", ["conv.0.weight"]),  # a container for those in it
        ("conv.1.weight", ["conv.1.weight"]),
        ("attention", ["attention.in_proj_weight", "attention.out_proj.weight"]),
        ("attention.out_proj", ["attention.out_proj.weight"]),
        ("rnn.weight*", ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        ("*_proj", ["attention.out_proj.weight"]),
        ("embedding", ["embedding.weight"]),
        ("[ch]*.weight", ["conv.0.weight", "head.weight"]),
        (lambda name, p: p.dim() == 3, ["experts"]),
        (lambda name, p: name.endswith("l0") and p.dim() == 2, ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),
        ({"head": 1}.keys(), ["head.weight"]),
    ],
)
def test_targets_are_named(targets, wanted):
    selection = find(Mixed(), targets=targets)
    assert [t.name for t in selection.targets] == wanted
    assert selection.named == set(wanted)


def test_what_is_not_named_says_so():
    assert find(Mixed(), targets="head").left_out["conv.0.weight"] == "not named in targets"


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ("hed", ValueError, "targets must be the name of a parameter or module, or a glob, of .*, got 'hed'"),
        (["head", "layer*"], ValueError, r"got 'layer\*'"),
        ("head.weigth", ValueError, "got 'head.weigth'; did you mean 'head.weight'"),
        ([3], TypeError, r"targets must be names, globs or a predicate, got 3 \(int\)"),
        (lambda name, p: False, ValueError, "no targets found in Mixed"),
        ([], ValueError, "no targets found in Mixed"),
        ("conv.1", ValueError, "no targets found in Mixed"),  # a norm has vectors only
    ],
)
def test_a_name_that_matches_nothing_is_refused(targets, error, message):
    with pytest.raises(error, match=message):
        find(Mixed(), targets=targets)


def test_how_closely_a_name_fits():
    target = next(t for t in all_targets(Mixed()) if t.name == "conv.0.weight")
    fits = {p: match(p, target) for p in ("conv.0.weight", "conv.0", "conv", "c*", "*.0", "con", "head", "")}
    assert fits == {"conv.0.weight": 4, "conv.0": 3, "conv": 2, "c*": 1, "*.0": 1, "con": 0, "head": 0, "": 0}


def test_of_several_names_the_closest_gives_the_value():
    targets = list(find(Mixed()).targets)
    found = resolve({"conv.0": 0.1, "*": 0.2, "attention.in_proj_weight": 0.4, "attention": 0.3}, targets, "sparsity")
    assert found == {
        "conv.0.weight": 0.1,
        "rnn.weight_ih_l0": 0.2,
        "rnn.weight_hh_l0": 0.2,
        "head.weight": 0.2,
        "attention.in_proj_weight": 0.4,
        "attention.out_proj.weight": 0.3,
    }


def test_of_equally_close_names_the_later_gives_the_value():
    targets = list(find(Mixed()).targets)
    assert resolve({"h*": 0.1, "*d": 0.2}, targets, "sparsity") == {"head.weight": 0.2}
    assert resolve({"*d": 0.2, "h*": 0.1}, targets, "sparsity") == {"head.weight": 0.1}


def test_values_of_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match=r"sparsity must be the name of a target or a glob over them, of .*, got 'haed.weight'; did"
    ):
        resolve({"head": 0.1, "haed.weight": 0.2}, find(Mixed()).targets, "sparsity")


# --- tied weights ---


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.first.weight


def test_a_tied_weight_counts_once_under_its_first_name():
    selection = find(Tied())
    assert [(t.name, t.aliases) for t in selection.targets] == [("first.weight", ("again.weight",))]


@pytest.mark.parametrize("name", ["first", "again", "again.weight", "ag*"])
def test_a_tied_weight_goes_by_each_of_its_names(name):
    assert names(Tied(), targets=name) == ["first.weight"]
    assert resolve({name: 0.5}, find(Tied()).targets, "sparsity") == {"first.weight": 0.5}


def test_a_tied_weight_has_one_value():
    targets = find(Tied()).targets
    assert resolve({"first": 0.5, "again": 0.5}, targets, "sparsity") == {"first.weight": 0.5}
    with pytest.raises(
        ValueError, match=r"sparsity must give a tied parameter one value, got 0.5 for 'first' and 0.2 for 'again'"
    ):
        resolve({"first": 0.5, "again": 0.2}, targets, "sparsity")


def test_a_module_used_twice_counts_once():
    block = nn.Linear(3, 3)
    model = nn.Sequential(block, nn.ReLU(), block)
    assert [(t.name, t.aliases) for t in find(model).targets] == [("0.weight", ("2.weight",))]


@pytest.mark.parametrize("embedding_first", [True, False])
def test_an_embedding_tied_to_a_head_is_an_embedding(embedding_first):
    """Pruning it by default would prune the embedding."""
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    order = [("embedding", embedding), ("head", head)]
    model = nn.ModuleDict(dict(order if embedding_first else order[::-1]))
    model["other"] = nn.Linear(4, 4)
    assert names(model) == ["other.weight"]
    assert names(model, targets="head") == ["embedding.weight" if embedding_first else "head.weight"]


# --- wrappers ---


def test_names_survive_compile():
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2)))
    compiled = torch.compile(model)
    assert names(compiled) == ["0.weight", "1.0.weight"]


def test_names_survive_a_compiled_part():
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2)))
    model[1] = torch.compile(model[1])
    assert names(model) == ["0.weight", "1.0.weight"]
    assert names(model, targets="1.0") == ["1.0.weight"]


def test_names_survive_data_parallel_around_compile():
    model = nn.Linear(3, 2)
    assert names(nn.DataParallel(torch.compile(model))) == ["weight"]


# --- your own modules ---


def test_an_unknown_module_is_read_by_dimensions_until_it_is_registered():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 8))
            self.gate = None

    class Narrow(Transposed): ...

    model = nn.Sequential(Transposed(), Narrow())
    with pytest.raises(
        ValueError, match=r"no targets found in Sequential .0.weight: raw parameters only when named in targets="
    ):
        find(model)
    register_axes(Transposed, weight=("in", "out"), gate=("out",))
    assert [(t.name, t.kind, axes(t.layout)) for t in find(model).targets] == [
        ("0.weight", "linear", ["in", "out"]),
        ("1.weight", "linear", ["in", "out"]),  # subclasses inherit
    ]


def test_the_closest_registered_class_counts():
    class Swapped(nn.Linear): ...

    class Swapped2(Swapped): ...

    class Plain(nn.Linear): ...

    register_axes(Swapped, weight=("in", "out"))
    assert axes(layout_of(Swapped(4, 8))) == axes(layout_of(Swapped2(4, 8))) == ["in", "out"]
    assert axes(layout_of(Plain(4, 8))) == axes(layout_of(nn.Linear(4, 8))) == ["out", "in"]
    register_axes(Swapped2, weight=("out", "in"))
    assert axes(layout_of(Swapped2(4, 8))) == ["out", "in"]
    assert axes(layout_of(Swapped(4, 8))) == ["in", "out"]


def test_a_kind_decides_about_the_default():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.filters = nn.Parameter(torch.zeros(8, 3, 2, 2))

    register_axes(Patches, kind="convolution", filters=("out", "in", "height", "width"))
    model = nn.Sequential(Patches(), nn.Linear(3, 3))
    assert names(model, coarse=True) == ["0.filters"]


def test_transformers_linear_layer_holds_inputs_first():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = conv1d(8, 4)  # 8 outputs of 4 inputs
    assert read_module(layer).kind == "linear" and names(nn.Sequential(layer), coarse=True) == ["0.weight"]
    layout = layout_of(layer)
    assert layout.shape == (4, 8)
    assert (layout.size("in"), layout.size("out")) == (4, 8)
    assert names(nn.Sequential(layer), layer_type=conv1d) == ["0.weight"]


class Unregistered(nn.Module): ...


@pytest.mark.parametrize(
    ("module_type", "options", "error", "message"),
    [
        (nn.Linear(2, 2), {"weight": ("out",)}, TypeError, "module_type must be a subclass of torch.nn.Module, got Linear"),
        (int, {"weight": ("out",)}, TypeError, "got <class 'int'>"),
        (Unregistered, {"weight": ("out", "inn")}, ValueError, "weight must be one of out, in, expert, .*, got 'inn'"),
        (Unregistered, {"kind": "conv", "weight": ("out",)}, ValueError, "kind must be one of convolution, .*, got 'conv'"),
    ],
)
def test_axes_are_checked(module_type, options, error, message):
    with pytest.raises(error, match=message):
        register_axes(module_type, **options)
    assert read_module(Unregistered()) is None


def test_fastais_dropped_recurrent_weights_are_recurrent():
    awdlstm = pytest.importorskip("fastai.text.models.awdlstm")
    model = awdlstm.AWD_LSTM(50, 16, 32, 2)
    sparsifier = Sparsifier(model, "weight", "local")
    raw = ["rnns.0.weight_hh_l0_raw", "rnns.1.weight_hh_l0_raw"]
    assert [t.name for t in sparsifier.targets if t.kind == "recurrent" and t.name in raw] == raw
    assert sparsifier.targets[0].layout.size("out") == 128  # four gates of 32
    sparsifier.sparsify_model(0.5)
    # 128 * (16 + 32) + 64 * (32 + 16) recurrent weights, half of them
    assert sum(int((p == 0).sum()) for n, p in model.named_parameters() if "weight_" in n) == 4608
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with sparsifier.hold(optimizer):
        model.reset()
        model(torch.randint(0, 50, (3, 7))).sum().backward()
        optimizer.step()
    assert sum(int((p == 0).sum()) for n, p in model.named_parameters() if "weight_" in n) == 4608
    model.eval()
    model.reset()
    model(torch.randint(0, 50, (3, 7)))
    assert (model.rnns[0].module.weight_hh_l0 == 0).float().mean() == 0.5  # what the LSTM reads


def test_a_dropped_linear_weight_is_one_and_other_raw_parameters_are_not():
    awdlstm = pytest.importorskip("fastai.text.models.awdlstm")
    reading = read_module(awdlstm.WeightDropout(nn.Linear(3, 5), 0.1, "weight"))
    assert (reading.kind, reading.layouts["weight_raw"].size("out")) == ("linear", 5)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_raw = nn.Parameter(torch.zeros(3, 4))
            self.module = nn.Linear(2, 2)

    assert read_module(Own()) is None


def test_a_parameter_that_the_class_has_not_is_refused_where_a_module_is_first_read():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, 4))
            self.shift = nn.Parameter(torch.zeros(3))

    class Factored(Own): ...

    register_axes(Own, weight=("in", "out"))
    with pytest.raises(
        ValueError, match=r"must name a parameter of the class \(w, shift\), got weight=; .*Own, w=\(\.\.\.\)\)"
    ):
        read_module(Own())
    assert read_module(Factored()).layouts == {}  # a subclass may hold its weight in another way
    register_axes(Own, w=("in", "out"))
    assert read_module(Own()).layouts["w"].size("out") == 4


def test_a_registered_weight_that_is_parametrised_later_or_left_out_is_no_mistake():
    class Own(nn.Linear): ...

    register_axes(Own, weight=("out", "in"), second=("out", "in"))
    assert list(read_module(Own(2, 2)).layouts) == ["weight"]
    assert read_module(nn.utils.parametrizations.weight_norm(Own(2, 2))) is not None
    assert read_module(torch.nn.utils.prune.l1_unstructured(Own(2, 2), "weight", 1)) is not None


def test_another_number_of_dimensions_than_registered_is_refused():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

    register_axes(Vector, weight=("out", "in"))
    with pytest.raises(ValueError, match=r"weight must have 2 dimensions \('out', 'in'\), got shape \(4,\)"):
        find(Vector())


# --- parametrised weights ---


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


PARAMETRISATIONS = {
    "WeightNorm": nn.utils.parametrizations.weight_norm,
    "SpectralNorm": nn.utils.parametrizations.spectral_norm,
    "Orthogonal": nn.utils.parametrizations.orthogonal,
    "WeightNorm, old": old_weight_norm,
    "SpectralNorm, old": nn.utils.spectral_norm,
    "L1Unstructured": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("how", PARAMETRISATIONS)
def test_parametrised_weights_are_refused_if_named_and_left_out_with_a_note_else(how):
    model = nn.Sequential(nn.Linear(4, 4), PARAMETRISATIONS[how](nn.Linear(4, 4)))
    kind = how.partition(",")[0]
    for options in ({"targets": "1"}, {"targets": "1.*"}):
        with pytest.raises(
            ValueError,
            match=rf"targets must not be parametrised, got 1 \(.*{kind}.*\): .* first with torch.nn.utils.*\(model.1, .* leave",
        ):
            find(model, **options)
    assert names(model, targets="0") == ["0.weight"]
    for options in ({}, {"coarse": True}, {"layer_type": nn.Linear}):
        selection = find(model, **options)
        assert [t.name for t in selection.targets] == ["0.weight"]
        (why,) = {selection.left_out[n] for n, p in model[1].named_parameters(prefix="1") if p.dim() > 1}
        assert re.fullmatch(rf"1 \(.*{kind}.*\) works its weight out anew in each forward pass", why)


def test_a_parametrised_model_itself_goes_by_its_class():
    with pytest.raises(
        ValueError, match=r"no targets found in ParametrizedLinear \(.*: ParametrizedLinear \(.* works its weight"
    ):
        find(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))


def test_a_parametrised_norm_that_is_no_target_does_not_matter():
    embedding = nn.utils.parametrizations.weight_norm(nn.Embedding(4, 4))
    assert names(nn.Sequential(embedding, nn.Linear(4, 4))) == ["1.weight"]


def test_parametrised_parts_of_a_recurrent_layer_take_the_layer_out():
    model = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), name="weight_hh_l0")
    with pytest.raises(ValueError, match=r"no targets found in ParametrizedLSTM .*weight_hh_l0\) works its weight out anew"):
        find(model)


class Raw(nn.Module):
    """A network of raw parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.scale, self.u = (nn.Parameter(torch.rand(shape)) for shape in ((6, 8), (8,), (8, 3)))

    def forward(self, x):
        return (x @ self.w).relu() * self.scale @ self.u


def test_raw_parameters_are_targets_of_coupled_channels_without_being_named():
    with pytest.raises(ValueError, match="raw parameters only when named"):
        find(Raw())
    assert names(Raw(), raw=True) == ["w", "u"]
    net = Raw()
    Sparsifier(net, "coupled", example_inputs=torch.rand(4, 6)).sparsify_model(0.5)
    assert [int((p == 0).sum()) for p in net.parameters()] == [24, 4, 12]


# --- lazy layers --------------------------------------------------------------------------------------------------------


def lazy_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5))


@pytest.mark.parametrize("options", [{}, {"targets": "2"}, {"targets": ["0", "2.weight"]}, {"targets": "*weight"}])
def test_a_lazy_layer_that_would_be_a_target_is_an_error_with_the_repair(options):
    with pytest.raises(
        ValueError, match=r"run once before, .* got 2\.weight; run one batch through it, or leave the layer out"
    ):
        find(lazy_net(), **options)


@pytest.mark.parametrize("options", [{"coarse": True}, {"targets": "0"}, {"layer_type": nn.Conv2d}])
def test_a_lazy_layer_that_would_be_none_is_left_out_with_a_note(options):
    selection = find(lazy_net(), **options)
    assert [t.name for t in selection.targets] == ["0.weight"]
    assert selection.left_out["2.weight"] == "a lazy layer without weights yet: run one batch through the model first"


def test_a_lazy_layer_that_has_run_is_one_like_others():
    model = lazy_net()
    model(torch.ones(2, 3, 8, 8))
    assert names(model) == ["0.weight", "2.weight"]


# --- adapters -----------------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A linear layer with a low-rank adapter, laid out as peft does."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 6).requires_grad_(not frozen)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})


ADAPTER = "a low-rank adapter beside frozen weights, only when named: what is zero in it leaves its product with them dense"


def test_adapters_beside_frozen_weights_are_left_out_with_a_note():
    model = nn.Sequential(LoRA(frozen=True), nn.Linear(6, 3))
    selection = find(model)
    assert [t.name for t in selection.targets] == ["0.base_layer.weight", "1.weight"]
    assert selection.left_out == {"0.lora_A.default.weight": ADAPTER, "0.lora_B.default.weight": ADAPTER}


def test_adapters_that_are_named_are_targets():
    model = nn.Sequential(LoRA(frozen=True), nn.Linear(6, 3))
    assert names(model, targets="*lora_*") == ["0.lora_A.default.weight", "0.lora_B.default.weight"]


def test_adapters_beside_weights_that_train_are_layers_like_others():
    model = nn.Sequential(LoRA(frozen=False), nn.Linear(6, 3).requires_grad_(False))
    assert names(model) == ["0.base_layer.weight", "0.lora_A.default.weight", "0.lora_B.default.weight", "1.weight"]


def test_a_weight_that_is_worked_out_anew_is_named_as_the_reason_why_it_is_not_found():
    model = nn.Sequential(nn.Linear(4, 4), prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))
    with pytest.raises(ValueError, match=r"got '1.weight'; 1 works its weight out anew .* by L1Unstructured: remove"):
        find(model, targets="1.weight")
    with pytest.raises(ValueError, match=r"got '0.wieght'; did you mean '0.weight'"):
        find(model, targets="0.wieght")
