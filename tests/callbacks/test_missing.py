"""Without fastai its callbacks are an error that names the extra, not a missing name."""

import pytest

import fasterai.callbacks.fastai as for_fastai
from fasterai.callbacks import missing


@pytest.mark.parametrize("name", missing.__all__)
def test_each_callback_names_the_extra(name):
    with pytest.raises(ImportError, match=rf"{name} needs fastai: pip install '\.\[fastai\]' in a checkout"):
        getattr(missing, name)(0.5, "weight")


def test_each_callback_of_fastai_has_one():
    assert sorted(missing.__all__) == sorted(for_fastai.__all__)
