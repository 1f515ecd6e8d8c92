"""A real `semid serve` in a process of its own, and what tests say to it.

For tests of any folder; those of this one have it as fixtures too.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import grpc
import numpy as np
import pytest
from waiting import wait_until

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub

SEMID = Path(sys.executable).with_name("semid")
# Where nothing is wrong, seconds; but a first start compiles, and a machine may do other things.
START_SECONDS = 300.0
STOP_SECONDS = 300.0

# Settings of whoever runs the tests are not the server's.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SEMID_")}


@dataclass(eq=False)
class Server:
    """One running server process and where it can be reached."""

    process: subprocess.Popen[str]
    log: IO[str]
    said: list[str] = field(default_factory=list)
    target: str = ""
    metrics: str = ""
    _lines: queue.Queue[str | None] = field(default_factory=queue.Queue)

    def wait_for(self, beginning: str) -> str:
        """Wait for a line on its stdout, and return what follows its last `` on ``."""
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no line {beginning!r} within {START_SECONDS} s:\n{self.stderr()}")
            if line is None:
                pytest.fail(f"the server ended before {beginning!r}:\n{self.stderr()}")
            self.said.append(line)
            if line.startswith(beginning):
                return line.rpartition(" on ")[2]

    def has_said(self, beginning: str) -> bool:
        """Whether there is a line on its stdout, not waited for yet; it and those before are."""
        with contextlib.suppress(queue.Empty):
            while (line := self._lines.get_nowait()) is not None:
                self.said.append(line)
                if line.startswith(beginning):
                    return True
        return False

    def read_stdout(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def stderr(self) -> str:
        # Not through the open file: the server writes where that is read.
        return Path(self.log.name).read_text()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        return self.process.wait(seconds)

    def stop(self) -> int:
        """Stop it as an operator does, and return its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def scrape(self) -> str:
        host, _, port = self.metrics.rpartition(":")
        with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)) as http_:
            http_.request("GET", "/metrics")
            return http_.getresponse().read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of one name whose labels include those given."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        samples = [
            line.rpartition(" ")
            for line in self.scrape().splitlines()
            if line.startswith((f"{name} ", f"{name}{{")) and all(part in line for part in wanted)
        ]
        assert samples, f"no sample of {name} with {labels}"
        return sum(float(value) for _, _, value in samples)

    @contextlib.contextmanager
    def channel(self):
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(self.target, options) as channel:
            yield channel

    @contextlib.contextmanager
    def stub(self):
        with self.channel() as channel:
            yield SemanticIdServiceStub(channel)


@contextlib.contextmanager
def run_server(
    checkpoint, *arguments, log: Path, env=None, wait=True, program=(SEMID, "serve"), stderr=None
):
    """Start `semid serve` on free ports of the loopback; kill it afterwards if it still runs.

    Its standard error goes to the file ``log``, or to ``stderr`` if that is given.
    """
    command = [*program, "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    if checkpoint is not None:
        command += ["--checkpoint", checkpoint]
    with (
        log.open("w+") as file,
        subprocess.Popen(
            list(map(str, [*command, *arguments])),
            stdout=subprocess.PIPE,
            stderr=file if stderr is None else stderr,
            text=True,
            env=ENVIRONMENT | (env or {}),
            cwd=log.parent,
        ) as process,
    ):
        server = Server(process, file)
        reader = threading.Thread(target=server.read_stdout, daemon=True)
        reader.start()
        try:
            if wait:
                server.metrics = server.wait_for("semid: metrics on ")
                server.target = server.wait_for("semid: serving ")
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            reader.join()


FAULTY = Path(__file__).with_name("faulty_serve.py")
HOLD = 1001.0
"""What has its encoder wait, as the first number of a row."""


def settings_of_gated(path: Path) -> dict[str, Any]:
    """Return what `run_server` needs for a server whose encoder waits behind a new gate there."""
    os.mkfifo(path)
    return {"program": (sys.executable, FAULTY), "env": {"SEMID_TEST_GATE": str(path)}}


@dataclass(frozen=True)
class Gate:
    """What the encoder of a server waits behind."""

    server: Server
    path: Path

    def hold(self, stub, width: int) -> grpc.Future:
        """Make a call whose batch waits, with all that comes after it, until it is let go."""
        row = np.zeros((1, width), np.float32)
        row[0, 0] = HOLD
        call = stub.Encode.future(pb.EncodeRequest(tensor=float32_tensor(row)))
        self.server.wait_for("held")
        return call

    def wait_for_queue(self, requests: int) -> None:
        """Wait until so many requests are queued."""
        wait_until(lambda: self.server.metric("semid_queue_requests") == requests)

    def wait_for_drain(self) -> None:
        """Wait until the server has said that it stops."""
        wait_until(lambda: self.server.metric("semid_serving") == 0)

    def release(self) -> None:
        with self.path.open("w"):
            pass


def float32_tensor(rows: np.ndarray) -> pb.Tensor:
    """The message of a float32 matrix, written by hand: independent of the client."""
    return pb.Tensor(
        dtype=pb.DATA_TYPE_FLOAT32, shape=rows.shape, data=rows.astype("<f4").tobytes()
    )
