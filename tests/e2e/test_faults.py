"""Faults while others call: every call ends once, correct or with an honest status.

One server for all faults that a server outlives, and a bystander who calls it all the while and
must never notice. After each, calls, queue and file descriptors are as before. The server is the
real one but for its encoder, which fails when the rows say so: `faulty_serve.py`.

Those that take long are `slow`: ``pytest -m "slow or not slow" tests/e2e/test_faults.py`` runs all.

Nothing here depends on how fast the machine is: what must have happened before a test goes on is
waited for, and requests of others are told from the bystander's by their rows.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from waiting import wait_until

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub

# A machine that takes minutes is slow, not wrong.
pytestmark = pytest.mark.timeout(400)

FAULTY = Path(__file__).with_name("faulty_serve.py")
SLOW_RELOAD = Path(__file__).with_name("slow_reload.py")
HOLD, NO_MEMORY, CROWDED, BUG, LOST = 1001.0, 1002.0, 1003.0, 1004.0, 1005.0
BYSTANDERS_ROWS = 3

OK = grpc.StatusCode.OK
CANCELLED = grpc.StatusCode.CANCELLED
INTERNAL = grpc.StatusCode.INTERNAL
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)


def encode(rows, order=None):
    """The request for the codes of float32 rows, the first of which may hold an order."""
    rows = np.array(rows, "<f4")
    if order is not None:
        rows[0, 0] = order
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=rows.shape, data=rows.tobytes())
    return pb.EncodeRequest(tensor=tensor)


def codes_in(response):
    return np.frombuffer(response.tensor.data, "u1").reshape(response.tensor.shape)


class Bystander:
    """Somebody else, who calls all the while over a connection of its own, and tries nothing twice.

    Its requests share batches with those that fail.
    """

    def __init__(self, target, embeddings, truth):
        self._target, self._embeddings, self._truth = target, embeddings, truth
        self.answers, self.complaints = 0, []
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._call, daemon=True)

    def _call(self):
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        with grpc.insecure_channel(self._target, options) as channel:
            stub = SemanticIdServiceStub(channel)
            while not (self._leave.is_set() and self.answers):
                rows = slice(start := self.answers % 1700, start + BYSTANDERS_ROWS)
                try:
                    got = codes_in(stub.Encode(encode(self._embeddings[rows]), timeout=90))
                except grpc.RpcError as error:
                    self.complaints.append(f"{error.code()}: {error.details()}")
                    return
                if not np.array_equal(got, self._truth[rows]):
                    self.complaints.append(f"wrong codes from row {start}")
                    return
                self.answers += 1
                self._leave.wait(0.005)  # not to take the whole of a small machine

    def is_served(self):
        """Wait for an answer to a call that begins from now on."""
        before = self.answers
        wait_until(lambda: self.complaints or self.answers > before + 1)
        assert self.complaints == []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._leave.set()
        self._thread.join(90)


def descriptors(server):
    return len([*Path(f"/proc/{server.process.pid}/fd").iterdir()])


def resident(server):
    return server.metric("process_resident_memory_bytes")


def unfinished(server):
    """Calls begun and not ended."""
    return server.metric("grpc_server_started_total") - server.metric("grpc_server_handled_total")


def ended(server, code, method="Encode"):
    return server.metric("grpc_server_handled_total", grpc_method=method, grpc_code=code.name)


def wait_for_rows(server, rows):
    """Wait until requests of so many rows together are queued, each of more than the bystander's.

    He has one of his own there at most.
    """
    wait_until(lambda: server.metric("semid_queue_rows") >= rows)


class Gate:
    """What an encoder that holds waits behind."""

    def __init__(self, path):
        os.mkfifo(path)
        self.path = path

    def release(self):
        """Let the batch go that is held, or is about to be."""
        with self.path.open("w"):
            pass

    def release_any(self):
        """Let a batch go if one is held."""
        with contextlib.suppress(OSError):  # nobody waits
            os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    return Gate(tmp_path_factory.mktemp("gate") / "gate")


@pytest.fixture(scope="module")
def checkpoint(reference_dir, tmp_path_factory):
    """A copy that tests may spoil, if they mend it."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.ckpt"
    shutil.copy(reference_dir / "digits_rkmeans/model.ckpt", path)
    return path


@pytest.fixture
def serve_faulty(serve, gate):
    """Start a server of the test's own whose encoder does as it is told, behind the gate."""

    def start(checkpoint, *arguments, **env):
        env |= {"SEMID_TEST_GATE": str(gate.path)}
        return serve(checkpoint, *arguments, env=env, program=(sys.executable, FAULTY))

    return start


@pytest.fixture(scope="module")
def faulty(run_server, gate, checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("faulty") / "serve.log"
    with run_server(
        checkpoint,
        "--log-level=debug",
        "--max-batch-seconds=3600",  # a batch takes all that waits
        log=log,
        env={"SEMID_TEST_GATE": str(gate.path)},
        program=(sys.executable, FAULTY),
    ) as server:
        yield server
        assert server.process.poll() is None, server.stderr()
        assert server.stop() == 0


@pytest.fixture(scope="module")
def truth(faulty, digits):
    with faulty.stub() as stub:
        codes = codes_in(stub.Encode(encode(digits)))
        decode = pb.DecodeRequest(
            tensor=pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=[1, 3], data=bytes(3))
        )
        stub.Decode(decode)
    return codes


@pytest.fixture
def fire(faulty, gate, digits, truth):
    """The server and its bystander; afterwards everything is as it was before."""
    wait_until(lambda: unfinished(faulty) == 0)
    before = descriptors(faulty)
    with Bystander(faulty.target, digits, truth) as bystander:
        faulty.bystander = bystander
        bystander.is_served()
        try:
            yield faulty
        finally:  # a test that failed may have left a batch behind the gate
            wait_until(lambda: gate.release_any() or unfinished(faulty) <= 1)
    assert bystander.complaints == []
    wait_until(lambda: unfinished(faulty) == 0)
    for name in ("semid_queue_requests", "semid_queue_rows", "semid_queue_bytes"):
        assert faulty.metric(name) == 0
    wait_until(lambda: descriptors(faulty) <= before)


@pytest.fixture
def stub(faulty):
    with faulty.stub() as stub:
        yield stub


@pytest.fixture
def hold(fire, gate, stub, digits):
    """Return a function that has the encoder hold a batch, and one that lets it go."""

    def begin():
        call = stub.Encode.future(encode(digits[:1], HOLD), timeout=90)
        fire.wait_for("held")
        return call

    return begin, gate.release


# --- callers who leave ----------------------------------------------------------------------

DOOMED = """
import sys, threading
import grpc, numpy as np
from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub

def encode(first):
    rows = np.full((4, 64), first, "<f4")
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=rows.shape, data=rows.tobytes())
    return pb.EncodeRequest(tensor=tensor)

answered = threading.Event()
def messages():
    for number in range(3):
        yield pb.EncodeStreamRequest(request=encode(number))
    answered.wait()
    for number in range(100):
        yield pb.EncodeStreamRequest(request=encode(number))

stub = SemanticIdServiceStub(grpc.insecure_channel(sys.argv[1]))
stream = stub.EncodeStream(messages())
for _ in range(3):
    next(stream)
calls = [stub.Encode.future(encode(float(sys.argv[2])))]
sys.stdin.readline()
answered.set()
calls += [stub.Encode.future(encode(7)) for _ in range(20)]
sys.stdin.readline()
"""


def test_a_client_killed_amid_its_calls_leaves_nothing_behind(fire, hold):
    _, release = hold
    before = ended(fire, CANCELLED), ended(fire, CANCELLED, "EncodeStream")
    left = fire.metric("semid_withdrawn_requests_total", operation="encode")
    with subprocess.Popen(
        [sys.executable, "-c", DOOMED, fire.target, str(HOLD)], stdin=subprocess.PIPE, text=True
    ) as client:
        try:
            fire.wait_for("held")  # its first call is in a batch, its stream was answered thrice
            client.stdin.write("\n")
            client.stdin.flush()
            # 20 more calls and as much of the stream as is read at once are in the queue.
            wait_for_rows(fire, (20 + 8) * 4)
        finally:
            client.kill()
    wait_until(lambda: ended(fire, CANCELLED) == before[0] + 21)
    wait_until(lambda: ended(fire, CANCELLED, "EncodeStream") == before[1] + 1)
    # Nothing is computed for who has left.
    wait_until(
        lambda: fire.metric("semid_withdrawn_requests_total", operation="encode") >= left + 28
    )
    release()


def test_a_call_cancelled_in_the_queue_is_not_computed(fire, hold, stub, digits):
    begin, release = hold
    first = begin()
    left = fire.metric("semid_withdrawn_requests_total", operation="encode")
    queued = stub.Encode.future(encode(digits[:1000]))
    wait_for_rows(fire, 1000)
    queued.cancel()
    wait_until(
        lambda: fire.metric("semid_withdrawn_requests_total", operation="encode") == left + 1
    )
    assert fire.metric("semid_queue_rows") < 1000
    release()
    assert first.code() is OK


def test_a_call_cancelled_in_the_batch_takes_nothing_from_those_it_shares_it_with(
    fire, hold, stub, digits, truth
):
    begin, release = hold
    first = begin()
    before = ended(fire, CANCELLED)
    leaving = stub.Encode.future(encode(digits[:5], HOLD))
    staying = [stub.Encode.future(encode(digits[n : n + 9])) for n in range(10)]
    wait_for_rows(fire, 5 + 10 * 9)
    release()
    fire.wait_for("held")  # the second batch has begun, with all of them
    leaving.cancel()
    wait_until(lambda: ended(fire, CANCELLED) == before + 1)
    release()
    assert first.code() is OK
    for n, call in enumerate(staying):
        np.testing.assert_array_equal(codes_in(call.result()), truth[n : n + 9])


def test_a_deadline_that_passes_in_the_queue_costs_nothing(fire, hold, stub, digits):
    begin, release = hold
    first = begin()
    answers, rows = fire.bystander.answers, fire.metric("semid_rows_total", operation="encode")
    late = stub.Encode.future(encode(digits[:1500]), timeout=0.3)
    # A server that hears of it only when there is no time left refuses it.
    assert late.code() in {DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED}
    release()
    assert first.code() is OK
    wait_until(lambda: fire.metric("semid_queue_requests") == 0)
    computed = fire.metric("semid_rows_total", operation="encode") - rows
    # One may be on its way to him, and one have been when the counting began.
    of_others = 1 + BYSTANDERS_ROWS * (fire.bystander.answers - answers + 2)
    assert computed <= of_others


def test_a_deadline_that_passes_in_the_batch_ends_that_call_alone(fire, hold, stub, digits, truth):
    begin, release = hold
    for timeout in (1, 5, 25):  # on a slow machine it may pass before the batch begins
        first = begin()
        before, dropped = ended(fire, DEADLINE_EXCEEDED), never_run(fire)
        late = stub.Encode.future(encode(digits[:5], HOLD), timeout=timeout)
        other = stub.Encode.future(encode(digits[:9]), timeout=90)
        wait_for_rows(fire, 9)
        release()
        assert first.code() is OK
        began = wait_until(lambda: fire.has_said("held") or (never_run(fire) > dropped and "no"))  # noqa: B023 - awaited here
        if began != "no":
            break
        assert other.code() is OK
    assert began != "no", "no deadline was far enough"
    assert late.code() is DEADLINE_EXCEEDED
    wait_until(lambda: ended(fire, DEADLINE_EXCEEDED) == before + 1)
    release()
    np.testing.assert_array_equal(codes_in(other.result()), truth[:9])


def never_run(server):
    """Requests that came and of which nothing was computed."""
    return sum(
        server.metric(f"semid_{end}_requests_total", operation="encode")
        for end in ("refused", "expired", "withdrawn")
    )


# --- connections ----------------------------------------------------------------------------

GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""How every HTTP/2 connection begins, and no settings."""


class Proxy:
    """A wire between clients and a server that can be cut without either end hearing of it.

    Of what a client sends, ``until`` bytes pass at first, and the rest when ``flowing`` is set.
    """

    def __init__(self, target, *, until=None):
        host, _, port = target.rpartition(":")
        self._far, self._until = (host, int(port)), until
        self.flowing = threading.Event()
        self.flowing.set()
        self._cut = False
        self.hung_up = threading.Event()
        """The server has closed a connection."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        """Let nothing through from now on, neither bytes nor the end of a connection."""
        self._cut = True

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._far)
                self._sockets += [near, far]
                threading.Thread(
                    target=self._pump, args=(near, far, self._until), daemon=True
                ).start()
                threading.Thread(target=self._pump_back, args=(far, near), daemon=True).start()

    def _pump_back(self, far, near):
        self._pump(far, near, None)
        self.hung_up.set()

    def _pump(self, source, sink, until):
        with contextlib.suppress(OSError):
            sent = 0
            while data := source.recv(4096):
                if until is not None and sent < until <= sent + len(data):
                    self.flowing.clear()
                    self.flowing.wait()
                if not self._cut:
                    sink.sendall(data)
                sent += len(data)
            if not self._cut:
                sink.shutdown(socket.SHUT_WR)

    def close(self):
        self.flowing.set()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def make_proxy(faulty):
    proxies = []

    def make(**settings):
        proxies.append(Proxy(faulty.target, **settings))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


def test_connections_that_fall_silent_hold_up_nobody(fire):
    host, _, port = fire.target.rpartition(":")
    with contextlib.ExitStack() as stack:
        for number in range(100):
            silent = stack.enter_context(socket.create_connection((host, int(port)), 60))
            if number % 2:
                silent.sendall(GREETING)
                assert silent.recv(9), "the server greets too"
        fire.bystander.is_served()
        # Somebody new is served too.
        stub = SemanticIdServiceStub(stack.enter_context(grpc.insecure_channel(fire.target)))
        assert stub.GetModel(pb.GetModelRequest(), timeout=60).model.input_dim == 64


def test_a_stream_whose_answers_nobody_reads_is_read_no_further(fire, stub):
    codes = np.zeros((2048, 3), "u1")
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=codes.shape, data=codes.tobytes())
    message = pb.DecodeStreamRequest(request=pb.DecodeRequest(tensor=tensor))  # 512 KiB answer it
    total = 150
    sent = [0, 0, 0]

    def messages(number):
        for _ in range(total):
            sent[number] += 1
            yield message

    memory = resident(fire)
    streams = [stub.DecodeStream(messages(number), timeout=100) for number in range(3)]
    first = [next(stream) for stream in streams]
    for _ in range(10):
        fire.bystander.is_served()
    # All answers together are 236 MB, and most of them are left uncomputed.
    assert resident(fire) - memory < 100e6
    for stream in streams[1:]:
        stream.cancel()
    # It has lost nothing: who reads on gets the rest.
    rest = sum(
        answer.response.tensor.data == first[0].response.tensor.data for answer in streams[0]
    )
    assert rest == total - 1


@pytest.mark.slow  # a server of its own, and its patience
def test_a_peer_that_vanished_is_noticed_and_its_calls_end(serve_faulty, checkpoint, gate, digits):
    # A server of its own: who has so little patience may take a busy client for one that is gone.
    server = serve_faulty(checkpoint, "--keepalive=1")
    with contextlib.ExitStack() as stack:
        proxy = Proxy(server.target)
        stack.callback(proxy.close)
        never = queue.SimpleQueue()
        stack.callback(never.put, None)
        far = SemanticIdServiceStub(stack.enter_context(grpc.insecure_channel(proxy.target)))
        stream = far.EncodeStream(iter(never.get, None))
        call = far.Encode.future(encode(digits[:1], HOLD))
        server.wait_for("held")
        wait_until(lambda: server.metric("grpc_server_started_total") == 2)
        proxy.cut()  # both ends stay open, and nothing comes through
        wait_until(lambda: unfinished(server) == 0)
        # A stream that was waiting for a message may see its end first, and then its cancellation.
        assert ended(server, CANCELLED) == 1
        assert ended(server, CANCELLED, "EncodeStream") + ended(server, OK, "EncodeStream") == 1
        assert proxy.hung_up.wait(60)
        assert not call.done(), "the client knows of nothing"
        assert not stream.done()
        gate.release()
        with server.stub() as stub:
            assert len(codes_in(stub.Encode(encode(digits[:1]), timeout=60))) == 1
    assert server.stop() == 0


def test_a_request_that_dribbles_in_holds_up_nobody(fire, make_proxy, digits, truth):
    proxy = make_proxy(until=20_000)
    with grpc.insecure_channel(proxy.target) as channel:
        call = SemanticIdServiceStub(channel).Encode.future(encode(digits), timeout=60)
        wait_until(lambda: not proxy.flowing.is_set())
        for _ in range(5):
            fire.bystander.is_served()
        assert not call.done()
        proxy.flowing.set()
        np.testing.assert_array_equal(codes_in(call.result()), truth)


# --- the device -----------------------------------------------------------------------------


def queued_together(hold, fire, stub, requests):
    """Have requests share a batch, and return their calls."""
    begin, release = hold
    first = begin()
    calls = [stub.Encode.future(request, timeout=90) for request in requests]
    wait_for_rows(fire, sum(request.tensor.shape[0] for request in requests))
    release()
    assert first.code() is OK
    return calls


def test_a_batch_without_device_memory_is_split_and_a_request_without_fails_alone(
    fire, hold, stub, digits, truth
):
    requests = [encode(digits[n : n + 9]) for n in range(12)]
    requests[3] = encode(digits[:5], CROWDED)
    requests[7] = encode(digits[:30], NO_MEMORY)
    calls = queued_together(hold, fire, stub, requests)
    assert calls[3].code() is OK
    assert calls[7].code() is INTERNAL
    assert "no memory for this request of 30 rows" in calls[7].details()
    assert "SECRET" not in calls[7].details()
    wait_until(lambda: "0xSECRET" in fire.stderr())  # the operator is told all
    for n in {*range(12)} - {3, 7}:
        np.testing.assert_array_equal(codes_in(calls[n].result()), truth[n : n + 9])


def test_a_request_that_makes_the_encoder_fail_fails_alone(fire, hold, stub, digits, truth):
    requests = [encode(digits[n : n + 9]) for n in range(12)]
    requests[5] = encode(digits[:5], BUG)
    calls = queued_together(hold, fire, stub, requests)
    assert calls[5].code() is INTERNAL
    assert "SECRET" not in calls[5].details()
    wait_until(lambda: "a bug at 0xSECRET" in fire.stderr())  # the operator is told all
    for n in {*range(12)} - {5}:
        np.testing.assert_array_equal(codes_in(calls[n].result()), truth[n : n + 9])
    assert health_of(fire) == SERVING


def health_of(server):
    with server.channel() as channel:
        return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status


def test_a_device_that_is_lost_ends_the_process_once_every_call_has_its_answer(
    serve_faulty, gate, reference_dir, digits
):
    server = serve_faulty(reference_dir / "digits_rkmeans/model.ckpt")
    with server.channel() as channel:
        stub = SemanticIdServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        held = stub.Encode.future(encode(digits[:1], HOLD))
        server.wait_for("held")
        calls = [stub.Encode.future(encode(digits[:1], LOST))]
        calls += [stub.Encode.future(encode(digits[n : n + 9])) for n in range(30)]
        wait_until(lambda: server.metric("semid_queue_requests") == 31)
        gate.release()
        assert held.code() is OK
        # Another server can answer what this one no longer can.
        assert {call.code() for call in calls} == {UNAVAILABLE}
        assert next(watch).status == NOT_SERVING
    assert server.wait() == 1
    said = server.stderr()
    assert "Error: the device has failed and can do nothing more for this process" in said
    assert signal.SIGTERM.name not in said


def test_what_breaks_while_the_event_loop_runs_it_is_told_as_if_the_worker_had(
    serve_faulty, checkpoint, digits
):
    server = serve_faulty(checkpoint, SEMID_TEST_IN_LOOP="1")
    with server.channel() as channel:
        stub = SemanticIdServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        for order, code in [(None, OK), (BUG, INTERNAL), (None, OK), (NO_MEMORY, INTERNAL)] * 3:
            assert stub.Encode.future(encode(digits[:3], order)).code() is code
        server.wait_for("in the event loop")
        assert stub.Encode.future(encode(digits[:3], LOST)).code() is UNAVAILABLE
        assert next(watch).status == NOT_SERVING
    assert server.wait() == 1
    said = server.stderr()
    assert said.count("no device memory for 3 rows") == 3
    assert "Error: the device has failed and can do nothing more for this process" in said


def test_a_batch_that_hangs_ends_the_process_once_every_call_has_its_answer(
    serve_faulty, checkpoint, digits
):
    server = serve_faulty(checkpoint, "--max-stall=3")
    with server.channel() as channel:
        stub = SemanticIdServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        calls = [stub.Encode.future(encode(digits[:1], HOLD))]
        server.wait_for("held")  # and is never let go
        calls += [stub.Encode.future(encode(digits[n : n + 9])) for n in range(30)]
        assert {call.code() for call in calls} == {UNAVAILABLE}
        assert next(watch).status == NOT_SERVING
    assert server.wait() == 1
    said = server.stderr()
    assert "a batch has not ended within 3 s" in said
    assert "in encode" in said, "the stack of what hangs is in the log"


@pytest.mark.slow  # a server of its own, and the limit
def test_a_batch_that_hangs_while_the_server_drains_is_told_too(serve_faulty, checkpoint, digits):
    server = serve_faulty(checkpoint, "--max-stall=3", "--grace=40")
    with server.channel() as channel:
        call = SemanticIdServiceStub(channel).Encode.future(encode(digits[:1], HOLD))
        server.wait_for("held")  # and is never let go
        server.signal(signal.SIGTERM)
        assert call.code() is UNAVAILABLE
        assert "a batch has not ended within 3 s" in call.details()
    assert server.wait() == 0
    assert "in encode" in server.stderr(), "the stack of what hangs is in the log"


@pytest.mark.slow  # a server of its own, and the limit
def test_a_batch_that_hangs_the_event_loop_ends_the_process_and_callers_hear_of_it(
    serve_faulty, checkpoint, digits
):
    server = serve_faulty(checkpoint, "--max-stall=3", SEMID_TEST_IN_LOOP="1")
    with server.channel() as channel:
        stub = SemanticIdServiceStub(channel)
        held = False
        while not held:  # until one finds the worker at rest, and is run by the loop
            first = stub.Encode.future(encode(digits[:1], HOLD))
            while not (held := server.has_said("held")) and not first.done():
                time.sleep(0.02)
        calls = [first]
        calls += [stub.Encode.future(encode(digits[n : n + 9])) for n in range(30)]
        assert {call.code() for call in calls} == {UNAVAILABLE}
    assert server.wait() == 1
    said = server.stderr()
    assert "the event loop has not run for 3 s" in said
    assert "in encode" in said, "the stack of what hangs is in the log"


# --- around it ------------------------------------------------------------------------------


@pytest.mark.slow  # three servers
@pytest.mark.parametrize("processes", [1, 2])
def test_a_reload_that_computes_beyond_the_grace_period_does_not_abort_the_process(
    serve, checkpoint, processes
):
    arguments = ["--grace=0.2", f"--processes={processes}"]
    server = serve(checkpoint, *arguments, program=(sys.executable, SLOW_RELOAD))
    server.signal(signal.SIGHUP)
    for _ in range(processes):
        server.wait_for("loading")
    assert server.stop() == 0
    said = server.stderr()
    assert said.count("with a new version still being read") == processes
    assert "ended with status" not in said, "no child of several ended otherwise"


@pytest.mark.slow  # two servers
@pytest.mark.parametrize("processes", [1, 2])
def test_a_first_load_that_computes_when_the_server_is_told_to_end_does_not_abort_it(
    serve, checkpoint, processes
):
    settings = {"program": (sys.executable, SLOW_RELOAD), "env": {"SEMID_TEST_NEVER": "1"}}
    server = serve(checkpoint, f"--processes={processes}", wait=False, **settings)
    for _ in range(processes):
        server.wait_for("loading")
    assert server.stop() == 0
    assert "ended with status" not in server.stderr()


def test_a_checkpoint_that_is_lost_or_spoilt_while_it_is_served_changes_nothing(fire, checkpoint):
    whole = checkpoint.read_bytes()

    def reloads(result):
        return fire.metric("semid_model_reloads_total", result=result)

    failed, loaded = reloads("failed"), reloads("ok")
    try:
        for spoilt in (None, b"", whole[: len(whole) // 2], b"x" * len(whole)):
            if spoilt is None:
                checkpoint.unlink()
            else:
                checkpoint.write_bytes(spoilt)
            fire.signal(signal.SIGHUP)
            failed += 1
            wait_until(lambda: reloads("failed") == failed)  # noqa: B023 - awaited in its turn
            fire.bystander.is_served()
    finally:
        checkpoint.write_bytes(whole)
    assert health_of(fire) == SERVING
    fire.signal(signal.SIGHUP)
    wait_until(lambda: reloads("ok") == loaded + 1)
    fire.bystander.is_served()


def test_scrapers_that_never_read_hold_up_neither_calls_nor_other_scrapes(fire):
    host, _, port = fire.metrics.rpartition(":")
    with contextlib.ExitStack() as stack:
        for number in range(100):
            silent = stack.enter_context(socket.create_connection((host, int(port)), 60))
            if number % 2:
                silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                silent.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        fire.bystander.is_served()
        assert fire.metric("semid_serving") == 1


@pytest.mark.slow  # it takes the server's patience, half a minute
def test_scrapers_that_never_read_are_let_go(fire):
    host, _, port = fire.metrics.rpartition(":")
    with socket.create_connection((host, int(port)), 60) as silent:
        assert silent.recv(1) == b"", "closed by the server"


@pytest.mark.slow  # the end waits a while for the lines to be taken
def test_a_log_that_nobody_reads_holds_up_no_call_and_no_end(serve, checkpoint, digits):
    reader, writer = os.pipe()
    try:
        server = serve(checkpoint, "--log-level=debug", stderr=writer)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        with server.stub() as stub:
            for n in range(50):
                assert len(stub.Encode(encode(digits[n : n + 1]), timeout=30).tensor.data) == 3
        assert server.stop() == 0
    finally:
        os.close(reader)
        os.close(writer)
