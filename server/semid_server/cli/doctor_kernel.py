"""A GPU kernel of one line, for `semid doctor`: whether any can be compiled and run here."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_WIDTH = 64


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no types
def _double(numbers: Any, WIDTH: tl.constexpr) -> None:  # noqa: N803 - Triton's custom
    """``numbers = 2 * numbers``."""
    places = numbers + tl.arange(0, WIDTH)
    tl.store(places, 2.0 * tl.load(places))


def run(device: torch.device) -> bool:
    """Compile it for a device, run it there, and tell whether the numbers are right."""
    numbers = torch.arange(_WIDTH, dtype=torch.float32, device=device)
    _double[(1,)](numbers, WIDTH=_WIDTH)
    expected = 2 * torch.arange(_WIDTH, dtype=torch.float32)
    return bool(torch.equal(numbers.cpu(), expected))
