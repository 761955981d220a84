"""The figure of all pictures of the library, which a notebook shows once.

Imported where a picture is made, since matplotlib is slow to load.
"""

from __future__ import annotations

from matplotlib import get_backend
from matplotlib._pylab_helpers import Gcf  # the open figures; `display.py` alone imports pyplot, with its settings
from matplotlib.figure import Figure

__all__ = ["OpenFigure"]


class OpenFigure(Figure):
    """Figure that a notebook does not show a second time at the end of the cell, as the value of the last line was shown."""

    def _ipython_display_(self) -> None:
        """Drop the figure from the open ones, where the end of the cell would show them; it is about to be shown.

        Raises:
            NotImplementedError: Always, whereupon IPython shows it as it shows any figure.
        """
        if "inline" in get_backend():
            Gcf.destroy_fig(self)
        raise NotImplementedError("to be shown as any figure")
