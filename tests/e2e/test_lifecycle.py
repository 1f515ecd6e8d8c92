"""From the start to the end of a server: settings, load, overload, drain."""

from __future__ import annotations

import collections
import contextlib
import json
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from semid.v1 import semid_pb2 as pb
from semid_client import Client, SemidClientError, UnavailableError

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
FLOOD = Path(__file__).with_name("large_flood.py")
LONG = 3600
"""Seconds that no test takes."""


@pytest.fixture
def checkpoint(reference_dir):
    return reference_dir / "digits_rkmeans/model.ckpt"


# --- the start ------------------------------------------------------------------------------


def test_health_never_says_serving_before_a_model_answers(serve, checkpoint):
    server = serve(checkpoint, wait=False)
    server.metrics = server.wait_for("semid: metrics on ")
    assert server.metric("semid_serving") in {0.0, 1.0}  # metrics answer while it loads
    server.target = server.wait_for("semid: serving ")
    with server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert (
            health.Check(health_pb2.HealthCheckRequest()).status
            == health_pb2.HealthCheckResponse.SERVING
        )
    with server.stub() as stub:
        assert stub.GetModel(pb.GetModelRequest()).model.name


def test_flags_win_over_the_environment_and_both_over_the_file(serve, checkpoint, tmp_path):
    config = tmp_path / "semid.toml"
    config.write_text(
        f'checkpoint = "{checkpoint}"\n'
        'name = "file"\nmax_batch_rows = 300\nmax_message_bytes = 3000000\n'
    )
    environment = {"SEMID_SERVE_NAME": "environment", "SEMID_SERVE_MAX_BATCH_ROWS": "200"}
    server = serve(None, "--config", config, "--max-batch-rows", 100, env=environment)
    with Client(server.target) as client:
        model = client.model()
    assert model.limits.max_message_bytes == 3_000_000  # of the file alone
    assert model.name == "environment"  # which the file sets too
    assert model.limits.max_rows == 100  # which all three set
    assert server.stop() == 0


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_either_signal_ends_an_idle_server_with_status_0(serve, checkpoint, end):
    server = serve(checkpoint)
    server.signal(end)
    assert server.wait() == 0
    assert "Traceback" not in server.stderr()


def test_a_signal_while_it_loads_ends_it_too(serve, checkpoint):
    server = serve(checkpoint, wait=False)
    server.wait_for("semid: metrics on ")
    assert server.stop() == 0
    assert "Traceback" not in server.stderr()


# --- the drain ------------------------------------------------------------------------------


def test_sigterm_loses_no_admitted_request(
    serve_gated, checkpoint, digits, tensor_of, reference_set_named
):
    server, gate = serve_gated(checkpoint, "--grace", LONG)
    truth = reference_set_named("digits_rkmeans").codes
    calls = 60
    with server.stub() as stub:
        first = gate.hold(stub, 64)
        futures = [
            stub.Encode.future(
                pb.EncodeRequest(tensor=tensor_of(digits[10 * call : 10 * call + 40]))
            )
            for call in range(calls)
        ]
        gate.wait_for_queue(calls)
        server.signal(signal.SIGTERM)
        gate.wait_for_drain()
        gate.release()
        statuses = [future.code() for future in (first, *futures)]
        assert statuses == [OK] * (1 + calls)
        for call, future in enumerate(futures):
            codes = np.frombuffer(future.result().tensor.data, "u1").reshape(40, 3)
            np.testing.assert_array_equal(codes, truth[10 * call : 10 * call + 40])
    assert server.wait() == 0


def test_callers_during_a_drain_get_answers_or_unavailable(serve, checkpoint, digits):
    server = serve(checkpoint)
    with Client(server.target) as client:
        truth = client.encode(digits)
    outcomes: list[str] = []
    answered = threading.Event()

    def call_until_refused(seed: int) -> None:
        random = np.random.default_rng(seed)
        with Client(server.target, timeout=LONG) as client:
            while True:
                start = int(random.integers(1700))
                try:
                    codes = client.encode(digits[start : start + 50])
                except UnavailableError:
                    return outcomes.append("unavailable")
                except SemidClientError as error:
                    return outcomes.append(repr(error))
                if not np.array_equal(codes, truth[start : start + 50]):
                    return outcomes.append("wrong codes")
                answered.set()

    callers = [threading.Thread(target=call_until_refused, args=(seed,)) for seed in range(6)]
    for caller in callers:
        caller.start()
    assert answered.wait(60)
    assert server.stop() == 0
    for caller in callers:
        caller.join()
    assert outcomes == ["unavailable"] * 6


def test_a_stream_that_the_drain_cuts_has_answers_to_all_it_sent_before(
    serve, checkpoint, digits, tensor_of, request
):
    server = serve(checkpoint)
    message = pb.EncodeStreamRequest(request=pb.EncodeRequest(tensor=tensor_of(digits[:10])))
    request.addfinalizer((more := threading.Event()).set)

    def messages():
        yield from [message] * 5
        more.wait()  # the stream stays open and idle

    with server.stub() as stub:
        answers = stub.EncodeStream(messages())
        for _ in range(5):
            assert list(next(answers).response.tensor.shape) == [10, 3]
        server.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    assert caught.value.code() is UNAVAILABLE
    assert server.wait() == 0


@pytest.mark.slow  # three processes that send what they can
def test_who_floods_a_server_that_ends_with_large_messages_is_told(serve, checkpoint):
    server = serve(checkpoint)
    command = [sys.executable, FLOOD, server.target, "32", "1,4,16"]
    outcomes: collections.Counter[str] = collections.Counter()
    with contextlib.ExitStack() as stack:
        flood = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            for _ in range(3)
        ]
        for process in flood:
            stack.callback(process.kill)
        for process in flood:
            assert process.stdout.readline() == "calling\n"
        assert server.stop() == 0
        for process in flood:
            outcomes.update(json.loads(process.stdout.readline()))
    statuses: collections.Counter[str] = collections.Counter()
    for outcome, count in outcomes.items():
        # With details behind it, it is what their own gRPC says of a connection that has ended.
        statuses[outcome.partition(":")[0]] += count
    assert set(statuses) <= {"OK", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"}, outcomes
    assert min(outcomes["OK"], outcomes["UNAVAILABLE"]) > 0, outcomes
    # By gRPC, of calls that come as it stops: none as a rule.
    assert statuses["CANCELLED"] * 10 <= statuses["UNAVAILABLE"], outcomes


# --- many connections -----------------------------------------------------------------------


def test_connections_may_be_more_than_the_soft_limit_on_open_files(
    serve, checkpoint, digits, tensor_of
):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 150 + len(list(Path("/proc/self/fd").iterdir()))  # this process has some of its own
    idle = few + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        server = serve(checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    host, _, port = server.target.rpartition(":")
    with contextlib.ExitStack() as stack, server.stub() as stub:
        for _ in range(idle):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
        answer = stub.Encode(pb.EncodeRequest(tensor=tensor_of(digits[:3])), timeout=30)
    assert list(answer.tensor.shape) == [3, 3]
    assert server.stop() == 0


# --- overload -------------------------------------------------------------------------------


def test_an_overloaded_server_refuses_at_once_and_keeps_its_memory(
    serve_gated, checkpoint, digits, tensor_of, reference_set_named
):
    server, gate = serve_gated(checkpoint, "--max-queue-requests", 4)
    request = pb.EncodeRequest(tensor=tensor_of(digits[:1536]))
    total = 300

    def flood(stub) -> list[grpc.Future]:
        """Send a lot of calls, 100 at a time; return them once each has ended."""
        in_flight, calls = threading.Semaphore(100), []
        for _ in range(total):
            in_flight.acquire()
            calls.append(stub.Encode.future(request))
            calls[-1].add_done_callback(lambda _: in_flight.release())
        for _ in range(100):
            in_flight.acquire()
        return calls

    with server.stub() as stub:
        first = gate.hold(stub, 64)
        admitted = [stub.Encode.future(request) for _ in range(4)]
        gate.wait_for_queue(4)
        # At once: nothing ends before the gate opens but what is refused.
        refused = flood(stub)
        memory = server.metric("process_resident_memory_bytes")
        refused += flood(stub) + flood(stub)
        growth = server.metric("process_resident_memory_bytes") - memory
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert not any(call.done() for call in (first, *admitted))
        gate.release()
        truth = reference_set_named("digits_rkmeans").codes[:1536].astype("u1").tobytes()
        assert [call.result().tensor.data == truth for call in admitted] == [True] * 4
        assert first.code() is OK

    retry_info = error_details_pb2.RetryInfo()
    (packed,) = rpc_status.from_call(refused[0]).details
    assert packed.Unpack(retry_info)
    assert retry_info.retry_delay.ToMilliseconds() > 0
    assert server.metric("semid_refused_requests_total", operation="encode") == len(refused)
    # The last two floods offered 236 MB: memory is bounded by the queue, not by what is sent.
    assert growth < 100e6
    assert server.stop() == 0
