"""Around every call of semid's own service: its metrics, and its errors as statuses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, NoReturn, Self

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from semid_server.errors import InvalidInputError, NotServingError, SemidError
from semid_server.serving.logs import REQUEST_ID_KEY, begin_request
from semid_server.serving.status import status_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from semid_server.serving.metrics import Metrics
    from semid_server.serving.tokens import TokenFile

    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

logger = logging.getLogger(__name__)

INTERNAL_MESSAGE = "an internal error; the server's log says more"


class CallInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not generic at run time
    """Counts and times the calls of one service, and turns what they raise into statuses.

    An exception that is not semid's own is a bug: it is logged, and the caller is told only that,
    since its text may hold what is no caller's business.

    Parameters
    ----------
    service : str
        Full name of the service; calls of others pass through untouched.
    metrics : Metrics
        Where calls are counted.
    tokens : TokenFile, optional
        Who may call what; everybody everything without it.
    """

    def __init__(self, service: str, metrics: Metrics, tokens: TokenFile | None = None) -> None:
        self._service, self._metrics, self._tokens = service, metrics, tokens
        self._draining = False
        self._calls = self._in_progress = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def drain(self) -> None:
        """Turn every further call away as unavailable; those in progress go on."""
        self._draining = True

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

    async def intercept_service(  # type: ignore[override]  # None for an unknown method
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the handler of a call, wrapped."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.removeprefix("/").rpartition("/")
        if handler is None or service != self._service:
            return handler
        read = _reading(handler.request_deserializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, ("unary", service, method)),
                read,
                handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(handler.unary_stream, ("server_stream", service, method), _readable),
                read,
                handler.response_serializer,
            )
        return grpc.stream_stream_rpc_method_handler(
            self._stream(handler.stream_stream, ("bidi_stream", service, method), _Requests),
            read,
            handler.response_serializer,
        )

    def _unary(self, behaviour: Any, call: tuple[str, str, str]) -> Any:
        async def answer(request: Any, context: Context) -> Any:
            with self._counted(), _Call(self._metrics, self._tokens, call, context) as this:
                try:
                    self._turn_away_if_draining()
                    this.authorise()
                    return await behaviour(_readable(request), context)
                except Exception as error:  # noqa: BLE001 - told apart there
                    await this.fail(error)

        return answer

    def _stream(
        self, behaviour: Any, call: tuple[str, str, str], readable: Callable[[Any], Any]
    ) -> Any:
        async def answer(requests: Any, context: Context) -> AsyncIterator[Any]:
            with self._counted(), _Call(self._metrics, self._tokens, call, context) as this:
                try:
                    self._turn_away_if_draining()
                    this.authorise()
                    async for response in behaviour(readable(requests), context):
                        yield response
                except Exception as error:  # noqa: BLE001 - told apart there
                    await this.fail(error)

        return answer

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._calls += 1
        self._in_progress += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_progress -= 1
            if not self._in_progress:
                self._idle.set()

    def _turn_away_if_draining(self) -> None:
        if self._draining:
            raise NotServingError("the server is shutting down; try again, elsewhere if you can")


class _Unreadable:
    """Stands for a message whose bytes are none of its type."""


def _reading(deserialize: Any) -> Callable[[bytes], Any]:
    """Return a deserializer that never raises: gRPC would call it an error of the server's."""

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable()

    return read


def _readable(request: Any) -> Any:
    if isinstance(request, _Unreadable):
        raise InvalidInputError("the message cannot be read: its bytes are no message of its type")
    return request


class _Requests:
    """The messages of a stream, each of which can be read."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = requests

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        return _readable(await anext(self._requests))


class _Call:
    """One call, from its start to its status."""

    def __init__(
        self,
        metrics: Metrics,
        tokens: TokenFile | None,
        call: tuple[str, str, str],
        context: Context,
    ) -> None:
        self._metrics, self._tokens, self._call, self._context = metrics, tokens, call, context
        self._metadata = dict(context.invocation_metadata() or ())
        self._trailing = ((REQUEST_ID_KEY, begin_request(self._metadata)),)
        context.set_trailing_metadata(self._trailing)
        self._code = grpc.StatusCode.OK
        self._started = time.perf_counter()

    def authorise(self) -> None:
        """Raise unless the caller may make this call."""
        if self._tokens is not None:
            sent = self._metadata.get("authorization")
            self._tokens.check(sent if isinstance(sent, str) else None, self._call[-1])

    def __enter__(self) -> Self:
        self._metrics.started.labels(*self._call).inc()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            remaining = self._context.time_remaining()
            late = remaining is not None and remaining <= 0
            self._code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
        seconds = time.perf_counter() - self._started
        self._metrics.handling.labels(*self._call).observe(seconds)
        self._metrics.handled.labels(*self._call, self._code.name).inc()
        logger.debug("%s: %s after %.1f ms", self._call[-1], self._code.name, 1e3 * seconds)

    async def fail(self, error: Exception) -> NoReturn:
        """End the call with the status of ``error``."""
        if isinstance(error, SemidError):
            status = status_of(error)
            self._code = status.code
            trailing = self._trailing + status.trailing_metadata
            await self._context.abort(status.code, status.message, trailing)
        logger.error("%s failed", "/".join(self._call[1:]), exc_info=error)
        self._code = grpc.StatusCode.INTERNAL
        await self._context.abort(self._code, INTERNAL_MESSAGE, self._trailing)
        raise AssertionError("abort() raises")  # pragma: no cover
