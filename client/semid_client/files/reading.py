"""Blocks of a source, read before they are asked for."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, repeat
from typing import TYPE_CHECKING, Final, Self

from semid_client.files.finite import not_finite
from semid_client.files.memory import SLACK
from semid_client.files.rows import Block, MatrixRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from semid_client.files.memory import Memory
    from semid_client.files.rows import Source

AHEAD: Final = 2
"""Blocks that wait for each thread that works on them."""

READERS: Final = 4
"""Threads that read a file of which any part can be read: one alone copies from the page cache at a
fraction of what the memory or a GPU's bus can take, and leaves a disk idle between two requests."""


@dataclass(frozen=True, slots=True)
class Read:
    """A block, its bad rows found, the memory that it is in if that is ours, and its seconds."""

    block: Block
    memory: Memory | None
    seconds: float


class ReadAhead:
    """Reads a source, from some row to its end, by threads of its own. A context manager.

    A matrix is read in several places at once, into memory that is used again when it is taken
    back; everything else from one block to the next, wherever its format puts them. Whether all
    numbers are finite is seen in the same threads, if it is to be. Blocks come in the order of
    their rows.

    Parameters
    ----------
    source : Source
        What to read.
    start : int
        The first row.
    n_rows : int
        Rows of a block, at most.
    memory : callable
        Makes memory of at least so many bytes, from the beginning of a page.
    check : bool
        Whether to look for rows that are not finite.

    Attributes
    ----------
    threads : int
        How many read.
    """

    def __init__(
        self,
        source: Source,
        start: int,
        n_rows: int,
        memory: Callable[[int], Memory],
        *,
        check: bool = True,
    ) -> None:
        self._check = check
        self._source, self._memory = source, memory
        self._free: list[Memory] = []
        self._reads: Iterator[Callable[[], Read | None]]
        if isinstance(source, MatrixRows):
            self.threads = READERS
            self._n_bytes = n_rows * source.width * source.dtype.itemsize + SLACK
            starts = range(start, source.n_rows or 0, n_rows)
            self._reads = (partial(self._read, source, at, at + n_rows) for at in starts)
        else:
            self.threads = 1
            self._reads = repeat(partial(self._read_on, source.blocks(start, n_rows)))
        self._pool = ThreadPoolExecutor(self.threads, "semid-read")

    def __iter__(self) -> Iterator[Read | BaseException]:
        """All blocks, or those before an error, which comes last."""
        begun = deque(map(self._pool.submit, islice(self._reads, self.threads + AHEAD)))
        while begun:
            first = begun.popleft()
            error = first.exception()
            if error is not None:
                yield error
                return
            found = first.result()
            if found is None:
                return
            yield found
            # Only now: it may be read into memory that has been taken back meanwhile.
            begun.extend(map(self._pool.submit, islice(self._reads, 1)))

    def take_back(self, memory: Memory | None) -> None:
        """Use memory again: nobody needs the block any more that was read into it."""
        if memory is not None:
            self._free.append(memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, source: MatrixRows, start: int, stop: int) -> Read:
        began = time.perf_counter()
        try:
            memory = self._free.pop()
        except IndexError:  # no more than blocks read ahead and blocks at work
            memory = self._memory(self._n_bytes)
        rows = source.read(start, min(stop, source.n_rows or 0), memory)
        block = self._checked(Block(start, rows))
        return Read(block, memory, time.perf_counter() - began)

    def _checked(self, block: Block) -> Block:
        return checked(block) if self._check else block

    def _read_on(self, blocks: Iterator[Block]) -> Read | None:
        began = time.perf_counter()
        block = next(blocks, None)
        if block is None:
            return None
        return Read(self._checked(block), None, time.perf_counter() - began)


def checked(block: Block) -> Block:
    """A block with its rows that are not finite among the bad ones."""
    bad = block.bad | not_finite(block.rows, block.start)
    return replace(block, bad=dict(sorted(bad.items())))
