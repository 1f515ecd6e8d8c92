"""How a batch on the host is cut into pieces, copied to the device, and computed meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from collections import defaultdict, deque
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from semid_server.encoding.rows import are_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

T = TypeVar("T")

STAGES = 3
"""Pieces on the device at once: one is computed while the next two are on their way."""

RECORDING = Lock()
"""Held while a graph is recorded, which CUDA and torch can do for one at a time only, and not while
any thread synchronises the device or gives memory back to it."""

_SPARE: dict[torch.device, deque[torch.cuda.Stream]] = defaultdict(deque)

_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: it does not wait for the default stream, nor that for it."""


def own_stream(owner: object, device: torch.device) -> torch.cuda.Stream:
    """A stream that nothing else has until ``owner`` is gone.

    Not one of torch's, which deals out the same 32 again and again: of more than eight encoders
    that live, replaced ones included, two would have the same one, and record graphs where the
    other runs its own.
    """
    spare = _SPARE[device]
    try:
        # The oldest there is: what used the newest may be about to be given back still, and what is
        # given back asks its stream.
        stream = spare.popleft()
    except IndexError:
        handle = _new_stream(device)
        # torch leaves its constructor without annotations
        stream = torch.cuda.ExternalStream(handle, device)  # type: ignore[no-untyped-call]
    weakref.finalize(owner, spare.append, stream)
    return stream


def _new_stream(device: torch.device) -> int:
    """Make a stream in the context that torch works in, and return its handle.

    By the driver, which is there wherever there is a CUDA device; where the runtime's library is,
    and under what name, differs from build to build.
    """
    current = torch.cuda.current_device()  # has torch initialise CUDA, if it has not yet
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        if (status := getattr(driver, name)(*arguments)) != 0:
            raise RuntimeError(f"{name}: CUDA error {status}")

    number, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t()
    call("cuDeviceGet", ctypes.byref(number), current if device.index is None else device.index)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    call("cuCtxPushCurrent_v2", context)
    try:
        call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(context))
    return stream.value


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Keep Python from collecting garbage meanwhile; `RECORDING` is held.

    Encoders, and the models they are of, are parts of cycles. To give back the graphs and events of
    a dead one spoils the graph that the same thread records, or ends the process.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def pieces(total: int, *, least: int, most: int) -> list[tuple[int, int]]:
    """``(start, stop)`` of consecutive parts of ``total`` rows, small ones at both ends.

    Nothing is computed before the first piece has arrived, and nothing copied while the last is
    computed: both are of ``least`` rows, and pieces double from there to ``most`` in the middle,
    where what each of them costs by itself counts more.
    """
    front: list[int] = []
    back: list[int] = []
    size = min(least, most)
    while total > 0:
        for side in (front, back):
            if total > 0:
                side.append(min(size, total))
                total -= side[-1]
        size = min(2 * size, most)
    found, start = [], 0
    for size in (*front, *reversed(back)):
        found.append((start, start + size))
        start += size
    return found


def convey(
    parts: list[tuple[int, int]],
    *,
    ahead: int,
    send: Callable[[int, int, int], None],
    work: Callable[[int, int, int], None],
) -> None:
    """Call ``send(i, start, stop)`` and ``work(i, start, stop)`` for part ``i``, each in order.

    Parts are sent ``ahead`` of the one that is worked on: queueing the work takes the host longer
    than the device needs to copy a small part.
    """
    for i in range(len(parts) + ahead):
        if i < len(parts):
            send(i, *parts[i])
        if i >= ahead:
            work(i - ahead, *parts[i - ahead])


class Stage:
    """Where one piece of host rows goes: pinned memory, device memory, a stream to compute on.

    Parameters
    ----------
    size : int
        Bytes of the largest piece.
    dim : int
        ``D``, numbers in a row.
    device : torch.device
        A CUDA device.

    Attributes
    ----------
    stream : torch.cuda.Stream
        What is computed for its rows runs there.
    call : Tensor
        int64 ``(2,)``: where the rows are that are worked on, and how many; see `point`.
    address : int
        Where rows that are sent are.
    """

    def __init__(self, size: int, dim: int, device: torch.device) -> None:
        self._dim = dim
        self._host: Tensor | None = None
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._sent = self._memory[:0]
        self.stream = own_stream(self, device)
        self.call = torch.zeros(2, dtype=torch.int64, device=device)
        self._call: list[int | None] = [0, 0]
        self.address = self._memory.data_ptr()
        self._graph_memory: Any = torch.cuda.graph_pool_handle()
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's own
        self._used = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's own
        self._in_use = True
        self._index = self._memory.device.index
        self._current: torch.cuda.Stream | None = None
        self.release()  # once there are zeros

    def point(self, address: int, n: int) -> None:
        """What is queued from now on works on the ``n`` rows at ``address``."""
        for place, number in enumerate((address, n)):
            if self._call[place] != number:
                self._call[place] = None  # not known, should this be interrupted
                self.call[place].fill_(number)
                self._call[place] = number

    def recorded(self, queue: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """A graph of all that ``queue()`` queues, and what it returned; it is called twice."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            queue()  # compiles, which a capture must not
        graph = torch.cuda.CUDAGraph()
        # Graphs of a stage run one after another, and may use the same memory. Those of two stages
        # run side by side; the library, too, has working memory for each stream of its own.
        memory = {"pool": self._graph_memory, "stream": self.stream}
        with (
            RECORDING,
            _nothing_collected(),
            torch.cuda.graph(graph, **memory, capture_error_mode="thread_local"),
        ):
            result = queue()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph, result

    def pinned(self, rows: Tensor) -> Tensor:
        """Copy of ``rows`` in pinned memory, once the last piece there was sent."""
        if self._host is None:
            self._host = torch.empty(len(self._memory), dtype=torch.uint8, pin_memory=True)
        self._arrived.synchronize()
        return self._view(self._host, len(rows), rows.dtype).copy_(rows)

    def send(self, rows: Tensor, stream: torch.cuda.Stream, *, pinned: bool) -> None:
        """Begin the copy of ``rows`` (n, D) on ``stream``, once the last piece was used."""
        if not pinned:
            rows = self.pinned(rows)
        stream.wait_event(self._used)
        with torch.cuda.stream(stream):
            self._sent = self._view(self._memory, len(rows), rows.dtype)
            self._sent.copy_(rows, non_blocking=True)
        self._arrived.record(stream)

    def wait_for_rows(self) -> None:
        """What is queued from now on waits for the rows that were sent."""
        torch.cuda.current_stream().wait_event(self._arrived)

    def screen(self) -> Tensor:
        """Tell of each row that was sent whether it is finite, bool ``(n,)``; zero the others."""
        finite = are_finite(self._sent)
        self._sent.masked_fill_(~finite[:, None], 0)
        return finite

    def wait_for_room(self) -> None:
        """What is queued from now on waits until the last rows were used."""
        if self._in_use:
            self._current_stream().wait_event(self._used)

    def release(self) -> None:
        """Let the next rows come once what is queued has run."""
        self._in_use = True
        self._used.record(self._current_stream())

    def settle(self) -> None:
        """Wait here for what is queued, in place of `release`: the next rows need not wait.

        It was queued after `wait_for_room`, so nothing before it is left either.
        """
        self._current_stream().synchronize()
        self._in_use = False

    def mark(self) -> torch.cuda.Event:
        """An event that comes once all that has been queued on the stage's stream has run."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's own
        event.record(self.stream)
        return event

    def _current_stream(self) -> torch.cuda.Stream:
        """`torch.cuda.current_stream`, which takes ten microseconds to make what is known."""
        address = torch._C._cuda_getCurrentRawStream(self._index)  # noqa: SLF001 - as Triton's launcher
        if self._current is None or self._current.cuda_stream != address:
            self._current = torch.cuda.current_stream(self._index)
        return self._current

    def _view(self, memory: Tensor, n: int, dtype: torch.dtype) -> Tensor:
        size = n * self._dim * dtype.itemsize
        return memory[:size].view(dtype).view(n, self._dim)
