"""Commands whose output nobody reads to its end: no traceback, and other broken pipes stay errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dpo_lab.terminal.pipes import explain_closed, quiet_if_closed
from tests.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["train", *(pytest.param(each, marks=pytest.mark.extended) for each in ("inspect", "study", "report"))]
)
def test_help_that_is_not_read_to_its_end_is_no_error(command):
    ours, theirs = os.pipe()
    os.close(ours)  # as head does, here before the first line
    arguments = [sys.executable, "-m", f"dpo_lab.{command}", "--help"]
    result = subprocess.run(arguments, cwd=REPOSITORY, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_pipe_that_breaks_elsewhere_is_an_error():
    with pytest.raises(BrokenPipeError, match="of a worker"), quiet_if_closed():
        raise BrokenPipeError("of a worker")
    assert explain_closed(BrokenPipeError("of a worker")) is None


def test_exit_codes_are_kept():
    with pytest.raises(SystemExit, match="3"), quiet_if_closed():
        raise SystemExit(3)
