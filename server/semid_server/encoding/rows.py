"""Checks and small arithmetic on batches of rows that every encoder shares."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from semid_server.encoding.protocol import ROW_DTYPES
from semid_server.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def checked(rows: Tensor, input_dim: int) -> Tensor:
    """Return ``rows`` if they are of shape ``(n, input_dim)`` and of a type that can be encoded.

    Raises
    ------
    InvalidInputError
        If they are not, with what was found and what was expected.
    """
    if rows.dim() != 2 or rows.shape[1] != input_dim:  # noqa: PLR2004 - a matrix
        raise InvalidInputError.at(
            "embeddings", f"shape {tuple(rows.shape)}; expected (n, {input_dim})"
        )
    if rows.dtype not in ROW_DTYPES:
        raise InvalidInputError.at(
            "embeddings",
            f"dtype {rows.dtype}; expected one of {', '.join(map(str, ROW_DTYPES))}",
        )
    return rows


def spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of consecutive parts of ``total`` rows, each of at most ``size``."""
    for start in range(0, total, size):
        yield start, min(start + size, total)


def default_threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))
