"""The blocking client."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import grpc

from semid_client._base import BaseClient, Flow
from semid_client._errors import ProtocolError
from semid_client._hedging import METHODS, settles
from semid_client._transfer import Decoding, Encoding

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from semid.v1 import semid_pb2 as pb
    from semid_client._channel import Settings
    from semid_client._hedging import Hedging
    from semid_client._model import ModelInfo
    from semid_client._transfer import RowSource

T = TypeVar("T")


class Client(BaseClient):
    """A semid server, as seen from a program that blocks.

    Any number of threads may use one client at once. Make it after a fork, not before: gRPC does
    not survive one, so in a forked child a client raises `ClientClosedError`.

    Parameters
    ----------
    target : str
        Address of the server: ``host:port``, or any gRPC name, such as ``dns:///name:port`` (calls
        go in turn to all its addresses), ``ipv4:10.0.0.7:50051,10.0.0.8:50051`` or ``unix:path``.
        gRPC takes a proxy from ``http_proxy``, for other machines than this one.
    model : str
        Name of the model; empty for the server's default.
    expected_fingerprint : str
        If set, calls fail with `FingerprintMismatchError` unless the model has this fingerprint.
        Set it wherever codes are stored, and to decode stored codes.
    on_fingerprint_change : {"warn", "error"}
        What to do when another model answers than the one that answered this client first, because
        it was replaced or because replicas differ: warn, once for each, with a
        `FingerprintChangedWarning`, or fail with `FingerprintMismatchError` from then on. The
        answers to one call are of one model in either case.
    timeout : float
        Seconds within which each call must be complete, all its messages and retries included.
        Each call can be given its own.
    max_in_flight : int
        Messages of one call that are under way at once. A few keep the server busy; more only
        fill its queue.
    hedge_after : float, optional
        Seconds after which a call that has no answer yet is sent a second time, to the next server
        in turn; the first answer wins, and the other call is cancelled. For targets of several
        servers. At most one call in twenty is sent twice, so a good value is what 95 to 99 % of
        the calls stay under.
    health_checks : bool
        Ask each server to tell when it stops or is ready again, and send calls to those that are
        ready only; a call less in the server's ``--max-concurrent-rpcs`` for each connection. False
        only where something between lets semid's own calls through, but not ``grpc.health.v1``.
    shared_memory : {"auto", True, False}
        Hand embeddings over in shared memory, to a server on this machine, in place of sending
        them: several times faster for arrays of 256 KiB and more, with the same codes. "auto" does
        so where the target is a loopback address and the server takes it, and sends them
        otherwise; the reason is logged once. True tries for every target, and fails with
        `ConfigurationError` where it cannot be had. Client and server run as the same user and see
        the same ``/dev/shm``. Each call has memory of its own, ``max_in_flight`` times 4 MiB; where
        the server shares no more with one client, further calls at the same time are sent, or with
        True wait for one that is done.
    tls : TLS or None
        Encryption; None for none.
    token : str or None
        Sent as ``authorization: Bearer`` with every call.
    allow_plaintext_token : bool
        Send the token without encryption, to another machine too. Without this it goes
        unencrypted to the machine's own addresses alone (``localhost``, ``127.0.0.1``, ``[::1]``,
        ``unix:``); to any other target the constructor raises.

    Raises
    ------
    ConfigurationError
        If an argument cannot be used.

    Examples
    --------
    >>> with Client("localhost:50051") as client:
    ...     codes = client.encode(embeddings)  # (n, D) float32 -> (n, L) uint8
    ...     vectors = client.decode(codes)     # (n, L) -> (n, D) float32
    """

    def encode(self, embeddings: ArrayLike, *, timeout: float | None = None) -> NDArray[Any]:
        """Codes of each embedding: its semantic ID.

        Parameters
        ----------
        embeddings : array_like
            ``(n, D)``, or one row ``(D,)``: float32, float16, bfloat16 (of ml_dtypes) or float64,
            in any layout and byte order, sent as it is. A list of floats counts as float64.
            Integers are refused: they are mostly codes in the wrong place. ``n`` may be 0. Tensors
            of torch in the CPU's memory and tables of numbers are arrays to numpy, and so here; a
            column of lists is not, see `numpy.stack`.
            Large arrays are split under the server's limits.
        timeout : float, optional
            Seconds for all of it; the client's own by default.

        Returns
        -------
        numpy.ndarray
            ``(n, L)``, or ``(L,)`` for one row, in the smallest unsigned type that holds every
            code of the model; writable. All rows are of one model.

        Raises
        ------
        InvalidInputError
            For a wrong shape, type or length of rows, NaN, an infinity or a masked number; ``row``
            says where.
        ConfigurationError
            If the timeout is no positive number of seconds, or memory must be shared and cannot be.
        ClientClosedError
            If the client was closed, or made before a fork.
        FingerprintMismatchError
            If the model is not the one expected, or was replaced meanwhile.
        ProtocolError
            If the answer breaks the contract.
        CallError
            If the server or the network ended the call; see its subclasses.
        """
        return self._drive(self._encode_flow(embeddings, timeout))

    def decode(
        self,
        codes: ArrayLike,
        mode: Literal["sum", "calibrated"] = "sum",
        *,
        timeout: float | None = None,
    ) -> NDArray[Any]:
        """Reconstruction of the embedding behind each semantic ID, or behind its first codes.

        Parameters
        ----------
        codes : array_like
            ``(n, l)``, or one row ``(l,)``, the first ``l`` of the model's ``L`` codes, in any
            integer type.
        mode : {"sum", "calibrated"}
            The sum of the chosen centroids through the model's decoder, or on the scale of the
            embeddings, for models that were calibrated.
        timeout : float, optional
            Seconds for all of it; the client's own by default.

        Returns
        -------
        numpy.ndarray
            float32 ``(n, D)``, or ``(D,)`` for one row; writable.

        Raises
        ------
        InvalidInputError
            For a wrong shape or type, or a code out of range; ``row`` says where.
        ConfigurationError
            If there is no such mode, or the timeout is no positive number of seconds.
        ClientClosedError
            If the client was closed, or made before a fork.
        FailedPreconditionError
            If the model lacks what the mode needs.
        FingerprintMismatchError
            If the model is not the one expected, or was replaced meanwhile.
        ProtocolError
            If the answer breaks the contract.
        CallError
            If the server or the network ended the call; see its subclasses.
        """
        return self._drive(self._decode_flow(codes, mode, timeout))

    def encode_into(
        self,
        source: RowSource,
        sink: Callable[[int, NDArray[Any]], None],
        *,
        timeout: float | None = None,
    ) -> str:
        """Encode rows that need not fit in memory.

        Unlike `encode`, it pins the model that it meets first, lets ``timeout`` bound each
        message rather than the whole, and waits within it for a server that is busy or restarts.

        Parameters
        ----------
        source : RowSource
            Anything with ``shape``, ``dtype`` and slices of rows, such as a memory map. A message
            of rows is read when there is room to send it, and more than once if it has to be.
        sink : callable
            Called as ``sink(start, codes)`` for one piece after the other, in order. The pieces
            are read-only and little-endian.
        timeout : float, optional
            Seconds for each message; the client's own by default.

        Returns
        -------
        str
            Fingerprint of the model that gave all of the codes.

        Raises
        ------
        SemidClientError
            As `encode`. What ``source`` and ``sink`` raise passes as it is.
        """
        return self._drive(self._transfer(Encoding(source), sink, timeout, patient=True))

    def decode_into(
        self,
        source: RowSource,
        sink: Callable[[int, NDArray[Any]], None],
        mode: Literal["sum", "calibrated"] = "sum",
        *,
        calibration: str | None = None,
        timeout: float | None = None,
    ) -> str:
        """Decode rows of codes that need not fit in memory; all else as in `encode_into`.

        If ``calibration`` is given, as in `ModelInfo`, it is a `FingerprintMismatchError` that an
        answer was made with another one.

        Raises
        ------
        SemidClientError
            As `decode`. What ``source`` and ``sink`` raise passes as it is.
        """
        decoding = Decoding(source, mode, calibration)
        return self._drive(self._transfer(decoding, sink, timeout, patient=True))

    def allocate(
        self,
        rows: int,
        width: int,
        dtype: DTypeLike = "float32",
        *,
        timeout: float | None = None,
    ) -> NDArray[Any]:
        """Allocate an array for embeddings that `encode` then hands over without copying them.

        It is an array like any other, in memory that is shared with the server: fill it, encode it
        or slices of its rows, fill it again. It must not change while it is encoded. Where no
        memory can be shared it is an ordinary one. The memory is shared for as long as the array
        or any part of it is in use.

        Parameters
        ----------
        rows, width : int
            Its shape.
        dtype : dtype
            float32, float16, bfloat16 (of ml_dtypes) or float64.
        timeout : float, optional
            Seconds; the client's own by default.

        Returns
        -------
        numpy.ndarray
            ``(rows, width)``, of any content.

        Raises
        ------
        InvalidInputError
            For another dtype, or a shape that no array has.
        ConfigurationError
            If the timeout is no positive number of seconds, or memory must be shared and cannot be.
        ClientClosedError
            If the client was closed, or made before a fork.
        FingerprintMismatchError
            If the model is not the one expected.
        ProtocolError
            If the answer breaks the contract.
        CallError
            If the server or the network ended the call; see its subclasses.
        """
        return self._drive(self._allocate_flow(rows, width, dtype, timeout))

    def model(self, *, timeout: float | None = None) -> ModelInfo:
        """Ask what the model is: shapes, fingerprint, decode modes, limits.

        Raises
        ------
        ConfigurationError
            If the timeout is no positive number of seconds.
        ClientClosedError
            If the client was closed, or made before a fork.
        FingerprintMismatchError
            If it is not the one expected.
        ProtocolError
            If the answer breaks the contract.
        CallError
            If the server or the network ended the call; see its subclasses.
        """
        return self._drive(self._model_flow(timeout))

    def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Ask for every model that is served.

        Raises
        ------
        ConfigurationError
            If the timeout is no positive number of seconds.
        ClientClosedError
            If the client was closed, or made before a fork.
        ProtocolError
            If the answer breaks the contract.
        CallError
            If the server or the network ended the call; see its subclasses.
        """
        return self._drive(self._models_flow(timeout))

    def wait_ready(self, timeout: float = 60.0) -> ModelInfo:
        """Wait until the server has loaded its model and answers; ask again while it does not.

        Parameters
        ----------
        timeout : float
            Seconds to wait at most.

        Raises
        ------
        ConfigurationError
            If the timeout is no positive number of seconds.
        ClientClosedError
            If the client was closed, or made before a fork.
        DeadlineExceededError
            If it was not ready by then; the message tells the last reason.
        FingerprintMismatchError
            At once, if the model is not the one expected.
        ProtocolError
            If the answer breaks the contract.
        CallError
            At once, for anything that waiting does not cure, such as a wrong token.
        """
        return self._drive(self._ready_flow(timeout))

    def close(self) -> None:
        """Close the connection. Calls under way fail with `ClientClosedError`."""
        self._closed = True
        if self._forked:  # gRPC would wait for threads that are not here
            return
        self._sharing.close()
        self._channel.close()
        self._shared_channel.close()
        self._starter.shutdown(wait=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _starter(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "semid-client")  # its thread begins with its work

    def _open_channel(self, settings: Settings) -> grpc.Channel:
        if settings.credentials is None:
            return grpc.insecure_channel(settings.target, settings.options)
        return grpc.secure_channel(settings.target, settings.credentials, settings.options)

    def _start(
        self, method: str, request: Any, timeout: float, *, alone: bool, shared: bool = False
    ) -> Any:
        call = getattr(self._shared_stub if shared else self._stub, method)
        how = {"timeout": timeout, "metadata": self._settings.metadata}
        if self._hedging and method in METHODS and not shared:
            start = partial(self._starter.submit, call.future, request)
            return _Hedged(start, how, self._hedging)
        if alone:
            # A blocking call needs no thread besides the caller's: it takes 0.1 ms less.
            return _Blocking(partial(call, request, **how))
        return _Started(self._starter.submit(call.future, request, **how))

    def _open_lease(self, request: pb.ShareMemoryRequest, timeout: float) -> _Blocking:
        return _Blocking(partial(self._do_open_lease, request, timeout))

    def _do_open_lease(self, request: pb.ShareMemoryRequest, timeout: float) -> _Lease:
        starting = self._starter.submit(
            self._shared_stub.ShareMemory,
            request,
            metadata=self._settings.metadata,
            wait_for_ready=True,
        )
        late = threading.Event()
        try:
            call = starting.result()

            def end_late_call() -> None:
                late.set()
                call.cancel()

            # The call itself has no deadline: it lasts as long as the memory is shared.
            timer = threading.Timer(timeout, end_late_call)
            timer.daemon = True
            timer.start()
            try:
                response = next(call, None)
            finally:
                timer.cancel()
        except BaseException as error:
            starting.add_done_callback(lambda call: call.exception() or call.result().cancel())
            if late.is_set() and isinstance(error, grpc.RpcError):
                raise TimeoutError(f"no answer within {timeout:g} s") from error
            raise
        if response is None:
            raise ProtocolError("the server ended ShareMemory without an answer")
        return _Lease(call, response.segment)

    def _pause(self, seconds: float) -> _Blocking:
        return _Blocking(partial(time.sleep, seconds))

    def _wait_for(self, future: Future[Any], seconds: float) -> _Blocking:
        return _Blocking(partial(wait, [future], seconds))

    @staticmethod
    def _drive(flow: Flow[T]) -> T:
        """Run a flow, blocking for whatever it yields."""
        try:
            waiting = next(flow)
            while True:
                try:
                    result = waiting.result()
                except BaseException as error:  # noqa: BLE001 -- the flow decides, and cleans up
                    waiting = flow.throw(error)
                else:
                    waiting = flow.send(result)
        except StopIteration as done:
            value: T = done.value
            return value


@dataclass(frozen=True, slots=True)
class _Blocking:
    """Something that is done while it is waited for, in the form of a call's future."""

    do: Callable[[], Any]

    def result(self) -> Any:
        """Do it."""
        return self.do()

    def cancel(self) -> None:
        """Do nothing: it is not under way while anybody else could cancel it."""


@dataclass(frozen=True, slots=True)
class _Started:
    """A call that another thread starts.

    Ctrl-C interrupts the main thread wherever it is. Within gRPC's start of a call it would leave
    a call that nobody counts, for which the channel then waits for ever as it closes, and later
    calls hang. No signal reaches the thread that starts them here.
    """

    call: Future[Any]

    def result(self) -> Any:
        """Wait for the answer."""
        return self.call.result().result()

    def error(self) -> BaseException | None:
        """Wait for the end, and return how it failed."""
        return self.call.exception() or self.call.result().exception()

    def when_done(self, do: Callable[[], None]) -> None:
        """Have another thread do something when the answer is there."""

        def started(call: Future[Any]) -> None:
            if call.exception() is None:
                call.result().add_done_callback(lambda _: do())
            else:
                do()

        self.call.add_done_callback(started)

    def cancel(self) -> None:
        """Cancel the call, as soon as it is started if it is not yet."""
        self.call.add_done_callback(lambda call: call.exception() or call.result().cancel())


@dataclass(eq=False, weakref_slot=True, slots=True)
class _Lease:
    """A call of ShareMemory."""

    call: Any
    handle: str

    @property
    def active(self) -> bool:
        return bool(self.call.is_active())

    def end(self) -> None:
        self.call.cancel()


class _Hedged:
    """A call that is made a second time if its answer does not come soon; see `Hedging`."""

    def __init__(
        self, start: Callable[..., Future[Any]], how: dict[str, Any], hedging: Hedging
    ) -> None:
        self._start, self._how, self._hedging = start, how, hedging
        self._began = time.monotonic()
        self._attempts: list[_Started] = []
        self._done: queue.SimpleQueue[_Started] = queue.SimpleQueue()
        self._try(how["timeout"])

    def _try(self, timeout: float) -> None:
        attempt = _Started(self._start(**self._how | {"timeout": timeout}))
        self._attempts.append(attempt)
        attempt.when_done(partial(self._done.put, attempt))

    def result(self) -> Any:
        """Wait for the first answer."""
        try:
            attempt = self._done.get(timeout=self._hedging.wait(self._began))
        except queue.Empty:
            left = self._how["timeout"] - (time.monotonic() - self._began)
            if left > 0 and self._hedging.take():
                self._try(left)
            attempt = self._done.get()
        if len(self._attempts) > 1:
            if not settles(attempt.error()):
                attempt = self._done.get()
            self.cancel()
        answer = attempt.result()
        self._hedging.earn()
        return answer

    def cancel(self) -> None:
        """Cancel what is under way."""
        for attempt in self._attempts:
            attempt.cancel()
