"""The doors: what a run imports is out of the garbage collector's way."""

from __future__ import annotations

import gc
import sys

import pytest

from dpo_lab.door import loading


@pytest.fixture
def unfrozen():
    yield
    gc.unfreeze()


def test_what_is_loaded_is_never_looked_at_by_the_collector_again(tmp_path, monkeypatch, unfrozen):
    (tmp_path / "loaded_by_a_door.py").write_text(
        "import gc\nCOLLECTS = gc.isenabled()\nKEPT = [[number] for number in range(1000)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with loading():
        import loaded_by_a_door  # type: ignore[import-not-found]
    assert not loaded_by_a_door.COLLECTS
    assert gc.isenabled()
    young = [object_ for generation in range(3) for object_ in gc.get_objects(generation)]
    assert not {id(kept) for kept in loaded_by_a_door.KEPT} & {id(object_) for object_ in young}
    assert gc.is_tracked(loaded_by_a_door.KEPT[0])
    del sys.modules["loaded_by_a_door"]


def test_the_collector_goes_on_where_an_import_fails(unfrozen):
    with pytest.raises(ModuleNotFoundError), loading():
        import there_is_no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
