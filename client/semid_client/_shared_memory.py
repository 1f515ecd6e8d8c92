"""Embeddings handed over in memory, to a server on the same machine, instead of being sent.

A file in ``/dev/shm`` that both sides have open; the contract's ``ShareMemory`` says how it becomes
so. Here is the client's side of it:

- `Segment` is such a file, mapped. It is made without a name and locked, named only to be shared,
  and grows afterwards: a process that is killed at any moment leaves at most one page, which
  the next server to start removes. Pages are allocated before they are written to: where
  ``/dev/shm`` is full, that is an error, and not a signal that ends the process.
- A *lease* is the call that keeps it shared. When it ends, the segment is of no more use.
- A *carrier* puts the rows of a message where the server can read them: `Staging` copies them into
  slots of a segment, as many as there are messages in flight; `InPlace` finds them there already,
  in an array of `Client.allocate`. A slot is written to again only when its answer has come, or
  when nobody waits for the answer any more.
- `Sharing` decides: which transfers go that way, what to do when it cannot be had, and which
  segments are kept for the next transfer.

All of it is a shortcut. Whatever keeps it from working, from a server in another container to a
full ``/dev/shm``, the embeddings are sent as bytes, and the reason is logged once. Where the server
takes no further segment beside those that are in use, that goes for the one transfer alone; and one
that must not be sent waits for a segment that another gives back.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import Future
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import grpc
import numpy as np

from semid.v1 import semid_pb2 as pb
from semid_client._channel import is_loopback
from semid_client._errors import (
    CallError,
    ConfigurationError,
    DeadlineExceededError,
    InvalidInputError,
    NotFoundError,
    ProtocolError,
    ResourceExhaustedError,
    SemidClientError,
    UnavailableError,
)
from semid_client._tensor import EMBEDDING_TYPES, check_embedding_type, wire_form
from semid_client._transfer import Encoding

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from numpy.typing import DTypeLike, NDArray

    from semid_client._model import ModelInfo, SharedMemoryLimits
    from semid_client._transfer import Decoding

logger = logging.getLogger(__name__)

SharedMemoryMode = Literal["auto"] | bool
MODES: Final = ("auto", True, False)

FOLDER: Final = Path("/dev/shm")  # noqa: S108 -- where the contract says that the memory is

SHARED_FROM: Final = 256 << 10
"""Bytes of embeddings from which on a transfer is worth sharing: a call costs more than so few."""

SLOT_BYTES: Final = 4 << 20
"""Rows of a message that are copied. Few calls for much data, and still in the processor's cache
when the server reads them."""

IN_PLACE_BYTES: Final = 16 << 20
"""Rows of a message that are in place. Few calls for much data, and still several of them, so that
one is on its way while another is encoded."""

HEADER_BYTES: Final = 4096
"""The page that holds the proof. What follows is aligned for any type."""

PROOF_BYTES: Final = 32

PATIENCE: Final = 2.0
"""Seconds for the server to take what is shared, where bytes are a way out. It takes a millisecond,
but a connection that was lost is tried again once a second."""

UNTIL_AGAIN: Final = 60.0
"""Seconds before it is tried again where it could not be had."""


class SharingEndedError(SemidClientError):
    """What is shared can be used no more: never seen outside of this package.

    Attributes
    ----------
    can_begin_again : bool
        Whether sharing anew may help: the server knows it no longer. If not, memory is lacking.
    """

    def __init__(self, message: str, *, can_begin_again: bool) -> None:
        super().__init__(message)
        self.can_begin_again = can_begin_again


class Lease(Protocol):
    """A call that keeps a segment shared."""

    handle: str

    @property
    def active(self) -> bool:
        """Whether it lasts, as far as is known here."""

    def end(self) -> None:
        """End it, from any thread."""


class Segment:
    """A file in shared memory, mapped into this process.

    Parameters
    ----------
    nbytes : int
        Bytes that can be used, after the header.

    Raises
    ------
    OSError
        There is no such memory here, or no more of it.
    """

    def __init__(self, nbytes: int) -> None:
        import fcntl  # noqa: PLC0415 -- not everywhere; nor is the rest

        self.name = f"semid-{secrets.token_hex(16)}"
        self.proof = secrets.token_bytes(PROOF_BYTES)
        self.nbytes = HEADER_BYTES + nbytes
        self._fd = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        weakref.finalize(self, os.close, self._fd)
        fcntl.flock(self._fd, fcntl.LOCK_EX)  # says that its owner lives
        os.pwrite(self._fd, self.proof, 0)
        folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Python follows the link in /proc only where a folder is given as a descriptor.
            source = f"/proc/self/fd/{self._fd}"
            os.link(source, self.name, dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def hide(self) -> None:
        """Remove its name, if nobody has yet."""
        with contextlib.suppress(FileNotFoundError):
            (FOLDER / self.name).unlink()

    def map(self) -> mmap.mmap:
        """Give it its size, and map it; `allocate` comes before any use."""
        os.ftruncate(self._fd, self.nbytes)
        return mmap.mmap(self._fd, self.nbytes)

    def allocate(self, offset: int, nbytes: int) -> None:
        """Have memory for these bytes, or raise `OSError`."""
        os.posix_fallocate(self._fd, offset, nbytes)


class Carrier(ABC):
    """Puts the rows of messages into a segment that is shared."""

    def __init__(self, segment: Segment, lease: Lease, limits: SharedMemoryLimits) -> None:
        self._segment, self._limits = segment, limits
        self.lease = lease

    max_bytes: int

    def rows_at_once(self, row_bytes: int) -> int:
        """Rows that one message may have; 0 if not even one fits."""
        return min(self._limits.max_rows, self.max_bytes // row_bytes)

    def lost(self, error: SemidClientError) -> bool:
        """Whether a call failed because the segment is no longer shared."""
        return isinstance(error, NotFoundError) or (
            isinstance(error, UnavailableError) and not self.lease.active
        )

    def tensor(self, key: int, rows: NDArray[Any]) -> pb.SharedTensor:
        """Say where the server finds these rows: once they are there.

        Raises
        ------
        SharingEndedError
            There is no memory for them.
        """
        kind, wire, rows = wire_form(rows)
        try:
            offset = self._place(key, rows, wire)
        except OSError as error:
            said = f"{FOLDER}: {error.strerror}"
            raise SharingEndedError(said, can_begin_again=False) from error
        return pb.SharedTensor(
            dtype=kind, shape=rows.shape, segment=self.lease.handle, offset=offset
        )

    @abstractmethod
    def _place(self, key: int, rows: NDArray[Any], wire: np.dtype[Any]) -> int:
        """Return the offset of rows, put there if need be; a message keeps its ``key``."""

    def done(self, key: int) -> None:  # noqa: B027 -- most have nothing to do
        """Take note that the answer to a message has come."""


class Staging(Carrier):
    """Copies the rows of each message into a slot. For one transfer at a time."""

    def __init__(
        self, segment: Segment, lease: Lease, limits: SharedMemoryLimits, slot_bytes: int
    ) -> None:
        super().__init__(segment, lease, limits)
        self.max_bytes = slot_bytes
        self._memory = segment.map()
        # The one that was free last comes first: it is most likely in the cache.
        self._free = list(range(HEADER_BYTES, segment.nbytes, slot_bytes))[::-1]
        self._allocated: set[int] = set()
        self._taken: dict[int, int] = {}

    def _place(self, key: int, rows: NDArray[Any], wire: np.dtype[Any]) -> int:
        if key not in self._taken:
            self._taken[key] = self._free.pop()
        offset = self._taken[key]
        if offset not in self._allocated:
            self._segment.allocate(offset, self.max_bytes)
            self._allocated.add(offset)
        slot = np.frombuffer(self._memory, wire, rows.size, offset).reshape(rows.shape)
        np.copyto(slot, rows, casting="equiv")
        return offset

    def done(self, key: int) -> None:
        """Free the slot of a message."""
        self._free.append(self._taken.pop(key))

    def clear(self) -> None:
        """Free all slots: nobody waits for their answers."""
        self._free += self._taken.values()
        self._taken.clear()


class InPlace(Carrier):
    """Finds rows in the array that `Client.allocate` made."""

    def __init__(
        self, segment: Segment, lease: Lease, limits: SharedMemoryLimits, begin: int
    ) -> None:
        super().__init__(segment, lease, limits)
        self.max_bytes = min(IN_PLACE_BYTES, limits.max_request_bytes)
        self._begin = begin
        self._end = begin + segment.nbytes

    def holds(self, rows: object) -> bool:
        """Whether rows lie in this segment, as they would be sent."""
        if not (isinstance(rows, np.ndarray) and rows.flags.c_contiguous):
            return False
        if rows.dtype.name not in EMBEDDING_TYPES or not rows.dtype.isnative:
            return False
        at = rows.__array_interface__["data"][0]
        return bool(self._begin <= at and at + rows.nbytes <= self._end)

    def _place(self, key: int, rows: NDArray[Any], wire: np.dtype[Any]) -> int:  # noqa: ARG002 -- they are where they are
        return int(rows.__array_interface__["data"][0]) - self._begin


class Sharing:
    """Which transfers of a client go through shared memory, and the segments kept for them.

    Parameters
    ----------
    mode : {"auto", True, False}
        As `Client` documents it.
    target : str
        The server.
    slots : int
        Messages of one transfer that are in flight at once.
    open_lease : callable
        A flow, as in `_base`: given a request and seconds, it returns a `Lease`.
    wait : callable
        Given a `Future` and seconds, returns what a flow yields to wait for its end, or that long.
    """

    def __init__(
        self,
        mode: SharedMemoryMode,
        target: str,
        *,
        slots: int,
        open_lease: Callable[[pb.ShareMemoryRequest, float], Generator[Any, Any, Lease]],
        wait: Callable[[Future[Any], float], Any],
    ) -> None:
        if mode not in MODES:
            raise ConfigurationError(
                f"shared_memory is {mode!r}; expected one of {', '.join(map(repr, MODES))}"
            )
        self._mode, self._target, self._slots = mode, target, slots
        self._open_lease, self._wait = open_lease, wait
        # Taken again by the thread that has it when that thread drops an array meanwhile.
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._idle: list[Staging] = []
        # What transfers have, and a mark for each that the server is being asked for.
        self._out: set[object] = set()
        self._waiting: deque[Future[Staging | None]] = deque()
        self._leases: weakref.WeakSet[Any] = weakref.WeakSet()
        self._in_place: list[InPlace] = []
        self._not_before = 0.0
        self._told: set[str] = set()

    # Flows.

    def carrier(
        self, transfer: Encoding | Decoding, info: ModelInfo, timeout: float
    ) -> Generator[Any, Any, Carrier | None]:
        """Return what carries the rows of a transfer; None if they are to be sent as bytes.

        Raises
        ------
        ConfigurationError
            If the client was told to share memory, and cannot.
        DeadlineExceededError
            If it was told to, and no segment came free in time.
        UnavailableError
            If the server cannot be reached.
        """
        if not isinstance(transfer, Encoding) or self._mode is False:
            return None
        row_bytes = transfer.source.shape[1] * transfer.source.dtype.itemsize
        if transfer.source.shape[0] * row_bytes < SHARED_FROM:
            return None
        limits = self._limits(info)
        if limits is None:
            return None
        carrier = self._holder(transfer.source)
        if carrier is None:
            carrier = yield from self._staging(row_bytes, limits, timeout)
        if carrier is None or carrier.rows_at_once(row_bytes):
            return carrier
        self.give_back(carrier)
        return None

    def _staging(
        self, row_bytes: int, limits: SharedMemoryLimits, timeout: float
    ) -> Generator[Any, Any, Staging | None]:
        """Return a segment that is idle, or a new one, or the next to come free; None for bytes."""
        until = time.monotonic() + timeout
        while True:
            kept = self._kept()
            if kept is not None:
                return kept
            try:
                left = max(0.0, until - time.monotonic())
                return (yield from self._asked_for(row_bytes, limits, left))
            except ResourceExhaustedError as error:
                refusal = error
            if not self.required:
                self._full(refusal)
                return None
            freed = yield from self._freed(refusal, until - time.monotonic(), timeout)
            if freed is not None:
                return freed

    def _asked_for(
        self, row_bytes: int, limits: SharedMemoryLimits, timeout: float
    ) -> Generator[Any, Any, Staging | None]:
        """Return what `_stage` does, as something that a transfer has."""
        mark = object()
        made: Staging | None = None
        with self._lock:
            self._out.add(mark)
        try:
            made = yield from self._stage(row_bytes, limits, timeout)
        finally:
            with self._lock:
                self._out.remove(mark)
                if made is not None:
                    self._out.add(made)
                if not self._out:
                    self._wake()
        return made

    def _freed(
        self, refusal: ResourceExhaustedError, left: float, timeout: float
    ) -> Generator[Any, Any, Staging | None]:
        """Wait for what another transfer gives back; None if it is time to look and ask again."""
        waiter: Future[Staging | None] = Future()
        with self._lock:
            if self._idle:
                return None
            if not self._out:  # nothing will come free
                self._full(refusal)
            self._waiting.append(waiter)
        try:
            yield self._wait(waiter, max(0.0, left))
        except BaseException:
            if not waiter.cancel():
                self.give_back(waiter.result())
            raise
        if waiter.cancel():
            raise DeadlineExceededError(
                f"shared_memory=True, but no memory shared with {self._target} came free within "
                f"{timeout:g} s: {refusal.details}",
                target=self._target,
                method="ShareMemory",
                code=grpc.StatusCode.DEADLINE_EXCEEDED,
            ) from refusal
        return waiter.result()

    def _stage(
        self, row_bytes: int, limits: SharedMemoryLimits, timeout: float
    ) -> Generator[Any, Any, Staging | None]:
        """Share a segment of slots; None if it cannot be, or a row has no place in one."""
        room = (limits.max_bytes - HEADER_BYTES) // self._slots
        slot = min(SLOT_BYTES, limits.max_request_bytes, room)
        slot -= slot % HEADER_BYTES
        if slot < row_bytes:
            return None
        made = yield from self._share(slot * self._slots, limits, timeout)
        return made and Staging(*made, limits, slot)

    def allocate(
        self, rows: int, width: int, dtype: DTypeLike, info: ModelInfo, timeout: float
    ) -> Generator[Any, Any, NDArray[Any]]:
        """Return an array ``(rows, width)`` in memory that is shared, or one that is not.

        Raises
        ------
        InvalidInputError
            For a dtype that embeddings do not have, or a shape that no array has.
        ConfigurationError
            If the client was told to share memory, and cannot.
        UnavailableError
            If the server cannot be reached.
        """
        kind = _dtype(dtype)
        rows, width = _length("rows", rows), _length("width", width)
        nbytes = rows * width * kind.itemsize
        limits = None if self._mode is False or not nbytes else self._limits(info)
        made = None
        if limits is not None:
            try:
                made = yield from self._share(nbytes, limits, timeout)
            except ResourceExhaustedError as error:
                self._full(error)
        if limits is None or made is None:
            return np.empty((rows, width), kind)
        segment, lease = made
        try:
            memory = segment.map()
            segment.allocate(HEADER_BYTES, nbytes)
        except OSError as error:
            lease.end()
            self._cannot(f"{FOLDER}: {error.strerror}")
            return np.empty((rows, width), kind)
        array = np.frombuffer(memory, kind, rows * width, HEADER_BYTES).reshape(rows, width)
        begin = array.__array_interface__["data"][0] - HEADER_BYTES
        carrier = InPlace(segment, lease, limits, begin)
        with self._lock:
            self._in_place.append(carrier)
        # Not of the array: a part of it that is still in use keeps the memory, not the array.
        weakref.finalize(memory, self._forget, carrier).atexit = False
        return array

    def _share(
        self, nbytes: int, limits: SharedMemoryLimits, timeout: float
    ) -> Generator[Any, Any, tuple[Segment, Lease] | None]:
        if HEADER_BYTES + nbytes > limits.max_bytes:
            self._cannot(
                f"{HEADER_BYTES + nbytes} bytes are more than the {limits.max_bytes} that the "
                "server takes from one connection",
                again=0,
            )
            return None
        try:
            segment = Segment(nbytes)
        except OSError as error:
            self._cannot(f"{FOLDER}: {error.strerror}")
            return None
        try:
            request = pb.ShareMemoryRequest(
                name=segment.name, size_bytes=segment.nbytes, proof=segment.proof
            )
            patience = timeout if self.required else min(timeout, PATIENCE)
            lease = yield from self._open_lease(request, patience)
        except (UnavailableError, ResourceExhaustedError):
            raise
        except (CallError, ProtocolError) as error:
            self._cannot(str(error))
            return None
        finally:
            segment.hide()
        self._leases.add(lease)
        return segment, lease

    # The rest waits for nothing.

    def give_back(self, carrier: Carrier | None) -> None:
        """Keep what carried a transfer for the next one, which may be waiting for it."""
        if isinstance(carrier, Staging):
            carrier.clear()
            with self._lock:
                if carrier not in self._out:  # it was let go of
                    return
                self._out.remove(carrier)
                if carrier.lease.active:
                    self._hand_on(carrier)
                else:
                    self._wake()

    def lost(self, carrier: Carrier | None, ended: SharingEndedError, *, again: bool) -> None:
        """Let go of what is no longer shared; unless ``again``, use bytes for a while."""
        if carrier is not None:
            self._forget(carrier)
            with self._lock:
                self._out.discard(carrier)
                self._wake()
        if not (again and ended.can_begin_again):
            self._cannot(str(ended))

    @property
    def required(self) -> bool:
        """Whether bytes are no way out."""
        return self._mode is True

    def close(self) -> None:
        """End all sharing. Arrays that were allocated stay as they are."""
        with self._lock:
            self._idle.clear()
            self._in_place.clear()
        for lease in list(self._leases):
            lease.end()
        with self._lock:
            self._wake()

    def _holder(self, rows: object) -> Carrier | None:
        """Return what has rows in place already."""
        with self._lock:
            for carrier in self._in_place:
                if carrier.holds(rows) and carrier.lease.active:
                    return carrier
        return None

    def _kept(self) -> Staging | None:
        """Return what another transfer has left, if it is still shared."""
        with self._lock:
            while self._idle:
                staging = self._idle.pop()
                if staging.lease.active:
                    self._out.add(staging)
                    return staging
        return None

    def _hand_on(self, staging: Staging) -> None:
        """Give a segment to the transfer that has waited longest, or keep it for the next."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if waiter.set_running_or_notify_cancel():
                self._out.add(staging)
                waiter.set_result(staging)
                return
        self._idle.append(staging)

    def _wake(self) -> None:
        """Have all that wait look again: there may be room by now, or nothing to wait for."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)

    def _forget(self, carrier: Carrier) -> None:
        if self._pid != os.getpid():  # a copy of the array, dropped by a forked process
            return
        carrier.lease.end()
        with self._lock:
            self._in_place = [other for other in self._in_place if other is not carrier]

    def _limits(self, info: ModelInfo) -> SharedMemoryLimits | None:
        """What the server takes; None if nothing is to be shared with it now."""
        if self._mode == "auto" and not is_loopback(self._target):
            return None
        if time.monotonic() < self._not_before and self._mode == "auto":
            return None
        if not (sys.platform == "linux" and hasattr(os, "O_TMPFILE")):
            self._cannot("it takes Linux")
        elif info.limits.shared_memory is None:
            self._cannot("the server takes none")
        else:
            return info.limits.shared_memory
        return None

    def _cannot(self, reason: str, *, again: float = UNTIL_AGAIN) -> None:
        """Say once why bytes are sent; raise if the client was told not to."""
        self._tell("no memory is shared with %s, embeddings are sent instead: %s", reason)
        self._not_before = time.monotonic() + again

    def _full(self, refusal: ResourceExhaustedError) -> None:
        """Say once why one transfer is sent; what is shared already stays in use."""
        self._tell(
            "no more memory is shared with %s now, some embeddings are sent instead: %s",
            refusal.details,
        )

    def _tell(self, text: str, reason: str) -> None:
        if self._mode is True:
            raise ConfigurationError(
                f"shared_memory=True, but no memory can be shared with {self._target}: {reason}"
            )
        if text not in self._told:
            self._told.add(text)
            logger.info(text, self._target, reason)


def _dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """Return the type of embeddings that is meant; `InvalidInputError` if none is."""
    try:
        kind = np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"dtype is {dtype!r}; expected float32, float16, bfloat16 (of ml_dtypes) or float64"
        ) from error
    check_embedding_type(kind)
    return kind


def _length(name: str, value: int) -> int:
    """Return one side of a shape as an int; `InvalidInputError` if no array has it."""
    if not (isinstance(value, Integral) and value >= 0):
        raise InvalidInputError(f"{name} is {value!r}; expected a whole number, at least 0")
    return int(value)
