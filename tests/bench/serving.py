"""Benchmark of serving: what semid adds to gRPC, beside its limit and its peers, in one run.

    python tests/bench/serving.py                     # minutes
    python tests/bench/serving.py --quick             # under a minute: does it all still run?
    python tests/bench/serving.py --only tracing      # what spans cost; a minute
    python tests/bench/serving.py --device cuda       # semid's servers encode on a GPU
    python tests/bench/serving.py --triton PATH/python  # an interpreter with nvidia-pytriton

Everything runs on this machine, servers and clients in processes of their own, over loopback. The
rows are explained where they are printed. Ratios are of medians over rounds in which the servers
took turns, so that what else the machine does falls on all of them alike. See `serving_load.py`
for how load is made and latency counted, `serving_servers.py` for what stands beside semid.

semid need not be installed: with proto, server and client on PYTHONPATH, a checkout is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from encode_cases import random_model
from serving_load import Load

from semid.v1 import semid_pb2 as pb
from semid_server.checkpoint import save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TextIO

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MOVIES = ROOT / "checkpoints" / "movies"
SERVE = (sys.executable, "-c", "from semid_server.cli.serve import serve; serve()")
"""`semid serve` of what this interpreter imports: an installed command may be of another place."""

ENCODE = "/semid.v1.SemanticIdService/Encode"
GET_MODEL = "/semid.v1.SemanticIdService/GetModel"
TRITON = "/inference.GRPCInferenceService/ModelInfer"
TRITONS = {"triton": "predict_step", "triton+enc": "encoder", "bare triton": "nothing"}
"""What Triton runs for the codes: the model as it is, semid's encoder, or nothing."""

PROCESSORS = len(os.sched_getaffinity(0))
KIB, MIB = 1 << 10, 1 << 20
MAX_MESSAGE = 32 * MIB
DIM = 2048
ROW_BYTES = 4 * DIM

ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "67108864",
}
"""What every process starts with, but `semid serve`: that is to find its way itself."""

PLAIN = {
    name: value for name, value in os.environ.items() if not name.startswith(("SEMID_", "MALLOC_"))
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long, how often, on what device semid encodes, and which peers are left out."""

    sizes: tuple[int, ...] = (64 * KIB, MIB, 4 * MIB, 16 * MIB)
    in_flight: tuple[int, ...] = (1, 8)
    rounds: int = 3
    spells: int = 5  # parts into which a round of messages up to 1 MiB is cut
    seconds: float = 1.5
    device: str = "cpu"
    without: tuple[str, ...] = ()
    overload: tuple[float, ...] = (1.0, 2.0, 10.0)


YIELDING = 19
"""By how much clients lower their priority where the processors should be the server's."""

QUICK = Plan(
    sizes=(64 * KIB, MIB), in_flight=(8,), rounds=1, spells=1, seconds=0.3, overload=(1.0, 10.0)
)


# -- servers and clients -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server process, and how to talk to it."""

    name: str
    process: subprocess.Popen
    ready: str
    method: str = ENCODE
    bodies: str = "semid"

    @cached_property
    def target(self) -> str:
        """Its address, once it has said that it serves: servers so start side by side."""
        for line in self.process.stdout:
            if line.startswith(self.ready):
                return line.split()[-1]
        sys.exit(f"{self.name} did not start; its last words are above")

    def rss(self) -> int:
        """Bytes resident, of the process and its children."""
        return sum(int(_stat(pid)[21]) for pid in self._pids()) * os.sysconf("SC_PAGE_SIZE")

    def cpu(self) -> float:
        """Seconds of processor time so far, of the process and its children."""
        ticks = sum(int(tick) for pid in self._pids() for tick in _stat(pid)[11:13])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _pids(self) -> list[int]:
        pids = [self.process.pid]
        for pid in pids:  # grows as it goes: children of children too
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        return pids


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on, state: the second may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


@contextlib.contextmanager
def started(
    name: str, command: list[object], *, ready: str, env: dict[str, str], **fields: str
) -> Iterator[Server]:
    """Start a server that will print a line beginning with ``ready``, and end it afterwards."""
    with subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if name in TRITONS else None,  # it logs every step
        text=True,
        env=env,
    ) as process:
        try:
            yield Server(name=name, process=process, ready=ready, **fields)
        finally:
            process.stdin.close()  # on which the servers of the benchmark end
            if ready != "ready":
                process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def semid(
    name: str,
    checkpoint: Path,
    *flags: object,
    device: str,
    env: dict[str, str] | None = None,
) -> contextlib.AbstractContextManager[Server]:
    command = [*SERVE, "--checkpoint", checkpoint, "--host", "127.0.0.1", "--port", 0]
    command += ["--metrics-port", 0, "--max-message-bytes", MAX_MESSAGE, "--log-level", "warning"]
    command += ["--device", device]
    return started(name, [*command, *flags], ready="semid: serving", env=PLAIN | (env or {}))


def beside(
    name: str, kind: str, *arguments: object, env: dict[str, str] | None = None
) -> contextlib.AbstractContextManager[Server]:
    command = [sys.executable, HERE / "serving_servers.py", kind, *arguments]
    return started(name, command, ready="ready", env=PLAIN | ALLOCATOR | (env or {}))


def triton(
    name: str,
    python: Path,
    checkpoint: Path,
    requests: Path,
    rows: list[int],
    *,
    port: int,
) -> contextlib.AbstractContextManager[Server]:
    packages = sysconfig.get_path("purelib")
    command = [python, HERE / "serving_triton.py", packages, checkpoint, requests, port]
    command += [TRITONS[name], *rows]
    libraries = {"LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))}
    environment = PLAIN | ALLOCATOR | libraries
    return started(name, command, ready="ready", env=environment, method=TRITON, bodies="triton")


@dataclass(frozen=True)
class Result:
    """What the clients of one load saw."""

    seconds: float
    answers: list[tuple[int, str, int, int]]
    lag: float
    cpu: float

    def latencies(self, status: str | None = "OK", call: int | None = None) -> np.ndarray:
        """Milliseconds of the answers of one status (None: any that is not OK) and one call."""
        return np.array(
            [
                microseconds / 1000
                for index, answered, microseconds, _ in self.answers
                if (answered == status if status else answered != "OK") and call in (None, index)
            ]
        )

    @property
    def rate(self) -> float:
        """Requests answered OK a second."""
        return len(self.latencies()) / self.seconds

    def rate_between(self, begin: float, end: float) -> float:
        """Requests answered OK a second, between two times since the load began."""
        answered = [
            at for _, status, _, at in self.answers if status == "OK" and begin <= at / 1e6 < end
        ]
        return len(answered) / (end - begin)

    def statuses(self) -> str:
        names = [status for _, status, _, _ in self.answers]
        return ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names)))


def together(results: list[Result]) -> Result:
    """Several loads as one; times since the load began stay those of each."""
    return Result(
        sum(result.seconds for result in results),
        [answer for result in results for answer in result.answers],
        max(result.lag for result in results),
        sum(result.cpu for result in results),
    )


@dataclass(frozen=True)
class Running:
    """Client processes under way."""

    processes: list[subprocess.Popen]
    begin: float

    def finish(self) -> Result:
        results = [json.loads(process.stdout.readline()) for process in self.processes]
        for process in self.processes:
            process.stdin.close()
            process.wait(20)
            process.stdout.close()
        return Result(
            max(result["seconds"] for result in results),
            [tuple(answer) for result in results for answer in result["answers"]],
            max(result["lag"] for result in results),
            sum(result["cpu"] for result in results),
        )


def begin(load: Load, clients: int = 1) -> Running:
    """Start client processes that share the rate of a load, and let them go at one moment."""
    return release(ready(load, clients), time.monotonic() + 0.05)


def ready(load: Load, clients: int = 1) -> list[subprocess.Popen]:
    """Start client processes that wait to be released."""
    if load.rate is not None:
        load = replace(load, rate=load.rate / clients)
    processes = []
    for _ in range(clients):
        process = subprocess.Popen(
            [sys.executable, HERE / "serving_load.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=PLAIN | ALLOCATOR,
        )
        process.stdin.write(json.dumps(asdict(load)) + "\n")
        process.stdin.flush()
        processes.append(process)
    for process in processes:
        if process.stdout.readline() != "ready\n":
            sys.exit(f"a client of {load.target} did not start")
    return processes


def release(processes: list[subprocess.Popen], at: float) -> Running:
    """Have clients that are ready begin at a time of the monotonic clock."""
    for process in processes:
        process.stdin.write(f"{at}\n")
        process.stdin.flush()
    return Running(processes, at)


def send(load: Load, clients: int = 1) -> Result:
    return begin(load, clients).finish()


def percentiles(milliseconds: np.ndarray) -> str:
    if not len(milliseconds):
        return "none"
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return f"p50 {p50:8.2f} ms   p99 {p99:8.2f} ms"


# -- what is measured ----------------------------------------------------------------------------


class Bench:
    """All measurements of one run; figures are kept by name for `--json`."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        triton_python: Path | None,
        servers: contextlib.ExitStack,
    ) -> None:
        self.plan, self.folder, self.triton_python = plan, folder, triton_python
        self._servers = servers
        self.figures: dict[str, float] = {}
        self.made = make_checkpoint(folder / "made", DIM, 256)
        self.slow = make_checkpoint(folder / "slow", 384, 4096)
        rng = np.random.default_rng(0)
        for size in plan.sizes:
            self._write(f"semid-{size // ROW_BYTES}", rng, size // ROW_BYTES, DIM)
        self._write("one-384", rng, 1, 384)
        self._write("one-2048", rng, 1, DIM)
        self._write("some-384", rng, 16, 384)
        self._write("bulk-384", rng, 8192, 384)
        (folder / "empty").write_bytes(pb.GetModelRequest().SerializeToString())

    def _write(self, name: str, rng: np.random.Generator, rows: int, dim: int) -> None:
        values = rng.standard_normal((rows, dim), dtype=np.float32)
        tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes())
        (self.folder / name).write_bytes(pb.EncodeRequest(tensor=tensor).SerializeToString())

    # Servers start when they are first named, and end with the run; idle ones take no time.

    def _semid(self, name: str, checkpoint: Path, *flags: object, **settings: Any) -> Server:
        server = semid(name, checkpoint, *flags, **{"device": self.plan.device} | settings)
        return self._servers.enter_context(server)

    def _beside(self, name: str, *arguments: object) -> list[Server]:
        if name in self.plan.without:
            return []
        return [self._servers.enter_context(beside(name, name, *arguments))]

    def _tritons(
        self, checkpoint: Path, rows: list[int], names: Iterable[str], *, port: int
    ) -> list[Server]:
        """Servers behind Triton, each with three ports from ``port`` on."""
        return [
            self._servers.enter_context(
                triton(name, self.triton_python, checkpoint, self.folder, rows, port=at)
            )
            for at, name in zip(range(port, 1 << 16, 3), names, strict=False)
        ]

    @cached_property
    def echo(self) -> Server:
        return self._servers.enter_context(beside("echo", "echo"))

    @cached_property
    def on_made(self) -> list[Server]:
        """What serves the made checkpoint, the limit first."""
        found = [
            self.echo,
            self._servers.enter_context(beside("plain", "plain")),
            self._servers.enter_context(beside("instant", "instant", self.made)),
            self._semid("semid", self.made),
            *self._beside("unbatched", self.made),
        ]
        if self.triton_python:
            rows = [size // ROW_BYTES for size in self.plan.sizes]
            found += self._tritons(self.made, rows, TRITONS, port=18101)
        return found

    @cached_property
    def on_movies(self) -> list[Server]:
        """What serves the movies, the limit first, then semid."""
        found = [
            self.echo,
            self._semid("semid", MOVIES),
            *self._beside("unbatched", MOVIES),
        ]
        if self.triton_python:
            found += self._tritons(MOVIES, [1], ("triton", "triton+enc"), port=18121)
        return found

    @cached_property
    def on_slow(self) -> list[Server]:
        """Servers whose device is slow, with a short queue: by computing, and by waiting."""
        flags = ["--reference", "--threads", 1, "--max-queue-requests", 16]
        computes = self._semid("semid", self.slow, *flags, device="cpu")
        return [computes, *self._beside("asleep", self.slow)]

    @cached_property
    def on_processes(self) -> list[Server]:
        """One process, two, and four, as far as there are processors."""
        return [
            self._semid(f"{count}", self.made, "--processes", count)
            for count in (1, 2, 4)
            if count <= PROCESSORS
        ]

    @cached_property
    def on_tracing(self) -> list[Server]:
        """The movies without spans, with those of one call in 100, and with all."""
        collector = self._servers.enter_context(beside("collector", "collector"))
        export = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.target}"}
        some = {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.01"}
        return [
            self._semid("off", MOVIES),
            self._semid("1 in 100", MOVIES, "--tracing", env=export | some),
            self._semid("every call", MOVIES, "--tracing", env=export),
        ]

    def load(self, server: Server, body: str, **settings: float) -> Load:
        call = (server.method, str(self.folder / body))
        return Load(target=server.target, calls=[call], **{"seconds": self.plan.seconds} | settings)

    def keep(self, name: str, value: float) -> float:
        self.figures[name] = round(float(value), 4)
        return value

    @property
    def _encodes(self) -> str:
        if self.plan.device == "cpu":
            return "the CPU encodes, on the cores that gRPC and the client need too"
        return f"{self.plan.device} encodes"

    def throughput(self) -> None:
        """Bytes of embeddings answered a second, by the size of a message."""
        title(f"Encode, MB/s of embeddings, {DIM} x 256 x 3, closed loop of one client process")
        print(
            "echo: asyncio grpcio on uvloop, as semid, the same messages, no work; plain: the\n"
            "same on Python's own event loop. instant: semid, its device taking no time.\n"
            f"semid: {self._encodes}.\n"
            "unbatched: a thread pool around predict_step. triton: predict_step behind pytriton;\n"
            "triton+enc: semid's encoder there; bare triton: what takes no time, as in instant."
        )
        names = [server.name for server in self.on_made]
        print("\n     size    in flight    " + "".join(f"{name:>13}" for name in names), end="")
        print(
            "   instant/echo  instant/plain  semid/echo"
            + ("  semid/triton  semid/triton+enc  instant/bare triton" * bool(self.triton_python))
        )
        for size in self.plan.sizes:
            for in_flight in self.plan.in_flight:
                self._throughput_of(self.on_made, size, in_flight)

    def _throughput_of(self, servers: list[Server], size: int, in_flight: int) -> None:
        rates: dict[str, list[float]] = {server.name: [] for server in servers}
        costs: dict[str, list[tuple[float, float]]] = {server.name: [] for server in servers}
        # Where many fit into a moment, short spells: what else runs on the machine changes with it.
        spells = self.plan.spells if size <= MIB else 1
        seconds = self.plan.seconds / spells
        for _ in range(self.plan.rounds * spells):
            for server in servers:
                body = f"{server.bodies}-{size // ROW_BYTES}"
                # Without a warm-up, whose processor time could not be told apart.
                before = server.cpu()
                load = self.load(server, body, in_flight=in_flight, warmup=0, seconds=seconds)
                result = send(load)
                sent = len(result.answers) * size
                spent = server.cpu() - before, result.cpu
                costs[server.name].append(tuple(1000 * cpu / (sent / MIB) for cpu in spent))
                rates[server.name].append(result.rate * size / 1e6)
        found = {name: median(values) for name, values in rates.items()}
        for name, rate in found.items():
            self.keep(f"mb_per_s.{name}.{size}.{in_flight}", rate)
        line = f"  {size // KIB:6} K {in_flight:10}       "
        line += "".join(f"{rate:13.0f}" for rate in found.values())
        line += f"{found['instant'] / found['echo']:13.2f}{found['instant'] / found['plain']:15.2f}"
        line += f"{found['semid'] / found['echo']:12.2f}"
        if "triton" in found:
            line += f"{found['semid'] / found['triton']:14.2f}"
            line += f"{found['semid'] / found['triton+enc']:18.2f}"
            line += f"{found['instant'] / found['bare triton']:21.2f}"
        print(line)
        for place, side in enumerate(("server", "client")):
            line = f"     {side}, ms of CPU a MiB "
            for name, values in costs.items():
                spent = median(value[place] for value in values)
                self.keep(f"{side}_cpu_ms_per_mib.{name}.{size}.{in_flight}", spent)
                line += f"{spent:13.2f}"
            print(line, flush=True)

    def one_row(self) -> None:
        """Latency and rate of requests of one row."""
        title("One row, 384 x 64 x 3 (checkpoints/movies): latency when idle, and requests/s")
        print(
            "Idle: one in flight, Encode and an empty RPC (GetModel) in turn on one connection.\n"
            "Rate: closed loop, 2 client processes with 16 in flight each.\n"
        )
        servers = self.on_movies
        idle: dict[str, list[np.ndarray]] = {server.name: [] for server in servers}
        empty: dict[str, list[np.ndarray]] = {server.name: [] for server in servers}
        rates: dict[str, list[float]] = {server.name: [] for server in servers}
        for _ in range(self.plan.rounds):
            for server in servers:
                load = self.load(
                    server, f"{server.bodies}-1" if server.name in TRITONS else "one-384"
                )
                calls = [*load.calls]
                if server.name not in TRITONS:
                    calls.append((GET_MODEL, str(self.folder / "empty")))
                result = send(replace(load, calls=calls))
                idle[server.name].append(result.latencies(call=0))
                empty[server.name].append(result.latencies(call=1))
                rates[server.name].append(send(replace(load, in_flight=16), clients=2).rate)
        for server in servers:
            name = server.name
            latencies, without = np.concatenate(idle[name]), np.concatenate(empty[name])
            rate = self.keep(f"one_row.rate.{name}", median(rates[name]))
            line = f"  {name:10}{rate:7.0f} requests/s   Encode {percentiles(latencies)}"
            for percent in (50, 99):
                self.keep(f"one_row.p{percent}.{name}", np.percentile(latencies, percent))
            if len(without):
                beyond = [
                    self.keep(
                        f"one_row.beyond_empty.p{percent}.{name}",
                        np.percentile(latencies, percent) - np.percentile(without, percent),
                    )
                    for percent in (50, 99)
                ]
                line += f"   beyond an empty RPC: p50 {beyond[0]:+.2f} ms, p99 {beyond[1]:+.2f} ms"
            print(line, flush=True)

    def tracing(self) -> None:
        """What spans cost, where all calls are as small as can be."""
        title("semid serve --tracing, one row, 384 x 64 x 3: spans are exported to this machine")
        print(
            "Idle: one in flight. Rate and processor time: 2 client processes with 16 in flight\n"
            "each; the collector needs processors too.\n"
        )
        idle: dict[str, list[np.ndarray]] = {server.name: [] for server in self.on_tracing}
        rates: dict[str, list[float]] = {server.name: [] for server in self.on_tracing}
        costs: dict[str, list[float]] = {server.name: [] for server in self.on_tracing}
        for _ in range(self.plan.rounds):
            for server in self.on_tracing:
                load = self.load(server, "one-384")
                idle[server.name].append(send(load).latencies())
                before = server.cpu()
                result = send(replace(load, in_flight=16, warmup=0), clients=2)
                costs[server.name].append(1e6 * (server.cpu() - before) / len(result.answers))
                rates[server.name].append(result.rate)
        without = median(rates["off"])
        for name, found in rates.items():
            rate = self.keep(f"tracing.rate.{name}", median(found))
            cost = self.keep(f"tracing.cpu_us_per_call.{name}", median(costs[name]))
            latencies = np.concatenate(idle[name])
            for percent in (50, 99):
                self.keep(f"tracing.p{percent}.{name}", np.percentile(latencies, percent))
            print(
                f"  {name:10}{rate:7.0f} requests/s ({rate / without:4.2f} of off)   "
                f"{cost:5.0f} us of CPU a call   Encode {percentiles(latencies)}",
                flush=True,
            )

    def processes(self) -> None:
        """What more processes bring: to large messages, and to single rows."""
        clients = max(4, min(12, PROCESSORS - 4))
        title(
            f"semid serve --processes N, {DIM} x 256 x 3, {clients} client processes with 8 in "
            "flight each"
        )
        print(
            "The clients need processors as well: with 2 in all, more processes bring little.\n"
            "The kernel divides the connections by chance, one a client, not evenly.\n"
        )
        for server in self.on_processes:
            bulk = self.load(server, f"semid-{MIB // ROW_BYTES}", in_flight=8)
            one = self.load(server, "one-2048", in_flight=8)
            rate = self.keep(
                f"processes.mb_per_s.{server.name}",
                self._rate_of(bulk, clients) * MIB / 1e6,
            )
            rows = self.keep(f"processes.one_row.rate.{server.name}", self._rate_of(one, clients))
            print(
                f"  N = {server.name}: {rate:6.0f} MB/s at 1 MiB   {rows:6.0f} one-row requests/s",
                flush=True,
            )

    def _rate_of(self, load: Load, clients: int) -> float:
        return median(send(load, clients=clients).rate for _ in range(self.plan.rounds))

    def under_load(self) -> None:
        """Latency of one-row callers at a constant arrival rate, alone and beside a bulk caller."""
        title("One row at a constant rate of 200 requests/s (open loop), 384 x 64 x 3")
        print(
            "beside bulk: one more client keeps 8 requests of 8192 rows (12 MiB) under way;\n"
            "undivided: the same, on a server that does each of them in one batch; echo: the same\n"
            "on the echo, which computes nothing: what messages of 12 MiB do to small ones.\n"
        )
        whole = self._semid("whole", MOVIES, "--max-batch-seconds", 3600)
        echo, server = self.on_movies[:2]
        cases = {
            "alone": (server, False),
            "beside bulk": (server, True),
            "beside bulk, undivided": (whole, True),
            "beside bulk, echo": (echo, True),
        }
        results: dict[str, list[Result]] = {name: [] for name in cases}
        bulk_rows: dict[str, list[float]] = {name: [] for name in cases}
        seconds = 2 * self.plan.seconds
        for _ in range(self.plan.rounds):
            for name, (beside, busy) in cases.items():
                clients = ready(self.load(beside, "one-384", rate=200, seconds=seconds))
                if not busy:
                    results[name].append(release(clients, time.monotonic() + 0.05).finish())
                    continue
                bulk = begin(self.load(beside, "bulk-384", in_flight=8, seconds=1.5 * seconds))
                running = release(clients, bulk.begin + 0.25 * seconds)
                results[name].append(running.finish())
                bulk_rows[name].append(bulk.finish().rate * 8192)
        for name, rounds in results.items():
            answers = together(rounds)
            self.keep(f"under_load.p99.{name}", np.percentile(answers.latencies(), 99))
            line = f"  {name:24} {percentiles(answers.latencies())}   {answers.statuses()}"
            if bulk_rows[name]:
                rows = self.keep(f"under_load.bulk_rows.{name}", median(bulk_rows[name]))
                line += f"; the bulk caller: {rows:.0f} rows/s"
            print(line, flush=True)

    def overload(self) -> None:
        """Goodput beyond capacity, what a refusal costs the caller, and the way back."""
        title("Overload: 16 rows a request, 384 x 4096 x 3, open loop, a queue of 16 requests")
        print(
            "The float64 reference encodes (--reference, one thread): the device is too slow, not\n"
            "the wire. Capacity (closed loop, 16 in flight) is measured before each load; goodput\n"
            "is answers OK a second in the last four fifths of it. Medians (least to most) of the\n"
            "rounds; latencies, from when a request was due, are of all rounds.\n"
            "Recovery: from the load's end to the first answer as fast as when idle.\n"
            f"yielding: the clients at nice {YIELDING}, so that what they spend on being refused\n"
            "is taken from the device less, as if they were on machines of their own.\n"
            "elsewhere: the load goes to the echo, and semid's capacity is measured beside it:\n"
            "what clients and gRPC take from a device that need not refuse anybody.\n"
            "apart: a device that takes a millisecond a row and none of these processors.\n"
        )
        server, apart = self.on_slow
        load = self.load(server, "some-384", seconds=2 * self.plan.seconds)
        idle = float(np.percentile(send(load).latencies(), 99))
        most = self.plan.overload[-1]
        levels = {f"{times:g}x": (times, 0) for times in self.plan.overload}
        levels[f"{most:g}x, yielding"] = most, YIELDING
        capacities: list[float] = []
        loads: dict[str, list[Overloaded]] = {name: [] for name in levels}
        elsewhere: list[float] = []
        capacities_apart: list[float] = []
        load_apart = replace(load, target=apart.target)
        idle_apart = float(np.percentile(send(load_apart).latencies(), 99))
        loads[name_apart := f"{most:g}x, apart"] = []
        for _ in range(self.plan.rounds):
            for name, (times, nice) in levels.items():
                capacities.append(self._capacity(load))
                beyond = replace(load, rate=times * capacities[-1], nice=nice, warmup=0)
                loads[name].append(self._overloaded(server, beyond, capacities[-1], idle))
            capacities.append(self._capacity(load))
            beyond = replace(load, target=self.echo.target, rate=most * capacities[-1], warmup=0)
            running = begin(beyond, clients=2)
            elsewhere.append(self._capacity(load) / capacities[-1])
            running.finish()
            capacities_apart.append(capacity := self._capacity(load_apart))
            beyond = replace(load_apart, rate=most * capacity, warmup=0)
            loads[name_apart].append(self._overloaded(apart, beyond, capacity, idle_apart))
        self.keep("overload.capacity", median(capacities))
        print(f"  capacity {spread(capacities, '.1f')} requests/s; idle p99 {idle:.1f} ms")
        print(f"  apart    {spread(capacities_apart, '.1f')} requests/s; {idle_apart:.1f} ms")
        for name, rounds in loads.items():
            self._print_overload(name, rounds)
        self.keep(f"overload.{most:g}x, elsewhere.capacity_of_capacity", median(elsewhere))
        print(f"  {most:3g}x, elsewhere: capacity {spread(elsewhere)} of capacity")

    def _capacity(self, load: Load) -> float:
        """Requests a second that a closed loop gets, of 16 in flight."""
        return send(replace(load, in_flight=16)).rate_between(0.2 * load.seconds, load.seconds)

    def _overloaded(self, server: Server, load: Load, capacity: float, idle: float) -> Overloaded:
        before = most = server.rss()
        probing = ready(replace(load, rate=None, seconds=1.5, nice=0))
        running = begin(load, clients=2)
        probe = release(probing, running.begin + load.seconds)
        while time.monotonic() < running.begin + load.seconds:
            most = max(most, server.rss())
            time.sleep(0.05)
        result = running.finish()
        recovered = [
            at / 1e6
            for _, status, microseconds, at in probe.finish().answers
            if status == "OK" and microseconds / 1000 <= 1.5 * idle
        ]
        return Overloaded(
            goodput=result.rate_between(0.2 * load.seconds, load.seconds) / capacity,
            result=result,
            rss=(before, most),
            recovery=min(recovered, default=math.inf),
        )

    def _print_overload(self, name: str, rounds: list[Overloaded]) -> None:
        goodputs = [load.goodput for load in rounds]
        results = together([load.result for load in rounds])
        answered, refused = results.latencies(), results.latencies(None)
        before = rounds[0].rss[0] / MIB  # of all rounds: what one leaves behind is growth too
        most = max(load.rss[1] for load in rounds) / MIB
        recoveries = [load.recovery for load in rounds]
        self.keep(f"overload.{name}.goodput_of_capacity", median(goodputs))
        self.keep(f"overload.{name}.rss_growth_mib", most - before)
        self.keep(f"overload.{name}.recovery_s", median(recoveries))
        line = f"  {name:>4}: goodput {spread(goodputs)} of capacity"
        line += f"   answered {percentiles(answered)}"
        if len(refused):
            self.keep(f"overload.{name}.refusal_p99", np.percentile(refused, 99))
            line += f"   refused {percentiles(refused)}"
        line += f"   RSS {before:.0f} -> {most:.0f} MiB"
        print(f"{line}   recovery {spread(recoveries)} s")
        late = f"the client was at most {results.lag * 1000:.0f} ms late"
        print(f"        {results.statuses()}; {late}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Overloaded:
    """What one load beyond capacity showed: RSS before and at most, seconds to recover."""

    goodput: float
    result: Result
    rss: tuple[int, int]
    recovery: float


def spread(values: list[float], form: str = ".2f") -> str:
    """The median, the least and the most."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def make_checkpoint(folder: Path, dim: int, width: int) -> Path:
    """Save a model of three layers with centroids in random directions, the same every time."""
    torch.set_num_threads(1)
    model, spec = random_model(dim, [width] * 3)
    save_checkpoint(folder, model=model, spec=spec, name=folder.name)
    return folder


def title(text: str) -> None:
    print(f"\n== {text}")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def machine() -> None:
    models = [
        line.partition(": ")[2]
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    print(f"machine   {len(models)} x {models[0]}, {memory:.0f} GiB, {platform.platform()}")
    packages = ("semid", "grpcio", "protobuf", "numpy", "torch")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"versions  Python {platform.python_version()}, {versions}")
    print(f"load      {os.getloadavg()[0]:.2f} before the run (1 minute): what else ran counts in")


def gpu(device: str) -> None:
    if device != "cpu":
        print(f"device    {device}: {torch.cuda.get_device_name(device)}, for semid's servers")


SECTIONS = {
    "throughput": "on_made",
    "one_row": "on_movies",
    "under_load": "on_movies",
    "processes": "on_processes",
    "tracing": "on_tracing",
    "overload": "on_slow",
}
"""What can be measured, and the servers that it needs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short rounds: figures mean little")
    parser.add_argument("--triton", type=Path, help="interpreter that has nvidia-pytriton")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="these sections alone")
    parser.add_argument(
        "--device", default="cpu", help="where semid's servers encode: cpu (default), cuda, cuda:i"
    )
    parser.add_argument(
        "--without", choices=["unbatched"], action="append", default=[], help="leave this peer out"
    )
    parser.add_argument("--rounds", type=int, help="repetitions of each figure")
    parser.add_argument("--seconds", type=float, help="seconds of each load")
    parser.add_argument("--json", type=Path, help="write all figures to this file too")
    parser.add_argument(
        "--write", type=Path, help="put what is printed in place of the first ```text block of this"
    )
    arguments = parser.parse_args()
    if arguments.write is None:
        run(arguments)
        return
    document = arguments.write.read_text()
    before, start, rest = document.partition("```text\n")
    _, end, after = rest.partition("\n```\n")
    if not start or not end:
        sys.exit(f"{arguments.write} has no ```text block")
    printed = Tee(sys.stdout)
    with contextlib.redirect_stdout(printed):
        run(arguments)
    arguments.write.write_text(before + start + printed.text.strip() + end + after)


class Tee:
    """Writes on, and keeps what was written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.text = stream, ""

    def write(self, text: str) -> int:
        self.text += text
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


def run(arguments: argparse.Namespace) -> None:
    machine()
    gpu(arguments.device)
    if arguments.triton is None:
        print("peers     no Triton: give --triton an interpreter that has nvidia-pytriton")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        plan = QUICK if arguments.quick else Plan()
        given = {name: getattr(arguments, name) for name in ("rounds", "seconds")}
        plan = replace(
            plan,
            device=arguments.device,
            without=tuple(arguments.without),
            **{name: value for name, value in given.items() if value is not None},
        )
        bench = Bench(plan, Path(folder), arguments.triton, servers)
        # Not in the quick run: three servers more to start.
        usual = [section for section in SECTIONS if section != "tracing" or not arguments.quick]
        sections = arguments.only or usual
        started = [server for section in sections for server in getattr(bench, SECTIONS[section])]
        for server in started:
            print(f"{server.name} on {server.target}", file=sys.stderr)
        for section in sections:
            getattr(bench, section)()
    print(f"\nload      {os.getloadavg()[0]:.2f} after the run")
    if arguments.json:
        arguments.json.write_text(json.dumps(bench.figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
