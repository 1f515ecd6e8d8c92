"""Fakes of what serving stands on: a device that waits to be told, and an observer that notes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue

import grpc
import grpc.aio
import numpy as np
import pytest

from semid.v1 import semid_pb2_grpc as pb_grpc
from semid_server.serving.batcher import Batcher, BatchLimits, Runner
from semid_server.serving.calls import Calls
from semid_server.serving.catalogue import Catalogue
from semid_server.serving.config import ModelSource, ServeConfig
from semid_server.serving.metrics import Metrics
from semid_server.serving.server import SERVICE, Server
from semid_server.serving.servicer import SemanticIdServicer, add_to_server
from semid_server.serving.types import ServedModel


class FakeDevice(Runner):
    """A runner whose batches end when the test says so.

    Each batch is put on `began` when it begins and ends with the next item of `outcomes`: a
    function of the payloads, or an exception to raise. `free()` lets all batches, these and
    coming, end with an echo of their payloads.
    """

    def __init__(self) -> None:
        self.began: SimpleQueue = SimpleQueue()
        self.outcomes: SimpleQueue = SimpleQueue()
        self.batches: list[tuple[object, list[object]]] = []
        self.threads: set[int] = set()
        self.is_free = threading.Event()
        self.afters = 0

    def run(self, key, payloads):
        self.threads.add(threading.get_ident())
        self.batches.append((key, list(payloads)))
        self.began.put((key, list(payloads)))
        outcome = echo if self.is_free.is_set() else self.outcomes.get(timeout=300)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome(payloads)

    def after(self):
        self.afters += 1

    def free(self):
        self.is_free.set()
        self.outcomes.put(echo)


def echo(payloads):
    return [("answer to", payload) for payload in payloads]


@dataclass
class NotingObserver:
    """Notes what it is told."""

    refusals: list = field(default_factory=list)
    expiries: list = field(default_factory=list)
    withdrawals: list = field(default_factory=list)
    runs: list = field(default_factory=list)
    answered: list = field(default_factory=list)
    admissions: int = 0
    marks: list = field(default_factory=list)

    def admitted(self, key, rows):
        self.admissions += 1
        return self.admissions

    def refused(self, key):
        self.refusals.append(key)

    def expired(self, key):
        self.expiries.append(key)

    def withdrawn(self, key):
        self.withdrawals.append(key)

    def ran(self, key, *, rows, answered, waits, seconds, failed, marks):
        self.marks.append(tuple(marks))
        self.answered.append(answered)
        self.runs.append((key, rows, tuple(waits), seconds, failed))


class Clock:
    """A clock that goes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def device():
    return FakeDevice()


@pytest.fixture
def observer():
    return NotingObserver()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
async def make_batcher(device, observer, clock):
    """Return a function that starts a batcher on the fake device; all are stopped in the end."""
    made = []

    async def make(**limits):
        defaults = {
            "max_batch_rows": 10,
            "max_batch_bytes": 1000,
            "max_queue_requests": 100,
            "max_queue_bytes": 10_000,
        }
        batcher = Batcher(limits=BatchLimits(**defaults | limits), observer=observer, clock=clock)
        await batcher.start(lambda: device)
        made.append(batcher)
        return batcher

    yield make
    for batcher in made:
        batcher.stop()
    device.free()


SOURCES = (ModelSource(Path("unused")),)

MODEL = ServedModel(
    name="toy",
    fingerprint="f" * 64,
    kind="rq-kmeans",
    input_dim=4,
    embedding_dim=4,
    codebook_widths=(10, 300, 7),
    normalize_residuals=True,
    decode_modes=("sum",),
    code_dtype=np.dtype("<u2"),
    device="toy",
)


def toy_codes(rows):
    """Codes of the toy model: a row's numbers, truncated, modulo the widths."""
    widths = np.array(MODEL.codebook_widths)
    numbers = np.nan_to_num(np.asarray(rows, np.float64)[:, :3])
    return (np.abs(np.trunc(numbers)) % widths).astype(np.uint16)


class ToyModel(Runner):
    """A model simple enough to know the answers by heart; keys are kept to be looked at."""

    quick = False

    def runs_quickly(self, key):
        return self.quick

    def __init__(self) -> None:
        self.keys: list = []

    def run(self, key, payloads):
        self.keys.append(key)
        if key.operation == "decode":
            return [np.repeat(p.sum(axis=1, dtype=np.float32)[:, None], 4, 1) for p in payloads]
        return [toy_codes(rows) for rows in payloads]


@dataclass
class Service:
    """A servicer behind a real socket, and what stands behind it."""

    stub: object
    servicer: SemanticIdServicer
    catalogue: Catalogue
    batcher: Batcher
    metrics: Metrics
    channel: grpc.aio.Channel
    address: str
    calls: Calls


@pytest.fixture
async def serve_runner():
    """Return a function that serves a runner over loopback, as `Server` would."""
    async with contextlib.AsyncExitStack() as stack:

        async def serve(
            runner, *, model=MODEL, shared_memory=None, tracing=None, incoming=None, **settings
        ):
            config = ServeConfig(models=SOURCES, **settings)
            metrics = Metrics()
            batcher = Batcher(
                limits=BatchLimits(
                    max_batch_rows=config.max_batch_rows,
                    max_batch_bytes=config.max_batch_bytes,
                    max_queue_requests=config.max_queue_requests,
                    max_queue_bytes=config.max_queue_bytes,
                ),
                observer=metrics if tracing is None else tracing.observe(metrics),
            )
            await batcher.start(lambda: runner)
            stack.callback(batcher.stop)
            catalogue = Catalogue()
            if model is not None:
                catalogue.put(model)
            servicer = SemanticIdServicer(
                batcher,
                catalogue,
                config=config,
                shared_memory=shared_memory,
                on_received=metrics.received,
            )
            server = grpc.aio.server()
            calls = Calls(
                SERVICE,
                metrics,
                max_calls=config.max_concurrent_rpcs,
                incoming=incoming,
                trace=None if tracing is None else tracing.trace,
            )
            add_to_server(servicer, server, calls)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            stack.push_async_callback(server.stop, None)
            address = f"127.0.0.1:{port}"
            channel = grpc.aio.insecure_channel(address)
            stack.push_async_callback(channel.close)
            stub = pb_grpc.SemanticIdServiceStub(channel)
            return Service(stub, servicer, catalogue, batcher, metrics, channel, address, calls)

        yield serve


@pytest.fixture
async def toy(serve_runner, toy_runner):
    return await serve_runner(toy_runner)


@pytest.fixture
def toy_runner():
    return ToyModel()


@pytest.fixture(name="toy_codes")
def toy_codes_fixture():
    return toy_codes


@pytest.fixture
def toy_served():
    return MODEL


class FakeBackend:
    """The fake device with a model to show; loading lasts until the test lets it end."""

    def __init__(self, device, served):
        self._device, self.served = device, replace(served, backend=self)
        self.may_load = threading.Event()
        self.error = None

    def __call__(self, source, config, *, on_verified):
        self.may_load.wait(300)
        if self.error:
            raise self.error
        return self

    quick = False

    def warm_up(self): ...

    def proved_rows(self):
        return {"reference": 7}

    def run(self, key, payloads):
        self._device.run(key, payloads)
        return [np.ones((len(rows), 3), np.uint16) for rows in payloads]

    def after(self): ...

    def drift(self):
        return []

    def device_use(self):
        return None


class Running:
    """A server that runs as a task of this test's loop."""

    def __init__(self, server, lines):
        self.server, self.lines = server, lines
        self.task = asyncio.create_task(server.run())

    async def line(self, words):
        """Wait for the announced line that begins so, and return what follows."""
        while True:
            for line in self.lines:
                if line.startswith(words):
                    return line.removeprefix(words)
            if self.task.done():
                await self.task  # raises what ended it
                pytest.fail("the server ended without that line")
            await asyncio.sleep(0)

    async def address(self):
        return await self.line("serving toy on ")

    async def metrics(self):
        host = await self.line("metrics on ")
        url = f"http://{host}/metrics"
        return await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())


@pytest.fixture
async def run_server():
    """Return a function that starts a server; whatever is left running is ended."""
    running = []

    def run(backend, **settings):
        settings = {
            "models": SOURCES,
            "host": "127.0.0.1",
            "port": 0,
            "metrics_port": 0,
            "grace": 30.0,
        } | settings
        lines = []
        server = Server(
            ServeConfig(**settings),
            announce=lines.append,
            make_backend=backend,
        )
        running.append(Running(server, lines))
        return running[-1]

    yield run
    for one in running:
        one.server.request_stop()
        with contextlib.suppress(Exception):
            await one.task


@pytest.fixture
def backend(device, toy_served):
    fake = FakeBackend(device, toy_served)
    yield fake
    fake.may_load.set()
    device.free()


class HangingDisk:
    """A disk that does not answer from when the test says so until its end.

    Attributes
    ----------
    asked : Event
        Whether anything was asked of it since.
    who : set of int
        The threads that asked.
    """

    def __init__(self):
        self.asked, self.who = threading.Event(), set()
        self._answers = threading.Event()
        self._answers.set()

    def path(self, path):
        """The path of a file on this disk."""
        disk = self

        class OnThisDisk(type(Path())):
            def __fspath__(self):
                disk.ask()
                return super().__fspath__()

        return OnThisDisk(path)

    def begin(self):
        self._answers.clear()

    def end(self):
        self._answers.set()

    def ask(self):
        if self._answers.is_set():
            return
        self.who.add(threading.get_ident())
        self.asked.set()
        # The event loop would end the test with it.
        if threading.current_thread() is not threading.main_thread():
            self._answers.wait(300)


@pytest.fixture
def hanging():
    disk = HangingDisk()
    yield disk
    disk.end()
