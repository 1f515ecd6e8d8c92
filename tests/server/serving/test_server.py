"""The life of a server, in this process: startup, health, drain, ports, metrics."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import re
import signal
import socket
import time

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from semid.v1 import semid_pb2 as pb
from semid.v1 import semid_pb2_grpc as pb_grpc
from semid_server.errors import ConfigurationError, DeviceLostError, MalformedCheckpointError
from semid_server.serving.incoming import FEW
from semid_server.serving.server import SERVICE

SERVING = health_pb2.HealthCheckResponse.SERVING
ANSWERED = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
REQUEST = pb.EncodeRequest(
    tensor=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[1, 4], data=np.ones(4, "f4").tobytes())
)


@pytest.fixture
async def connect():
    async with contextlib.AsyncExitStack() as stack:

        async def connect(address):
            return await stack.enter_async_context(grpc.aio.insecure_channel(address))

        yield connect


async def check_health(channel, service=""):
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_health_is_serving_only_once_the_model_is_loaded(
    run_server, backend, connect, lasting_port
):
    port = lasting_port()
    server = run_server(backend, port=port)
    await server.line("metrics on ")
    channel = await connect(f"127.0.0.1:{port}")
    await channel.channel_ready()
    for service in ("", SERVICE):
        assert await check_health(channel, service) == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pb_grpc.SemanticIdServiceStub(channel).Encode(REQUEST)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    backend.may_load.set()
    await server.address()
    for service in ("", SERVICE):
        assert await check_health(channel, service) == SERVING


async def test_health_of_every_service_can_be_listed_and_of_no_other_is_any_known(
    run_server, backend, connect
):
    backend.may_load.set()
    channel = await connect(await run_server(backend).address())
    health = health_pb2_grpc.HealthStub(channel)
    listed = (await health.List(health_pb2.HealthListRequest())).statuses
    assert {name: one.status for name, one in listed.items()} == {"": SERVING, SERVICE: SERVING}
    request = health_pb2.HealthCheckRequest(service="semid.v2.Other")
    with pytest.raises(grpc.aio.AioRpcError, match=r"no service 'semid\.v2\.Other' is known here"):
        await health.Check(request)
    watch = health.Watch(request)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


async def test_a_checkpoint_that_cannot_be_loaded_ends_the_server_with_its_error(
    run_server, backend
):
    backend.error = MalformedCheckpointError("some/path", "is cut short")
    backend.may_load.set()
    with pytest.raises(MalformedCheckpointError, match="some/path: is cut short"):
        await run_server(backend).task


async def test_a_signal_while_loading_ends_the_server(run_server, backend):
    server = run_server(backend)
    await server.line("metrics on ")
    os.kill(os.getpid(), signal.SIGTERM)
    await server.task
    assert not any(line.startswith("serving") for line in server.lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_on_a_signal_what_was_admitted_is_answered_and_health_goes_first(
    run_server, backend, device, connect, number
):
    backend.may_load.set()
    server = run_server(backend)
    channel = await connect(await server.address())
    stub = pb_grpc.SemanticIdServiceStub(channel)
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    calls = [stub.Encode(REQUEST)]
    await asyncio.to_thread(device.began.get, timeout=60)
    calls += [stub.Encode(REQUEST) for _ in range(5)]
    while server.server._batcher.queue.requests < 5:
        await asyncio.sleep(0)
    os.kill(os.getpid(), number)
    assert (await watch.read()).status == NOT_SERVING
    watch.cancel()
    device.free()
    for call in calls:
        assert (await call).fingerprint == "f" * 64
    await server.task


async def test_what_is_still_queued_when_the_grace_period_ends_is_told_so(
    run_server, backend, device, connect
):
    backend.may_load.set()
    server = run_server(backend, grace=0.05)
    channel = await connect(await server.address())
    stub = pb_grpc.SemanticIdServiceStub(channel)
    running = stub.Encode(REQUEST)
    await asyncio.to_thread(device.began.get, timeout=60)
    queued = stub.Encode(REQUEST)
    while server.server._batcher.queue.requests < 1:
        await asyncio.sleep(0)
    server.server.request_stop()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await queued
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "before this request was reached" in caught.value.details()
    device.free()
    assert (await running).fingerprint == "f" * 64
    await server.task


async def test_calls_that_come_all_at_once_are_all_answered(run_server, backend):
    backend.may_load.set()
    server = run_server(backend)
    address = await server.address()
    options = [("grpc.use_local_subchannel_pool", 1)]
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(address, options)) for _ in range(4)]
        for channel in channels:
            await asyncio.to_thread(grpc.channel_ready_future(channel).result)
        stubs = [pb_grpc.SemanticIdServiceStub(channel) for channel in channels]
        # Not awaited: until then this thread, which is the server's as well, is busy with them.
        calls = [stub.GetModel.future(pb.GetModelRequest()) for stub in stubs for _ in range(500)]
        time.sleep(1)  # noqa: ASYNC251 - that is what this is about
        codes = await asyncio.to_thread(lambda: collections.Counter(call.code() for call in calls))
    assert codes == {grpc.StatusCode.OK: len(calls)}


@pytest.mark.parametrize("processes", [1, 2])
async def test_unless_told_otherwise_three_fifths_of_what_the_models_leave_may_be_in_use(
    run_server, backend, monkeypatch, processes
):
    memory = 1 << 40
    monkeypatch.setattr("semid_server.serving.server.allowed", lambda: memory)
    backend.may_load.set()
    running = run_server(backend, processes=processes)
    await running.address()
    watched = running.server._memory
    in_use = watched.in_use()
    assert watched.limit == pytest.approx(in_use + 0.6 * (memory / processes - in_use), abs=1 << 27)


async def test_where_the_models_leave_no_memory_there_is_a_limit_for_a_few_messages(
    run_server, backend, monkeypatch
):
    monkeypatch.setattr("semid_server.serving.server.allowed", lambda: 1000)
    backend.may_load.set()
    running = run_server(backend, max_message_bytes=1 << 20)
    await running.address()
    watched = running.server._memory
    assert watched.limit == pytest.approx(watched.in_use() + 2 * FEW * (1 << 20), abs=1 << 25)


async def test_a_limit_below_what_the_models_and_a_few_messages_take_is_told(
    run_server, backend, caplog
):
    backend.may_load.set()
    running = run_server(backend, max_memory_bytes=123_456_789_012_345)
    await running.address()
    assert "--max-memory-bytes" not in caplog.text
    running = run_server(backend, max_memory_bytes=1234)
    await running.address()
    assert running.server._memory.limit == 1234
    assert "more than the limit of 1234 (--max-memory-bytes)" in caplog.text


async def test_who_calls_again_at_once_while_the_server_ends_is_told_so_each_time(
    run_server, backend, connect
):
    backend.may_load.set()
    server = run_server(backend)
    address = await server.address()
    stubs = [pb_grpc.SemanticIdServiceStub(await connect(address)) for _ in range(4)]
    codes = collections.Counter()

    async def call_on(stub):
        while True:
            call = stub.GetModel(pb.GetModelRequest())
            code, details = await call.code(), await call.details()
            codes[code] += 1
            if "connect" in details:  # the server is gone
                return

    callers = [asyncio.create_task(call_on(stub)) for stub in stubs for _ in range(32)]
    async with asyncio.timeout(60):
        while not codes[grpc.StatusCode.OK]:
            await asyncio.sleep(0.01)
        server.server.request_stop()
        await server.task
        await asyncio.gather(*callers)
    assert set(codes) <= {*ANSWERED, grpc.StatusCode.CANCELLED}
    # One may come at the very moment at which gRPC stops.
    assert codes[grpc.StatusCode.CANCELLED] <= 1


async def test_a_lost_device_ends_the_server_with_its_error_and_calls_with_unavailable(
    run_server, backend, device, connect
):
    backend.may_load.set()
    server = run_server(backend)
    channel = await connect(await server.address())
    stub = pb_grpc.SemanticIdServiceStub(channel)
    call = stub.Encode(REQUEST)
    await asyncio.to_thread(device.began.get, timeout=60)
    device.outcomes.put(DeviceLostError("the device has failed"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    with pytest.raises(DeviceLostError):
        await server.task


async def test_signal_handlers_are_given_back(run_server, backend):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    backend.may_load.set()
    server = run_server(backend)
    await server.address()
    server.server.request_stop()
    await server.task
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("setting", ["port", "metrics_port", "admin_port"])
async def test_a_port_that_is_taken_is_named_with_the_flag_to_change(run_server, backend, setting):
    backend.may_load.set()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        flag = "--" + setting.replace("_", "-")
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}.*{flag}"):
            await run_server(backend, **{setting: port}).task


async def test_a_second_server_on_the_same_port_is_refused(run_server, backend):
    backend.may_load.set()
    first = run_server(backend)
    port = int((await first.address()).rsplit(":", 1)[1])
    with pytest.raises(ConfigurationError, match="Address already in use"):
        await run_server(backend, port=port).task


async def test_a_host_that_is_not_this_machines_is_named_with_its_flag(run_server, backend):
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1:0: .*--host"):
        await run_server(backend, host="192.0.2.1").task


async def test_metrics_show_the_model_the_queue_and_what_was_answered(
    run_server, backend, device, connect
):
    backend.may_load.set()
    device.free()
    server = run_server(backend)
    stub = pb_grpc.SemanticIdServiceStub(await connect(await server.address()))
    await stub.Encode(REQUEST)
    text = await server.metrics()
    info = re.search(r"^semid_model_info\{(.*)\} 1\.0$", text, re.MULTILINE).group(1)
    assert 'fingerprint="' + "f" * 64 in info
    assert 'model="toy"' in info
    assert "semid_serving 1.0" in text
    assert "semid_queue_requests 0.0" in text
    assert 'semid_rows_total{operation="encode"} 1.0' in text
    assert 'semid_proved_rows_total{level="reference",model="toy"} 7.0' in text


async def test_a_message_beyond_the_limit_is_refused_and_the_server_goes_on(
    run_server, backend, device, connect
):
    backend.may_load.set()
    device.free()
    server = run_server(backend, max_message_bytes=1 << 17, max_batch_bytes=1 << 17)
    stub = pb_grpc.SemanticIdServiceStub(await connect(await server.address()))
    large = pb.EncodeRequest(tensor=pb.Tensor(data=bytes(1 << 18)))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Encode(large)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await stub.Encode(REQUEST)).fingerprint == "f" * 64
