"""Loops compiled by numba, and kept compiled where there is a folder to keep them in."""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from numbers import Number
from typing import TYPE_CHECKING, Any, TypeVar

from numba import njit

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

F = TypeVar("F", bound="Callable[..., Any]")

_njit: Any = njit  # its overloads know no forwarded options


def compiled(*signatures: Any, **options: Any) -> Callable[[F], F]:
    """Compile as `numba.njit` does; later processes read the result from numba's cache folder.

    That is the ``__pycache__`` beside the source, else a folder of the user's, or
    ``NUMBA_CACHE_DIR``. Where none can be written to (a read-only image, a user without a home)
    numba would refuse to compile at all: here every process then compiles anew, and says so.

    Numba takes what it kept for good while the source file is the same. The numbers that the
    file imports are compiled in too, so the name under which a function is kept tells of them.
    """

    def decorate(function: F) -> F:
        numbers = {
            name: value for name, value in function.__globals__.items() if isinstance(value, Number)
        }
        digest = hashlib.sha256(repr(sorted(numbers.items())).encode()).hexdigest()
        function.__qualname__ += f"_{digest[:8]}"
        try:
            kept: F = _njit(*signatures, cache=True, **options)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            _tell_once()
            made: F = _njit(*signatures, **options)(function)
            return made
        return kept

    return decorate


@cache
def _tell_once() -> None:
    logger.warning(
        "loops are compiled by every process anew, which takes seconds: numba finds no folder to "
        "keep them in; NUMBA_CACHE_DIR names one"
    )
