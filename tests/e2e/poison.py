"""Kernels after which a GPU does nothing more for the process, for `faulty_serve.py`.

Both are queued and not waited for: the error comes to whoever waits for the device next.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FAR = 1 << 40
"""Numbers between a tensor and where nothing is: more memory than any GPU has."""


def fail_assertion() -> None:
    """Look up a place beyond the end, which torch's kernel asserts nobody does."""
    numbers = torch.zeros(1, device="cuda")
    numbers[torch.ones(1, dtype=torch.int64, device="cuda")]


@triton.jit
def _write(numbers, distance):
    tl.store(numbers + distance, 1.0)


def write_astray() -> None:
    """Write where there is no memory."""
    _write[(1,)](torch.zeros(1, device="cuda"), FAR)
