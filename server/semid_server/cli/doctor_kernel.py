"""A GPU kernel of one line, for `semid doctor`: whether any can be compiled and run here."""

# ruff: noqa: ANN001, ANN201, N803 - Triton reads annotations, and takes capitals for constants
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WIDTH = 64


@triton.jit
def double(numbers, WIDTH: tl.constexpr):
    """``numbers = 2 * numbers``."""
    places = numbers + tl.arange(0, WIDTH)
    tl.store(places, 2.0 * tl.load(places))


def run(device: torch.device) -> bool:
    """Compile it for a device, run it there, and tell whether the numbers are right."""
    numbers = torch.arange(_WIDTH, dtype=torch.float32, device=device)
    double[(1,)](numbers, WIDTH=_WIDTH)
    expected = 2 * torch.arange(_WIDTH, dtype=torch.float32)
    return bool(torch.equal(numbers.cpu(), expected))
