"""The star import gives the familiar names and nothing of others."""

from __future__ import annotations

from fasterai.misc import all as everything


def test_the_star_import_has_the_familiar_names():
    names: dict = {}
    exec("from fasterai.misc.all import *", names)
    assert set(everything.__all__) <= names.keys()
    assert {"BN_Folder", "FC_Decomposer"} <= names.keys()
    assert not {"nn", "torch", "copy", "unwrap"} & names.keys()
