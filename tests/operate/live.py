"""A small fleet under load, and a real Prometheus that watches it with the project's own files.

Shared by the tests of this folder and by `render_dashboard.py`. Everything listens on the loopback,
on ports that the system chose, and ends with the `with` block that started it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import yaml

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub
from semid_client import Client, SemidClientError

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
SEMID = Path(sys.executable).with_name("semid")
CHECKPOINT = ROOT / "checkpoints/movies"
MOVIES = ROOT / "tests/reference/data/movies.npy"

PATIENCE = 300.0
DAY = 86_400

# Settings of whoever runs this are not the server's.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SEMID_")}


@contextlib.contextmanager
def process(command, *, log: Path, **settings):
    """Run a program whose stdout and stderr go to a file; it is gone afterwards."""
    with (
        log.open("w") as file,
        subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, **settings
        ) as running,
    ):
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                running.kill()


def found_in(log: Path, pattern: str, running: subprocess.Popen[Any]) -> str:
    """Wait for a line in a program's log, and return what the pattern's group matched."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if match := re.search(pattern, log.read_text()):
            return match[1]
        if running.poll() is not None:
            break
        time.sleep(0.02)
    raise AssertionError(f"no line {pattern!r} of {running.args}:\n{log.read_text()}")


@dataclass(frozen=True)
class Replica:
    """Where a server of the fleet can be reached."""

    target: str
    metrics: str

    def scrape(self) -> str:
        """Return its page of metrics."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=60) as page:
            return page.read().decode()


@contextlib.contextmanager
def fleet(folder: Path):
    """Two replicas of one model: `semid serve`, and the one with a stand-in for a GPU."""
    commands = (
        [
            *(SEMID, "serve", "--checkpoint", CHECKPOINT, "--host", "127.0.0.1", "--port", 0),
            *("--metrics-port", 0, "--device", "cpu", "--threads", 1),
            *("--verify-fraction", 0.05, "--max-queue-requests", 4),
        ],
        [sys.executable, ROOT / "tests/operate/replica_with_device.py", CHECKPOINT],
    )
    with contextlib.ExitStack() as stack:
        logs = [folder / f"replica-{number}.log" for number in range(len(commands))]
        running = [
            stack.enter_context(process(command, log=log, env=ENVIRONMENT, cwd=folder))
            for command, log in zip(commands, logs, strict=True)
        ]
        yield [
            Replica(
                target=found_in(log, r"semid: serving \S+ on (\S+)\n", program),
                metrics=found_in(log, r"semid: metrics on (\S+)\n", program),
            )
            for log, program in zip(logs, running, strict=True)
        ]


def mistakes(movies) -> list[tuple[pb.EncodeRequest, float]]:
    """Return requests that must fail, with the timeout of each: one for most of the codes."""

    def request(rows, **fields) -> pb.EncodeRequest:
        tensor = pb.Tensor(
            dtype=pb.DATA_TYPE_FLOAT32, shape=rows.shape, data=rows.astype("<f4").tobytes()
        )
        return pb.EncodeRequest(tensor=tensor, **fields)

    return [
        (request(np.full_like(movies[:2], np.nan)), 5.0),
        (request(movies[:2, :-1]), 5.0),
        (request(movies[:2], model="nobody"), 5.0),
        (request(movies[:2], expected_fingerprint="0" * 64), 5.0),
        (request(movies[:2000]), 0.003),
    ]


@contextlib.contextmanager
def load(replicas):
    """Keep the replicas busy: encoding and decoding, alone and together, and with mistakes."""
    movies = np.load(MOVIES)
    ended = threading.Event()

    def call(target: str, seed: int, pause: float, most: int) -> None:
        rng = np.random.default_rng(seed)
        with Client(target, timeout=10) as client:
            while not ended.wait(rng.exponential(pause)):
                rows = movies[rng.integers(0, len(movies), rng.integers(1, most))]
                with contextlib.suppress(SemidClientError):  # refused: the queue is short
                    client.decode(client.encode(rows))

    def err(target: str, pause: float) -> None:
        with grpc.insecure_channel(target) as channel:
            stub = SemanticIdServiceStub(channel)
            for request, timeout in itertools.cycle(mistakes(movies)):
                if ended.wait(pause):
                    return
                with contextlib.suppress(grpc.RpcError):
                    stub.Encode(request, timeout=timeout)

    callers = [
        threading.Thread(
            target=call,
            args=(replica.target, 7 * number + caller, pause, most),
            daemon=True,
        )
        for number, replica in enumerate(replicas)
        for caller, (pause, most) in enumerate([(0.1, 64), (0.05, 4), (0.2, 512), (0.02, 2)])
    ]
    callers += [
        threading.Thread(target=err, args=(replica.target, 0.1), daemon=True)
        for replica in replicas
    ]
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        ended.set()
        for caller in callers:
            caller.join(PATIENCE)


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    address: str

    def get(self, path: str, **parameters: Any) -> Any:
        """Return the data of an answer of its HTTP interface."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(
            f"http://{self.address}/api/v1/{path}?{query}", timeout=60
        ) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[float]:
        """Return the finite values of an expression now."""
        result = self.get("query", query=expression)["result"]
        values = [float(sample["value"][1]) for sample in result]
        return [value for value in values if math.isfinite(value)]

    def silent(self, expressions: list[str]) -> list[str]:
        """Wait until each of these expressions had a value; return those that never had.

        One is asked for again, since a second in which a machine did other things has no figures.
        """
        until = time.monotonic() + PATIENCE
        while waiting := [one for one in expressions if not self.values(one)]:
            if time.monotonic() > until:
                break
            expressions = waiting
            time.sleep(0.2)
        return waiting


def configuration(replicas) -> dict[str, Any]:
    """Return the project's configuration, with these replicas for a name, in a hurry."""
    config = yaml.safe_load((DOCKER / "prometheus/prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DOCKER / "prometheus" / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [replica.metrics for replica in replicas]}]
    return config


def write_past(replicas, folder: Path, promtool: str) -> None:
    """Give Prometheus the two days that rules of drift look back on: as if all had been as now."""
    page = replicas[0].scrape()
    name, fingerprint = re.search(
        r'semid_model_info\{.*?fingerprint="(\w+)".*?model="([^"]+)"', page
    ).group(2, 1)
    layers = int(re.search(r'semid_model_info\{.*?layers="(\d+)"', page)[1])
    now = int(time.time())
    lines = []
    for record, value in (("quantization_error_ratio", 0.5), ("code_perplexity", 50)):
        lines.append(f"# TYPE semid:{record}:avg gauge")
        for layer in range(layers):
            labels = f'job="semid",model="{name}",fingerprint="{fingerprint}",layer="{layer}"'
            lines += [
                f"semid:{record}:avg{{{labels}}} {value} {stamp}"
                for stamp in range(now - 2 * DAY, now - DAY + 600, 600)
            ]
    past = folder / "past.om"
    past.write_text("\n".join([*lines, "# EOF\n"]))
    subprocess.run(
        [promtool, "tsdb", "create-blocks-from", "openmetrics", past, folder / "data"],
        check=True,
        capture_output=True,
    )


@contextlib.contextmanager
def prometheus(replicas, folder: Path):
    """Run Debian's Prometheus over the replicas, with the project's rules."""
    program, promtool = map(shutil.which, ("prometheus", "promtool"))
    assert program, "no prometheus on the PATH"
    assert promtool, "no promtool on the PATH"
    write_past(replicas, folder, promtool)
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration(replicas)))
    log = folder / "prometheus.log"
    command = [
        *(program, f"--config.file={folder / 'prometheus.yaml'}"),
        *(f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0"),
    ]
    with process(command, log=log, cwd=folder) as running:
        address = found_in(log, r'msg="Listening on" address=(127\.\S+)', running)
        found_in(log, r'(msg="Server is ready to receive web requests\.")', running)
        yield Prometheus(address)


@contextlib.contextmanager
def watched_fleet(folder: Path):
    """Run all of it: yields the Prometheus and the replicas, once every rule has figures."""
    with fleet(folder) as replicas, load(replicas), prometheus(replicas, folder) as watcher:
        everyone = f'count(up{{job="semid"}} == 1) == {len(replicas)}'
        assert not watcher.silent([everyone, "semid:code_perplexity:avg offset 3s"])
        yield watcher, replicas


def queries(dashboard, *, rate_interval: str) -> list[tuple[str, str, str]]:
    """Return panel, legend and expression of each query, with its variables replaced by values."""
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            for operation in ("encode", "decode"):
                expression = filled(
                    target["expr"], rate_interval=rate_interval, operation=operation
                )
                if operation == "encode" or "$operation" in target["expr"]:
                    found.append((panel["title"], target["legendFormat"], expression))
    return found


def filled(text: str, *, rate_interval: str, operation: str) -> str:
    """Put values in the places of the dashboard's variables, as Grafana does."""
    for name, value in {
        "$__rate_interval": rate_interval,
        "$instance": ".+",
        "$model": ".+",
        "$operation": operation,
    }.items():
        text = text.replace(name, value)
    assert "$" not in text, f"a variable without a value in {text}"
    return text
