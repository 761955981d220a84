from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from fasterai.distill.maps import attention_maps, cosines, plot_attention_maps

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(2), nn.Flatten(1))


class Tokens(nn.Module):
    """Tokens of a class and of 8 x 8 places."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.last(torch.cat([torch.full_like(tokens[:, :1], 99), tokens], 1))


def test_attention_maps_are_means_of_powers_over_channels():
    model = network().eval()
    one, other = attention_maps(model, X, ["0", model[1]])
    torch.testing.assert_close(one, model[0](X).detach().square().mean(1))
    torch.testing.assert_close(other, model[1](model[0](X)).detach().square().mean(1))
    torch.testing.assert_close(attention_maps(model, X, ["0"], p=1)[0], model[0](X).detach().abs().mean(1))


def test_tokens_are_maps_without_their_class():
    torch.testing.assert_close(attention_maps(Tokens(), X, ["last"])[0], X.square().mean(1))


def test_nothing_changes():
    model, state = network().train(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention_maps(model, X, ["1"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("last", "layers must be layers of the model"),
        ("4", r"layers must return maps .* got \(3, 144\) of '4'"),
        ("5", "layers must be ones that run, got '5'"),
    ],
)
def test_layers_without_maps_are_refused(layer, message):
    model = network()
    model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*list(model)[:5]), x)
    model.append(nn.ReLU())
    with pytest.raises(ValueError, match=message):
        attention_maps(model, X, [layer])


def test_one_layer_for_a_list_of_them_is_refused():
    with pytest.raises(TypeError, match=r"layers must be a list of layers, got '10'; pass \['10'\]"):
        attention_maps(network(), X, "10")


def test_cosines_by_hand():
    ones, half = torch.ones(2, 2, 2), torch.tensor([[[1.0, 0], [0, 0]], [[0, 2], [2, 0]]])
    torch.testing.assert_close(cosines(ones, half), torch.tensor([0.5, 2**-0.5]))
    torch.testing.assert_close(cosines(torch.ones(2, 4, 4), 3 * ones), torch.ones(2))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_has_an_image_and_each_map_with_its_cosine(channels):
    images, maps = torch.rand(2, channels, 8, 8), torch.rand(2, 4, 4)
    figure = plot_attention_maps(images, {"teacher": maps, "student": 2 * maps, "alone": torch.rand(2, 2, 2)}, "layer3")
    assert len(figure.axes) == 8
    assert [axes.get_title(loc="left") for axes in figure.axes[:4]] == ["image", "teacher", "student", "alone"]
    assert [axes.get_xlabel() for axes in figure.axes[1:3]] == ["", "cosine 1.00"]
    assert figure.axes[3].get_xlabel().startswith("cosine 0.")
    assert figure.axes[1].images[0].get_array().shape == (4, 4)
    assert figure.axes[0].images[0].get_array().shape == (8, 8, 3)
    assert figure.get_suptitle() == "layer3"
    plt.close("all")


@pytest.mark.parametrize("maps", [{}, {"teacher": torch.rand(1, 4, 4)}])
def test_maps_of_other_images_are_refused(maps):
    with pytest.raises(ValueError, match="maps must be those of the 2 images"):
        plot_attention_maps(torch.rand(2, 3, 8, 8), maps)
