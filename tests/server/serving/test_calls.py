"""What stands around each call, seen from within: gRPC's part is played by the test."""

from __future__ import annotations

import asyncio
import weakref
from types import SimpleNamespace

import grpc
import pytest

from semid_server.errors import InvalidInputError, OverloadedError
from semid_server.serving.calls import Calls
from semid_server.serving.logs import REQUEST_ID_KEY
from semid_server.serving.metrics import Metrics
from semid_server.serving.status import PUSHBACK_KEY

METHOD = "/toy.Service/Encode"
DETAILS = SimpleNamespace(method=METHOD, invocation_metadata=())
CALL = {"grpc_type": "unary", "grpc_service": "toy.Service", "grpc_method": "Encode"}


class AbortedError(Exception):
    """What gRPC raises to end a handler."""


class Context:
    """One call, as a handler sees it."""

    def __init__(self):
        self.status, self.trailing = None, {}

    def invocation_metadata(self):
        return ()

    def set_trailing_metadata(self, metadata): ...

    def time_remaining(self):
        return None

    async def abort(self, code, details, trailing_metadata=()):
        self.status, self.trailing = code, dict(trailing_metadata)
        raise AbortedError(details)


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def gate():
    return asyncio.Event()


@pytest.fixture
def calls(metrics, gate):
    async def answer(message, context):
        await gate.wait()
        return message

    calls = Calls("toy.Service", metrics, max_calls=4)
    handler = grpc.unary_unary_rpc_method_handler(answer, bytes, bytes)
    calls.serve({"Encode": handler})
    return calls


async def test_of_calls_that_waited_for_their_messages_no_more_than_the_limit_begin(
    calls, metrics, gate
):
    # All are let in, as none is in progress yet; then all messages come.
    handlers = [calls.service(DETAILS) for _ in range(7)]
    contexts = [Context() for _ in handlers]
    tasks = [
        asyncio.ensure_future(handler.unary_unary(b"message", context))
        for handler, context in zip(handlers, contexts, strict=True)
    ]
    refused, begun = await asyncio.wait(tasks[4:])
    assert not begun
    for task in refused:
        with pytest.raises(AbortedError, match="calls are in progress; this server takes 4"):
            await task
    assert [context.status for context in contexts[4:]] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
    counted = metrics.registry.get_sample_value(
        "semid_refused_requests_total", {"operation": "encode"}
    )
    assert counted == len(refused)
    gate.set()
    assert await asyncio.gather(*tasks[:4]) == [b"message"] * 4
    await calls.idle()


async def test_calls_that_are_refused_alike_have_each_the_whole_status(calls, metrics):
    refusals = [OverloadedError("full", retry_after=0.25)] * 2
    refusals.append(OverloadedError("still full", retry_after=0.5))
    handler = grpc.unary_unary_rpc_method_handler(lambda message, context: message, bytes, bytes)
    calls.serve({"Encode": handler}, {"Encode": lambda: refusals[len(contexts)]})
    contexts: list[Context] = []
    for error in refusals:
        refuse = calls.service(DETAILS).stream_unary
        contexts.append(Context())
        with pytest.raises(AbortedError, match=f"^{error}$"):
            await refuse(None, contexts[-1])
    assert {context.status for context in contexts} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert [context.trailing[PUSHBACK_KEY] for context in contexts] == ["250", "250", "500"]
    assert len({context.trailing[REQUEST_ID_KEY] for context in contexts}) == len(contexts)
    counted = {
        name: metrics.registry.get_sample_value(name, labels | extra)
        for name, labels, extra in (
            ("semid_refused_requests_total", {"operation": "encode"}, {}),
            ("grpc_server_handled_total", CALL, {"grpc_code": "RESOURCE_EXHAUSTED"}),
        )
    }
    assert set(counted.values()) == {len(contexts)}


async def test_calls_whose_message_is_on_its_way_count_until_they_begin_or_end(calls, gate):

    async def come():
        """Ask what answers a call, as the task does that will answer it, and wait."""
        handler = calls.service(DETAILS)
        try:
            await asyncio.Event().wait()
        finally:
            handlers.append(handler)

    handlers = []
    coming = [asyncio.create_task(come()) for _ in range(2)]
    await asyncio.sleep(0)
    assert calls.service(DETAILS).stream_unary is not None, "one too many is refused unread"
    coming[0].cancel()  # its caller leaves before the message has come
    await asyncio.wait(coming[:1])
    assert calls.service(DETAILS).unary_unary is not None
    # That one begins, and counts once.
    begun = asyncio.create_task(handlers[0].unary_unary(b"message", Context()))
    await asyncio.sleep(0)
    coming[1].cancel()
    gate.set()
    assert await begun == b"message"
    await asyncio.wait(coming)


async def test_what_was_made_of_a_message_is_gone_when_its_caller_is_told_what_is_wrong(metrics):
    class Request: ...

    made, told = [], []

    def read(_message):
        request = Request()
        made.append(weakref.ref(request))
        return request

    async def refuse(request, context):
        try:
            {}["row"]
        except KeyError as error:
            raise InvalidInputError("row 3 is bad") from error

    class Caller(Context):
        async def abort(self, code, details, trailing_metadata=()):
            told.append(made[0]())
            await super().abort(code, details, trailing_metadata)

    calls = Calls("toy.Service", metrics)
    calls.serve({"Encode": grpc.unary_unary_rpc_method_handler(refuse, read, bytes)})
    with pytest.raises(AbortedError, match="row 3 is bad"):
        await calls.service(DETAILS).unary_unary(b"", Caller())
    assert told == [None]


async def test_calls_that_are_held_are_told_when_they_are_released(calls):
    calls.drain()
    calls.hold()
    context = Context()
    handler = calls.service(DETAILS)
    held = asyncio.ensure_future(handler.stream_unary(None, context))
    await asyncio.sleep(0.01)
    assert context.status is None
    calls.release()
    with pytest.raises(AbortedError, match="shutting down"):
        await held
    assert context.status is grpc.StatusCode.UNAVAILABLE
