"""From the start to the end of a server: settings, load, overload, drain."""

from __future__ import annotations

import functools
import signal
import threading
import time

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from semid.v1 import semid_pb2 as pb
from semid_client import Client, SemidClientError, UnavailableError

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
SLOWLY = ("--reference", "--threads", "1")
"""One thread of the float64 reference: slow enough for a queue to form."""


@pytest.fixture
def checkpoint(reference_dir):
    return reference_dir / "digits_rkmeans/model.ckpt"


@pytest.fixture
def large(reference_dir):
    """The checkpoint whose rows take longest, and its embeddings."""
    return reference_dir / "movies_rkmeans/model.ckpt"


@pytest.fixture
def movies(reference_dir):
    return np.load(reference_dir / "data/movies.npy")


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
    config.write_text(f'checkpoint = "{checkpoint}"\nmax_batch_rows = 300\nname = "file"\n')

    def limits(*arguments, env=None) -> tuple[int, str]:
        server = serve(None, "--config", config, *arguments, env=env)
        with Client(server.target) as client:
            model = client.model()
        assert server.stop() == 0
        return model.limits.max_rows, model.name

    assert limits() == (300, "file")
    environment = {"SEMID_SERVE_MAX_BATCH_ROWS": "200"}
    assert limits(env=environment) == (200, "file")
    assert limits("--max-batch-rows", 100, env=environment) == (100, "file")


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


def test_sigterm_under_load_loses_no_admitted_request(serve, large, movies, tensor_of):
    server = serve(large, *SLOWLY)
    calls = 60
    with server.stub() as stub:
        truth = np.frombuffer(
            stub.Encode(pb.EncodeRequest(tensor=tensor_of(movies[:640]))).tensor.data, "u1"
        ).reshape(640, 3)
        started = server.metric("grpc_server_started_total", grpc_method="Encode")
        futures = [
            stub.Encode.future(
                pb.EncodeRequest(tensor=tensor_of(movies[10 * call : 10 * call + 40]))
            )
            for call in range(calls)
        ]
        # Each scrape is a round trip: no pause is needed between them.
        while server.metric("grpc_server_started_total", grpc_method="Encode") < started + calls:
            assert server.process.poll() is None
        server.signal(signal.SIGTERM)
        statuses = [future.code() for future in futures]
        assert statuses == [OK] * calls
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
        with Client(server.target, timeout=30) as client:
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
    assert answered.wait(30)
    assert server.stop() == 0
    for caller in callers:
        caller.join()
    assert outcomes == ["unavailable"] * 6


def test_a_stream_that_the_drain_cuts_has_answers_to_all_it_sent_before(
    serve, checkpoint, digits, tensor_of
):
    server = serve(checkpoint)
    message = pb.EncodeStreamRequest(request=pb.EncodeRequest(tensor=tensor_of(digits[:10])))
    more = threading.Event()

    def messages():
        yield from [message] * 5
        more.wait(30)  # the stream stays open and idle

    with server.stub() as stub:
        answers = stub.EncodeStream(messages(), timeout=60)
        for _ in range(5):
            assert list(next(answers).response.tensor.shape) == [10, 3]
        server.signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        more.set()
    assert caught.value.code() is UNAVAILABLE
    assert server.wait() == 0


# --- overload -------------------------------------------------------------------------------


def test_an_overloaded_server_refuses_at_once_and_keeps_its_memory(serve, large, movies, tensor_of):
    server = serve(large, *SLOWLY, "--max-queue-requests", 4, "--max-batch-rows", 512)
    request = pb.EncodeRequest(tensor=tensor_of(movies[:256]))
    total = 300

    def flood(stub) -> list[tuple[float, grpc.Future]]:
        """Send a batch of calls, 100 at a time; return how each ended, and after how long."""
        in_flight, ended = threading.Semaphore(100), []

        def record(future, sent):
            ended.append((time.monotonic() - sent, future))
            in_flight.release()

        for _ in range(total):
            in_flight.acquire()
            future = stub.Encode.future(request, timeout=60)
            future.add_done_callback(functools.partial(record, sent=time.monotonic()))
        for _ in range(100):
            in_flight.acquire()  # all have ended
        return ended

    with server.stub() as stub:
        truth = stub.Encode(request).tensor.data
        ended = flood(stub)
        memory = server.metric("process_resident_memory_bytes")
        ended += flood(stub) + flood(stub)
        growth = server.metric("process_resident_memory_bytes") - memory

    refused = [(seconds, call) for seconds, call in ended if call.code() is not OK]
    assert len(ended) == 3 * total
    assert {call.code() for _, call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(call.result().tensor.data == truth for _, call in ended if call.code() is OK)
    assert 0 < len(refused) < 3 * total
    # Far less than the queue of one minute that admitting all would have made.
    assert max(seconds for seconds, _ in refused) < 10
    retry_info = error_details_pb2.RetryInfo()
    (packed,) = rpc_status.from_call(refused[0][1]).details
    assert packed.Unpack(retry_info)
    assert retry_info.retry_delay.ToMilliseconds() > 0
    assert server.metric("semid_refused_requests_total", operation="encode") == len(refused)
    # The last two floods sent 236 MB: memory is bounded by the queue, not by what was sent.
    assert growth < 60e6
    assert server.stop() == 0


def test_a_request_that_expired_in_the_queue_is_not_computed(serve, large, movies, tensor_of):
    # One long turn: else the small requests would be done between the parts of the long one.
    server = serve(large, *SLOWLY, "--max-batch-seconds", 3600, "--max-message-bytes", 1 << 25)
    rows = np.tile(movies, (5, 1))
    long = pb.EncodeRequest(tensor=tensor_of(rows))
    with server.stub() as stub:
        stub.Encode(long)  # now the server knows how many rows make a turn
        busy = stub.Encode.future(long)
        while server.metric("semid_received_bytes_total", transport="message") < 2 * rows.nbytes:
            assert server.process.poll() is None
        late = stub.Encode.future(pb.EncodeRequest(tensor=tensor_of(movies[:1])), timeout=0.05)
        left = stub.Encode.future(pb.EncodeRequest(tensor=tensor_of(movies[:1])))
        left.cancel()
        # Refused at once if the server knows by then how slow it is.
        assert late.code() in {
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        }
        assert busy.code() is OK
        assert server.metric("semid_rows_total", operation="encode") == 2 * len(rows)
    assert server.stop() == 0
