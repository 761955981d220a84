"""Pictures of attention maps: where the outputs of layers are large, and where those of two networks agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.display import HEAT, SMALL, dress, new_figure, styled
from fasterai.distill.capture import find_layers
from fasterai.distill.losses.shapes import as_one_map, attention_of, grid_of, resize
from fasterai.distill.matching import outputs_of_layers
from fasterai.model.supported import check_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["attention_maps", "cosines", "plot_attention_maps"]


def attention_maps(model: nn.Module, x: Any, layers: Sequence[str | nn.Module], p: float = 2.0) -> list[Tensor]:
    """Return where the outputs of layers are large: the mean over channels of `|a|^p`, one `(B, H, W)` for each layer.

    The model runs once in eval mode, and nothing in it changes. Tokens `(B, T, C)` are laid out as the square that they are; a
    class token is left out.

    Args:
        model: The network.
        x: Its inputs: a tensor, or a tuple of arguments.
        layers: The layers, by name or themselves.
        p: The power.

    Raises:
        ValueError: A layer is unknown, did not run, or returns no images.
        TypeError: The model is no network, or one layer is given instead of a list.
    """
    check_model(model)
    found = find_layers("layers", model, layers)
    last = dict(outputs_of_layers(model, x, found))
    return [_image_of(last.get(i), name, p) for i, name in enumerate(layers)]


def _image_of(feature: Tensor | None, layer: str | nn.Module, p: float) -> Tensor:
    name = layer if isinstance(layer, str) else type(layer).__name__
    if feature is None:
        raise ValueError(f"layers must be ones that run, got {name!r}, which did not")
    grid = grid_of(feature.shape[1]) if feature.dim() == 3 else tuple(feature.shape[2:])
    if grid is None or len(grid) != 2:
        raise ValueError(f"layers must return maps (B, C, H, W) or tokens of a square, got {tuple(feature.shape)} of {name!r}")
    maps = as_one_map(feature).flatten(2)[..., -(grid[0] * grid[1]) :]
    return attention_of(maps, p).reshape(len(feature), *grid)


def cosines(maps: Tensor, others: Tensor) -> Tensor:
    """Return how alike maps `(B, H, W)` are to others, `(B,)`: 1 where one is a multiple of the other, 0 where they part.

    Maps of another size are averaged or interpolated to that of the others.
    """
    sized = resize(maps[:, None].float(), others.shape[1:])
    return F.cosine_similarity(sized.flatten(1), others.float().flatten(1))


@styled()
def plot_attention_maps(images: Tensor, maps: Mapping[str, Tensor], title: str = "") -> Figure:
    """Draw images, and beside each the attention maps of networks for it, with their cosine to the first one's.

    Args:
        images: The images `(B, 1 or 3, H, W)`, in any range.
        maps: Name of a network -> its attention maps `(B, h, w)`; the first is the one that the others are held against.
        title: The title.

    Raises:
        ValueError: There are no maps, or not as many as images.
    """
    if not maps or any(len(one) != len(images) for one in maps.values()):
        counts = {name: len(one) for name, one in maps.items()}
        raise ValueError(f"maps must be those of the {len(images)} images, for at least one network, got {counts}")
    first, *_ = maps.values()
    alike = {name: cosines(one, first) for name, one in maps.items()}
    columns = 1 + len(maps)
    figure = new_figure(1.6 * columns, 1.75 * len(images) + 0.5)
    panels = figure.subplots(len(images), columns, squeeze=False)
    for i, row in enumerate(panels):
        _draw(row[0], _picture(images[i]), "")
        for axes, (name, one) in zip(row[1:], maps.items(), strict=True):
            _draw(axes, one[i].detach().float().cpu().numpy(), "" if one is first else f"cosine {float(alike[name][i]):.2f}")
    for axes, name in zip(panels[0], ["image", *maps], strict=True):
        dress(axes, "")
        axes.set_title(name, loc="left", fontsize=SMALL)
    if title:
        figure.suptitle(title, ha="left", x=0.02)
    return figure


def _picture(image: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    shown = image.detach().float().cpu()
    shown = (shown - shown.min()) / (shown.max() - shown.min()).clamp(min=1e-12)
    return torch.cat([shown] * (3 if len(shown) == 1 else 1)).movedim(0, -1).numpy()


def _draw(axes: Axes, picture: np.ndarray[Any, np.dtype[Any]], below: str) -> None:
    axes.imshow(picture, cmap=HEAT, interpolation="nearest", vmin=0 if picture.ndim == 2 else None)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(below, fontsize=SMALL)
    axes.spines[:].set_visible(False)
