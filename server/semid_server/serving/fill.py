"""The one copy of a payload's numbers, into the batch, which sees whether all of them are finite.

Numbers in shared memory, which their owner may change at any time, are looked at where they have
been copied to, a block at a time while it is in the processor's cache. The kernel copies at a third
of the speed of the memory, so that many of them are copied by several threads.

Compiled, since the alternatives cost more than the copy itself: numpy adds float16 one by one, and
torch wakes its threads for a sum, which then spin on the cores that gRPC needs. The interpreter's
lock is released meanwhile, but for a few numbers.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numba import types

from semid_server.encoding.compiled import compiled

if TYPE_CHECKING:
    import numpy.typing as npt

    from semid_server.serving.shared_memory import SharedRows
    from semid_server.serving.types import EmbeddingType

EXPONENTS: Final[dict[EmbeddingType, np.unsignedinteger[Any]]] = {
    "float32": np.uint32(0x7F80_0000),
    "float16": np.uint16(0x7C00),
    "bfloat16": np.uint16(0x7F80),
    "float64": np.uint64(0x7FF0_0000_0000_0000),
}
"""The bits of the exponent: NaN and the infinities alone have all of them set (IEEE 754, 3.4)."""

BLOCK_BYTES: Final = 256 * 1024
"""Read from shared memory at once: little beside the cache, much beside a system call."""

READER_BYTES: Final = 2 << 20
"""Bytes of one request from which on it is worth having one more thread read."""

HELD_BYTES: Final = 128 * 1024
"""Bytes up to which the interpreter's lock is kept: where the event loop wants it too, to have it
back takes longer than to copy so few."""

MAX_READERS: Final = min(4, len(os.sched_getaffinity(0)))
"""Threads that read one request: more than a few copy no faster."""

_SIGNATURES = [
    # A message's numbers begin at any byte.
    types.boolean(
        types.Array(bits, 2, "C"), types.Array(bits, 2, "C", readonly=True, aligned=False), bits
    )
    for bits in (types.uint16, types.uint32, types.uint64)
]


def copy_finite(target: npt.NDArray[Any], source: npt.NDArray[Any], dtype: EmbeddingType) -> bool:
    """Copy ``source`` to ``target``, and tell whether all of its numbers are finite.

    Parameters
    ----------
    target, source : numpy.ndarray, shape (n, D)
        Contiguous, numbers of ``dtype`` or their bits.
    dtype : str
        What the numbers are.
    """
    exponent = EXPONENTS[dtype]
    bits = exponent.dtype
    copy = _copy_held if source.nbytes <= HELD_BYTES else _copy
    return bool(copy(target.view(bits), source.view(bits), exponent))


def read_finite(target: npt.NDArray[Any], rows: SharedRows, dtype: EmbeddingType) -> bool:
    """Read ``rows`` into ``target``, and tell whether all of the numbers there are finite.

    Parameters
    ----------
    target : numpy.ndarray, shape (n, D)
        Contiguous, numbers of ``dtype`` or their bits.
    rows : SharedRows
        As many.
    dtype : str
        What the numbers are.

    Raises
    ------
    InvalidInputError, DeviceError
        They cannot be read, or not all of them; ``target`` then holds anything.
    """
    exponent = EXPONENTS[dtype]
    bits = target.reshape(-1).view(exponent.dtype)
    readers = max(1, min(MAX_READERS, bits.nbytes // READER_BYTES))
    share = max(1, -(-len(bits) // readers))
    starts = range(0, len(bits), share)
    others = [
        _readers().submit(_read_part, bits[start : start + share], start, rows, exponent)
        for start in starts[1:]
    ]
    try:
        finite = _read_part(bits[:share], 0, rows, exponent)
    finally:
        wait(others)  # or they would write over the next batch
    return all([finite, *(other.result() for other in others)])


def _read_part(
    bits: npt.NDArray[Any], start: int, rows: SharedRows, exponent: np.unsignedinteger[Any]
) -> bool:
    """Read the numbers from ``start`` on, as many as there is room for."""
    block = BLOCK_BYTES // bits.itemsize
    finite = True
    for begin in range(0, len(bits), block):
        part = bits[begin : begin + block]
        rows.read(part.data.cast("B"), (start + begin) * bits.itemsize)
        finite &= bool(_are_finite(part, exponent))
    return finite


@cache
def _readers() -> ThreadPoolExecutor:
    """Return the threads that help to read; they are started when they are first needed."""
    return ThreadPoolExecutor(MAX_READERS, "semid-read")


@compiled(
    [
        types.boolean(types.Array(bits, 1, "C"), bits)
        for bits in (types.uint16, types.uint32, types.uint64)
    ],
    nogil=True,
)
def _are_finite(numbers: Any, exponent: Any) -> bool:
    beyond = 0
    for i in range(len(numbers)):
        beyond += (numbers[i] & exponent) == exponent
    return beyond == 0


@compiled(_SIGNATURES, nogil=True)
def _copy(target: Any, source: Any, exponent: Any) -> bool:
    to, numbers = target.reshape(-1), source.reshape(-1)
    beyond = 0
    for i in range(len(numbers)):
        bits = numbers[i]
        to[i] = bits
        # Added up rather than left at: a loop without a way out is done 16 numbers at a time.
        beyond += (bits & exponent) == exponent
    return beyond == 0


@compiled(_SIGNATURES)
def _copy_held(target: Any, source: Any, exponent: Any) -> bool:
    finite: bool = _copy(target, source, exponent)
    return finite
