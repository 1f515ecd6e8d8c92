"""Messages that never come whole: what they take, and whom they keep out.

What is sent of them is sent slowly, as a busy machine must not look like a broken one; some are
therefore `slow`: ``pytest -m "slow or not slow" tests/e2e/test_incoming.py`` runs all.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from half_sent import HalfSent
from running import float32_tensor

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub

pytestmark = pytest.mark.timeout(300)

MIB = 1 << 20
MESSAGE = 4 * MIB
RESOURCE_EXHAUSTED = b"8"


def memory(server, name):
    """Bytes of memory, as the kernel tells of a process."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) << 10


async def until(condition):
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.02)


async def sees_to_it(server, digits):
    """Ask as an honest caller does, and tries again when told to."""
    request = pb.EncodeRequest(tensor=float32_tensor(digits[:3]))
    while True:
        async with grpc.aio.insecure_channel(server.target) as channel:
            call = SemanticIdServiceStub(channel).Encode(request, timeout=60)
            if await call.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                return np.frombuffer((await call).tensor.data, "u1").reshape(3, 3)
            await asyncio.sleep(0.05)


async def test_messages_that_are_half_sent_take_no_more_memory_than_the_limit(
    serve, reference_dir, digits
):
    await half_sent(serve, reference_dir, digits, "/semid.v1.SemanticIdService/Encode")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", ["/semid.v1.SemanticIdService/EncodeStream", "/grpc.health.v1.Health/Check"]
)
async def test_half_sent_messages_of_streams_and_of_other_services_take_no_more_either(
    serve, reference_dir, digits, path
):
    await half_sent(serve, reference_dir, digits, path)


async def half_sent(serve, reference_dir, digits, path):
    """Send many messages to a method, but for their last bytes, and see what they take."""
    # 300 messages of 4 MiB, on top of what the server takes by itself: 0.4 GB at most.
    settings = ("--max-message-bytes", MESSAGE, "--max-memory-bytes", 600_000_000)
    server = serve(reference_dir / "digits_rkmeans/model.ckpt", *settings)
    before = memory(server, "VmRSS")
    assert before < 500 * MIB
    expected = await sees_to_it(server, digits)
    peers = [HalfSent(), HalfSent()]
    sending = [
        asyncio.ensure_future(peer.send(server.target, path, calls=150, message_bytes=MESSAGE - 64))
        for peer in peers
    ]
    # Until all that goes on has sent what it sends.
    await until(lambda: peers[0].sent and not any(any(peer.left.values()) for peer in peers))
    np.testing.assert_array_equal(await sees_to_it(server, digits), expected)
    statuses = peers[0].statuses + peers[1].statuses
    assert len(statuses) > 100
    assert set(statuses) == {RESOURCE_EXHAUSTED}
    assert memory(server, "VmHWM") < before + 700 * MIB
    assert "memory is short" in server.stderr()
    for task in sending:
        task.cancel()
    await asyncio.wait(sending)
    async with grpc.aio.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    server.stop()
    assert "Traceback" not in server.stderr()


@pytest.mark.slow  # it is sent a gigabyte
async def test_who_takes_no_answer_and_sends_half_a_message_is_cut_off_when_memory_is_short(
    serve, reference_dir, digits
):
    settings = ("--max-message-bytes", MESSAGE, "--max-memory-bytes", 600_000_000)
    server = serve(reference_dir / "digits_rkmeans/model.ckpt", *settings)
    before = memory(server, "VmRSS")
    expected = await sees_to_it(server, digits)
    message = pb.EncodeStreamRequest(request=pb.EncodeRequest(tensor=float32_tensor(digits[:3])))
    peer = HalfSent()
    sending = asyncio.ensure_future(
        peer.send(
            server.target,
            "/semid.v1.SemanticIdService/EncodeStream",
            calls=300,
            message_bytes=MESSAGE - 64,
            source="127.0.0.2",
            first=message.SerializeToString(),
            window=0,
        )
    )
    async with asyncio.timeout(120):
        await sending
    assert memory(server, "VmHWM") < before + 700 * MIB
    np.testing.assert_array_equal(await sees_to_it(server, digits), expected)
    await until(lambda: "takes nothing that it is sent: it was cut off" in server.stderr())

    def streams(name):
        return server.metric(name, grpc_method="EncodeStream")

    await until(lambda: streams("grpc_server_handled_total") == 300)
    assert streams("grpc_server_started_total") == 300
    server.stop()
    assert "Traceback" not in server.stderr()


async def test_calls_of_one_address_that_send_half_leave_room_for_another(
    serve, reference_dir, digits
):
    server = serve(reference_dir / "digits_rkmeans/model.ckpt", "--max-concurrent-rpcs", 64)
    expected = await sees_to_it(server, digits)
    peer = HalfSent()
    path = "/semid.v1.SemanticIdService/Encode"
    sending = asyncio.ensure_future(
        peer.send(server.target, path, calls=80, message_bytes=1000, source="127.0.0.2")
    )
    # It has all places; what it has too many is refused.
    await until(lambda: len(peer.statuses) >= 16)
    stub_request = pb.EncodeRequest(tensor=float32_tensor(digits[:3]))
    async with grpc.aio.insecure_channel(server.target) as channel:
        for _ in range(20):
            answer = await SemanticIdServiceStub(channel).Encode(stub_request, timeout=60)
            codes = np.frombuffer(answer.tensor.data, "u1").reshape(3, 3)
            np.testing.assert_array_equal(codes, expected)
    assert set(peer.statuses) == {RESOURCE_EXHAUSTED}
    assert len(peer.statuses) == 17  # one made way, and its place was there for the next
    sending.cancel()
    await asyncio.wait([sending])
    server.stop()
    assert "Traceback" not in server.stderr()
