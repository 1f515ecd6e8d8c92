"""Memory that blocks of a file are read into, one after another."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Memory: TypeAlias = "NDArray[np.uint8]"

SLACK: Final = 2 * mmap.PAGESIZE
"""Bytes more than a block has: what is read past the page cache begins and ends with a page."""


def pages(n_bytes: int) -> Memory:
    """At least ``n_bytes`` that begin with a page."""
    return np.frombuffer(mmap.mmap(-1, max(1, n_bytes)), np.uint8)
