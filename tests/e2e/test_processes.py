"""Several server processes behind one address, as their operator meets them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub

ROWS = np.zeros((2, 64), np.float32)


@pytest.fixture
def checkpoint(reference_dir):
    return reference_dir / "digits_rkmeans" / "model.ckpt"


def request():
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=ROWS.shape, data=ROWS.tobytes())
    return pb.EncodeRequest(tensor=tensor)


def encode_on_connections(target, count):
    """One Encode on each of so many connections, which the kernel divides among the processes."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = stack.enter_context(grpc.insecure_channel(target, options))
            stub = SemanticIdServiceStub(channel)
            assert len(stub.Encode(request(), timeout=20, wait_for_ready=True).tensor.data)


def servers_of(pid):
    """The children of a process that serve: multiprocessing has one more that does not."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    }


def wait_until(condition):
    until = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < until, "it did not come to pass within 90 s"
        time.sleep(0.05)


def test_processes_share_the_load_and_outlive_one_of_them(serve, checkpoint):
    server = serve(checkpoint, "--processes", "2")
    first = servers_of(server.process.pid)
    assert len(first) == 2
    encode_on_connections(server.target, 16)
    assert server.metric("grpc_server_handled_total", grpc_method="Encode", grpc_code="OK") == 16
    assert server.metric("semid_serving") == 1

    os.kill(min(first), signal.SIGKILL)
    wait_until(lambda: len(servers_of(server.process.pid) - {min(first)}) == 2)
    # Until the new one serves, the other answers all; what the dead one counted is kept.
    encode_on_connections(server.target, 4)
    assert server.metric("grpc_server_handled_total", grpc_method="Encode", grpc_code="OK") == 20

    server.signal(signal.SIGINT)
    assert server.wait() == 0
    assert "status -9; another is started" in server.stderr()


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
