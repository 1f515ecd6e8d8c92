"""Requests in, batches out: admission, batches across callers, exactly one answer to each.

A request that is admitted waits in a queue of its key (what can run together shares a key). One
thread, the worker, owns whatever runs the batches. Whenever it is free it takes a *turn*: requests
of one key, as many as it is known to run within `BatchLimits.max_batch_seconds`. It runs them and
hands the answers back to the event loop. So a lone request never waits for company, and a batch
grows by itself while the worker is busy. Nothing polls.

**Who is in a turn.** Keys that wait take turns. Within a key, requests are ordered by the time at
which each would have been done had it come to an idle worker: a small one goes ahead of a large one
that came a little before it, and does not overtake for ever. A request that fills more than a turn
is taken in parts, and gets a quarter of each turn for certain, more only if nobody else wants it.
So a large caller delays small ones by no more than a turn, and small ones never starve a large one.
Turns cost large callers something, most of all a CPU's: where nobody small has come for a while,
they are longer, until somebody does.

**Short turns.** Handing work to a thread and back costs more than a small batch itself. Where the
runner allows it (`Runner.runs_quickly`), and only while the worker rests, the event loop runs
batches that are known to take less than `QUICK` seconds itself, once it has read all that had come.
A short request that finds nothing queued it may run at once, alone (`Batcher.answer_now`): to wait
for others that might share its batch would cost more than a short batch does. Where the worker has
a processor to itself, requests that come thick and fast are left to it from `APART` seconds on,
those of `FEW_BYTES` and less from `APART_FEW`. And where a batch costs about as much however few
requests it has (`Runner.company_pays`), one that is known to come with others waits for them, for a
turn or two of the loop.

The life of a request that is queued::

    admit() ── no room, or no time ──> OverloadedError
      │
      ▼
    QUEUED ── its future is cancelled ──> withdrawn: room is given back at once
      │  └─── its deadline cannot be met when it is reached ──> DeadlineExpiredError
      ▼
    TAKEN, in parts if it is large ──> the answer, or an error, sets the future

What the loop and the worker share is guarded by one lock, but for what only the one who runs a
batch writes: which batch that is, and until when.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from semid_server.errors import (
    DeadlineExpiredError,
    DeviceError,
    DeviceLostError,
    InvalidInputError,
    NotServingError,
    OverloadedError,
    SemidError,
)
from semid_server.serving.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound="Hashable")
Payload = TypeVar("Payload")
Answer = TypeVar("Answer")
T = TypeVar("T")

MIN_RETRY_AFTER = 0.05
MAX_RETRY_AFTER = 5.0

QUICK: Final = 0.0005
"""Seconds that a batch may take which the event loop runs itself: no more than what the way to the
worker and back costs, and too little to be missed by the other calls."""

QUICK_AT_MOST: Final = 4 * QUICK
"""Seconds that such a batch may take on average, whatever gets in its way."""

APART: Final = 0.00008
"""Seconds from which a batch is worth the way to the worker, if that has a processor of its own and
the loop has other calls to see to."""

APART_FEW: Final = 0.00015
FEW_BYTES: Final = 128 * 1024
"""The same for batches of at most so many bytes. To copy more is what the loop is spared; few are
copied in no time, and what a device then takes for them is less than what the way costs."""

APART_AT_MOST: Final = 0.0003
SHARED_BYTES: Final = 2 << 20
"""A batch that requests share may take the loop `APART` seconds for each, but no more in all than
that; and have so many bytes."""

COMPANY: Final = 2
"""Calls on their way from which on a request waits for them: one alone is often not worth it."""

PUT_OFF_AT_MOST: Final = 2
"""Turns of the loop that it waits: what was on its way is there by then, or is long in coming."""

LOOP_SHARE: Final = 7
"""The loop has, where such batches would take more than one part in so many of its time."""

TO_SPARE: Final = 4
"""Processors from which the worker is taken to have one: some for the loop and gRPC's threads."""

LARGE_SHARE: Final = 4
"""A request larger than a turn gets one part in so many of each turn while others wait."""

AMONG_LARGE: Final = 4
"""How many times as long turns are while only large requests come."""

AWHILE: Final = 1.0
"""Seconds without a small request, after which turns are longer."""

ALIKE: Final = 0.01
"""Seconds in which a full queue hardly changes: so long, all get the same refusal."""

_LONG_GAP: Final = 2 * LOOP_SHARE * QUICK
"""Seconds between two requests beyond which all are alike: there is time for any short batch."""

_GAPS: Final = 8
"""Requests that the time between two of them is told from, as a moving average."""

MAX_PACES: Final = 256
"""Kinds of batches whose speed is remembered: the oldest is forgotten for a new one."""


class Runner(ABC, Generic[Key, Payload, Answer]):
    """What runs batches: one at a time, called by the worker thread alone unless it is quick.

    Attributes
    ----------
    divisible : bool
        Whether requests may be run in parts; `part` and `join` are needed then.
    """

    divisible: bool = False

    @abstractmethod
    def run(self, key: Key, payloads: Sequence[Payload]) -> Sequence[Answer | SemidError]:
        """Answer each payload, in order; an error in a place answers that payload alone."""

    def run_alone(self, key: Key, payload: Payload) -> Answer | SemidError:
        """Answer one payload as `run` does. Called by the event loop's thread, if it is quick."""
        (answer,) = self.run(key, (payload,))
        return answer

    def part(self, payload: Payload, start: int, stop: int) -> Payload:
        """Return rows ``start`` to ``stop`` of a payload."""
        raise NotImplementedError

    def join(self, answers: Sequence[Answer]) -> Answer:
        """Return the answer to a payload from those to its parts."""
        raise NotImplementedError

    def runs_quickly(self, key: Key) -> bool:  # noqa: ARG002 - here none of them is
        """Whether the event loop's thread may run short batches as well, while the worker rests."""
        return False

    def company_pays(self, key: Key) -> bool:  # noqa: ARG002 - of a runner that does not tell, no
        """Whether a short batch takes about as long with a few requests more."""
        return False

    def kind(self, key: Key) -> Hashable:
        """Return what batches that take equally long have in common.

        It is kept for longer than their requests, so it must not hold on to what runs them.
        """
        return key

    def after(self) -> None:
        """Do what may wait until the answers of the batch are set."""


RunnerT = TypeVar("RunnerT", bound=Runner[Any, Any, Any])


class Observer(Protocol):
    """Is told what happens to requests. Called by the loop and the worker: must be thread-safe."""

    def admitted(self, key: Hashable, rows: int) -> object:
        """Told by its caller's task that a request was admitted; `ran` is given what it returns."""

    def refused(self, key: Hashable) -> None:
        """Told that a request found no room, or not enough time left."""

    def expired(self, key: Hashable) -> None:
        """Told that a request was dropped, since its deadline could not be met."""

    def withdrawn(self, key: Hashable) -> None:
        """Told that a caller left while its request was queued."""

    def ran(
        self,
        key: Hashable,
        *,
        rows: int,
        answered: int,
        waits: Sequence[float],
        seconds: float,
        failed: bool,
        marks: Sequence[object],
    ) -> None:
        """Told that a batch ran: its rows, the seconds each request waited, and its own.

        ``answered`` are those of its rows whose requests it did not end with an error. ``failed``
        tells that the device failed to run it, or failed with a part of it.
        ``marks`` are what `admitted` returned for each of its requests; ``waits`` leave out those
        that an earlier batch had begun with.
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
    max_batch_seconds : float
        A batch is made to take about so long at most, by what earlier ones took; `AMONG_LARGE`
        times as long where nothing has come for `AWHILE` that takes less than half of it.
    """

    max_batch_rows: int
    max_batch_bytes: int
    max_queue_requests: int
    max_queue_bytes: int
    max_batch_seconds: float = math.inf


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
        "answers",
        "deadline",
        "done",
        "future",
        "key",
        "mark",
        "nbytes",
        "pace",
        "payload",
        "rows",
        "seconds",
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
        pace: Pace,
        ticket: int,
        future: asyncio.Future[Answer],
        mark: object,
    ) -> None:
        self.key, self.payload = key, payload
        self.rows, self.nbytes = rows, nbytes
        self.deadline, self.admitted = deadline, admitted
        # What it would take alone, and its place in the order.
        self.pace, self.seconds = pace, pace.work(rows)
        self.turn = admitted + self.seconds, ticket
        self.future, self.mark = future, mark
        # Rows that were taken, and the answers to them, if it is taken in parts.
        self.done = 0
        self.answers: list[Answer] = []

    @property
    def left(self) -> int:
        return self.rows - self.done


@dataclass(slots=True)
class _Batch(Generic[Key, Payload, Answer]):
    """What one turn runs: requests, and the rows of each that are in it."""

    parts: list[tuple[_Entry[Key, Payload, Answer], int, int]] = field(default_factory=list)
    rows: int = 0
    nbytes: int = 0

    def add(self, entry: _Entry[Key, Payload, Answer], rows: int) -> None:
        self.parts.append((entry, entry.done, entry.done + rows))
        entry.done += rows
        self.rows += rows
        whole = rows == entry.rows
        self.nbytes += entry.nbytes if whole else -(-entry.nbytes * rows // entry.rows)


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
    processors : int, optional
        How many there are for this process; by default, those that it may run on.
    coming : callable, optional
        Tells how many calls have begun whose requests are still on their way here.
    """

    def __init__(
        self,
        *,
        limits: BatchLimits,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        processors: int | None = None,
        coming: Callable[[], int] = lambda: 0,
    ) -> None:
        self._limits, self._observer, self._clock = limits, observer, clock
        self._coming = coming
        # Turns of the loop for which what it is about to run has waited for what comes.
        self._put_off = 0
        self._to_spare = (processors or len(os.sched_getaffinity(0))) >= TO_SPARE
        # When the last request came that might be answered at once, and the usual time between two.
        self._came_at, self._gap = clock(), _LONG_GAP
        self._lock = threading.Lock()  # entered as it is: the condition adds calls of Python's
        self._changed = threading.Condition(self._lock)
        # Each in the order of turns; the keys in the order in which they were served.
        self._queues: dict[Key, list[_Entry[Key, Payload, Answer]]] = {}
        self._paces: dict[Hashable, Pace] = {}
        self._next_ticket = 0
        self._requests = self._rows = self._nbytes = 0
        # What was refused last before it was read, and when.
        self._refusal: OverloadedError | None = None
        self._refused_at = 0.0
        # Seconds of work that wait, and the time at which what runs is expected to end.
        self._seconds = self._busy_until = 0.0
        self._stopped = False
        # When the last small request came: none may have, but one may be about to.
        self._small_at = clock()
        # Whether the worker waits to be told of work; and whether the loop is about to do it.
        self._resting = self._quick_due = False
        self._runner: Runner[Key, Payload, Answer]
        self._waiting_for_room: deque[asyncio.Future[None]] = deque()
        # The batch that runs, if one does, and how many have begun.
        self._running: _Batch[Key, Payload, Answer] | None = None
        # Stands for a batch of one request that the loop runs at once: it is in no list.
        self._alone: _Batch[Key, Payload, Answer] = _Batch()
        self._begun = 0
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

    def refusal(self) -> OverloadedError | None:
        """Return what a request would be refused with now, whatever it is; None if it may come.

        Cheap: for refusing a call before its message is read. What is refused within `ALIKE`
        seconds is refused with one and the same error.
        """
        # Without the lock: a number that is a moment old refuses or admits one call more.
        limits = self._limits
        if self._requests == 0 or (
            self._requests < limits.max_queue_requests and self._nbytes < limits.max_queue_bytes
        ):
            return None
        now = self._clock()
        if self._refusal is None or now - self._refused_at > ALIKE:
            self._refusal, self._refused_at = self._overloaded(), now
        return self._refusal

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
            The queue is full, or what is ahead in it takes longer than the deadline allows.
        NotServingError
            The batcher has stopped.
        """
        return self._admit(key, payload, rows, nbytes, deadline, patient=False)

    def answer_now(self, key: Key, payload: Payload, *, rows: int, nbytes: int) -> Answer | None:
        """Answer a request at once, if it is known to be short and nobody else has work here.

        For the event loop's thread alone, which runs it. Queueing costs as much as a short batch.
        No deadline is looked at: what is ahead of none is tried whatever its deadline, as in
        `admit`.

        Parameters
        ----------
        key, payload, rows, nbytes : object
            As in `admit`.

        Returns
        -------
        object
            The answer; None if the request must be admitted instead.

        Raises
        ------
        SemidError
            What the runner has to say of it in place of an answer.
        ValueError
            It is larger than a batch: as in `admit`, a bug.
        """
        if not self._runner.runs_quickly(key):
            return None
        self._check_size(rows, nbytes)
        now = self._clock()
        gap = min(now - self._came_at, _LONG_GAP)
        self._gap += (gap - self._gap) / _GAPS
        self._came_at = now
        with self._lock:
            # The worker rests until it is notified, which only this thread does: nobody else runs.
            if not self._resting or self._stopped or self._requests or self._quick_due:
                return None
            # Without a pace nothing is known of it.
            pace = self._paces.get(self._runner.kind(key))
            if pace is None or not self._is_quick(pace, rows, nbytes):
                return None
            if self._runner.company_pays(key) and self._coming() >= COMPANY:
                return None
        if pace.work(rows) < self._limits.max_batch_seconds / 2:
            self._small_at = now
        return self._run_alone(key, payload, rows, pace, now)

    async def admit_when_room(
        self, key: Key, payload: Payload, *, rows: int, nbytes: int, deadline: float | None
    ) -> asyncio.Future[Answer]:
        """Do as `admit` does, but wait for room instead of refusing: for flow-controlled streams.

        The caller bounds how many wait here. Waiters are served in the order in which they came.
        """
        my_turn = not self._waiting_for_room
        while True:
            waiter: asyncio.Future[None] | None = None
            with self._lock:
                if not (self._stopped or (my_turn and self._has_room(nbytes))):
                    # In line before the lock is let go of: whoever makes room looks for it there.
                    waiter = asyncio.get_running_loop().create_future()
                    if my_turn:  # the room went to a caller that does not wait: still the first
                        self._waiting_for_room.appendleft(waiter)
                    else:
                        self._waiting_for_room.append(waiter)
            if waiter is None:
                future = self._admit(key, payload, rows, nbytes, deadline, patient=True)
                self._wake_next_waiter()
                return future
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
                    self._uncount(entry)
                    if not entry.future.done():
                        entry.future.set_exception(
                            NotServingError("the server shut down before this request was reached")
                        )
            self._queues.clear()
            self._resting = False
            self._changed.notify()
        while self._waiting_for_room:
            self._wake_next_waiter()

    async def lost(self) -> DeviceLostError:
        """Wait until the device is lost, if ever it is; nothing is admitted from then on."""
        return await asyncio.shield(self._lost)

    def give_up(self, error: DeviceLostError) -> None:
        """Fail what runs and what waits, and admit no more: the batch that runs will not end."""
        if (batch := self._running) is not None:
            self._answer([(entry, error) for entry, _, _ in batch.parts])
        self._lose(error)

    @property
    def running(self) -> int | None:
        """The number of the batch that runs; None if none does. Any thread may ask."""
        begun = self._begun
        return None if self._running is None else begun

    @property
    def queue(self) -> QueueState:
        """How full the queue is now."""
        with self._lock:
            return QueueState(self._requests, self._rows, self._nbytes)

    def _admit(
        self,
        key: Key,
        payload: Payload,
        rows: int,
        nbytes: int,
        deadline: float | None,
        *,
        patient: bool,
    ) -> asyncio.Future[Answer]:
        self._check_size(rows, nbytes)
        assert self._loop is not None, "start() comes first"  # noqa: S101 - a bug of ours
        with self._lock:
            if self._stopped:
                raise NotServingError("the server has shut down")
            if not self._has_room(nbytes):
                self._observer.refused(key)
                raise self._overloaded()
            now = self._clock()
            self._next_ticket += 1
            entry = _Entry(
                key,
                payload,
                rows=rows,
                nbytes=nbytes,
                deadline=deadline,
                admitted=now,
                pace=self._pace(key),
                ticket=self._next_ticket,
                future=self._loop.create_future(),
                mark=None,
            )
            self._note_size(entry)
            if deadline is not None and not patient:
                self._refuse_if_hopeless(entry, deadline, now)
            entry.mark = self._observer.admitted(key, rows)
            insort(self._queues.setdefault(key, []), entry, key=_turn)
            self._requests += 1
            self._rows += rows
            self._nbytes += nbytes
            self._seconds += entry.seconds
            if self._resting and not self._quick_due:
                self._rouse(entry)
        entry.future.add_done_callback(
            lambda future: self._withdraw(entry) if future.cancelled() else None
        )
        return entry.future

    def _check_size(self, rows: int, nbytes: int) -> None:
        limits = self._limits
        if rows > limits.max_batch_rows or nbytes > limits.max_batch_bytes:
            raise ValueError(
                f"a request of {rows} rows and {nbytes} bytes exceeds a batch of "
                f"{limits.max_batch_rows} rows and {limits.max_batch_bytes} bytes"
            )

    def _refuse_if_hopeless(
        self, entry: _Entry[Key, Payload, Answer], deadline: float, now: float
    ) -> None:
        """Refuse what would expire in the queue: its caller can still ask somebody else.

        What nothing is ahead of is always tried: it shows how long such requests take by now.
        """
        running = max(0.0, self._busy_until - now)
        if now + running + self._seconds + entry.seconds <= deadline:
            return
        queue = self._queues.get(entry.key, [])
        # Those that fill more than a turn let this one pass, if it does not.
        most = max(entry.seconds, self._turn_seconds())
        ahead = [
            other
            for other in queue[: bisect_left(queue, entry.turn, key=_turn)]
            if other.seconds <= most
        ]
        seconds = running + sum(other.seconds * other.left / max(1, other.rows) for other in ahead)
        if seconds and now + seconds + entry.seconds > deadline:
            self._observer.refused(entry.key)
            raise OverloadedError(
                f"the deadline is {max(0.0, deadline - now):.3f} s away, and what is ahead of this "
                f"request takes about {seconds:.3f} s",
                retry_after=self._time_to_clear(),
            )

    def _rouse(self, entry: _Entry[Key, Payload, Answer]) -> None:
        """Have the work that waits be done: by the loop itself if it is short, else the worker."""
        assert self._loop is not None, "start() comes first"  # noqa: S101 - a bug of ours
        if self._runner.runs_quickly(entry.key) and self._is_quick(
            entry.pace, self._rows, self._nbytes
        ):
            self._quick_due = True
            self._loop.call_soon(self._run_quickly)
        else:
            self._resting = False
            self._changed.notify()

    def _is_quick(self, pace: Pace, rows: int, nbytes: int) -> bool:
        # The worker waits for the interpreter's lock: by the average alone, batches that went there
        # once would seem to belong there.
        average, shortest = pace.times(rows)
        if not (0 < shortest <= QUICK and average <= QUICK_AT_MOST):
            return False
        apart = APART_FEW if nbytes <= FEW_BYTES else APART
        if self._requests > 1 and nbytes <= SHARED_BYTES:
            apart = max(apart, min(APART * self._requests, APART_AT_MOST))
        return shortest <= apart or not self._to_spare or shortest * LOOP_SHARE <= self._gap

    def _run_quickly(self) -> None:
        """Run what has come since this was called for, unless it has become much."""
        put_off, self._put_off = self._put_off, 0
        with self._lock:
            self._quick_due = False
            if not self._queues or not self._resting:
                return
            (queue, *others) = self._queues.values()
            key, pace = queue[0].key, queue[0].pace
            quick = self._runner.runs_quickly(key) and not others
            if not quick or not self._is_quick(pace, self._rows, self._nbytes):
                self._resting = False
                self._changed.notify()
                return
            if put_off < PUT_OFF_AT_MOST and self._is_awaited(key):
                self._put_off, self._quick_due = put_off + 1, True
                asyncio.get_running_loop().call_soon(self._run_quickly)
                return
            expired: list[_Entry[Key, Payload, Answer]] = []
            batch = self._form_batch(expired)
        if expired:
            self._drop(expired, self._answer)
        self._wake_next_waiter()
        # The worker rests until it is notified, which only this thread does: nobody else runs.
        if batch.parts:
            self._run(batch, self._answer)
        with self._lock:
            if self._queues and self._resting and not self._quick_due:
                self._rouse(next(iter(self._queues.values()))[0])

    def _is_awaited(self, key: Key) -> bool:
        """Whether what is on its way had better share a batch with what waits."""
        if not self._runner.company_pays(key):
            return False
        coming = self._coming()
        return coming > 0 and self._requests - 1 + coming >= COMPANY

    def _lose(self, error: DeviceLostError) -> None:
        if not self._lost.done():
            self._lost.set_result(error)
        self.stop()

    def _withdraw(self, entry: _Entry[Key, Payload, Answer]) -> None:
        with self._changed:
            if not self._remove(entry):
                return  # a batch has taken it; its answer will find nobody
        self._observer.withdrawn(entry.key)
        self._wake_next_waiter()

    def _answer(
        self, finished: Sequence[tuple[_Entry[Key, Payload, Answer], Answer | SemidError]]
    ) -> None:
        for entry, answer in finished:
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

    def _overloaded(self) -> OverloadedError:
        return OverloadedError(
            f"the queue is full: {self._requests} requests with {self._nbytes} bytes wait "
            f"(limits: {self._limits.max_queue_requests} requests, "
            f"{self._limits.max_queue_bytes} bytes)",
            retry_after=self._time_to_clear(),
        )

    def _note_size(self, entry: _Entry[Key, Payload, Answer]) -> None:
        """Remember when one came that a long turn would keep waiting for many times its own."""
        if entry.seconds < self._limits.max_batch_seconds / 2:
            self._small_at = entry.admitted

    def _turn_seconds(self) -> float:
        """Seconds that a turn may take now."""
        alone = self._clock() - self._small_at > AWHILE
        return self._limits.max_batch_seconds * (AMONG_LARGE if alone else 1)

    def _time_to_clear(self) -> float:
        return min(MAX_RETRY_AFTER, max(MIN_RETRY_AFTER, self._seconds))

    def _pace(self, key: Key) -> Pace:
        kind = self._runner.kind(key)
        pace = self._paces.get(kind)
        if pace is None:
            pace = self._paces[kind] = Pace()
            if len(self._paces) > MAX_PACES:
                del self._paces[next(iter(self._paces))]
        return pace

    def _remove(self, entry: _Entry[Key, Payload, Answer]) -> bool:
        """Take a request out of its queue; False if it is not there."""
        queue = self._queues.get(entry.key, [])
        place = bisect_left(queue, entry.turn, key=_turn)
        if place == len(queue) or queue[place] is not entry:
            return False
        del queue[place]
        if not queue:
            del self._queues[entry.key]
        self._uncount(entry)
        return True

    def _uncount(self, entry: _Entry[Key, Payload, Answer]) -> None:
        """Count a request that leaves the queue out, with what is left of it."""
        self._requests -= 1
        self._nbytes -= entry.nbytes
        self._uncount_rows(entry, entry.left)

    def _uncount_rows(self, entry: _Entry[Key, Payload, Answer], rows: int) -> None:
        self._rows -= rows
        # Sums of floats do not come back to 0 by themselves.
        share = rows / entry.rows if entry.rows else 1.0
        self._seconds = max(0.0, self._seconds - entry.seconds * share) if self._requests else 0.0

    def _form_batch(
        self, expired: list[_Entry[Key, Payload, Answer]]
    ) -> _Batch[Key, Payload, Answer]:
        """Take a turn's requests, of the key that waits longest for one."""
        batch: _Batch[Key, Payload, Answer] = _Batch()
        while self._queues and not batch.parts:
            key = next(iter(self._queues))
            queue = self._queues.pop(key)
            if not self._take_all_of(queue, batch):
                gone = self._take_from(queue, batch, expired)
                if left := [entry for entry in queue if entry not in gone]:
                    self._queues[key] = left  # behind the other keys
            if batch.parts:
                self._busy_until = self._clock() + queue[0].pace.predict(batch.rows)
        return batch

    def _take_all_of(
        self, queue: list[_Entry[Key, Payload, Answer]], batch: _Batch[Key, Payload, Answer]
    ) -> bool:
        """Fill a batch with all of a queue, if it surely fits: so it is while the device keeps up.

        Where it might not, or something in it is late, nothing is taken.
        """
        limits, pace = self._limits, queue[0].pace
        # Of all queues: no less than what is in this one.
        rows, nbytes = self._rows, self._nbytes
        seconds = pace.predict(rows)
        if (
            rows > limits.max_batch_rows
            or nbytes > limits.max_batch_bytes
            or seconds > self._turn_seconds()
            or not pace.known
        ):
            return False
        done = self._clock() + seconds
        for entry in queue:
            if entry.deadline is not None and entry.deadline <= done:
                return False
        for entry in queue:
            self._uncount(entry)
            batch.add(entry, entry.left)
        return True

    def _take_from(
        self,
        queue: list[_Entry[Key, Payload, Answer]],
        batch: _Batch[Key, Payload, Answer],
        expired: list[_Entry[Key, Payload, Answer]],
    ) -> set[_Entry[Key, Payload, Answer]]:
        """Fill a batch from the queue of a key; returns the requests that are in it no more."""
        pace = queue[0].pace
        room = self._turn_rows(pace)
        # What cannot be divided is never too large: it makes its turn longer.
        large = {entry for entry in queue if self._runner.divisible and entry.left > room}
        gone: set[_Entry[Key, Payload, Answer]] = set()
        alone = len(queue) == 1 and not self._queues

        def drop_if_late(entry: _Entry[Key, Payload, Answer]) -> bool:
            # The first is given a try, as nothing better could be done meanwhile; but while others
            # wait, no part of one whose other parts cannot be done in time as well.
            needed = pace.predict(min(entry.left, room)) if batch.parts else 0.0
            if not alone:
                needed = max(needed, pace.work(entry.left) if entry in large else 0.0)
            if entry.deadline is None or entry.deadline > self._clock() + needed:
                return False
            gone.add(entry)
            expired.append(entry)
            self._uncount(entry)
            return True

        for_small = room
        if large:  # however few rows a turn has, some are for either
            room = max(room, 2)
            for_small = room - max(1, room // LARGE_SHARE)
        for entry in queue:
            if batch.parts and batch.rows >= for_small:
                break
            if (
                entry not in large
                and not drop_if_late(entry)
                and (not batch.parts or self._fits(entry, batch, for_small))
            ):
                gone.add(entry)
                self._uncount(entry)
                batch.add(entry, entry.left)
        for entry in [entry for entry in queue if entry in large]:
            if batch.rows < room and not drop_if_late(entry):
                self._take_part(entry, batch, room)
        return gone

    def _turn_rows(self, pace: Pace) -> int:
        """Rows that a turn may have now."""
        rows = self._limits.max_batch_rows
        if self._limits.max_batch_seconds == math.inf:
            return rows
        return min(rows, pace.rows_within(self._turn_seconds()))

    def _fits(
        self, entry: _Entry[Key, Payload, Answer], batch: _Batch[Key, Payload, Answer], room: int
    ) -> bool:
        return (
            batch.rows + entry.left <= room
            and batch.nbytes + entry.nbytes <= self._limits.max_batch_bytes
        )

    def _take_part(
        self, entry: _Entry[Key, Payload, Answer], batch: _Batch[Key, Payload, Answer], room: int
    ) -> None:
        nbytes = self._limits.max_batch_bytes - batch.nbytes
        rows = min(room - batch.rows, nbytes * entry.rows // max(1, entry.nbytes))
        if rows > 0:
            self._uncount_rows(entry, rows)
            batch.add(entry, rows)

    # -- the worker's side -------------------------------------------------------------------

    def _work(self, make_runner: Callable[[], RunnerT], made: asyncio.Future[RunnerT]) -> None:
        try:
            runner = self._runner = make_runner()
        except BaseException as error:  # noqa: BLE001 - handed to whoever awaits start()
            self._in_loop(_fail, made, error)
            return
        self._in_loop(_fulfil, made, runner)
        try:
            while (batch := self._take()) is not None:
                if batch.parts:  # else all that was reached had expired
                    self._run(batch, self._answer_from_worker)
                del batch  # what it holds on to is let go of before the next is waited for
        except Exception:  # a bug of ours: without this thread nobody would be answered, ever
            logger.critical("the worker has failed", exc_info=True)
            told = DeviceLostError("the server has failed; its log says more")
            self._in_loop(self.give_up, told)

    def _take(self) -> _Batch[Key, Payload, Answer] | None:
        """Wait for work and take the next batch; None when stopped."""
        expired: list[_Entry[Key, Payload, Answer]] = []
        with self._changed:
            while True:
                if self._stopped:
                    return None
                batch = self._form_batch(expired)
                if batch.parts or expired:
                    break
                self._resting = True
                self._changed.wait()
            waited_for = bool(self._waiting_for_room)
        if expired:
            self._drop(expired, self._answer_from_worker)
        if waited_for:
            self._in_loop(self._wake_next_waiter)
        return batch

    def _drop(
        self,
        expired: list[_Entry[Key, Payload, Answer]],
        deliver: Callable[..., None],
    ) -> None:
        for entry in expired:
            self._observer.expired(entry.key)
        deliver([(entry, _late(entry)) for entry in expired])

    # -- whoever runs a batch: the worker, or the loop while the worker rests --------------------

    def _run(
        self,
        batch: _Batch[Key, Payload, Answer],
        deliver: Callable[..., None],
    ) -> None:
        self._begun += 1
        self._running = batch
        self._run_noted(batch, deliver)
        self._running = None  # but not if that raised: then it has not been answered

    def _run_noted(
        self,
        batch: _Batch[Key, Payload, Answer],
        deliver: Callable[..., None],
    ) -> None:
        runner, key = self._runner, batch.parts[0][0].key
        started = self._clock()
        failed = False
        answers: Sequence[Answer | SemidError]
        finished: list[tuple[_Entry[Key, Payload, Answer], Answer | SemidError]]
        try:
            payloads = [
                entry.payload
                if stop - start == entry.rows
                else runner.part(entry.payload, start, stop)
                for entry, start, stop in batch.parts
            ]
            answers = runner.run(key, payloads)
            finished = self._finish(batch, answers)
        except Exception as error:  # noqa: BLE001 - told apart there
            failed = True
            told = self._failure(error, len(batch.parts), batch.rows)
            answers = [told] * len(batch.parts)
            finished = self._finish(batch, answers)
        seconds = self._clock() - started
        if not failed:
            batch.parts[0][0].pace.observe(batch.rows, seconds)
        self._busy_until = 0.0
        try:
            unanswered = [
                stop - start
                for (_, start, stop), answer in zip(batch.parts, answers, strict=True)
                if isinstance(answer, SemidError)
            ]
            self._observer.ran(
                key,
                rows=batch.rows,
                answered=batch.rows - sum(unanswered),
                waits=[started - entry.admitted for entry, start, _ in batch.parts if start == 0],
                seconds=seconds,
                failed=failed or any(isinstance(answer, DeviceError) for answer in answers),
                marks=[entry.mark for entry, _, _ in batch.parts],
            )
        except Exception:
            logger.exception("a batch could not be noted; its answers are not affected")
        deliver(finished)
        if failed:
            return
        try:
            runner.after()
        except Exception:
            logger.exception("what follows a batch failed; its answers are not affected")

    def _run_alone(self, key: Key, payload: Payload, rows: int, pace: Pace, now: float) -> Answer:
        """Do as `_run` does with a batch of one request, which came now.

        Half of what Python does for a short batch is for requests that share it.
        """
        mark = self._observer.admitted(key, rows)
        self._begun += 1
        self._running = self._alone
        failed = False
        answer: Answer | SemidError
        try:
            answer = self._runner.run_alone(key, payload)
        except Exception as error:  # noqa: BLE001 - told apart there
            failed = True
            answer = self._failure(error, 1, rows)
        seconds = self._clock() - now
        try:
            if not failed:
                pace.observe(rows, seconds)
            self._observer.ran(
                key,
                rows=rows,
                answered=0 if isinstance(answer, SemidError) else rows,
                waits=(0.0,),
                seconds=seconds,
                failed=failed or isinstance(answer, DeviceError),
                marks=(mark,),
            )
        except Exception:
            logger.exception("a batch could not be noted; its answers are not affected")
        try:
            if not failed:
                self._runner.after()
        except Exception:
            logger.exception("what follows a batch failed; its answers are not affected")
        self._running = None
        if isinstance(answer, SemidError):
            raise answer
        return answer

    def _failure(self, error: Exception, requests: int, rows: int) -> SemidError:
        """Return what the callers of a batch that failed are told."""
        if isinstance(error, DeviceLostError):
            logger.critical("%s", error)
            with self._changed:
                self._stopped = True  # at once: the loop answers those that wait
            self._in_loop(self._lose, error)
        if isinstance(error, SemidError):
            return error
        # The text stays in the log: it may hold what is no caller's business.
        logger.error("a batch of %d requests with %d rows failed", requests, rows, exc_info=error)
        return DeviceError("the device failed while it computed this batch")

    def _finish(
        self, batch: _Batch[Key, Payload, Answer], answers: Sequence[Answer | SemidError]
    ) -> list[tuple[_Entry[Key, Payload, Answer], Answer | SemidError]]:
        """Return the requests that a batch ends, with their answers; keep those to parts."""
        finished: list[tuple[_Entry[Key, Payload, Answer], Answer | SemidError]] = []
        for (entry, start, stop), answer in zip(batch.parts, answers, strict=True):
            if isinstance(answer, SemidError):
                if stop < entry.rows:
                    with self._changed:
                        self._remove(entry)
                finished.append((entry, self._about_all(entry, answer) if start else answer))
                continue
            if stop - start == entry.rows:
                finished.append((entry, answer))
                continue
            entry.answers.append(answer)
            if stop == entry.rows:
                finished.append((entry, self._runner.join(entry.answers)))
        return finished

    def _about_all(self, entry: _Entry[Key, Payload, Answer], error: SemidError) -> SemidError:
        """Return what an error in a later part of a request is in the request as a whole.

        It may name rows, and counts them from where the part begins. Bad rows are found before
        anything is computed, so running all of them together costs little.
        """
        if not isinstance(error, InvalidInputError):
            return error
        (answer,) = self._runner.run(entry.key, [entry.payload])
        return answer if isinstance(answer, SemidError) else error

    def _answer_from_worker(
        self, finished: Sequence[tuple[_Entry[Key, Payload, Answer], Answer | SemidError]]
    ) -> None:
        if finished:
            self._in_loop(self._answer, finished)

    def _in_loop(self, function: Callable[..., None], *args: object) -> None:
        assert self._loop is not None, "start() comes first"  # noqa: S101 - a bug of ours
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def _late(entry: _Entry[Any, Any, Any]) -> DeadlineExpiredError:
    computed = f"{entry.done} of {entry.rows} rows were" if entry.done else "nothing was"
    return DeadlineExpiredError(
        f"the deadline passed, or could not be met, while the request was queued; {computed} "
        "computed"
    )


def _turn(entry: _Entry[Any, Any, Any]) -> tuple[float, int]:
    return entry.turn


def _fulfil(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
