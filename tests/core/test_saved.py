"""What saved states say of the run that they are of; checks of their parts are tested with their owners."""

from __future__ import annotations

import warnings

from fasterai.core.saved import settings_in_words, warn_of_settings


def test_words_of_settings_have_no_address_and_so_are_the_same_in_another_process():
    class Own:
        pass

    words = settings_in_words(sparsity=0.8, criteria=Own(), rule=None)
    assert words["sparsity"] == "0.8" and words["rule"] == "None"
    assert words["criteria"].endswith("Own object>") and words == settings_in_words(sparsity=0.8, criteria=Own(), rule=None)


def test_a_setting_that_the_state_does_not_know_is_no_difference():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warn_of_settings("Sparsifier", {"sparsity": "0.8", "gone": "1"}, {"sparsity": "0.8", "new": "2"})
