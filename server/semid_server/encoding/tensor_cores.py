"""Whether a device's float16 product is as exact as the certificate takes it to be.

No vendor says how a tensor core rounds, so BOUNDS.md assumes something ("float16 on tensor
cores") and this asks the device itself, by sums that are as bad as that assumption allows.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from semid_server.encoding.plan import TENSOR_CORE_UNIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

_SMALL = (2.0**-11, 2.0**-12, 2.0**-13)
_FACTORS = (1.0, 1.0 - 2.0**-11, 1.0 + 2.0**-10, 1.5, 1.999)
"""Products of these are from 2^-26 to 2^-20, beside one of 1: around the places of float32's last
bit and of the two that are kept below it, exactly there, just above and just below."""


_COMPARED = 1024
"""Rows at either end of a batch that are compared with float64."""


def allowed(dim: int) -> float:
    """Error of a sum of ``dim`` products, relative to the sum of their absolute values."""
    return (dim + 2) * TENSOR_CORE_UNIT


def worst_loss(
    shape: tuple[int, int],
    dim: int,
    n_rows: Iterable[int],
    *,
    device: torch.device,
    product: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """Greatest error of a product of float16, as a share of what BOUNDS.md allows.

    Parameters
    ----------
    shape : (int, int)
        ``(N, padded D)`` of the columns.
    dim : int
        ``D``; rows and columns are zero from there on.
    n_rows : iterable of int
        Numbers of rows to multiply at once: the library has a kernel for each size.
    device : torch.device
        Where.
    product : callable
        Inner products float32 (n, N) of float16 rows (n, padded D) and columns (N, padded D).
    """
    columns = _cycled(_hard(dim, first=True), shape, device)
    exact_columns = columns.double().T
    hard = _hard(dim, first=False)
    worst = 0.0
    for n in n_rows:
        rows = _cycled(hard.roll(n, dims=0), (n, shape[1]), device)
        products = product(rows, columns)
        # the first and the last: float64 for all of a large batch is too much memory
        for part in (slice(0, _COMPARED), slice(max(_COMPARED, n - _COMPARED), n)):
            wide = rows[part].double()
            most = allowed(dim) * (wide.abs() @ exact_columns.abs())
            error = (products[part].double() - wide @ exact_columns).abs()
            loss = error / most.clamp(min=torch.finfo(torch.float64).tiny)
            worst = max(worst, float(loss.max()) if loss.numel() else 0.0)
    return worst


def _hard(dim: int, *, first: bool) -> Tensor:
    """float16 ``(m, dim)``: one large number and many small ones, or all of one size.

    A row of one kind (``first``) and one of the other have a single product of 1, in a place that
    differs, and products of the sizes above everywhere else, of one sign or of both.
    """
    places = sorted({0, 1, 7, 8, 15, 16, dim // 2, dim - 1} & set(range(dim)))
    found = []
    for small, factor in itertools.product(_SMALL, _FACTORS):
        row = torch.full((dim,), small * factor, dtype=torch.float64)
        if first:
            row[places] = 1.0
            found.append(row)
            continue
        for place, sign in itertools.product(places, (1.0, -1.0)):
            signed = sign * row
            signed[places] = 0.0
            signed[place] = 1.0
            found.append(signed)
        mixed = row.clone()
        mixed[1::2] *= -1
        mixed[0] = 1.0
        found.append(mixed)
    generator = torch.Generator().manual_seed(dim)
    # nothing cancels, and what is cut off adds up
    found += list(torch.rand(16, dim, generator=generator, dtype=torch.float64))
    return torch.stack(found).half()


def _cycled(rows: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    """``rows`` over and over, padded with zeros, as many and as wide as ``shape`` says."""
    n, width = shape
    which = torch.arange(n) % len(rows)
    padded = torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
    return padded.to(device)[which.to(device)]
