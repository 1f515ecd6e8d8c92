"""Compiled loops are kept where they can be, know the numbers compiled in, and run everywhere."""

from __future__ import annotations

import importlib.util
import logging
import sys

import pytest

from semid_server.encoding import compiled

MODULE = """
from constants import FACTOR
from semid_server.encoding.compiled import compiled

def inner(x):
    return x * FACTOR

inner = compiled(nogil=True)(inner)

@compiled(nogil=True)
def outer(x):
    return inner(x) + 1
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that imports the module above anew, with a constant of another file."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "loops.py").write_text(MODULE)

    def load(factor):
        (tmp_path / "constants.py").write_text(f"FACTOR = {factor}\n")
        modules = {}
        for name in ("constants", "loops"):
            spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            # From the source each time: two versions may be of one second and one size.
            code = compile((tmp_path / f"{name}.py").read_text(), spec.origin, "exec")
            exec(code, module.__dict__)  # noqa: S102 - the module written above
            modules[name] = module
        return modules["loops"]

    return load


def test_a_changed_constant_of_another_file_is_compiled_in(load):
    assert load(2.0).outer(10.0) == 21.0
    assert load(3.0).outer(10.0) == 31.0
    assert load(2.0).outer(10.0) == 21.0


def test_what_was_compiled_is_kept(load, tmp_path):
    load(2.0).outer(10.0)
    again = load(2.0)
    again.outer(10.0)
    assert sum(again.outer.stats.cache_hits.values()) == 1


def test_without_a_folder_to_keep_it_in_it_is_compiled_all_the_same(load, monkeypatch, caplog):
    from numba.core import caching, config  # noqa: PLC0415

    monkeypatch.setattr(config, "CACHE_LOCATOR_CLASSES", "", raising=False)
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    caplog.set_level(logging.WARNING)
    compiled._tell_once.cache_clear()
    assert load(5.0).outer(10.0) == 51.0
    assert caplog.text.count("NUMBA_CACHE_DIR") == 1
