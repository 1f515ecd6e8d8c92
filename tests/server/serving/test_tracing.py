"""Spans, as an exporter is given them, of calls that came over a real socket."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import grpc
import grpc.aio
import numpy as np
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from semid.v1 import semid_pb2 as pb
from semid_server.errors import ConfigurationError, OverloadedError
from semid_server.serving.batcher import Runner
from semid_server.serving.calls import Calls
from semid_server.serving.config import ModelSource, ServeConfig
from semid_server.serving.incoming import Incoming
from semid_server.serving.metrics import Metrics
from semid_server.serving.server import SERVICE, Server
from semid_server.serving.tracing import Tracing, open_tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = ("traceparent", f"00-{TRACE}-{PARENT}-01")
NOT_SAMPLED = ("traceparent", f"00-{TRACE}-{PARENT}-00")


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter):
    return Tracing(SimpleSpanProcessor(exporter))


@pytest.fixture
async def traced(serve_runner, toy_runner, tracing):
    return await serve_runner(toy_runner, tracing=tracing)


@pytest.fixture
def spans(exporter):
    """Wait for so many spans; of calls and of batches, in the order in which they ended."""

    async def wait(count, kind=SpanKind.SERVER):
        while len(ended := [s for s in exporter.get_finished_spans() if s.kind is kind]) < count:
            await asyncio.sleep(0)
        assert len(ended) == count
        return ended

    return wait


def request(rows=1, **fields):
    data = np.ones((rows, 4), "<f4").tobytes()
    return pb.EncodeRequest(
        tensor=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=(rows, 4), data=data), **fields
    )


class Gate(Runner):
    """Answers with codes of 0 once it is open; each batch waits for that."""

    def __init__(self, error=None):
        self.began, self.open, self.error = threading.Event(), threading.Event(), error

    def run(self, key, payloads):
        self.began.set()
        self.open.wait(300)
        if self.error is not None:
            raise self.error
        return [np.zeros((len(rows), 3), np.uint16) for rows in payloads]


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open.set()


async def test_a_call_is_a_server_span_that_says_what_was_asked_and_what_came_of_it(traced, spans):
    await traced.stub.Encode(request(3), metadata=[("x-request-id", "mine")])
    (span,) = await spans(1)
    assert span.name == "semid.v1.SemanticIdService/Encode"
    attributes = dict(span.attributes)
    assert attributes.pop("semid.queue_seconds") >= 0
    assert attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": "semid.v1.SemanticIdService/Encode",
        "rpc.response.status_code": "OK",
        "semid.request_id": "mine",
        "semid.model": "toy",
        "semid.fingerprint": "f" * 64,
        "semid.requests": 1,
        "semid.rows": 3,
    }
    assert span.status.status_code is StatusCode.UNSET
    assert span.parent is None


async def test_a_call_is_a_child_of_the_span_that_its_metadata_names(traced, spans):
    await traced.stub.Encode(request(), metadata=[SAMPLED])
    (span,) = await spans(1)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.parent.is_remote


@pytest.mark.parametrize("header", ["", "00-0-0-01", "nonsense", f"00-{'0' * 32}-{PARENT}-01"])
async def test_a_context_that_cannot_be_read_begins_a_trace(traced, spans, header):
    await traced.stub.Encode(request(), metadata=[("traceparent", header)])
    (span,) = await spans(1)
    assert span.parent is None


async def test_a_call_that_its_caller_does_not_record_leaves_no_span_nor_does_its_batch(
    traced, exporter
):
    await traced.stub.Encode(request(), metadata=[NOT_SAMPLED])
    assert exporter.get_finished_spans() == ()


async def test_a_batch_is_linked_to_the_calls_whose_requests_it_ran(
    serve_runner, tracing, gate, spans
):
    toy = await serve_runner(gate, tracing=tracing)
    first = toy.stub.Encode(request(1))
    await asyncio.to_thread(gate.began.wait, 60)
    others = [toy.stub.Encode(request(rows)) for rows in (2, 3)]
    while toy.batcher.queue.requests < 2:
        await asyncio.sleep(0)
    gate.open.set()
    await asyncio.gather(first, *others)
    calls = {span.attributes["semid.rows"]: span for span in await spans(3)}
    alone, together = await spans(2, SpanKind.INTERNAL)
    assert [link.context.span_id for link in alone.links] == [calls[1].context.span_id]
    linked = {(link.context.trace_id, link.context.span_id) for link in together.links}
    assert linked == {(calls[n].context.trace_id, calls[n].context.span_id) for n in (2, 3)}
    assert together.parent is None
    assert together.name == "semid batch encode"
    assert dict(together.attributes) == {
        "semid.operation": "encode",
        "semid.model": "toy",
        "semid.fingerprint": "f" * 64,
        "semid.device": "toy",
        "semid.requests": 2,
        "semid.rows": 5,
    }
    assert together.start_time >= alone.end_time - 1_000_000  # clocks of two kinds
    # They waited at least for what was left of the first batch.
    assert all(calls[n].attributes["semid.queue_seconds"] > 0 for n in (2, 3))


async def test_a_sampler_of_shares_leaves_out_no_batch_of_a_call_that_it_took(
    serve_runner, toy_runner, exporter, spans, monkeypatch
):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    toy = await serve_runner(toy_runner, tracing=Tracing(SimpleSpanProcessor(exporter)))
    await toy.stub.Encode(request())
    await toy.stub.Encode(request(), metadata=[SAMPLED])
    (call,) = await spans(1)
    (batch,) = await spans(1, SpanKind.INTERNAL)
    assert [link.context.span_id for link in batch.links] == [call.context.span_id]


async def test_a_stream_is_one_span_with_the_sum_of_its_requests(traced, spans):
    messages = [pb.EncodeStreamRequest(request=request(rows)) for rows in (2, 3, 4)]
    async for _ in traced.stub.EncodeStream(iter(messages), metadata=[SAMPLED]):
        pass
    (span,) = await spans(1)
    assert span.name == "semid.v1.SemanticIdService/EncodeStream"
    assert (span.attributes["semid.requests"], span.attributes["semid.rows"]) == (3, 9)
    assert span.attributes["rpc.response.status_code"] == "OK"


async def test_a_call_without_rows_has_a_span_too(traced, spans):
    await traced.stub.GetModel(pb.GetModelRequest())
    (span,) = await spans(1)
    assert "semid.rows" not in span.attributes


async def test_a_failure_of_the_callers_making_is_named_but_no_error_of_the_server(traced, spans):
    with pytest.raises(grpc.aio.AioRpcError):
        await traced.stub.Encode(request(model="unknown"))
    (span,) = await spans(1)
    assert span.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert "error.type" not in span.attributes
    assert span.status.status_code is StatusCode.UNSET
    assert len(span.attributes["semid.request_id"]) == 32


async def test_a_failure_of_the_device_is_an_error_of_call_and_batch(serve_runner, tracing, spans):
    gate = Gate(ValueError("what is nobody's business"))
    gate.open.set()
    toy = await serve_runner(gate, tracing=tracing)
    with pytest.raises(grpc.aio.AioRpcError):
        await toy.stub.Encode(request())
    (call,) = await spans(1)
    (batch,) = await spans(1, SpanKind.INTERNAL)
    assert call.attributes["rpc.response.status_code"] == "INTERNAL"
    assert call.attributes["error.type"] == "INTERNAL"
    assert call.status.status_code is batch.status.status_code is StatusCode.ERROR
    assert "nobody" not in call.to_json() + batch.to_json()


@pytest.mark.parametrize("unary", [True, False])
async def test_a_call_that_its_caller_cancels_ends_as_cancelled(
    serve_runner, tracing, gate, spans, unary
):
    toy = await serve_runner(gate, tracing=tracing)
    if unary:
        call = toy.stub.Encode(request())
    else:
        call = toy.stub.EncodeStream(iter([pb.EncodeStreamRequest(request=request())]))
        reading = asyncio.ensure_future(call.read())
    await asyncio.to_thread(gate.began.wait, 60)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await (call if unary else reading)
    (span,) = await spans(1)
    assert span.attributes["rpc.response.status_code"] == "CANCELLED"


async def test_a_call_that_is_refused_unread_has_a_span_too(serve_runner, tracing, gate, spans):
    toy = await serve_runner(gate, tracing=tracing, max_concurrent_rpcs=1)
    first = toy.stub.Encode(request())
    await asyncio.to_thread(gate.began.wait, 60)
    with pytest.raises(grpc.aio.AioRpcError):
        await toy.stub.Encode(request())
    (span,) = await spans(1)
    assert span.attributes["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
    gate.open.set()
    await first


async def test_a_stream_that_is_given_up_while_it_computes_has_a_span_that_says_so(
    serve_runner, tracing, gate, spans
):
    incoming = Incoming()
    toy = await serve_runner(gate, tracing=tracing, incoming=incoming)
    call = toy.stub.EncodeStream(iter([pb.EncodeStreamRequest(request=request())]))
    await asyncio.to_thread(gate.began.wait, 60)
    (awaited,) = incoming.streams.next_to_go(1)
    await awaited.give_up(OverloadedError("memory is short", retry_after=1.0))
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (span,) = await spans(1)
    assert span.attributes["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
    assert not len(incoming.streams)


async def test_metadata_leaves_nothing_but_the_request_id_in_spans(traced, spans):
    secrets = [("authorization", "Bearer hidden"), ("x-key", "hidden"), ("k-bin", b"hidden")]
    await traced.stub.Encode(request(), metadata=[("x-request-id", "shown"), *secrets])
    (call,) = await spans(1)
    (batch,) = await spans(1, SpanKind.INTERNAL)
    assert "shown" in call.to_json()
    assert "hidden" not in call.to_json() + batch.to_json()


# -- off -------------------------------------------------------------------------------------


async def test_without_tracing_a_call_is_answered_by_what_a_span_would_be_put_around():
    given = []

    def trace(method, handler):
        given.append(handler)
        return handler

    async def behaviour(request, context): ...

    methods = {"Encode": grpc.unary_unary_rpc_method_handler(behaviour, bytes, bytes)}
    details = SimpleNamespace(method=f"/{SERVICE}/Encode", invocation_metadata=())
    on, off = Calls(SERVICE, Metrics(), trace=trace), Calls(SERVICE, Metrics())
    for calls in (on, off):
        calls.serve(methods)
    assert on.service(details) is given[0]
    assert off.service(details).unary_unary.__code__ is given[0].unary_unary.__code__


def test_the_extra_is_needed_by_tracing_alone_which_says_so_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "semid_server.serving.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    config = ServeConfig(models=(ModelSource(tmp_path),))
    Server(config, announce=lambda _line: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'semid\[tracing\]'"):
        Server(replace(config, tracing=True), announce=lambda _line: None)


def test_a_variable_that_the_exporter_cannot_use_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "unheard-of")
    with pytest.raises(ConfigurationError, match="OTEL_ variables set it up"):
        open_tracing()


async def test_the_end_does_not_wait_long_for_a_collector_that_is_not_there(
    serve_runner, toy_runner, monkeypatch
):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")
        tracing = open_tracing(patience=0.1)
        toy = await serve_runner(toy_runner, tracing=tracing)
        await toy.stub.Encode(request())
        began = time.monotonic()
        await asyncio.to_thread(tracing.close)
        assert time.monotonic() - began < 29  # the library would try for 30 s
