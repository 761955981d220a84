from __future__ import annotations

import pickle

import matplotlib.pyplot as plt
import pytest

from fasterai import figures
from fasterai.display import new_axes, new_figure


@pytest.mark.parametrize("make", [new_figure, lambda *size: new_axes(*size).figure])
@pytest.mark.parametrize(("backend", "is_open"), [("module://matplotlib_inline.backend_inline", False), ("agg", True)])
def test_a_figure_that_a_notebook_has_shown_is_not_shown_again_at_the_end_of_the_cell(make, backend, is_open, monkeypatch):
    monkeypatch.setattr(figures, "get_backend", lambda: backend)
    plt.close("all")
    shown, other = make(2, 2), make(2, 2)
    with pytest.raises(NotImplementedError):  # by which IPython shows it in the ordinary way
        shown._ipython_display_()
    assert plt.fignum_exists(shown.number) == is_open
    assert plt.fignum_exists(other.number)
    plt.close("all")


def test_figures_can_be_pickled():
    figure = new_figure(2, 2)
    assert type(pickle.loads(pickle.dumps(figure))) is figures.OpenFigure
    plt.close("all")
