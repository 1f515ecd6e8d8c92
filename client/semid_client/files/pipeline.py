"""Rows through an engine into work: reading, computing and writing at the same time.

Threads read ahead, the engine's threads compute, the caller's thread writes and records progress.
Each hands on a bounded number of blocks, so that memory is that of a few blocks.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from semid_client._errors import InvalidInputError
from semid_client.files._errors import FileError, NotFiniteError
from semid_client.files.reading import AHEAD, ReadAhead, checked
from semid_client.files.rows import Block

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from semid_client._model import ModelInfo
    from semid_client.files.memory import Memory
    from semid_client.files.outputs import OnBadRow
    from semid_client.files.reading import Read
    from semid_client.files.rows import Source
    from semid_client.files.work import Progress


class Engine(Protocol):
    """What computes: a server, or a checkpoint on this machine.

    Attributes
    ----------
    info : ModelInfo
        The model, of which all answers are.
    where : str
        Where it is, for messages.
    stage : str
        What its work is called where it is the bottleneck.
    threads : int
        How many blocks it can work on at once.
    block_bytes : int
        Bytes of rows that make a good block.
    screens : bool
        Whether `encode` looks for rows that are not finite, and refuses them by a
        `NotFiniteError`; otherwise they have to be found before.
    """

    info: ModelInfo
    where: str
    stage: str
    threads: int
    block_bytes: int
    screens: bool

    def memory(self, n_bytes: int) -> Memory:
        """At least so many bytes, from the beginning of a page, where rows are best read into."""

    def encode(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Codes (n, L) of finite embeddings (n, D), which change after that.

        Raises
        ------
        NotFiniteError
            If some are not, and it looks for that.
        """

    def decode(self, codes: NDArray[Any], mode: str) -> NDArray[Any]:
        """Reconstructions float32 (n, D) of codes (n, l)."""

    def close(self) -> None:
        """Let go of it."""


class Sink(Protocol):
    """What takes the rows that were computed: `Work`, or a stream."""

    @property
    def progress(self) -> Progress:
        """How far it is."""

    def append(self, n_in: int, rows: NDArray[Any], bad: Mapping[int, str]) -> None:
        """Add what the next ``n_in`` rows of the input gave; ``bad`` by index in the input."""


@dataclass(slots=True)
class Stages:
    """Seconds that each stage was at work, side by side; the largest is the bottleneck."""

    reading: float = 0.0
    computing: float = 0.0
    writing: float = 0.0
    bytes_read: int = 0

    def bottleneck(self, computing: str) -> str:
        """Name the stage that the others wait for."""
        stages = {"reading": self.reading, computing: self.computing, "writing": self.writing}
        return max(stages, key=lambda name: stages[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Brings what an engine makes of the rows of a source, and is not there yet, into work.

    Attributes
    ----------
    source, work
        From where, and to where.
    engine : Engine
        Says how much at once.
    compute : callable
        One of its methods.
    on_bad_row : "fail", "skip" or "null"
        What to do about rows that hold NaN, or no numbers: end; leave them out; leave some row for
        them. The two latter list them in the work.
    report : callable
        Called with the number of rows that were done, after each block.
    row_bytes : int
        Bytes of a row that is computed: no more of them make a block than of the source's.
    keep_ids : callable, optional
        Given the ids of each block of a stream.
    stages : Stages
        How long each took.
    """

    source: Source
    work: Sink
    engine: Engine
    compute: Callable[[NDArray[Any]], NDArray[Any]]
    on_bad_row: OnBadRow
    report: Callable[[int], None]
    row_bytes: int = 0
    keep_ids: Callable[[Any], None] | None = None
    stages: Stages = field(default_factory=Stages)
    _waiting: deque[_Waiting] = field(default_factory=deque)

    def run(self) -> None:
        """Do it all.

        Raises
        ------
        FileError
            If the source cannot be read, holds a bad row, or the output cannot be written.
        SemidClientError
            If the engine cannot go on. After any error the engine is closed.
        """
        row_bytes = max(self.source.width * self.source.dtype.itemsize, self.row_bytes, 1)
        n_rows = max(1, self.engine.block_bytes // row_bytes)
        start = self.work.progress.rows_in
        pool = ThreadPoolExecutor(self.engine.threads, "semid-compute")
        check = not self.engine.screens
        with ReadAhead(self.source, start, n_rows, self.engine.memory, check=check) as reads:
            try:
                for item in reads:
                    self._waiting.append(self._submit(item, pool, reads.threads))
                    # What is done goes at once: its memory is of use to the next.
                    while self._waiting and (
                        self._waiting[0].future.done()
                        or len(self._waiting) > AHEAD * self.engine.threads
                    ):
                        reads.take_back(self._finish())
                while self._waiting:
                    reads.take_back(self._finish())
            except BaseException:
                self.engine.close()  # ends what is under way: nobody waits for it any more
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _submit(
        self, item: Read | BaseException, pool: ThreadPoolExecutor, readers: int
    ) -> _Waiting:
        # What is wrong is said in its turn, so that what comes before it is kept.
        if isinstance(item, BaseException):
            return _Waiting(Block(0, np.empty((0, 0))), None, pool.submit(_fail, item))
        block = item.block
        self.stages.reading += item.seconds / readers
        self.stages.bytes_read += block.rows.nbytes
        return _Waiting(block, item.memory, pool.submit(self._timed, block))

    def _timed(self, block: Block) -> _Computed:
        began = time.perf_counter()
        try:
            answer = self._compute(block)
        except NotFiniteError:  # seldom: only now they are looked for here
            block = checked(block)
            answer = self._compute(block)
        return _Computed(block, answer, time.perf_counter() - began)

    def _compute(self, block: Block) -> NDArray[Any]:
        if block.bad and self.on_bad_row == "fail":
            row, problem = next(iter(block.bad.items()))
            path, at = self.source.named(row)
            raise FileError(path, f"row {at}: {problem}")
        return self.compute(_without_bad(block))

    def _finish(self) -> Memory | None:
        """Write what the block gave that was submitted first; return the memory it was read to."""
        waiting = self._waiting.popleft()
        done = waiting.answer(self.source)
        block, answer = done.block, done.answer
        self.stages.computing += done.seconds / self.engine.threads
        began = time.perf_counter()
        if block.bad and self.on_bad_row == "skip":
            answer = np.delete(answer, _places(block), axis=0)
        if self.keep_ids is not None:
            self.keep_ids(block.ids)
        self.work.append(len(block.rows), answer, block.bad)
        self.stages.writing += time.perf_counter() - began
        self.report(len(block.rows))
        return waiting.memory


@dataclass(frozen=True, slots=True)
class _Computed:
    """A block with all that is bad in it, what it gave, and the seconds that took."""

    block: Block
    answer: NDArray[Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A block that is being computed, and the memory that it was read into, if that is ours."""

    block: Block
    memory: Memory | None
    future: Future[_Computed]

    def answer(self, source: Source) -> _Computed:
        """Wait for what was computed; a refusal is about a row of the source."""
        # In pieces: an interrupt that comes just before a lock is waited for is not seen meanwhile.
        while not self.future.done():
            wait((self.future,), timeout=1)
        try:
            return self.future.result()
        except InvalidInputError as error:
            if error.row is None:
                raise FileError(source.path, error.problem) from error
            path, at = source.named(self.block.start + error.row)
            raise FileError(path, f"row {at}: {error.problem}") from error


def _fail(error: BaseException) -> _Computed:
    raise error


def _places(block: Block) -> list[int]:
    """Where in the block the bad rows are."""
    return [row - block.start for row in block.bad]


def _without_bad(block: Block) -> NDArray[Any]:
    """Rows of a block with zeros for bad ones, which are computed too and then dropped."""
    rows = block.rows
    if block.bad:
        if not rows.flags.writeable:
            rows = rows.copy()
        rows[_places(block)] = 0  # finite, and a code of every model
    return rows
