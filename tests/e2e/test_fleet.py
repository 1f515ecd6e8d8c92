"""Several servers behind one name: round robin, rolling restarts, deaths, newcomers, changes.

The name is resolved by a name server of the test's own, so that its addresses can change while
clients hold on to it, as they do behind a headless service.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from semid_client import Client, DeadlineExceededError

if TYPE_CHECKING:
    from collections.abc import Callable

LOADER = Path(__file__).with_name("fleet_load.py")
NAME = "fleet.semid.test"
A_RECORD = 1


class NameServer:
    """Answers questions about one name, over UDP (RFC 1035)."""

    def __init__(self) -> None:
        self.addresses: tuple[str, ...] = ()
        self.asked = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            question, sender = self._socket.recvfrom(512)
            if not question:
                return
            end = 12
            while question[end]:  # the labels of the name
                end += question[end] + 1
            (kind,) = struct.unpack(">H", question[end + 1 : end + 3])
            self.asked += kind == A_RECORD
            addresses = self.addresses if kind == A_RECORD else ()
            header = question[:2] + struct.pack(">5H", 0x8180, 1, len(addresses), 0, 0)
            records = [
                struct.pack(">3HIH", 0xC00C, A_RECORD, 1, 0, 4) + socket.inet_aton(address)
                for address in addresses
            ]
            self._socket.sendto(header + question[12 : end + 5] + b"".join(records), sender)

    def close(self) -> None:
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()


@dataclass
class Fleet:
    """Servers on addresses from 127.0.0.2 on, all on one port, behind one name."""

    names: NameServer
    start: Callable[..., Any]
    checkpoint: Path
    port: int
    servers: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        return f"dns://127.0.0.1:{self.names.port}/{NAME}:{self.port}"

    def add(self, *hosts: str) -> None:
        """Start servers side by side; the name knows them once all are ready."""
        started = {
            host: self.start(
                self.checkpoint,
                *("--host", host, "--port", self.port),
                *("--max-batch-rows", 40, "--threads", 1, "--max-connection-age", 5),
                wait=False,
            )
            for host in hosts
        }
        for server in started.values():
            server.metrics = server.wait_for("semid: metrics on ")
            server.target = server.wait_for("semid: serving ")
        self.servers |= started
        self.names.addresses = tuple(self.servers)

    def remove(self, host: str) -> Any:
        """Take a server off the name, and return it."""
        server = self.servers.pop(host)
        self.names.addresses = tuple(self.servers)
        return server

    def rows(self, host: str) -> float:
        """Rows that one server has encoded."""
        return self.servers[host].metric("semid_rows_total", operation="encode")

    def wait_for_rows(self, host: str) -> None:
        """Wait until clients have found a server."""
        while self.rows(host) == 0:
            assert self.servers[host].process.poll() is None
            time.sleep(0.1)  # the server tells nobody, and a scrape takes its time too


HOSTS = tuple(f"127.0.0.{last}" for last in range(2, 8))


@pytest.fixture
def fleet(serve, lasting_port, reference_dir):
    names = NameServer()
    yield Fleet(names, serve, reference_dir / "digits_rkmeans/model.ckpt", lasting_port(*HOSTS))
    names.close()


@dataclass
class Load:
    """A process of `fleet_load.py` that calls until it is told to stop."""

    process: subprocess.Popen[str]

    def finish(self) -> dict:
        """Have it stop; return its account."""
        said, _ = self.process.communicate("stop\n", timeout=300)
        assert self.process.returncode == 0
        return json.loads(said.splitlines()[-1])


@pytest.fixture
def load(tmp_path):
    """Start processes that call all the time, each with one kind of client, and wait for calls."""
    with contextlib.ExitStack() as stack:

        def start(kind: str, target: str, **settings) -> Load:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, LOADER, kind, target, json.dumps(settings)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={k: v for k, v in os.environ.items() if not k.startswith("SEMID_")},
                )
            )
            stack.callback(process.kill)
            assert process.stdout.readline() == "calling\n"
            return Load(process)

        yield start


KINDS = ("Client", "AsyncClient", "encode_into", "EncodeStream")


def settle(loads: dict[str, Load]) -> dict[str, dict]:
    """End all load; nothing may have failed, nor be wrong, nor lost."""
    accounts = {kind: load.finish() for kind, load in loads.items()}
    for kind, account in accounts.items():
        assert account["errors"] == [], kind
        assert account["wrong"] == 0, kind
    return accounts


@pytest.mark.slow  # three servers, one after another
def test_a_rolling_restart_of_three_servers_behind_one_name_fails_no_call(fleet, load):
    three = HOSTS[:3]
    fleet.add(*three)
    loads = {kind: load(kind, fleet.target) for kind in KINDS}
    for host in three:
        assert fleet.remove(host).stop() == 0
        fleet.add(host)
    for host in three:
        fleet.wait_for_rows(host)
    accounts = settle(loads)
    assert accounts["EncodeStream"]["resumed"] > 0


@pytest.mark.slow
def test_a_server_that_is_killed_fails_no_call_and_one_that_was_added_is_found(fleet, load):
    fleet.add(*HOSTS[:2])
    loads = {kind: load(kind, fleet.target) for kind in KINDS}
    fleet.add(HOSTS[2])
    fleet.remove(HOSTS[0]).signal(signal.SIGKILL)
    fleet.wait_for_rows(HOSTS[2])
    settle(loads)


@pytest.mark.slow
def test_a_fleet_whose_every_server_moves_to_another_address_fails_no_call(fleet, load):
    fleet.add(*HOSTS[:3])
    loads = {kind: load(kind, fleet.target) for kind in KINDS}
    for old, new in zip(HOSTS[:3], HOSTS[3:], strict=True):
        fleet.add(new)
        assert fleet.remove(old).stop() == 0
    for host in HOSTS[3:]:
        fleet.wait_for_rows(host)
    settle(loads)


@pytest.mark.slow
def test_a_server_that_hangs_is_left_in_the_end(fleet):
    fleet.add(*HOSTS[:2])
    with Client(fleet.target, timeout=5.0) as client:
        while not all(fleet.rows(host) for host in HOSTS[:2]):
            client.encode(np.ones((1, 64), np.float32), timeout=60.0)
        fleet.servers[HOSTS[0]].signal(signal.SIGSTOP)
        streak, failed = 0, 0
        while streak < 20:
            try:
                client.encode(np.ones((1, 64), np.float32))
                streak += 1
            except DeadlineExceededError:
                streak, failed = 0, failed + 1
        assert failed > 0
    fleet.servers[HOSTS[0]].signal(signal.SIGCONT)
