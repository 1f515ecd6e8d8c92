"""Limits on connections and callers, as seen from the other end of the wire.

A gRPC client hides most of them (it reconnects, and holds its pings back), so frames of HTTP/2 are
written and read here as they are: https://www.rfc-editor.org/rfc/rfc9113.
"""

from __future__ import annotations

import asyncio
import math
import struct
from typing import NamedTuple

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from semid.v1 import semid_pb2 as pb
from semid.v1 import semid_pb2_grpc as pb_grpc
from semid_server.errors import ConfigurationError, InvalidInputError
from semid_server.serving import batcher
from semid_server.serving.listener import Listener
from semid_server.serving.servicer import STREAM_WINDOW

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, GOAWAY = 0, 1, 4, 6, 7
ACK = END_STREAM = 1
END_HEADERS = 4
MAX_CONCURRENT_STREAMS = 3
INITIAL_WINDOW_SIZE = 4
EMPTY_MESSAGE = bytes(5)
ENHANCE_YOUR_CALM = 11


class Frame(NamedTuple):
    kind: int
    flags: int
    stream: int
    body: bytes


class Connection:
    """One end of an HTTP/2 connection."""

    def __init__(self, reader, writer):
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, address, settings=b""):
        host, _, port = address.rpartition(":")
        made = cls(*await asyncio.open_connection(host, int(port)))
        made._writer.write(PREFACE)
        made.send(SETTINGS, settings)
        return made

    def send(self, kind, body=b"", *, flags=0, stream=0):
        header = struct.pack(">I", len(body))[1:] + bytes([kind, flags])
        self._writer.write(header + struct.pack(">I", stream) + body)

    def call(self, path, *, stream=1):
        """Begin a call, whose message is sent by `send`."""
        fields = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path),
            (b":authority", b"x"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        ]
        # Names and values as they are: https://www.rfc-editor.org/rfc/rfc7541#section-6.2.2.
        body = b"".join(
            b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
            for name, value in fields
        )
        self.send(HEADERS, body, flags=END_HEADERS, stream=stream)

    async def read(self):
        """Return the next frame, or None where the connection ends."""
        try:
            header = await self._reader.readexactly(9)
            length = int.from_bytes(header[:3], "big")
            body = await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        frame = Frame(header[3], header[4], int.from_bytes(header[5:9], "big"), body)
        if frame.kind == PING and not frame.flags & ACK:
            self.send(PING, body, flags=ACK)  # as whoever is alive does
        return frame

    async def next_of(self, kind):
        while (frame := await self.read()) is not None:
            if frame.kind == kind and not frame.flags & ACK:
                return frame
        return None

    async def end(self):
        """Read on until the connection ends."""
        while await self.read() is not None:
            pass

    def close(self):
        self._writer.close()


def goaway_code(frame):
    return struct.unpack(">II", frame.body[:8])[1]


@pytest.fixture
async def connect():
    made = []

    async def connect(address, settings=b""):
        made.append(await Connection.open(address, settings))
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


@pytest.fixture
def ready(backend, device):
    backend.may_load.set()
    device.free()
    return backend


async def test_a_connection_is_told_how_many_calls_it_may_have_in_progress(
    run_server, ready, connect
):
    address = await run_server(ready, max_connection_streams=7).address()
    settings = (await (await connect(address)).next_of(SETTINGS)).body
    told = dict(struct.unpack(">HI", settings[at : at + 6]) for at in range(0, len(settings), 6))
    assert told[MAX_CONCURRENT_STREAMS] == 7


async def test_a_connection_of_the_greatest_age_is_told_to_go(run_server, ready, connect):
    address = await run_server(ready, max_connection_age=0.2).address()
    connection = await connect(address)
    assert goaway_code(await connection.next_of(GOAWAY)) == 0
    await connection.end()


async def test_an_idle_connection_is_closed(run_server, ready, connect):
    address = await run_server(ready, max_connection_idle=0.2).address()
    connection = await connect(address)
    assert (await connection.next_of(GOAWAY)).body.endswith(b"connection idle")
    await connection.end()


async def test_a_call_outlives_the_age_of_its_connection_by_the_grace_and_no_longer(
    run_server, backend, device
):
    backend.may_load.set()
    server = run_server(backend, max_connection_age=0.1, max_connection_age_grace=0.1)
    async with grpc.aio.insecure_channel(await server.address()) as channel:
        stub = pb_grpc.SemanticIdServiceStub(channel)
        stream = stub.EncodeStream()  # whose messages never come
        assert await stream.code() == grpc.StatusCode.UNAVAILABLE
    device.free()


async def test_who_pings_too_often_is_told_to_calm_down_and_disconnected(
    run_server, ready, connect
):
    address = await run_server(ready, min_ping_interval=60).address()
    connection = await connect(address)
    for number in range(5):
        connection.send(PING, struct.pack(">Q", number))
    assert goaway_code(await connection.next_of(GOAWAY)) == ENHANCE_YOUR_CALM
    await connection.end()


async def test_who_pings_as_often_as_is_allowed_stays(run_server, ready, connect):
    address = await run_server(ready, min_ping_interval=0).address()
    connection = await connect(address)
    for number in range(5):
        connection.send(PING, struct.pack(">Q", number))
    answers = 0
    while answers < 5:
        frame = await connection.read()
        assert frame.kind != GOAWAY
        answers += frame.kind == PING and frame.flags & ACK


def request_of(rows):
    data = np.ones((rows, 4), "f4")
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=data.shape, data=data.tobytes())
    return pb.EncodeRequest(tensor=tensor)


async def test_a_caller_with_too_much_in_work_is_refused_and_its_streams_wait(
    serve_runner, device, toy_codes
):
    service = await serve_runner(device, max_peer_bytes=100)
    running = service.stub.Encode(request_of(5))
    await asyncio.to_thread(device.began.get, timeout=30)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.stub.Encode(request_of(2))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "80 bytes of this caller are in work" in caught.value.details()
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"] == "100"

    async def messages():
        yield pb.EncodeStreamRequest(request=request_of(2))

    stream = service.stub.EncodeStream(messages())
    answer = asyncio.create_task(stream.read())
    for rows in (5, 2):
        device.outcomes.put(lambda payloads, rows=rows: [np.zeros((rows, 3), np.uint16)])
    await running
    assert list((await answer).response.tensor.shape) == [2, 3]


class Call:
    """A call as the servicer sees it; the test says when it has ended."""

    def __init__(self):
        self.callbacks = []

    def peer(self):
        return "ipv4:10.0.0.7:5000"

    def time_remaining(self):
        return None

    def add_done_callback(self, callback):
        self.callbacks.append(callback)


def decode_request(rows):
    codes = np.zeros((rows, 3), np.uint8)
    return pb.DecodeRequest(
        tensor=pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=codes.shape, data=codes.tobytes())
    )


CALLER = "ipv4:10.0.0.7"
ANSWER_BYTES = 16
"""Of a row that the toy model decodes: four numbers."""


@pytest.fixture(params=["queued", "at once"])
async def either_way(request, toy, toy_runner, monkeypatch):
    """The toy model, whose requests are queued, or answered at once."""
    if request.param == "at once":
        monkeypatch.setattr(batcher, "QUICK", math.inf)
        monkeypatch.setattr(batcher, "QUICK_AT_MOST", math.inf)
        await toy.stub.Encode(request_of(1))
        await toy.stub.Decode(decode_request(1))
        while not toy.batcher._resting:
            await asyncio.sleep(0)
        toy_runner.quick = True
        monkeypatch.delattr(toy.batcher.__class__, "admit")
    return toy


async def test_an_answer_to_decode_counts_until_its_call_has_ended(either_way):
    toy = either_way
    peers, call = toy.servicer._peers, Call()
    await toy.servicer.Decode(decode_request(5), call)
    assert peers.of(CALLER) == 5 * ANSWER_BYTES
    for callback in call.callbacks:
        callback(call)
    assert peers.of(CALLER) == 0


async def test_answers_of_a_decode_stream_count_until_each_has_been_taken(toy):
    async def messages():
        for rows in (5, 7):
            yield pb.DecodeStreamRequest(request=decode_request(rows))

    peers = toy.servicer._peers
    answers = toy.servicer.DecodeStream(messages(), Call())
    await anext(answers)
    while peers.of(CALLER) < 12 * ANSWER_BYTES:  # the second is admitted when it is read
        await asyncio.sleep(0)
    await anext(answers)
    assert peers.of(CALLER) == 7 * ANSWER_BYTES
    with pytest.raises(StopAsyncIteration):
        await anext(answers)
    assert peers.of(CALLER) == 0


async def test_who_leaves_a_decode_stream_without_reading_it_holds_nothing(toy):
    async def messages():
        while True:
            yield pb.DecodeStreamRequest(request=decode_request(5))

    peers = toy.servicer._peers
    answers = toy.servicer.DecodeStream(messages(), Call())
    await anext(answers)
    while peers.of(CALLER) < 5 * STREAM_WINDOW * ANSWER_BYTES:
        await asyncio.sleep(0)
    await answers.aclose()
    while toy.batcher.queue.requests:
        await asyncio.sleep(0)
    assert peers.of(CALLER) == 0


async def test_a_decode_stream_that_nobody_reads_holds_up_no_other_of_its_caller(
    serve_runner, toy_runner
):
    toy = await serve_runner(toy_runner, max_peer_bytes=40 * ANSWER_BYTES)

    async def messages(rows):
        for _ in range(20):
            yield pb.DecodeStreamRequest(request=decode_request(rows))

    peers = toy.servicer._peers
    unread = toy.servicer.DecodeStream(messages(5), Call())
    await anext(unread)
    async with asyncio.timeout(60):
        while peers.of(CALLER) < 10 * ANSWER_BYTES:  # a quarter, and no more: see below
            await asyncio.sleep(0)
        # Nor does one whose messages are larger than that hold itself up.
        for rows in (3, 15):
            read = [answer async for answer in toy.servicer.DecodeStream(messages(rows), Call())]
            assert len(read) == 20
            assert peers.of(CALLER) == 10 * ANSWER_BYTES
        assert len([answer async for answer in unread]) == 19
    assert peers.of(CALLER) == 0


async def test_an_answer_to_encode_is_counted_no_longer_than_it_takes(either_way):
    toy = either_way
    answer = await toy.stub.Encode(request_of(5))
    assert list(answer.tensor.shape) == [5, 3]
    assert toy.servicer._peers._bytes == {}


async def test_a_request_that_is_refused_for_its_rows_is_counted_no_longer(either_way, toy_runner):
    def refuse(_key, payloads):
        return [InvalidInputError("row 0 is bad") for _ in payloads]

    toy_runner.run = refuse
    for call in (
        either_way.stub.Encode(request_of(5)),
        either_way.stub.Decode(decode_request(5)),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="row 0 is bad"):
            await call
    while either_way.servicer._peers._bytes:  # the server hears a moment later that it is over
        await asyncio.sleep(0)


async def test_what_a_caller_had_in_work_is_given_back_when_it_leaves(serve_runner, device):
    service = await serve_runner(device, max_peer_bytes=100)
    running = service.stub.Encode(request_of(1))
    await asyncio.to_thread(device.began.get, timeout=30)
    queued = service.stub.Encode(request_of(5))
    while not service.batcher.queue.requests:
        await asyncio.sleep(0)
    queued.cancel()
    while service.batcher.queue.requests:
        await asyncio.sleep(0)
    again = service.stub.Encode(request_of(5))
    for rows in (1, 5):
        device.outcomes.put(lambda payloads, rows=rows: [np.zeros((rows, 3), np.uint16)])
    await running
    assert list((await again).tensor.shape) == [5, 3]


async def test_times_without_end_are_taken(run_server, ready):
    endless = dict.fromkeys(
        ("keepalive", "max_connection_age", "max_connection_idle", "min_ping_interval"), math.inf
    )
    server = run_server(ready, **endless)
    async with grpc.aio.insecure_channel(await server.address()) as channel:
        stub = pb_grpc.SemanticIdServiceStub(channel)
        assert (await stub.GetModel(pb.GetModelRequest())).model.name == "toy"


async def test_who_watches_the_health_takes_no_place_of_a_call(run_server, ready):
    server = run_server(ready, max_concurrent_rpcs=1, max_connection_streams=1000)
    async with grpc.aio.insecure_channel(await server.address()) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(300)]
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stub = pb_grpc.SemanticIdServiceStub(channel)
        assert (await stub.GetModel(pb.GetModelRequest())).model.name == "toy"
        for watch in watches:
            watch.cancel()


async def test_who_watches_the_health_and_takes_nothing_holds_up_neither_others_nor_the_drain(
    run_server, ready, connect
):
    server = run_server(ready)
    address = await server.address()
    peer = await connect(address, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
    for stream in (1, 3, 5):
        peer.call(b"/grpc.health.v1.Health/Watch", stream=stream)
        peer.send(DATA, EMPTY_MESSAGE, flags=END_STREAM, stream=stream)
    # It goes on to answer pings and settings: its connection is a good one.
    reading = asyncio.ensure_future(peer.end())
    async with asyncio.timeout(20), grpc.aio.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for _ in range(3):
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        server.server.request_stop()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.task
    await reading


@pytest.mark.parametrize("which", ["service", "admin"])
async def test_a_call_that_grpc_cannot_read_ends_its_server_which_is_opened_again(
    run_server, ready, connect, caplog, which
):
    server = run_server(ready, admin_port=0)
    at = {"service": await server.address(), "admin": await server.line("admin on ")}
    async with grpc.aio.insecure_channel(at[which]) as before:
        request = health_pb2.HealthCheckRequest()
        assert await health_pb2_grpc.HealthStub(before).Check(request)
        for _ in range(2):
            # No UTF-8. gRPC shuts the server, and says so to nobody but its log.
            (peer := await connect(at[which])).call(b"/\xff")
            async with asyncio.timeout(20):
                await peer.end()
                for address in at.values():
                    async with grpc.aio.insecure_channel(address) as channel:
                        check = health_pb2_grpc.HealthStub(channel).Check
                        answer = await check(request, wait_for_ready=True)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert await health_pb2_grpc.HealthStub(before).Check(request, wait_for_ready=True)
    lines = [record.getMessage() for record in caplog.records]
    said = [line for line in lines if "to be opened again" in line]
    assert len(said) == 2
    assert all(
        at[which].rpartition(":")[2] in line and "UnicodeDecodeError" in line for line in said
    )
    server.server.request_stop()
    await server.task


async def test_who_sends_such_a_call_and_takes_no_more_part_does_not_keep_the_port_shut(
    run_server, ready, connect, caplog
):
    server = run_server(ready)
    address = await server.address()
    peer = await connect(address)
    peer.call(b"/\xff")  # and it answers no ping, which gRPC would wait for
    async with asyncio.timeout(10), grpc.aio.insecure_channel(address) as channel:
        while "is to be opened again" not in caplog.text:
            await asyncio.sleep(0.01)
        request = health_pb2.HealthCheckRequest()
        await health_pb2_grpc.HealthStub(channel).Check(request, wait_for_ready=True)
    assert "Traceback" not in caplog.text
    server.server.request_stop()
    await server.task


async def test_a_port_that_cannot_be_had_again_ends_the_server_with_its_error(
    run_server, ready, connect, monkeypatch
):
    server = run_server(ready)
    address = await server.address()

    async def taken(self):
        raise ConfigurationError(f"{self.port} is taken")

    monkeypatch.setattr(Listener, "_open_again", taken)
    (await connect(address)).call(b"/\xff")
    with pytest.raises(ConfigurationError, match=f"{address.rpartition(':')[2]} is taken"):
        await server.task
