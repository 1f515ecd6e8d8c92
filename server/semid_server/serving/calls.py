"""Around every call of semid's own service: its metrics, and its errors as statuses.

What a gRPC interceptor would do for each call anew is done here once for each method, when the
server is made: looking for the method, wrapping its handler. And it is decided before a call's
message is read whether it is read at all. A call for which there is no room is refused at once,
and its message, megabytes perhaps, stays with its sender.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from asyncio import current_task
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from semid_server.errors import InvalidInputError, NotServingError, OverloadedError, SemidError
from semid_server.serving.incoming import (
    FEW,
    FULL_RETRY_AFTER,
    NO_MESSAGE,
    UNREADABLE,
    Incoming,
    may_be_gone,
    next_message,
)
from semid_server.serving.logs import REQUEST_ID_KEY, begin_request, id_in
from semid_server.serving.status import code_of_cancelled, status_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from semid_server.serving.metrics import MethodMetrics, Metrics
    from semid_server.serving.status import WireStatus
    from semid_server.serving.tokens import TokenFile

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
    Refusal = Callable[[], SemidError | None]
    Trace = Callable[[str, Handler], Handler]
    Metadata = tuple[tuple[str, str | bytes], ...]

logger = logging.getLogger(__name__)

INTERNAL_MESSAGE: Final = "an internal error; the server's log says more"

_UNKNOWN: Final = "\0"
"""In place of a request id: no caller can send it."""


@dataclass(frozen=True, slots=True)
class _Method:
    """A method that is served: what answers its calls, and when they are refused.

    ``patient`` answers them as ``handler`` does, but waits for the message itself, and so may give
    up.
    """

    name: str
    handler: Handler
    patient: Handler
    metrics: MethodMetrics
    refusal: Refusal


class Calls(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not generic at run time
    """Counts and times the calls of one service, and turns what they raise into statuses.

    An exception that is not semid's own is a bug: it is logged, and the caller is told only that,
    since its text may hold what is no caller's business.

    Parameters
    ----------
    service : str
        Full name of the service.
    metrics : Metrics
        Where calls are counted.
    tokens : TokenFile, optional
        Who may call what; everybody everything without it.
    max_calls : int, optional
        Calls in progress, at most, with those whose message is on its way: one more is refused, or
        another of the latter is given up for it.
    incoming : Incoming, optional
        What waits for messages, but for those of a few calls that have no message yet: to leave
        that to gRPC is faster, by a tenth of what a short call takes.
    trace : callable, optional
        Given a method's full name and what answers its calls, returns what does so in its place:
        for spans. Without it, calls are answered by what it would have been given.
    """

    def __init__(
        self,
        service: str,
        metrics: Metrics,
        tokens: TokenFile | None = None,
        *,
        max_calls: int | None = None,
        incoming: Incoming | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._service, self._metrics, self._tokens = service, metrics, tokens
        self._max_calls, self._trace = max_calls, trace
        self._incoming = incoming or Incoming()
        # Calls whose messages gRPC waits for. They cannot be given up, so some must be left.
        self._few = FEW if max_calls is None else min(FEW, max_calls // 2)
        self._methods: dict[str, _Method] = {}
        self._draining = False
        self._held: asyncio.Event | None = None
        self._calls = self._in_progress = 0
        # Calls whose message gRPC waits for: the request id that was sent ahead of it, if one was,
        # by the task, which may have ended by now.
        self._coming: dict[asyncio.Task[Any] | None, str | None] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        # The last refusal, and its status.
        self._refused_with: SemidError | None = None
        self._refused_status: WireStatus

    def serve(
        self, handlers: Mapping[str, Handler], refusals: Mapping[str, Refusal] | None = None
    ) -> None:
        """Answer calls by these handlers.

        Parameters
        ----------
        handlers : mapping of str to RpcMethodHandler
            By the method's name. They read and write messages as gRPC would have them do.
        refusals : mapping of str to callable, optional
            By the method's name: asked before a call's message is read, they return what to refuse
            it with, or None.
        """
        for name, handler in handlers.items():
            refusal = (refusals or {}).get(name, _never)
            self._methods[f"/{self._service}/{name}"] = self._wrapped(name, handler, refusal)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        """Return what answers a call: gRPC asks before it reads the message."""
        method = self._methods.get(handler_call_details.method)
        if method is None:
            return None
        # As few calls of Python's as may be: each is cold when it is come to.
        error = None
        if self._tokens is not None or self._held is not None:
            error = self._shut(method, handler_call_details)
        error = error or method.refusal()
        if error is not None:
            return self._refusing(method.name, method.metrics, error)
        if self._in_progress + len(self._coming) + self._incoming.calls.count >= self._few:
            handler = self._in_a_crowd(method)
            if handler is not None:
                return handler
        # gRPC asks in the task that will answer the call, once its message has come.
        metadata: Any = handler_call_details.invocation_metadata
        self._coming[current_task()] = id_in(metadata)
        return method.handler

    def drain(self) -> None:
        """Turn every further call away as unavailable; those in progress go on."""
        self._draining = True

    def hold(self) -> None:
        """Tell calls that come from now on, or were not told yet, nothing until `release`."""
        self._held = asyncio.Event()

    def release(self) -> None:
        """Turn those away that were held."""
        if self._held is not None:
            self._held.set()

    async def idle(self) -> None:
        """Wait until no call is in progress."""
        await self._idle.wait()

    async def quiet(self, seconds: float) -> None:
        """Wait until no call has come for so long."""
        while True:
            calls = self._calls
            await asyncio.sleep(seconds)
            if self._calls == calls:
                return

    def _wrapped(self, name: str, handler: Handler, refusal: Refusal) -> _Method:
        kinds: dict[tuple[bool, bool], tuple[str, Any]] = {
            (False, False): ("unary", self._unary),
            (False, True): ("server_stream", self._server_stream),
            (True, True): ("bidi_stream", self._bidi_stream),
        }
        kind, wrap = kinds[handler.request_streaming, handler.response_streaming]
        metrics = self._metrics.of_method((kind, self._service, name))
        wrapped = self._traced(name, wrap(name, handler, metrics))
        patient = wrapped
        if not handler.request_streaming:
            patient = self._patient(name, wrapped, metrics)
        return _Method(name, wrapped, patient, metrics, refusal)

    def _traced(self, name: str, handler: Handler) -> Handler:
        if self._trace is None:
            return handler
        return self._trace(f"{self._service}/{name}", handler)

    def _unary(self, name: str, handler: Handler, metrics: MethodMetrics) -> Handler:
        # gRPC hands over bytes and is given bytes: its own way around both is no shorter.
        behaviour: Any = handler.unary_unary
        read, write = handler.request_deserializer, handler.response_serializer
        assert read is not None  # noqa: S101 - generated handlers have both
        assert write is not None  # noqa: S101

        async def answer(message: bytes, context: Context) -> bytes:
            with _Call(self, name, metrics, context) as call:
                try:
                    self.check(metrics)
                    written: bytes = write(await behaviour(_read(read, message), context))
                except Exception as error:  # noqa: BLE001 - told apart there
                    await call.fail(error)
            return written

        return grpc.unary_unary_rpc_method_handler(answer)

    def _server_stream(self, name: str, handler: Handler, metrics: MethodMetrics) -> Handler:
        behaviour: Any = handler.unary_stream
        read = handler.request_deserializer
        assert read is not None  # noqa: S101 - generated handlers have it

        async def answer(message: bytes, context: Context) -> AsyncIterator[Any]:
            with _Call(self, name, metrics, context) as call:
                try:
                    self.check(metrics)
                    async with aclosing(behaviour(_read(read, message), context)) as responses:
                        async for response in responses:
                            yield response
                except Exception as error:  # noqa: BLE001 - told apart there
                    await call.fail(error)

        return grpc.unary_stream_rpc_method_handler(
            answer, response_serializer=handler.response_serializer
        )

    def _bidi_stream(self, name: str, handler: Handler, metrics: MethodMetrics) -> Handler:
        behaviour: Any = handler.stream_stream
        read = handler.request_deserializer
        assert read is not None  # noqa: S101 - generated handlers have it

        async def answer(_messages: object, context: Context) -> AsyncIterator[Any]:
            with _Call(self, name, metrics, context) as call:
                try:
                    self.check(metrics)
                    with _Requests(self._incoming, context, read, call) as requests:
                        async with aclosing(behaviour(requests, context)) as responses:
                            async for response in responses:
                                yield response
                except grpc.aio.AbortError:  # given up
                    raise
                except Exception as error:  # noqa: BLE001 - told apart there
                    await call.fail(error)

        return grpc.stream_stream_rpc_method_handler(
            answer, response_serializer=handler.response_serializer
        )

    def _patient(self, name: str, handler: Handler, metrics: MethodMetrics) -> Handler:
        """Return what answers as ``handler`` does the one message that it waits for itself."""

        async def first(context: Context) -> Any:
            def give_up(error: SemidError) -> Awaitable[NoReturn]:
                refuse: Any = self._refusing(name, metrics, error, at_once=True).stream_unary
                refused: Awaitable[NoReturn] = refuse(None, context)
                return refused

            message = await self._incoming.message(context, self._incoming.calls, give_up)
            if message is None:
                await may_be_gone()
                await give_up(InvalidInputError(NO_MESSAGE))
            return message

        if not handler.response_streaming:
            unary: Any = handler.unary_unary

            async def answer(_messages: object, context: Context) -> Any:
                return await unary(await first(context), context)

            return grpc.stream_unary_rpc_method_handler(answer)
        behaviour: Any = handler.unary_stream

        async def answer_stream(_messages: object, context: Context) -> AsyncIterator[Any]:
            async with aclosing(behaviour(await first(context), context)) as responses:
                async for response in responses:
                    yield response

        return grpc.stream_stream_rpc_method_handler(
            answer_stream, response_serializer=handler.response_serializer
        )

    def _contending(self, method: _Method) -> Handler:
        """Return what answers one call for which there is no room, if another makes way for it."""
        refusing = self._refusing(method.name, method.metrics, self._too_many())
        if not self._incoming.calls or self._in_progress >= (self._max_calls or math.inf):
            return refusing
        refuse: Any = refusing.stream_unary

        if not method.patient.response_streaming:
            unary: Any = method.patient.stream_unary

            async def answer(messages: object, context: Context) -> Any:
                make = unary if self._incoming.make_way(context) else refuse
                return await make(messages, context)

            return grpc.stream_unary_rpc_method_handler(answer)
        behaviour: Any = method.patient.stream_stream

        async def answer_stream(messages: object, context: Context) -> AsyncIterator[Any]:
            if not self._incoming.make_way(context):
                await refuse(messages, context)
            async with aclosing(behaviour(messages, context)) as responses:
                async for response in responses:
                    yield response

        return grpc.stream_stream_rpc_method_handler(
            answer_stream, response_serializer=method.patient.response_serializer
        )

    def _refusing(
        self, name: str, metrics: MethodMetrics, error: SemidError, *, at_once: bool = False
    ) -> Handler:
        """Return what refuses one call. As a reader of streams, it need not read the message.

        Unless ``at_once``, calls that are held are told when they are released.
        """

        async def refuse(_messages: object, context: Context) -> NoReturn:
            with _Call(self, name, metrics, context) as call:
                if self._held is not None and not at_once:
                    await self._held.wait()
                if self._draining:
                    await call.fail(_shutting_down())
                if isinstance(error, OverloadedError):
                    metrics.refused.value += 1
                await call.end(self._status_of_refusal(error))

        return self._traced(name, grpc.stream_unary_rpc_method_handler(refuse))

    def _status_of_refusal(self, error: SemidError) -> WireStatus:
        """Return what tells of ``error``: where many are refused, many get the same one."""
        if error is not self._refused_with:
            self._refused_with, self._refused_status = error, status_of(error)
        return self._refused_status

    @property
    def coming(self) -> int:
        """Calls whose message gRPC waits for; with some, it may be, whose callers have left."""
        return len(self._coming)

    @property
    def in_all(self) -> int:
        """Calls in progress, and those whose message is on its way."""
        return self._in_progress + len(self._coming) + len(self._incoming.calls)

    def _forget_the_gone(self) -> None:
        """Forget the calls whose caller left before their message had come: nobody told of them."""
        self._coming = {
            task: sent
            for task, sent in self._coming.items()
            if task is not None and not task.done()
        }

    def _too_many(self) -> OverloadedError:
        return OverloadedError(
            f"{self.in_all} calls are in progress; this server takes {self._max_calls}",
            retry_after=FULL_RETRY_AFTER,
        )

    def id_of(self, context: Context) -> str | None:
        """Return the request id that was sent with the call that this task is about to begin."""
        sent = self._coming.pop(current_task(), _UNKNOWN)
        if sent is _UNKNOWN:
            metadata: Any = context.invocation_metadata()
            return id_in(metadata)
        return sent

    def begin(self) -> None:
        """Count a call that begins."""
        self._calls += 1
        if not self._in_progress:
            self._idle.clear()
        self._in_progress += 1

    def end(self) -> None:
        """Count one that has ended."""
        self._in_progress -= 1
        if not self._in_progress:
            self._idle.set()

    def _shut(self, method: _Method, details: grpc.HandlerCallDetails) -> SemidError | None:
        """Return what a call is refused with that may not be made, or not any more, if so."""
        if self._held is not None:
            return _shutting_down()
        return None if self._tokens is None else self._unknown(self._tokens, method, details)

    def _in_a_crowd(self, method: _Method) -> Handler | None:
        """Return what answers a call that comes while there are others; None if it is as ever."""
        if self.in_all >= FEW:
            self._incoming.watch()
            if (short := self._incoming.refusal()) is not None:
                return self._refusing(method.name, method.metrics, short)
        if self._max_calls is not None and self.in_all >= self._max_calls:
            self._forget_the_gone()
            if self.in_all >= self._max_calls:
                return self._contending(method)
        if len(self._coming) == self._few:
            self._forget_the_gone()
            if len(self._coming) == self._few:
                return method.patient
        return None

    def _unknown(
        self, tokens: TokenFile, method: _Method, details: grpc.HandlerCallDetails
    ) -> SemidError | None:
        """Return what a caller is refused with who may not call this method, if so."""
        metadata: Any = details.invocation_metadata  # the stubs have those of another class
        sent = dict(metadata or ()).get("authorization")  # of several the last, as in `peers`
        try:
            tokens.check(sent if isinstance(sent, str) else None, method.name)
        except SemidError as error:
            return error
        return None

    def check(self, metrics: MethodMetrics) -> None:
        """Raise unless this call may be made now."""
        if self._draining:
            raise _shutting_down()
        # Others may have begun while the message was on its way.
        if self._max_calls is not None and self._in_progress > self._max_calls:
            metrics.refused.value += 1
            raise self._too_many()


def _shutting_down() -> NotServingError:
    return NotServingError("the server is shutting down; try again, elsewhere if you can")


def _never() -> None:
    """Refuse nothing."""


def _read(read: Callable[[bytes], Any], message: bytes) -> Any:
    try:
        return read(message)
    except DecodeError as error:
        raise InvalidInputError(UNREADABLE) from error


class _Requests:
    """The messages of a stream, which may be given up until it is left."""

    def __init__(
        self, incoming: Incoming, context: Context, read: Callable[[bytes], Any], call: _Call
    ) -> None:
        self._context, self._read = context, read
        self._streams = incoming.streams
        self._awaited = incoming.awaited(context, partial(call.give_up, current_task()))

    def __enter__(self) -> Self:
        self._streams.add(self._awaited)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._streams.discard(self._awaited)
        self._awaited.over = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        self._streams.renew(self._awaited)
        message = await next_message(self._context)
        if message is None:
            raise StopAsyncIteration
        return _read(self._read, message)


class _Call:
    """One call, from its start to its status."""

    __slots__ = (
        "_calls",
        "_code",
        "_context",
        "_counted",
        "_given_up",
        "_method",
        "_metrics",
        "_request_id",
        "_started",
    )

    def __init__(self, calls: Calls, method: str, metrics: MethodMetrics, context: Context) -> None:
        self._calls, self._method, self._metrics = calls, method, metrics
        self._context = context
        self._code = grpc.StatusCode.OK
        self._counted = False
        self._started = time.perf_counter()
        self._given_up: asyncio.Future[grpc.aio.AbortError] | None = None

    def __enter__(self) -> Self:
        self._request_id = begin_request(self._calls.id_of(self._context))
        # With an answer only to who sent one: on its way it costs more than to copy 64 KiB.
        if self._request_id.of_caller:
            self._context.set_trailing_metadata(self._told)
        self._calls.begin()
        self._metrics.started.value += 1
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if not self._counted:
            seconds = time.perf_counter() - self._started
            if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
                self._code = code_of_cancelled(seconds, self._context.time_remaining())
            self._count(seconds)
        self._calls.end()

    @property
    def _told(self) -> Metadata:
        return ((REQUEST_ID_KEY, str(self._request_id)),)

    async def fail(self, error: Exception) -> NoReturn:
        """End the call with the status of ``error``, unless it is given up already."""
        if self._given_up is not None:
            raise await self._given_up
        if isinstance(error, SemidError):
            status = status_of(error)
            # Where it comes from holds what was made of the message, many times its size perhaps:
            # not until the caller has been told, as many are at one time.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            await self.end(status)
        logger.error("%s failed", self._method, exc_info=error)
        await self._abort(grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE, self._told)

    async def give_up(self, task: asyncio.Task[Any] | None, error: OverloadedError) -> None:
        """End the call while ``task`` answers it, whatever that waits for."""
        if self._counted:  # it ends by itself
            return
        self._metrics.refused.value += 1
        self._given_up = asyncio.get_running_loop().create_future()
        try:
            await self.end(status_of(error))
        except grpc.aio.AbortError as ended:  # gRPC wants to see this one again
            self._given_up.set_result(ended)
        finally:
            self._given_up.cancel()
        if task is not None:
            task.cancel()

    async def end(self, status: WireStatus) -> NoReturn:
        """End the call with a status that is no success."""
        trailing = self._told + status.trailing_metadata
        await self._abort(status.code, status.message, trailing)

    async def _abort(self, code: grpc.StatusCode, message: str, trailing: Metadata) -> NoReturn:
        # Counted first, as what is answered is: who knows the outcome finds it in the metrics.
        self._code = code
        self._count(time.perf_counter() - self._started)
        await self._context.abort(code, message, trailing)

    def _count(self, seconds: float) -> None:
        self._counted = True
        self._metrics.handling.observe(seconds)
        # Hashing a member of an enum is a call of Python's.
        ok = self._code is grpc.StatusCode.OK
        (self._metrics.ok if ok else self._metrics.handled(self._code)).value += 1
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: %s after %.1f ms", self._method, self._code.name, 1e3 * seconds)
