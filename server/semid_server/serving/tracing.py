"""Spans of calls and batches for OpenTelemetry: what `semid serve --tracing` adds.

Every call of semid's own service is a span (https://opentelemetry.io/docs/specs/semconv/rpc/grpc/),
a child of its caller's if the call's metadata says so (W3C Trace Context). Every batch is a span of
its own, linked to those of the calls whose rows it ran: it belongs to all of them alike.

Whether a call is recorded is the sampler's to say. A batch is recorded if any of its calls is.

This module needs the extra ``tracing`` and is imported only where tracing is asked for: without it
nothing here is in the way of any call.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import aclosing
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Self

import grpc
import grpc.aio
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.exporter import InvalidCompressionValueException
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Link, SpanKind, StatusCode

from semid_server.errors import ConfigurationError
from semid_server.serving.logs import current_request_id
from semid_server.serving.status import code_of_cancelled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable, Sequence

    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span, Tracer

    from semid_server.serving.batcher import Observer

    CallContext = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]

LAST_SPANS: Final = 5.0
"""Seconds that the end of the process waits for its spans to be taken."""

FAULTS: Final = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""What the conventions call an error of the server; other statuses are the caller's doing."""

_current: ContextVar[_CallSpan | None] = ContextVar("call_span", default=None)


class Tracing:
    """Makes the spans of one process.

    Parameters
    ----------
    processor : SpanProcessor
        Given every span that ends.
    resource : Resource, optional
        What the spans are of; what the environment says, by default.
    """

    def __init__(self, processor: SpanProcessor, resource: Resource | None = None) -> None:
        calls = TracerProvider(resource=resource, shutdown_on_exit=False)
        # A sampler of shares, asked once more, would leave out most batches of the calls it took.
        batches = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        for provider in (calls, batches):
            provider.add_span_processor(processor)
        self._calls: Tracer = calls.get_tracer("semid")
        self._batches: Tracer = batches.get_tracer("semid")
        self._processor = processor

    def close(self) -> None:
        """Have what has ended exported; blocks until that is done or given up."""
        self._processor.shutdown()

    def trace(self, method: str, handler: Handler) -> Handler:
        """Return a handler that does as ``handler``, with a span around each call.

        Parameters
        ----------
        method : str
            Its full name, as in ``semid.v1.SemanticIdService/Encode``.
        handler : RpcMethodHandler
            Ends calls that fail by the context's ``abort``.
        """
        of_handler: dict[tuple[bool, bool], tuple[Any, Any]] = {
            (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
            (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
            (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
            (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
        }
        behaviour, make = of_handler[handler.request_streaming, handler.response_streaming]

        async def answer(message: Any, context: CallContext) -> Any:
            with _CallSpan(self._calls, method, context):
                return await behaviour(message, context)

        async def answer_stream(message: Any, context: CallContext) -> AsyncIterator[Any]:
            with _CallSpan(self._calls, method, context):
                async with aclosing(behaviour(message, context)) as responses:
                    async for response in responses:
                        yield response

        traced: Handler = make(
            answer_stream if handler.response_streaming else answer,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return traced

    def observe(
        self, observer: Observer, *, clock: Callable[[], float] = time.monotonic
    ) -> Observer:
        """Return an observer of a batcher that makes spans of batches, and tells ``observer``."""
        return _BatchSpans(self._batches, observer, clock)


def open_tracing(*, patience: float = LAST_SPANS) -> Tracing:
    """Return tracing that exports by OTLP over gRPC, as the ``OTEL_`` variables say.

    Starts a thread and a gRPC channel: to be called in the process that serves. The end of it waits
    for ``patience`` seconds at most.

    Raises
    ------
    ConfigurationError
        A variable holds what the exporter cannot use.
    """
    name = OTELResourceDetector().detect().attributes.get("service.name") or "semid"
    # The processes of one server share the name.
    resource = Resource.create({"service.name": name, "process.pid": os.getpid()})
    try:
        return Tracing(_Exporting(OTLPSpanExporter(), patience), resource)
    except (InvalidCompressionValueException, ValueError, OSError) as error:
        raise ConfigurationError(f"tracing, as the OTEL_ variables set it up: {error}") from error


class _Exporting(BatchSpanProcessor):
    """Exports in batches from a thread of its own, and gives up soon when it ends."""

    def __init__(self, exporter: OTLPSpanExporter, patience: float) -> None:
        super().__init__(exporter)
        self._last, self._patience = exporter, patience

    def shutdown(self) -> None:
        """Export what is left, for at most so many seconds."""
        # The library would try for 30 s where nobody listens: longer than supervisors wait.
        given_up = threading.Timer(self._patience, self._last.shutdown)
        given_up.daemon = True
        given_up.start()
        super().shutdown()  # type: ignore[no-untyped-call]  # the library left it out
        given_up.cancel()


class _CallSpan:
    """The span of one call, and what is learned of the call until it ends."""

    __slots__ = ("_context", "_key", "_requests", "_rows", "_started", "_wait", "span")

    def __init__(self, tracer: Tracer, method: str, context: CallContext) -> None:
        self._context, self._started = context, time.perf_counter()
        self._key: Any = None
        self._requests = self._rows = 0
        self._wait: float | None = None
        metadata = context.invocation_metadata() or ()
        self.span: Span = tracer.start_span(
            method,
            # Binary values are none of what the propagators read.
            context=extract({name: text for name, text in metadata if isinstance(text, str)}),
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": method},
        )

    def admitted(self, key: Hashable, rows: int) -> None:
        """Note a request of this call that was admitted."""
        self._key = key
        self._requests += 1
        self._rows += rows

    def waited(self, seconds: float) -> None:
        """Note how long a request of this call was queued."""
        self._wait = max(self._wait or 0.0, seconds)

    def __enter__(self) -> Self:
        _current.set(self)  # for the tasks that this one starts too; it ends with the call
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        code = self._code(error)
        span = self.span
        span.set_attribute("rpc.response.status_code", code.name)
        if code in FAULTS:
            span.set_attribute("error.type", code.name)
            span.set_status(StatusCode.ERROR)
        if span.is_recording():
            span.set_attribute("semid.request_id", current_request_id())
        if self._key is not None:
            model = self._key.model
            span.set_attribute("semid.model", model.name)
            span.set_attribute("semid.fingerprint", model.fingerprint)
            span.set_attribute("semid.requests", self._requests)
            span.set_attribute("semid.rows", self._rows)
        if self._wait is not None:
            span.set_attribute("semid.queue_seconds", self._wait)
        span.end()

    def _code(self, error: BaseException | None) -> grpc.StatusCode:
        if error is None:
            return grpc.StatusCode.OK
        code: Any = self._context.code()  # a number, 0, unless the call was aborted
        if isinstance(code, grpc.StatusCode):
            return code
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            seconds = time.perf_counter() - self._started
            return code_of_cancelled(seconds, self._context.time_remaining())
        return grpc.StatusCode.UNKNOWN


class _Mark:
    """An admitted request: whose it is, since when it waits, and what the inner observer noted."""

    __slots__ = ("admitted", "begun", "call", "inner")

    def __init__(self, call: _CallSpan | None, admitted: float, inner: object) -> None:
        self.call, self.admitted, self.inner = call, admitted, inner
        self.begun = False


class _BatchSpans:
    """Makes a span of each batch that ran; tells another observer everything."""

    def __init__(self, tracer: Tracer, inner: Observer, clock: Callable[[], float]) -> None:
        self._tracer, self._inner, self._clock = tracer, inner, clock
        self.refused, self.expired, self.withdrawn = inner.refused, inner.expired, inner.withdrawn

    def admitted(self, key: Hashable, rows: int) -> object:
        call = _current.get()
        if call is not None and not call.span.is_recording():
            call = None
        if call is not None:
            call.admitted(key, rows)
        return _Mark(call, self._clock(), self._inner.admitted(key, rows))

    def ran(
        self,
        key: Hashable,
        *,
        rows: int,
        answered: int,
        waits: Sequence[float],
        seconds: float,
        failed: bool,
        marks: Sequence[Any],
    ) -> None:
        self._inner.ran(
            key,
            rows=rows,
            answered=answered,
            waits=waits,
            seconds=seconds,
            failed=failed,
            marks=[mark.inner for mark in marks],
        )
        ended, started = time.time_ns(), self._clock() - seconds
        spans: dict[Span, None] = {}  # each once: a stream has several requests in a batch
        for mark in marks:
            if mark.call is None:
                continue
            spans[mark.call.span] = None
            if not mark.begun:
                mark.begun = True
                mark.call.waited(max(0.0, started - mark.admitted))
        contexts = [span.get_span_context() for span in spans]
        links = [Link(context) for context in contexts if context.trace_flags.sampled]
        if not links:
            return
        work: Any = key
        span = self._tracer.start_span(
            f"semid batch {work.operation}",
            context=Context(),  # nobody's child
            links=links,
            attributes={
                "semid.operation": work.operation,
                "semid.model": work.model.name,
                "semid.fingerprint": work.model.fingerprint,
                "semid.device": work.model.device,
                "semid.requests": len(marks),
                "semid.rows": rows,
            },
            start_time=ended - int(1e9 * seconds),
        )
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(ended)
