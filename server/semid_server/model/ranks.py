"""Several processes that train one model together, or one that trains alone."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from torch import distributed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_by_itself = ContextVar("_by_itself", default=False)


def together() -> bool:
    """Whether `torch.distributed` is set up in this process, and not left aside for a while."""
    set_up = distributed.is_available() and distributed.is_initialized()
    return set_up and not _by_itself.get()


@contextmanager
def by_itself() -> Iterator[None]:
    """Let this process work for a while as if it were the only one."""
    token = _by_itself.set(True)
    try:
        yield
    finally:
        _by_itself.reset(token)


def is_first_rank() -> bool:
    """Whether this process is the one that draws, writes and reports for all."""
    return not together() or distributed.get_rank() == 0


def from_first_rank(tensor: Tensor) -> Tensor:
    """The first rank's values of ``tensor``, which has one shape and dtype on all ranks."""
    if together():
        distributed.broadcast(tensor, src=0)
    return tensor


def summed_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of the ranks' values of ``tensor``, which has one shape and dtype on all ranks."""
    if together():
        distributed.all_reduce(tensor)
    return tensor
