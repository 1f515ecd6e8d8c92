"""Checks and small arithmetic on batches of rows that every encoder shares."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from semid_server.encoding.protocol import ROW_DTYPES, Screened
from semid_server.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import numpy.typing as npt
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


def are_finite(rows: Tensor) -> Tensor:
    """Tell of each of ``rows`` (n, D) whether all its numbers are finite, bool ``(n,)``."""
    # The largest number: one pass, no overflow; NaN is passed on, and less than nothing.
    longest: Tensor = torch.linalg.vector_norm(rows, math.inf, dim=1)
    return longest < math.inf


class AtOnce(ABC):
    """Part of an encoder that has the codes as soon as it has been given the rows."""

    @property
    @abstractmethod
    def input_dim(self) -> int:
        """``D``, numbers in a row."""

    @abstractmethod
    def encode(self, rows: Tensor) -> Tensor:
        """Codes ``(n, L)`` of finite ``rows`` (n, D)."""

    def prepare(self, rows: Tensor) -> Callable[[], npt.NDArray[np.unsignedinteger]]:
        """Return what encodes ``rows`` (n, D) whenever it is called; see `Encoder.prepare`."""
        checked(rows, self.input_dim)

        def encode() -> npt.NDArray[np.unsignedinteger]:
            codes: npt.NDArray[np.unsignedinteger] = self.encode(rows).numpy()
            return codes

        return encode

    def begin(self, rows: Tensor) -> Callable[[], Screened]:
        """Encode ``rows`` (n, D) now; see `Encoder.begin`."""
        finite = are_finite(checked(rows, self.input_dim))
        if not finite.all():
            rows = rows.masked_fill(~finite[:, None], 0)
        screened = Screened(self.encode(rows), finite)
        return lambda: screened


def spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of consecutive parts of ``total`` rows, each of at most ``size``."""
    for start in range(0, total, size):
        yield start, min(start + size, total)


def default_threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))
