"""Without fastai its callbacks are an error that names the extra, not a missing name."""

import pytest

from fasterai.callbacks import missing


@pytest.mark.parametrize("name", missing.__all__)
def test_each_callback_names_the_extra(name):
    with pytest.raises(ImportError, match=rf"{name} needs fastai: pip install '\.\[fastai\]' in a checkout"):
        getattr(missing, name)(0.5, "weight")
