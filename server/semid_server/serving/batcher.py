"""Requests in, batches out: admission, batches across callers, exactly one answer to each.

A request that is admitted waits in a queue of its key (what can run together shares a key). One
thread, the worker, owns whatever runs the batches. Whenever it is free it takes the request whose
turn it is and all others of the same key that fit beside it, runs them, and hands the answers back
to the event loop. So a lone request never waits for company, and a batch grows by itself while
the worker is busy. Nothing polls.

Whose turn it is: requests are ordered by the time at which each would have been done had it come
to an idle worker. A small one thereby goes ahead of a large one that came a little before it, and
nobody starves: whatever comes later than that time goes behind.

The life of a request::

    admit() ── no room ──> OverloadedError
      │
      ▼
    QUEUED ── its future is cancelled ──> withdrawn: room is given back at once
      │  └─── its deadline has passed when it is reached ──> DeadlineExpiredError
      ▼
    TAKEN ──> the batch's answer, or its error, sets the future

Everything that the loop and the worker share is guarded by one condition variable.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from semid_server.errors import (
    DeadlineExpiredError,
    DeviceError,
    DeviceLostError,
    NotServingError,
    OverloadedError,
    SemidError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound="Hashable")
Payload = TypeVar("Payload")
Answer = TypeVar("Answer")
T = TypeVar("T")

MIN_RETRY_AFTER = 0.05
MAX_RETRY_AFTER = 5.0


class Runner(ABC, Generic[Key, Payload, Answer]):
    """What runs batches. Every method is called by the worker thread alone."""

    @abstractmethod
    def run(self, key: Key, payloads: Sequence[Payload]) -> Sequence[Answer | SemidError]:
        """Answer each payload, in order; an error in a place answers that payload alone."""

    def after(self) -> None:
        """Do what may wait until the answers of the batch are on their way."""


RunnerT = TypeVar("RunnerT", bound=Runner[Any, Any, Any])


class Observer(Protocol):
    """Is told what happens to requests. Called by the loop and the worker: must be thread-safe."""

    def admitted(self, key: Hashable) -> object:
        """Told by its caller's task that a request was admitted; `ran` is given what it returns."""

    def refused(self, key: Hashable) -> None:
        """Told that a request found no room."""

    def expired(self, key: Hashable) -> None:
        """Told that a request's deadline passed before it was taken."""

    def withdrawn(self, key: Hashable) -> None:
        """Told that a caller left while its request was queued."""

    def ran(
        self,
        key: Hashable,
        *,
        rows: int,
        waits: Sequence[float],
        seconds: float,
        failed: bool,
        marks: Sequence[object],
    ) -> None:
        """Told that a batch ran: its rows, the seconds each request waited, and its own.

        ``marks`` are what `admitted` returned for each of its requests.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Bounds of batches and of the queue.

    Attributes
    ----------
    max_batch_rows, max_batch_bytes : int
        A batch holds no more than either. A single request may not be larger: see `Batcher.admit`.
    max_queue_requests, max_queue_bytes : int
        The queue, not counting the batch that runs, holds no more than either.
    """

    max_batch_rows: int
    max_batch_bytes: int
    max_queue_requests: int
    max_queue_bytes: int


@dataclass(frozen=True, slots=True)
class QueueState:
    """How full the queue is, at one moment."""

    requests: int
    rows: int
    nbytes: int


class _Entry(Generic[Key, Payload, Answer]):
    """One admitted request."""

    __slots__ = (
        "admitted",
        "deadline",
        "future",
        "key",
        "mark",
        "nbytes",
        "payload",
        "rows",
        "turn",
    )

    def __init__(
        self,
        key: Key,
        payload: Payload,
        *,
        rows: int,
        nbytes: int,
        deadline: float | None,
        admitted: float,
        turn: tuple[float, int],
        future: asyncio.Future[Answer],
        mark: object,
    ) -> None:
        self.key, self.payload = key, payload
        self.rows, self.nbytes = rows, nbytes
        self.deadline, self.admitted, self.turn = deadline, admitted, turn
        self.future, self.mark = future, mark


class Batcher(Generic[Key, Payload, Answer]):
    """Forms batches across callers and has one thread run them.

    Parameters
    ----------
    limits : BatchLimits
        Bounds of batches and of the queue.
    observer : Observer
        Is told what happens, for metrics.
    clock : callable
        Seconds that never go back; deadlines are times of this clock.
    """

    def __init__(
        self,
        *,
        limits: BatchLimits,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._observer, self._clock = limits, observer, clock
        self._changed = threading.Condition()
        # Each in the order of turns.
        self._queues: dict[Key, list[_Entry[Key, Payload, Answer]]] = {}
        self._next_ticket = 0
        self._requests = self._rows = self._nbytes = 0
        self._stopped = False
        self._rows_per_second = 0.0
        self._waiting_for_room: deque[asyncio.Future[None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lost: asyncio.Future[DeviceLostError]

    # -- the event loop's side ---------------------------------------------------------------

    async def start(self, make_runner: Callable[[], RunnerT]) -> RunnerT:
        """Start the worker, have it make the runner, and return that.

        A model on a device is thus made by the thread that will own it. Whatever ``make_runner``
        raises is raised here, and the worker has ended.
        """
        self._loop = asyncio.get_running_loop()
        self._lost = self._loop.create_future()
        made: asyncio.Future[RunnerT] = self._loop.create_future()
        # A daemon: a process told to end while the device hangs must be able to.
        threading.Thread(
            target=self._work, args=(make_runner, made), name="semid-device", daemon=True
        ).start()
        return await made

    def admit(
        self, key: Key, payload: Payload, *, rows: int, nbytes: int, deadline: float | None
    ) -> asyncio.Future[Answer]:
        """Queue a request and return the future of its answer, or refuse it at once.

        Parameters
        ----------
        key : hashable
            Requests of equal keys may share a batch.
        payload : object
            Handed to the runner; let go of as soon as the request ends, however it ends.
        rows, nbytes : int
            Its size, counted against the limits. The caller has refused what exceeds the limits
            of a batch, in words of its own: here that is a bug.
        deadline : float or None
            Time of the clock after which no work is done for it.

        Returns
        -------
        asyncio.Future
            Cancelling it withdraws the request, if no batch has taken it.

        Raises
        ------
        OverloadedError
            The queue is full.
        NotServingError
            The batcher has stopped.
        """
        if rows > self._limits.max_batch_rows or nbytes > self._limits.max_batch_bytes:
            raise ValueError(
                f"a request of {rows} rows and {nbytes} bytes exceeds a batch of "
                f"{self._limits.max_batch_rows} rows and {self._limits.max_batch_bytes} bytes"
            )
        assert self._loop is not None, "start() comes first"  # noqa: S101 - a bug of ours
        with self._changed:
            if self._stopped:
                raise NotServingError("the server has shut down")
            if not self._has_room(nbytes):
                self._observer.refused(key)
                raise OverloadedError(
                    f"the queue is full: {self._requests} requests with {self._nbytes} bytes wait "
                    f"(limits: {self._limits.max_queue_requests} requests, "
                    f"{self._limits.max_queue_bytes} bytes)",
                    retry_after=self._time_to_clear(),
                )
            now = self._clock()
            alone = rows / self._rows_per_second if self._rows_per_second else 0.0
            self._next_ticket += 1
            entry = _Entry(
                key,
                payload,
                rows=rows,
                nbytes=nbytes,
                deadline=deadline,
                admitted=now,
                turn=(now + alone, self._next_ticket),
                future=self._loop.create_future(),
                mark=self._observer.admitted(key),
            )
            insort(self._queues.setdefault(key, []), entry, key=_turn)
            self._count(entry, +1)
            self._changed.notify()
        entry.future.add_done_callback(
            lambda future: self._withdraw(entry) if future.cancelled() else None
        )
        return entry.future

    async def admit_when_room(
        self, key: Key, payload: Payload, *, rows: int, nbytes: int, deadline: float | None
    ) -> asyncio.Future[Answer]:
        """Do as `admit` does, but wait for room instead of refusing: for flow-controlled streams.

        The caller bounds how many wait here. Waiters are served in the order in which they came.
        """
        my_turn = not self._waiting_for_room
        while True:
            with self._changed:
                stopped, room = self._stopped, self._has_room(nbytes)
            if stopped or (room and my_turn):
                future = self.admit(key, payload, rows=rows, nbytes=nbytes, deadline=deadline)
                self._wake_next_waiter()
                return future
            waiter = asyncio.get_running_loop().create_future()
            if my_turn:  # the room went to a caller that does not wait: still the first
                self._waiting_for_room.appendleft(waiter)
            else:
                self._waiting_for_room.append(waiter)
            my_turn = True
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._waiting_for_room:
                    self._waiting_for_room.remove(waiter)
                else:  # woken and cancelled at once: the turn goes to the next
                    self._wake_next_waiter()
                raise

    def stop(self) -> None:
        """End the worker after the batch that runs; what is still queued fails as unavailable."""
        with self._changed:
            self._stopped = True
            for queue in self._queues.values():
                for entry in queue:
                    self._count(entry, -1)
                    if not entry.future.done():
                        entry.future.set_exception(
                            NotServingError("the server shut down before this request was reached")
                        )
            self._queues.clear()
            self._changed.notify()
        while self._waiting_for_room:
            self._wake_next_waiter()

    async def lost(self) -> DeviceLostError:
        """Wait until the device is lost, if ever it is; nothing is admitted from then on."""
        return await asyncio.shield(self._lost)

    def _lose(self, error: DeviceLostError) -> None:
        if not self._lost.done():
            self._lost.set_result(error)
        self.stop()

    @property
    def queue(self) -> QueueState:
        """How full the queue is now."""
        with self._changed:
            return QueueState(self._requests, self._rows, self._nbytes)

    def _withdraw(self, entry: _Entry[Key, Payload, Answer]) -> None:
        with self._changed:
            queue = self._queues.get(entry.key, [])
            place = bisect_left(queue, entry.turn, key=_turn)
            if place == len(queue) or queue[place] is not entry:
                return  # a batch has taken it; its answer will find nobody
            del queue[place]
            if not queue:
                del self._queues[entry.key]
            self._count(entry, -1)
        self._observer.withdrawn(entry.key)
        self._wake_next_waiter()

    def _deliver(
        self,
        batch: Sequence[_Entry[Key, Payload, Answer]],
        answers: Sequence[Answer | SemidError],
    ) -> None:
        for entry, answer in zip(batch, answers, strict=True):
            if entry.future.done():  # its caller left
                continue
            if isinstance(answer, SemidError):
                entry.future.set_exception(answer)
            else:
                entry.future.set_result(answer)

    def _wake_next_waiter(self) -> None:
        while self._waiting_for_room:
            waiter = self._waiting_for_room.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    # -- shared, with the condition held -----------------------------------------------------

    def _has_room(self, nbytes: int) -> bool:
        # An empty queue takes any single request: it is no larger than a batch.
        return self._requests == 0 or (
            self._requests < self._limits.max_queue_requests
            and self._nbytes + nbytes <= self._limits.max_queue_bytes
        )

    def _count(self, entry: _Entry[Key, Payload, Answer], sign: int) -> None:
        self._requests += sign
        self._rows += sign * entry.rows
        self._nbytes += sign * entry.nbytes

    def _time_to_clear(self) -> float:
        if self._rows_per_second <= 0:
            return MIN_RETRY_AFTER
        return min(MAX_RETRY_AFTER, max(MIN_RETRY_AFTER, self._rows / self._rows_per_second))

    # -- the worker's side -------------------------------------------------------------------

    def _work(self, make_runner: Callable[[], RunnerT], made: asyncio.Future[RunnerT]) -> None:
        try:
            runner = make_runner()
        except BaseException as error:  # noqa: BLE001 - handed to whoever awaits start()
            self._in_loop(_fail, made, error)
            return
        self._in_loop(_fulfil, made, runner)
        while (batch := self._take()) is not None:
            if batch:  # else all that was reached had expired
                self._run(runner, batch)

    def _take(self) -> list[_Entry[Key, Payload, Answer]] | None:
        """Wait for work and take the next batch; None when stopped."""
        expired: list[_Entry[Key, Payload, Answer]] = []
        with self._changed:
            while True:
                if self._stopped:
                    return None
                batch = self._form_batch(expired)
                if batch or expired:
                    break
                self._changed.wait()
        if expired:
            for entry in expired:
                self._observer.expired(entry.key)
            late = DeadlineExpiredError(
                "the deadline passed while the request was queued; nothing was computed"
            )
            self._in_loop(self._deliver, expired, [late] * len(expired))
        self._in_loop(self._wake_next_waiter)
        return batch

    def _form_batch(
        self, expired: list[_Entry[Key, Payload, Answer]]
    ) -> list[_Entry[Key, Payload, Answer]]:
        """Take the live request whose turn it is, and those of its key that fit beside it."""
        now = self._clock()
        batch: list[_Entry[Key, Payload, Answer]] = []
        while self._queues and not batch:
            key = min(self._queues, key=lambda key: self._queues[key][0].turn)
            left: list[_Entry[Key, Payload, Answer]] = []
            rows = nbytes = 0
            for entry in self._queues[key]:
                if entry.deadline is not None and entry.deadline <= now:
                    expired.append(entry)
                elif not batch or self._fits(rows + entry.rows, nbytes + entry.nbytes):
                    batch.append(entry)
                    rows += entry.rows
                    nbytes += entry.nbytes
                else:  # those behind it may be small enough
                    left.append(entry)
                    continue
                self._count(entry, -1)
            if left:
                self._queues[key] = left
            else:
                del self._queues[key]
        return batch

    def _fits(self, rows: int, nbytes: int) -> bool:
        return rows <= self._limits.max_batch_rows and nbytes <= self._limits.max_batch_bytes

    def _run(
        self, runner: Runner[Key, Payload, Answer], batch: list[_Entry[Key, Payload, Answer]]
    ) -> None:
        key = batch[0].key
        rows = sum(entry.rows for entry in batch)
        started = self._clock()
        failed = False
        answers: Sequence[Answer | SemidError]
        try:
            answers = runner.run(key, [entry.payload for entry in batch])
        except SemidError as error:
            failed, answers = True, [error] * len(batch)
            if isinstance(error, DeviceLostError):
                logger.critical("%s", error)
                with self._changed:
                    self._stopped = True  # at once: the loop answers those that wait
                self._in_loop(self._lose, error)
        except Exception:
            # The text stays in the log: it may hold what is no caller's business.
            logger.exception("a batch of %d requests with %d rows failed", len(batch), rows)
            failed = True
            answers = [DeviceError("the device failed while it computed this batch")] * len(batch)
        seconds = self._clock() - started
        if not failed and seconds > 0:
            # A moving average, for the hint to refused callers.
            rate = rows / seconds
            smoothed = 0.8 * self._rows_per_second + 0.2 * rate
            self._rows_per_second = smoothed if self._rows_per_second else rate
        waits = [started - entry.admitted for entry in batch]
        marks = [entry.mark for entry in batch]
        self._observer.ran(key, rows=rows, waits=waits, seconds=seconds, failed=failed, marks=marks)
        self._in_loop(self._deliver, batch, answers)
        if failed:
            return
        try:
            runner.after()
        except Exception:
            logger.exception("what follows a batch failed; its answers are not affected")

    def _in_loop(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None, "start() comes first"  # noqa: S101 - a bug of ours
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def _turn(entry: _Entry[Any, Any, Any]) -> tuple[float, int]:
    return entry.turn


def _fulfil(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
