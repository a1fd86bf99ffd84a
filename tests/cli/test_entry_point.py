"""The commands: what a run imports is out of the garbage collector's way; what the disk does not take is said in a line."""

from __future__ import annotations

import errno
import gc
import sys
from typing import NoReturn

import pytest
from omegaconf import OmegaConf

from dpo_lab.cli.entry_point import fast_imports, run_command, validate_and_run


@pytest.fixture
def unfrozen():
    yield
    gc.unfreeze()


def test_what_is_loaded_is_never_looked_at_by_the_collector_again(tmp_path, monkeypatch, unfrozen):
    (tmp_path / "loaded_by_a_command.py").write_text(
        "import gc\nCOLLECTS = gc.isenabled()\nKEPT = [[number] for number in range(1000)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with fast_imports():
        import loaded_by_a_command  # type: ignore[import-not-found]
    assert not loaded_by_a_command.COLLECTS
    assert gc.isenabled()
    young = [object_ for generation in range(3) for object_ in gc.get_objects(generation)]
    assert not {id(kept) for kept in loaded_by_a_command.KEPT} & {id(object_) for object_ in young}
    assert gc.is_tracked(loaded_by_a_command.KEPT[0])
    del sys.modules["loaded_by_a_command"]


def test_the_collector_goes_on_where_an_import_fails(unfrozen):
    with pytest.raises(ModuleNotFoundError), fast_imports():
        import there_is_no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


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
