import numpy as np
import torch

from fasterai.prune.scratch.picture import draw_widths


def test_bars_are_as_long_as_the_groups_are_wide_and_gates_are_counted() -> None:
    gates = {"a": torch.tensor([0.0, 0.0, 0.0, 1.0]), "b": torch.tensor([0.5, 0.5])}
    figure = draw_widths({"a": (3, 4, 1), "b": (2, 2, 2)}, gates, "widths")
    left, right = figure.axes
    found = {bars.get_label(): [bar.get_width() for bar in bars] for bars in left.containers}
    assert found == {"searched": [4, 2], "dense": [3, 2], "small": [1, 2]}
    (image,) = right.images
    shares = np.asarray(image.get_array())
    assert shares[0, [0, -1]].tolist() == [0.75, 0.25]
    assert shares[1, 10] == 1
