"""What `Client` and `AsyncClient` share: everything but the waiting.

Each operation is a generator, a *flow*: it starts calls, yields whatever has to be waited for, and
is given the result, or thrown the error, of the waiting. A client only drives flows: one by
blocking, the other by awaiting. So requests, order, retries, deadlines and errors are written once.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import grpc

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub
from semid_client._channel import TLS, Settings, check_timeout
from semid_client._errors import (
    CallError,
    ClientClosedError,
    DeadlineExceededError,
    FailedPreconditionError,
    FingerprintMismatchError,
    InvalidArgumentError,
    SemidClientError,
    UnavailableError,
    call_error,
)
from semid_client._fingerprints import Fingerprints, OnFingerprintChange
from semid_client._hedging import Hedging
from semid_client._model import ModelInfo
from semid_client._shared_memory import Sharing, SharingEndedError
from semid_client._tensor import as_matrix
from semid_client._transfer import Answers, Collected, Decoding, Encoding, spans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from semid_client._shared_memory import Carrier, Lease, SharedMemoryMode

T = TypeVar("T")
Flow = Generator[Any, Any, T]

DEFAULT_TIMEOUT: Final = 60.0
"""Seconds. There is always a deadline: a call without one can hang for ever."""

PAUSE: Final = 0.25
"""Seconds between attempts, each of which gRPC has retried with backoff already."""

OTHER_REPLICAS: Final = 5
"""How often a message is sent again because a model other than the one that its call began with
answered it: while a fleet changes its codebook, round robin finds a replica that has it still."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment, on the monotonic clock, at which an answer is of no more use."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Build the deadline ``seconds`` from now."""
        return cls(time.monotonic() + seconds)

    def remaining(self) -> float:
        """Seconds left; 0 when it has passed."""
        return max(0.0, self.at - time.monotonic())


@dataclass(slots=True)
class _Sent:
    """One span of a transfer, on its way."""

    span: slice
    deadline: Deadline
    call: Any


@dataclass(frozen=True, slots=True)
class _Job:
    """What all messages of one transfer have in common."""

    transfer: Encoding | Decoding
    info: ModelInfo
    answers: Answers
    patient: bool
    carrier: Carrier | None = None

    def hand_on(self, span: slice, rows: NDArray[Any]) -> None:
        """Hand the answer to a message on."""
        self.answers.hand_on(span, rows)
        if self.carrier is not None:
            self.carrier.done(span.start)

    def check_shared(self, error: SemidClientError) -> None:
        """Raise if a message failed because the server no longer knows what was shared."""
        if self.carrier is not None and self.carrier.lost(error):
            raise SharingEndedError(str(error), can_begin_again=True) from error


class BaseClient(ABC):
    """Settings, flows and errors of both clients. `Client` documents the arguments."""

    def __init__(
        self,
        target: str,
        *,
        model: str = "",
        expected_fingerprint: str = "",
        on_fingerprint_change: OnFingerprintChange = "warn",
        timeout: float = DEFAULT_TIMEOUT,
        max_in_flight: int = 4,
        hedge_after: float | None = None,
        health_checks: bool = True,
        shared_memory: SharedMemoryMode = "auto",
        tls: TLS | None = None,
        token: str | None = None,
        allow_plaintext_token: bool = False,
    ) -> None:
        self._settings = Settings(
            target=target,
            model=model,
            expected_fingerprint=expected_fingerprint,
            on_fingerprint_change=on_fingerprint_change,
            timeout=timeout,
            max_in_flight=max_in_flight,
            hedge_after=hedge_after,
            health_checks=health_checks,
            tls=tls,
            token=token,
            allow_plaintext_token=allow_plaintext_token,
        )
        self._fingerprints = Fingerprints(target, expected_fingerprint, on_fingerprint_change)
        self._hedging = None if hedge_after is None else Hedging(hedge_after)
        self._sharing = Sharing(
            shared_memory,
            target,
            slots=max_in_flight,
            open_lease=self._lease_flow,
            wait=self._wait_for,
        )
        self._channel = self._open_channel(self._settings)
        self._stub = SemanticIdServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated
        # What is shared is shared with one process: its calls keep to one connection.
        self._shared_channel = self._open_channel(replace(self._settings, one_server=True))
        self._shared_stub = SemanticIdServiceStub(self._shared_channel)  # type: ignore[no-untyped-call]
        self._info: ModelInfo | None = None
        self._heard = False
        self._closed = False
        self._pid = os.getpid()

    @property
    def target(self) -> str:
        """The server's address, as given."""
        return self._settings.target

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Fingerprints of the models that have answered so far, the first one first.

        More than one means that the model was replaced, or that replicas differ.
        """
        return self._fingerprints.seen

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<{type(self).__name__} of {self.target!r}, {state}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} holds connections and can be neither pickled nor copied: "
            "make one in each process"
        )

    # What the two clients do differently: how to open a channel, start a call, and let time pass.

    @abstractmethod
    def _open_channel(self, settings: Settings) -> Any: ...

    @abstractmethod
    def _start(
        self, method: str, request: Any, timeout: float, *, alone: bool, shared: bool = False
    ) -> Any:
        """Return a call that can be waited for, and cancelled.

        It is under way at once, unless it is ``alone``: then nothing else is until it is done.
        If it refers to ``shared`` memory, it goes where that is shared.
        """

    @abstractmethod
    def _open_lease(self, request: pb.ShareMemoryRequest, timeout: float) -> Any:
        """Return what can be waited for, and gives a `Lease`; waits for a connection."""

    @abstractmethod
    def _pause(self, seconds: float) -> Any:
        """Something that can be waited for, and takes that long."""

    @abstractmethod
    def _wait_for(self, future: Future[Any], seconds: float) -> Any:
        """Something that can be waited for, and ends with the future, or after that long."""

    # Flows.

    def _call(self, method: str, request: Any, deadline: Deadline) -> Flow[Any]:
        with self._errors_of(method):
            response = yield self._start(method, request, deadline.remaining(), alone=True)
        self._heard = True
        return response

    def _model_flow(self, timeout: float | None) -> Flow[ModelInfo]:
        return (yield from self._fetch_model(self._deadline(timeout)))

    def _fetch_model(self, deadline: Deadline) -> Flow[ModelInfo]:
        request = pb.GetModelRequest(model=self._settings.model)
        replicas_left = OTHER_REPLICAS
        while True:
            response = yield from self._call("GetModel", request, deadline)
            info = ModelInfo.from_message(response.model)
            try:
                self._fingerprints.met(info.fingerprint)
            except FingerprintMismatchError:
                if not replicas_left:
                    raise
                replicas_left -= 1
            else:
                self._info = info
                return info

    def _models_flow(self, timeout: float | None) -> Flow[tuple[ModelInfo, ...]]:
        deadline = self._deadline(timeout)
        response = yield from self._call("ListModels", pb.ListModelsRequest(), deadline)
        return tuple(ModelInfo.from_message(model) for model in response.models)

    def _ready_flow(self, timeout: float) -> Flow[ModelInfo]:
        check_timeout(timeout)
        deadline = Deadline.after(timeout)
        reason: SemidClientError | None = None
        while True:
            try:
                return (yield from self._fetch_model(deadline))
            except UnavailableError as error:
                reason = error
            except DeadlineExceededError as error:
                reason = reason or error
            if deadline.remaining() <= PAUSE:
                raise DeadlineExceededError(
                    f"the server at {self.target} was not ready within {timeout:g} s: {reason}",
                    target=self.target,
                    method="GetModel",
                    code=grpc.StatusCode.DEADLINE_EXCEEDED,
                ) from reason
            yield self._pause(PAUSE)

    def _encode_flow(self, embeddings: ArrayLike, timeout: float | None) -> Flow[NDArray[Any]]:
        rows, single = as_matrix(embeddings, "embeddings")
        return (yield from self._collect(Encoding(rows), timeout, single=single))

    def _decode_flow(
        self, codes: ArrayLike, mode: str, timeout: float | None
    ) -> Flow[NDArray[Any]]:
        rows, single = as_matrix(codes, "codes")
        return (yield from self._collect(Decoding(rows, mode), timeout, single=single))

    def _collect(
        self, transfer: Encoding | Decoding, timeout: float | None, *, single: bool
    ) -> Flow[NDArray[Any]]:
        sink = Collected(transfer.source.shape[0])
        yield from self._transfer(transfer, sink, timeout, patient=False)
        return sink.array[0] if single else sink.array

    def _transfer(
        self,
        transfer: Encoding | Decoding,
        sink: Callable[[int, NDArray[Any]], None],
        timeout: float | None,
        *,
        patient: bool,
    ) -> Flow[str]:
        """Send all rows, several messages in flight, and hand the answers on in order.

        The deadline bounds the whole transfer, or, if ``patient``, each message of it: then the
        transfer also waits, within that time, for a server that is busy or coming back.
        """
        deadline = self._deadline(timeout)
        self._check_usable()
        info = self._info or (yield from self._fetch_model(deadline))
        expected = self._fingerprints.expected or (info.fingerprint if patient else "")
        job = _Job(transfer, info, Answers(transfer, expected, sink), patient)
        lost_at = -1
        try:
            job = yield from self._with_carrier(job, deadline)
            while True:
                try:
                    yield from self._send_all(job, timeout, deadline)
                    break
                except SharingEndedError as ended:
                    # What has no answer yet is sent again. If nothing was answered since the memory
                    # was last shared anew, as bytes.
                    self._sharing.lost(job.carrier, ended, again=job.answers.next_row > lost_at)
                    lost_at = job.answers.next_row
                    if patient:
                        deadline = self._deadline(timeout)
                    job = yield from self._with_carrier(job, deadline)
        except SemidClientError:
            self._info = None  # the server may have been replaced: ask again before the next call
            raise
        finally:
            self._sharing.give_back(job.carrier)
        if job.answers.fingerprint != info.fingerprint:
            self._info = None
        return job.answers.fingerprint

    def _send_all(self, job: _Job, timeout: float | None, deadline: Deadline) -> Flow[None]:
        """Send all rows that have no answer yet, and hand the answers on."""
        names_bytes = len(self._settings.model.encode()) + len(job.info.fingerprint.encode())
        in_flight: deque[_Sent] = deque()
        try:
            for span in spans(
                job.transfer,
                job.info,
                names_bytes=names_bytes,
                start=job.answers.next_row,
                carrier=job.carrier,
            ):
                if len(in_flight) == self._settings.max_in_flight:
                    yield from self._finish(job, in_flight[0])
                    in_flight.popleft()
                if job.patient:
                    deadline = self._deadline(timeout)
                in_flight.append(_Sent(span, deadline, self._send(job, span, deadline)))
            while in_flight:
                yield from self._finish(job, in_flight[0])
                in_flight.popleft()
        finally:
            for sent in in_flight:
                sent.call.cancel()

    def _with_carrier(self, job: _Job, deadline: Deadline) -> Flow[_Job]:
        """Return the job with what carries its rows, if they are not to be sent as bytes."""
        while True:
            try:
                carrier = yield from self._sharing.carrier(
                    job.transfer, job.info, deadline.remaining()
                )
            except UnavailableError:
                if job.patient and deadline.remaining() > PAUSE:
                    yield self._pause(PAUSE)
                    continue
                if self._sharing.required:
                    raise
                carrier = None  # what is sent as bytes meets the same, and knows what to do
            return replace(job, carrier=carrier)

    def _lease_flow(self, request: pb.ShareMemoryRequest, timeout: float) -> Flow[Lease]:
        with self._errors_of("ShareMemory"):
            try:
                lease: Lease = yield self._open_lease(request, timeout)
            except TimeoutError as error:
                raise UnavailableError(
                    f"ShareMemory at {self.target} had no answer within {timeout:g} s",
                    target=self.target,
                    method="ShareMemory",
                ) from error
        return lease

    def _allocate_flow(
        self, rows: int, width: int, dtype: DTypeLike, timeout: float | None
    ) -> Flow[NDArray[Any]]:
        deadline = self._deadline(timeout)
        self._check_usable()
        info = self._info or (yield from self._fetch_model(deadline))
        return (yield from self._sharing.allocate(rows, width, dtype, info, deadline.remaining()))

    def _finish(self, job: _Job, sent: _Sent) -> Flow[None]:
        """Wait for one message's answer, and hand it on."""
        replicas_left = OTHER_REPLICAS
        while True:
            try:
                with self._errors_of(job.transfer.method):
                    response = yield sent.call
                self._heard = True
                if response.fingerprint:
                    self._fingerprints.met(response.fingerprint)
                rows = job.answers.read(sent.span, response)
            except (CallError, FingerprintMismatchError) as error:
                job.check_shared(error)
                failure = _explained(error, job, sent.span)
                if isinstance(failure, FingerprintMismatchError) and replicas_left:
                    replicas_left -= 1
                    pause: float | None = 0.0
                else:
                    pause = _pause_after(error) if job.patient else None
                if pause is None or sent.deadline.remaining() <= pause:
                    if failure is error:
                        raise
                    raise failure from error.__cause__
                if pause:
                    yield self._pause(pause)
                sent.call = self._send(job, sent.span, sent.deadline)
            else:
                job.hand_on(sent.span, rows)
                return

    # Parts of flows.

    def _deadline(self, timeout: float | None) -> Deadline:
        seconds = self._settings.timeout if timeout is None else timeout
        check_timeout(seconds)
        return Deadline.after(seconds)

    def _send(self, job: _Job, span: slice, deadline: Deadline) -> Any:
        request = job.transfer.request(
            span,
            model=self._settings.model,
            expected_fingerprint=job.answers.fingerprint,
            carrier=job.carrier,
        )
        alone = span.stop - span.start == job.transfer.source.shape[0]
        shared = job.carrier is not None
        with self._errors_of(job.transfer.method):
            return self._start(
                job.transfer.method, request, deadline.remaining(), alone=alone, shared=shared
            )

    @property
    def _forked(self) -> bool:
        """Whether this is a copy: its connections and its memory are those of another process."""
        return self._pid != os.getpid()

    def _check_usable(self) -> None:
        if self._forked:
            raise ClientClosedError(
                f"this client was made before a fork, in process {self._pid}; gRPC does not "
                "survive that: make a client in each process"
            )
        if self._closed:
            raise ClientClosedError(f"the client of {self.target} is closed")

    @contextmanager
    def _errors_of(self, method: str) -> Iterator[None]:
        """Let no error of gRPC's pass: all of them become this package's own."""
        self._check_usable()
        try:
            yield
        except grpc.RpcError as error:
            if self._closed:
                raise ClientClosedError(f"the client of {self.target} was closed") from error
            raise call_error(error, target=self.target, method=method, heard=self._heard) from error
        except (ValueError, RuntimeError, grpc.aio.UsageError) as error:
            # How gRPC says that the channel was closed by another thread or task.
            if not self._closed or isinstance(error, SemidClientError):
                raise
            raise ClientClosedError(f"the client of {self.target} was closed") from error


def _pause_after(error: SemidClientError) -> float | None:
    """Seconds after which a message may be sent again; None if that cannot help."""
    if not isinstance(error, CallError):
        return None
    if error.retry_after is None and isinstance(error, UnavailableError):
        return PAUSE
    return error.retry_after


def _explained(error: SemidClientError, job: _Job, span: slice) -> SemidClientError:
    """Say of a refusal where it is in the array given, not in the message that was sent."""
    if isinstance(error, FailedPreconditionError):
        # The status stands for a missing decode mode too; only a mismatch names the fingerprint.
        expected = job.answers.fingerprint
        if expected and expected in error.details:
            return FingerprintMismatchError(str(error))
        return error
    if not isinstance(error, InvalidArgumentError):
        return error
    fault = job.transfer.first_fault(span, job.info)
    if fault is not None:
        message = str(fault)
    elif span.stop - span.start < job.transfer.source.shape[0]:
        message = f"{error} (in rows {span.start} to {span.stop - 1}, counted there from 0)"
    else:
        return error
    located = InvalidArgumentError(
        message, target=error.target, method=error.method, code=error.code, details=error.details
    )
    if fault is not None:
        located.row, located.problem = fault.row, fault.problem
    return located
