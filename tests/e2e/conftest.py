"""Servers of `running` as fixtures: those that tests share, and those that a test starts itself."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running import ENVIRONMENT, Gate, float32_tensor, run_server, settings_of_gated

from semid_client import Client


@pytest.fixture(scope="session", name="run_server")
def run_server_fixture():
    """Return the context manager that runs a server, for servers that several tests share."""
    return run_server


@pytest.fixture
def serve(tmp_path):
    """Start servers that the test stops, or that are killed after it."""
    with contextlib.ExitStack() as stack:
        count = 0

        def start(checkpoint, *arguments, **settings):
            nonlocal count
            count += 1
            log = tmp_path / f"serve-{count}.log"
            return stack.enter_context(run_server(checkpoint, *arguments, log=log, **settings))

        yield start


@pytest.fixture
def serve_gated(serve, tmp_path):
    """Start a server whose encoder can be held; return it and its gate."""

    def start(checkpoint, *arguments):
        path = tmp_path / "gate"
        server = serve(checkpoint, *arguments, **settings_of_gated(path))
        return server, Gate(server, path)

    return start


@pytest.fixture(scope="session")
def forked_semid():
    """Return a function that runs `semid` as `subprocess.run` would, without the cost of a start.

    It returns the exit status, standard output and standard error.
    """
    program = [sys.executable, Path(__file__).with_name("forked_semid.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, **pipes) as process:

        def run(*arguments, env, cwd) -> tuple[int, str, str]:
            told, complained = cwd / "stdout", cwd / "stderr"
            command = {
                "arguments": list(map(str, arguments)),
                "env": env,
                "cwd": str(cwd),
                "stdout": str(told),
                "stderr": str(complained),
            }
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline()), told.read_text(), complained.read_text()

        try:
            yield run
        finally:
            process.kill()


@pytest.fixture
def refused(forked_semid, tmp_path):
    """Run `semid serve` that must refuse to start; return what it said, one sentence."""

    def run(*arguments, env=None) -> str:
        status, told, complained = forked_semid(
            "serve", "--host", "127.0.0.1", *arguments, env=ENVIRONMENT | (env or {}), cwd=tmp_path
        )
        assert status not in {0, -signal.SIGKILL, -signal.SIGSEGV}
        assert "Traceback" not in complained
        assert "semid: serving" not in told
        (sentence,) = (
            line.removeprefix("Error: ")
            for line in complained.splitlines()
            if line.startswith("Error: ")
        )
        return sentence

    return run


@pytest.fixture(scope="session")
def set_server(reference_set, tmp_path_factory):
    """A server of each reference set in turn, from its checkpoint as the original wrote it."""
    log = tmp_path_factory.mktemp(reference_set.name) / "serve.log"
    with run_server(reference_set.checkpoint, log=log) as server:
        yield server


@pytest.fixture(scope="session")
def digits_server(reference_dir, tmp_path_factory):
    """One server for all tests that leave it as they found it: RQ-KMeans, 64 -> 3 codes of 32."""
    log = tmp_path_factory.mktemp("digits") / "serve.log"
    with run_server(reference_dir / "digits_rkmeans/model.ckpt", log=log) as server:
        yield server
        assert server.process.poll() is None, f"the server died:\n{server.stderr()}"


@pytest.fixture
def client(digits_server):
    with Client(digits_server.target) as client:
        yield client


@pytest.fixture
def stub(digits_server):
    with digits_server.stub() as stub:
        yield stub


@pytest.fixture(scope="session")
def digits(reference_dir):
    embeddings = np.load(reference_dir / "data/digits.npy")
    embeddings.setflags(write=False)
    return embeddings


@pytest.fixture
def tensor_of():
    return float32_tensor


@pytest.fixture(scope="session")
def digits_channel(digits_server):
    """A raw channel that all examples of a property share."""
    with digits_server.channel() as channel:
        yield channel
