"""The commands: what a run imports is out of the garbage collector's way; what the disk does not take is said in a line."""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

import pytest
from omegaconf import OmegaConf

from dpo_lab.cli.entry_point import run_command, validate_and_run


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "outputs/a/run.json"),
            "error: outputs/a/run.json: No space left on device; what was written before is intact: make room, then"
            " type the same command again\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "outputs/a/.lock"),
            "error: outputs/a/.lock: Permission denied; get permission to read and write there, then type the same"
            " command again\n",
        ),
    ],
)
def test_a_disk_that_takes_nothing_ends_a_run_and_a_sweep_with_one_line(error, line, monkeypatch, capsys):
    def fail(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr("dpo_lab.config.schema.validate", fail)
    with pytest.raises(SystemExit) as ended:
        validate_and_run(OmegaConf.create(), lambda settings: None)
    assert (ended.value.code, capsys.readouterr().err) == (1, line)
    monkeypatch.setattr("dpo_lab.cli.entry_point.raise_on_signals", lambda tell: None)
    monkeypatch.setattr("dpo_lab.cli.entry_point.end_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # both are put back as they were
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert (run_command(fail), capsys.readouterr().err) == (1, line)
