"""Processes that own runs."""

from __future__ import annotations

import os
import subprocess
import sys

from fasterai.study.owners import is_gone, own_process


def test_this_process_is_there():
    assert not is_gone(own_process())
    assert own_process()["process"] == os.getpid()


def test_a_process_that_has_ended_is_gone():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert is_gone({**own_process(), "process": ended.pid})


def test_a_process_that_took_over_the_number_is_not_the_owner():
    assert is_gone({**own_process(), "since": "1"})


def test_nothing_is_known_of_other_machines():
    assert not is_gone({**own_process(), "machine": "other", "process": 2**22 + 1})
