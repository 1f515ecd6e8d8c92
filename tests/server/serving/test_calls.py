"""What stands around each call, seen from within: gRPC's part is played by the test."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import grpc
import pytest

from semid_server.serving.calls import Calls
from semid_server.serving.metrics import Metrics

METHOD = "/toy.Service/Encode"


class AbortedError(Exception):
    """What gRPC raises to end a handler."""


class Context:
    """One call, as a handler sees it."""

    def __init__(self):
        self.status = None

    def invocation_metadata(self):
        return ()

    def set_trailing_metadata(self, metadata): ...

    def time_remaining(self):
        return None

    async def abort(self, code, details, trailing_metadata=()):
        self.status = code
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

    calls = Calls("toy.Service", metrics, max_calls=2)
    handler = grpc.unary_unary_rpc_method_handler(answer, bytes, bytes)
    calls.serve({"Encode": handler})
    return calls


async def test_of_calls_that_waited_for_their_messages_no_more_than_the_limit_begin(
    calls, metrics, gate
):
    # All are let in, as none is in progress yet; then all messages come.
    handlers = [calls.service(SimpleNamespace(method=METHOD)) for _ in range(5)]
    contexts = [Context() for _ in handlers]
    tasks = [
        asyncio.ensure_future(handler.unary_unary(b"message", context))
        for handler, context in zip(handlers, contexts, strict=True)
    ]
    refused, begun = await asyncio.wait(tasks[2:])
    assert not begun
    for task in refused:
        with pytest.raises(AbortedError, match="calls are in progress; this server takes 2"):
            await task
    assert [context.status for context in contexts[2:]] == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 3
    counted = metrics.registry.get_sample_value(
        "semid_refused_requests_total", {"operation": "encode"}
    )
    assert counted == len(refused)
    gate.set()
    assert await asyncio.gather(*tasks[:2]) == [b"message"] * 2
    await calls.idle()
