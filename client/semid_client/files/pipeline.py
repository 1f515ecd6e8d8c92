"""Rows through an engine into work: reading, computing and writing at the same time.

One thread reads ahead, the engine's threads compute, the caller's thread writes and records
progress. Each hands on a bounded number of blocks, so that memory is that of a few blocks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from semid_client._errors import InvalidInputError
from semid_client.files._errors import FileError
from semid_client.files.rows import Block

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from semid_client._model import ModelInfo
    from semid_client.files.outputs import OnBadRow
    from semid_client.files.rows import Source
    from semid_client.files.work import Progress

AHEAD: Final = 2
"""Blocks that are read ahead, and that wait for each thread of the engine."""


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
    """

    info: ModelInfo
    where: str
    stage: str
    threads: int
    block_bytes: int

    def encode(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Codes (n, L) of finite embeddings (n, D)."""

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
        row_bytes = max(self.source.width * self.source.dtype.itemsize, 1)
        n_rows = max(1, self.engine.block_bytes // row_bytes)
        blocks = self.source.blocks(self.work.progress.rows_in, n_rows)
        pool = ThreadPoolExecutor(self.engine.threads, "semid-compute")
        try:
            for item in _ahead(blocks, self.stages):
                self._waiting.append(self._submit(item, pool))
                if len(self._waiting) > AHEAD * self.engine.threads:
                    self._finish()
            while self._waiting:
                self._finish()
        except BaseException:
            self.engine.close()  # ends what is under way: nobody waits for it any more
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, item: Block | BaseException, pool: ThreadPoolExecutor) -> _Waiting:
        # What is wrong is said in its turn, so that what comes before it is kept.
        if isinstance(item, BaseException):
            return _Waiting(Block(0, np.empty((0, 0))), {}, pool.submit(_fail, item))
        bad = dict(sorted((item.bad | not_finite(item)).items()))
        if bad and self.on_bad_row == "fail":
            row, problem = next(iter(bad.items()))
            error = FileError(self.source.path, f"row {row}: {problem}")
            return _Waiting(item, bad, pool.submit(_fail, error))
        return _Waiting(item, bad, pool.submit(self._timed, _without(item, bad)))

    def _timed(self, rows: NDArray[Any]) -> NDArray[Any]:
        began = time.perf_counter()
        answer = self.compute(rows)
        self.stages.computing += (time.perf_counter() - began) / self.engine.threads
        return answer

    def _finish(self) -> None:
        done = self._waiting.popleft()
        answer = done.answer(self.source.path)
        began = time.perf_counter()
        if done.bad and self.on_bad_row == "skip":
            answer = np.delete(answer, done.places, axis=0)
        if self.keep_ids is not None:
            self.keep_ids(done.block.ids)
        self.work.append(len(done.block.rows), answer, done.bad)
        self.stages.writing += time.perf_counter() - began
        self.report(len(done.block.rows))


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A block that is being computed, and its bad rows by index in the source."""

    block: Block
    bad: dict[int, str]
    future: Future[NDArray[Any]]

    @property
    def places(self) -> list[int]:
        """Where in the block the bad rows are."""
        return [row - self.block.start for row in self.bad]

    def answer(self, path: str) -> NDArray[Any]:
        """Wait for what was computed; a refusal is about a row of the source."""
        try:
            return self.future.result()
        except InvalidInputError as error:
            place = "" if error.row is None else f"row {self.block.start + error.row}: "
            raise FileError(path, place + error.problem) from error


def _fail(error: BaseException) -> NDArray[Any]:
    raise error


def _without(block: Block, bad: dict[int, str]) -> NDArray[Any]:
    """Rows of a block with zeros for bad ones, which are computed too and then dropped."""
    if not bad:
        return block.rows
    rows = block.rows.copy()
    rows[[row - block.start for row in bad]] = 0  # finite, and a code of every model
    return rows


def _ahead(blocks: Iterator[Block], stages: Stages) -> Iterator[Block | BaseException]:
    """Read in a thread of its own, `AHEAD` blocks before they are asked for; errors come last."""
    ready: queue.Queue[Block | BaseException | None] = queue.Queue(AHEAD)
    stop = threading.Event()

    def hand_on(item: Block | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def read() -> None:
        try:
            began = time.perf_counter()
            for block in blocks:
                stages.reading += time.perf_counter() - began
                stages.bytes_read += block.rows.nbytes
                hand_on(block)
                if stop.is_set():
                    return
                began = time.perf_counter()
        except BaseException as error:  # noqa: BLE001 -- raised where the blocks are asked for
            hand_on(error)
        hand_on(None)

    reader = threading.Thread(target=read, name="semid-read", daemon=True)
    reader.start()
    try:
        while (item := ready.get()) is not None:
            yield item
    finally:
        stop.set()
        reader.join()


def not_finite(block: Block) -> dict[int, str]:
    """Rows that hold NaN or an infinity, by index in the source."""
    rows = block.rows
    if rows.dtype.kind in "iu" or not rows.size:
        return {}
    with np.errstate(over="ignore", invalid="ignore"):
        # No sum of numbers of which one is not finite is finite: one pass finds the suspects.
        suspects = np.flatnonzero(~np.isfinite(rows.sum(axis=1)))
    bad = {}
    for row in suspects.tolist():
        columns = np.flatnonzero(~np.isfinite(rows[row]))
        if len(columns):
            column = int(columns[0])
            bad[block.start + row] = (
                f"number {column} is {rows[row, column]}; embeddings are finite"
            )
    return bad
