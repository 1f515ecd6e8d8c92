"""A server that asks gRPC for calls ahead: the same answers, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging

import grpc
import grpc.aio
import pytest
from grpc._cython import cygrpc

from semid_server.serving import asking

METHOD = "/test.Service/Call"


class Service(grpc.GenericRpcHandler):
    """Answers each message with itself once it may; counts who begins and who is cancelled."""

    def __init__(self):
        self.begun = []
        self.cancelled = []
        self.may = asyncio.Event()

    def service(self, details):
        if details.method == METHOD:
            return grpc.unary_unary_rpc_method_handler(self.answer)
        if details.method == METHOD + "Stream":
            return grpc.stream_stream_rpc_method_handler(self.answer_all)
        return None

    async def answer(self, message, context):
        self.begun.append(message)
        try:
            await self.may.wait()
        except asyncio.CancelledError:
            self.cancelled.append(message)
            raise
        return message

    async def answer_all(self, messages, context):
        async for message in messages:
            yield message


@contextlib.asynccontextmanager
async def running(make=asking.server, **settings):
    service = Service()
    server = make(**settings)
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield server, service, channel
    await server.stop(None)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def outstanding(server):
    """Calls that this server has asked for ahead."""
    return server._server._ahead


async def test_calls_are_asked_for_ahead_again_and_again():
    async with running() as (server, service, channel):
        service.may.set()
        call = channel.unary_unary(METHOD)
        for _ in range(3 * asking.AHEAD):
            assert await call(b"a") == b"a"
            # One is with gRPC itself.
            assert len(outstanding(server)) == asking.AHEAD - 1


@pytest.mark.parametrize("count", [1, asking.AHEAD - 1, asking.AHEAD, 20 * asking.AHEAD])
async def test_calls_at_once_each_get_their_own_answer(count):
    messages = [b"%d" % i for i in range(count)]
    async with running() as (_, service, channel):
        call = channel.unary_unary(METHOD)
        calls = [call(message) for message in messages]
        await until(lambda: len(service.begun) == count)
        service.may.set()
        assert [await answer for answer in calls] == messages
        assert sorted(service.begun) == sorted(messages)


async def test_calls_of_one_connection_begin_in_the_order_in_which_they_came():
    async with running() as (_, service, channel):
        call = channel.unary_unary(METHOD)
        service.may.set()
        await call(b"the connection is there")
        messages = [b"%d" % i for i in range(4 * asking.AHEAD)]
        await asyncio.gather(*(call(message) for message in messages))
        assert service.begun[1:] == messages


async def test_streams_and_unknown_methods_are_as_ever():
    async with running() as (_, _, channel):
        stream = channel.stream_stream(METHOD + "Stream")(iter([b"a", b"b"]))
        assert [message async for message in stream] == [b"a", b"b"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/test.Service/Nothing")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_who_leaves_is_cancelled():
    async with running() as (_, service, channel):
        call = channel.unary_unary(METHOD)(b"a")
        await until(lambda: service.begun)
        call.cancel()
        await until(lambda: service.cancelled == [b"a"])


async def test_no_more_calls_than_the_server_takes():
    async with running(maximum_concurrent_rpcs=2) as (_, service, channel):
        call = channel.unary_unary(METHOD)
        calls = [call(b"%d" % i) for i in range(asking.AHEAD)]
        await until(lambda: sum(answer.done() for answer in calls) == asking.AHEAD - 2)
        service.may.set()
        codes = [await answer.code() for answer in calls]
        assert codes.count(grpc.StatusCode.OK) == 2
        assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == asking.AHEAD - 2


async def test_a_grace_is_kept_and_nothing_is_left_behind(caplog):
    caplog.set_level(logging.DEBUG)
    async with running() as (server, service, channel):
        answer = channel.unary_unary(METHOD)(b"a")
        await until(lambda: service.begun)
        stopping = asyncio.ensure_future(server.stop(20))
        await asyncio.sleep(0.1)
        service.may.set()
        assert await answer == b"a"
        await stopping
        ahead = outstanding(server)
        assert not ahead
    others = {asyncio.current_task()}
    await until(lambda: asyncio.all_tasks() == others)
    del server
    gc.collect()
    await asyncio.sleep(0)
    # An exception that nobody has asked for is told there.
    assert not [line for line in caplog.records if line.name == "asyncio" and line.levelno >= 30]


async def test_a_server_that_never_started_stops():
    await asking.server().stop(None)


async def test_methods_that_are_registered_are_left_to_grpc():
    service = Service()
    service.may.set()
    server = asking.server()
    handler = grpc.unary_unary_rpc_method_handler(service.answer)
    server.add_registered_method_handlers("test.Service", {"Call": handler})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for _ in range(3):
            assert await channel.unary_unary(METHOD)(b"a") == b"a"
            stream = channel.stream_stream(METHOD + "Stream")(iter([b"b"]))
            assert [message async for message in stream] == [b"b"]
    assert not outstanding(server)
    await server.stop(None)


async def test_other_servers_of_this_process_are_as_they_were():
    asking.server()
    async with running(grpc.aio.server) as (server, service, channel):
        service.may.set()
        assert type(server._server) is cygrpc.AioServer
        assert await channel.unary_unary(METHOD)(b"a") == b"a"


async def test_a_grpc_with_other_names_is_used_as_it_is_and_said_so(monkeypatch, caplog):
    monkeypatch.setattr(asking, "NAMES", ("_a_name_of_tomorrow",))
    async with running() as (server, service, channel):
        service.may.set()
        assert type(server._server) is cygrpc.AioServer
        assert await channel.unary_unary(METHOD)(b"a") == b"a"
    (line,) = [record.getMessage() for record in caplog.records if "one by one" in record.message]
    assert grpc.__version__ in line


async def test_waiting_for_other_things_is_asyncios_own():
    tasks = {asyncio.ensure_future(asyncio.sleep(s)) for s in (0, 60)}
    done, pending = await asking._wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert (len(done), len(pending)) == (1, 1)
    (left,) = pending
    left.cancel()
    done, pending = await asking._wait(pending)
    assert done == {left}
