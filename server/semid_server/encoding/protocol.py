"""What every encoder is: rows in, codes out, and a count of how they were decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from semid_server.model import ModelSpec

ROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Element types of rows; a number means exactly the value that it holds."""

_CODE_DTYPES = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}


@dataclass(frozen=True, slots=True)
class EncodeCounts:
    """How many rows were decided where, since the encoder was made.

    Attributes
    ----------
    fast : int
        Proved in full by the certificate of the fast product.
    float64 : int
        Had a layer decided by the distances of its candidates in float64.
    reference : int
        Decided by the reference arithmetic, in float64 with a fixed order of summation.
    """

    fast: int = 0
    float64: int = 0
    reference: int = 0

    @property
    def rows(self) -> int:
        """All rows encoded."""
        return self.fast + self.float64 + self.reference

    def __add__(self, other: EncodeCounts) -> EncodeCounts:
        return EncodeCounts(
            self.fast + other.fast,
            self.float64 + other.float64,
            self.reference + other.reference,
        )


@dataclass(frozen=True, slots=True)
class Screened:
    """Codes of rows of which some may hold NaN or an infinity.

    Attributes
    ----------
    codes : Tensor
        ``(n, L)``; those of a row that is not finite mean nothing.
    finite : Tensor
        bool ``(n,)``.
    """

    codes: Tensor
    finite: Tensor


class Encoder(Protocol):
    """Semantic IDs of rows: the codes of `ReferenceEncoder`, at whatever speed."""

    @property
    def input_dim(self) -> int:
        """``D``, numbers in a row."""

    @property
    def n_layers(self) -> int:
        """``L``, codes of a row."""

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest of uint8, uint16 and uint32 that holds every code."""

    def encode(self, rows: Tensor) -> Tensor:
        """Codes ``(n, L)`` of finite ``rows`` (n, D), on the device that the rows are on.

        ``rows`` are float16, bfloat16, float32 or float64, on the host or on the encoder's own
        device, ``n >= 0``. One call at a time, unless the encoder allows more.

        Raises
        ------
        InvalidInputError
            If the rows are not of that type and shape.
        """

    def prepare(self, rows: Tensor) -> Callable[[], npt.NDArray[np.unsignedinteger]]:
        """Return what encodes ``rows`` (n, D) on the host, as they are whenever it is called.

        It returns codes ``(n, L)``. For memory that is filled again and again: to find out about it
        with every call, and to have torch around arrays, would take as long as the codes of a few
        rows do. One call at a time, as with `encode`.

        Raises
        ------
        InvalidInputError
            If the rows are not of that type and shape.
        """

    def begin(self, rows: Tensor) -> Callable[[], Screened]:
        """Begin to look through ``rows`` (n, D) on the host and to encode them; return what waits.

        Rows can be handed over before the codes of those before them are there, which a device
        uses that can take rows and compute at once. They must stay as they are until their codes
        have been waited for. One call at a time, as with `encode`; any thread may wait.

        Raises
        ------
        InvalidInputError
            If the rows are not of that type and shape.
        """

    def warm_up(self) -> None:
        """Compile and allocate now what the first calls would otherwise wait for."""

    def counts(self) -> EncodeCounts:
        """Rows decided at each level so far."""


def code_dtype_of(spec: ModelSpec) -> torch.dtype:
    """Return the smallest unsigned type that holds every code of the model."""
    return _CODE_DTYPES[spec.code_bits]
