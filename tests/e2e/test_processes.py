"""Several server processes behind one address, as their operator meets them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from waiting import wait_until

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub
from semid_client import Client, SemidClientError, UnavailableError
from semid_server.checkpoint import load_checkpoint

# A machine on which starting two processes takes minutes is slow, not wrong.
pytestmark = pytest.mark.timeout(400)

ROWS = np.zeros((2, 64), np.float32)
CALLERS = 4


@pytest.fixture
def checkpoint(reference_dir):
    return reference_dir / "digits_rkmeans" / "model.ckpt"


def request(rows=ROWS):
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=rows.shape, data=rows.tobytes())
    return pb.EncodeRequest(tensor=tensor)


def encode_on_connections(target, count, rows=ROWS):
    """One Encode on each of so many connections, which the kernel divides among the processes.

    Each has a part of the rows of its own, if there are enough.
    """
    parts = np.array_split(rows, count) if len(rows) >= count else [rows] * count
    with contextlib.ExitStack() as stack:
        for part in parts:
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = stack.enter_context(grpc.insecure_channel(target, options))
            stub = SemanticIdServiceStub(channel)
            assert len(stub.Encode(request(part), timeout=300, wait_for_ready=True).tensor.data)


def servers_of(pid):
    """The children of a process that serve: multiprocessing has one more that does not."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = set()
    for child in children:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.add(int(child))
    return found


class Callers:
    """Several who call all the while, each over a connection of its own, until a call fails."""

    def __init__(self, target, embeddings, truth, count=CALLERS):
        self._target, self._embeddings, self._truth = target, embeddings, truth
        self.answers = [0] * count
        self.failures = [None] * count
        self._leave = threading.Event()
        self._threads = [
            threading.Thread(target=self._call, args=(number,), daemon=True)
            for number in range(count)
        ]

    def _call(self, number):
        random = np.random.default_rng(number)
        with Client(self._target, timeout=60) as client:
            while not self._leave.is_set():
                start = int(random.integers(1700))
                rows = slice(start, start + int(random.integers(1, 90)))
                try:
                    codes = client.encode(self._embeddings[rows])
                except SemidClientError as error:
                    self.failures[number] = error
                    return
                if not np.array_equal(codes, self._truth[rows]):
                    self.failures[number] = f"wrong codes from row {start}"
                    return
                self.answers[number] += 1
                self._leave.wait(0.005)  # not to take the whole of a small machine

    def are_served(self):
        """Wait until each has had an answer to a call that began from now on."""
        before = list(self.answers)
        wait_until(
            lambda: (
                any(self.failures)
                or all(now > then + 1 for now, then in zip(self.answers, before, strict=True))
            )
        )
        assert self.failures == [None] * len(self.failures)

    def join(self):
        for thread in self._threads:
            thread.join(90)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._leave.set()
        self.join()


@pytest.fixture
def call(digits):
    """Return a function that has callers call a server, and check every answer."""

    def begin(server):
        with Client(server.target) as client:
            truth = client.encode(digits)
        return Callers(server.target, digits, truth)

    return begin


def test_callers_notice_nothing_of_a_process_that_is_killed_under_load(serve, checkpoint, call):
    server = serve(checkpoint, "--processes", "2")
    with call(server) as callers:
        callers.are_served()
        before = servers_of(server.process.pid)
        os.kill(min(before), signal.SIGKILL)
        callers.are_served()  # by the other
        wait_until(lambda: len(servers_of(server.process.pid) - {min(before)}) == 2)
        callers.are_served()
    assert callers.failures == [None] * CALLERS
    assert server.stop() == 0
    assert server.stderr().count("status -9; another is started") == 1


@pytest.mark.slow  # two processes more to start
def test_under_load_sighup_reloads_every_process_and_sigterm_drains_every_one(
    serve, checkpoint, call
):
    server = serve(checkpoint, "--processes", "2")
    with call(server) as callers:
        callers.are_served()
        server.signal(signal.SIGHUP)
        wait_until(lambda: server.metric("semid_model_reloads_total", result="ok") == 1)
        callers.are_served()
        assert server.stop() == 0
        callers.join()
    # Each was answered rightly until there was nobody left to ask.
    assert {type(failure) for failure in callers.failures} == {UnavailableError}
    assert min(callers.answers) > 2


def test_processes_share_the_load_and_outlive_one_of_them(serve, checkpoint, reference_set_named):
    server = serve(checkpoint, "--processes", "2")
    first = servers_of(server.process.pid)
    assert len(first) == 2
    digits = reference_set_named("digits_rkmeans")
    encode_on_connections(server.target, 16, digits.embeddings)
    assert server.metric("grpc_server_handled_total", grpc_method="Encode", grpc_code="OK") == 16
    assert server.metric("semid_serving") == 1
    # Of what both have encoded: the codes of a part are used otherwise.
    for layer, codes in enumerate(digits.codes.T):
        _, counts = np.unique(codes, return_counts=True)
        dead = server.metric("semid_dead_codes", layer=str(layer))
        assert dead + len(counts) == digits.info["codebook_width"]
        shares = counts / counts.sum()
        perplexity = np.exp(-(shares * np.log(shares)).sum())
        found = server.metric("semid_code_perplexity", layer=str(layer))
        assert found == pytest.approx(perplexity)

    os.kill(min(first), signal.SIGKILL)
    wait_until(lambda: len(servers_of(server.process.pid) - {min(first)}) == 2)
    # Until the new one serves, the other answers all; what the dead one counted is kept.
    encode_on_connections(server.target, 4)
    assert server.metric("grpc_server_handled_total", grpc_method="Encode", grpc_code="OK") == 20

    server.signal(signal.SIGINT)
    assert server.wait() == 0
    assert "status -9; another is started" in server.stderr()


def fingerprints(target, expected):
    """What connections find there, so many that each of two processes has some."""
    found = {}
    for _ in range(24):
        with Client(target, timeout=60) as client:
            one = client.model().fingerprint
        found[one] = found.get(one, 0) + 1
    assert set(found) <= set(expected), found
    return set(found)


def killed_and_replaced(server):
    """Kill a process, and wait until another serves in its place."""
    before = servers_of(server.process.pid)
    os.kill(min(before), signal.SIGKILL)
    wait_until(lambda: len(servers_of(server.process.pid) - {min(before)}) == 2)
    wait_until(lambda: server.metric("semid_serving") == 1)


def put(source, place):
    """Put a file in the place of another one, as whoever replaces a checkpoint does."""
    new = place.with_name("new")
    shutil.copyfile(source, new)
    new.replace(place)


@pytest.mark.slow  # it starts five processes
def test_a_process_that_is_started_again_serves_what_the_others_serve(
    serve, reference_dir, tmp_path
):
    first, other, wide = (
        reference_dir / name / "model.ckpt"
        for name in ("digits_rkmeans", "digits_rvq", "movies_rkmeans")
    )
    one, another = (load_checkpoint(path).fingerprint for path in (first, other))
    put(first, place := tmp_path / "served.ckpt")
    server = serve(place, "--processes", "2", "--name", "digits")
    assert fingerprints(server.target, {one}) == {one}

    put(wide, place)  # which none takes
    server.signal(signal.SIGHUP)
    wait_until(lambda: server.metric("semid_model_reloads_total", result="failed") >= 1)
    killed_and_replaced(server)
    assert fingerprints(server.target, {one, another}) == {one}

    put(other, place)  # which nobody has announced
    killed_and_replaced(server)
    assert fingerprints(server.target, {one, another}) == {one}

    server.signal(signal.SIGHUP)
    wait_until(lambda: server.metric("semid_model_reloads_total", result="ok") >= 1)
    assert fingerprints(server.target, {one, another}) == {another}
    place.unlink()
    killed_and_replaced(server)
    assert fingerprints(server.target, {one, another}) == {another}
    assert server.stop() == 0


def test_a_checkpoint_that_cannot_be_used_ends_the_start_with_one_sentence(serve, tmp_path):
    server = serve(tmp_path / "absent", "--processes", "2", wait=False)
    assert server.wait() == 1
    (line,) = [line for line in server.stderr().splitlines() if line.startswith("Error")]
    assert str(tmp_path / "absent") in line
    assert "Traceback" not in server.stderr()


def test_children_end_when_their_parent_is_killed(serve, checkpoint):
    server = serve(checkpoint, "--processes", "2")
    children = servers_of(server.process.pid)
    server.signal(signal.SIGKILL)
    server.wait()
    wait_until(lambda: not any(Path(f"/proc/{child}/exe").exists() for child in children))
