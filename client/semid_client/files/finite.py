"""Rows that hold NaN or an infinity, found by the bits of their numbers.

Numbers are looked at as integers. NaN and the infinities have all bits of the exponent set and the
finite numbers have not (IEEE 754, 3.4): as integers they are the largest, those without a sign
among the signed and those with one among the unsigned. The largest of many integers takes a
processor a fraction of what it takes to add up float16, and nothing can overflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

INFINITY: Final = {
    "float16": (np.uint16, np.int16, 0x7C00),
    "bfloat16": (np.uint16, np.int16, 0x7F80),
    "float32": (np.uint32, np.int32, 0x7F80_0000),
    "float64": (np.uint64, np.int64, 0x7FF0_0000_0000_0000),
}
"""Integers of the same size as each type, and the bits of its positive infinity."""

CHUNK_BYTES: Final = 1 << 20
"""Looked at twice while the processor's cache holds them."""


def not_finite(rows: NDArray[Any], start: int) -> dict[int, str]:
    """Say of each row of ``rows`` (n, m) that holds NaN or an infinity, which number that is.

    The first row has index ``start``. Integers are finite.
    """
    if rows.dtype.kind in "iu" or not rows.size:
        return {}
    step = max(1, CHUNK_BYTES // (rows.shape[1] * rows.dtype.itemsize))
    bad: dict[int, str] = {}
    for at in range(0, len(rows), step):
        some = rows[at : at + step]
        if not _are_finite(some):
            bad |= _described(some, start + at)
    return bad


def _are_finite(rows: NDArray[Any]) -> bool:
    if rows.dtype.name not in INFINITY or not rows.dtype.isnative:
        return bool(np.isfinite(rows).all())
    unsigned, signed, infinity = INFINITY[rows.dtype.name]
    bits = np.ascontiguousarray(rows).reshape(-1)
    negative = infinity + (1 << (8 * bits.itemsize - 1))
    positive_are = int(bits.view(signed).max()) < infinity
    return positive_are and int(bits.view(unsigned).max()) < negative


def _described(rows: NDArray[Any], start: int) -> dict[int, str]:
    with np.errstate(invalid="ignore"):  # a signalling NaN
        wrong = ~np.isfinite(rows)
    places = np.flatnonzero(wrong.any(axis=1))
    columns = wrong[places].argmax(axis=1)
    return {
        start + place: f"number {column} is {rows[place, column]}; embeddings are finite"
        for place, column in zip(places.tolist(), columns.tolist(), strict=True)
    }
