"""Waiting for what tells nobody when it comes to pass."""

from __future__ import annotations

import time

SECONDS = 300
"""A machine that takes minutes is slow, not wrong."""


def wait_until(condition):
    """Wait until ``condition()`` is true, and return what it is then."""
    until = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < until, f"it did not come to pass within {SECONDS} s"
        time.sleep(0.01)
    return found
