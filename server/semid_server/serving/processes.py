"""Several server processes behind one address and one metrics endpoint.

The parent runs no model and serves no call. It starts the children (afresh, not by fork: gRPC does
not survive one), each a whole `Server` that binds the same port, among which the kernel divides the
connections (SO_REUSEPORT). Over a pipe a child says that it serves, or why it cannot, and hands
over its metrics when the parent's endpoint is asked for them; the parent adds them up.

The life of a child::

    started ── "failed", or it ends ──> on the first start: all end, and the command fails
      │                                 later: started again, after a pause that doubles
      ▼
    "serving" ── it ends, untold ─────> started again
      │
      ▼
    told to end, by a signal passed on or by the end of the pipe ──> drains, ends

All children serve the same version of each model, since none of them reads its path. The parent
reads it, keeps what it read (see `kept`), and hands that to each child that starts, when it asks:
to the first ones, and to one that is started again, whatever is at the path by then. A new version,
on SIGHUP or seen with ``watch``, takes the place of the one before in all of them or in none::

    the parent reads it ── it cannot be used ────────────────────────────────> refused
      │
      ▼
    "load" to all that serve, ── one of them cannot use it, or ends ─────────> refused: "drop"
    and to who begins to             whether it had loaded it or not
      │
      ▼
    all of them have loaded it: it is the version to serve from now on; "put" to all

- Children start meanwhile with the one before. Who has it and still starts when the new one is put
  is ended, and another started: none begins to serve what the others have left. While no child
  serves at all, a new version is thus taken on the parent's word, so that it can mend what keeps
  them from starting.
- A refusal waits for nobody. Who still loads lets go of the version once it has it, and is told to
  load another one only then: a child that does not read its pipe must not fill it. Changes are
  numbered, so that its answer is not taken for one about the next version.
- A version that was refused because a child ended is tried again with ``watch``.
- A child that hangs holds a new version up, and nothing else: all serve the one before, it too if
  it wakes. The log names it; `semid_serving` is 0.
- From the first to the last "put", a moment, some serve the one and some the other; and a stream
  ends on the version it began with, in all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import time
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar

import uvloop
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from semid_server.errors import ConfigurationError, DeviceError, SemidError
from semid_server.serving.addresses import (
    admin_address,
    bracketed,
    open_metrics,
    service_address,
    share_address,
)
from semid_server.serving.disk import in_daemon
from semid_server.serving.drift import add_windows
from semid_server.serving.kept import Kept, read
from semid_server.serving.metrics import DRIFT, Metrics, drift_families
from semid_server.serving.reloading import Reloads, Stamp, check_width, lies_in_the_files, stamp
from semid_server.serving.server import Server, leave_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import BaseContext
    from multiprocessing.process import BaseProcess

    from semid_server.serving.backend import Backend
    from semid_server.serving.config import ModelSource, ServeConfig
    from semid_server.serving.drift import LayerDrift
    from semid_server.serving.metrics import Drift

T = TypeVar("T")

logger = logging.getLogger(__name__)

PAUSES: Final = (0.5, 30.0)
"""Seconds before a child that ended is started again: the first time, and at most."""

STEADY: Final = 60.0
"""Seconds of serving after which the pauses begin anew."""

METRICS_PATIENCE: Final = 2.0
"""Seconds that a scrape waits for a child. Then that child's last figures have to do, for later
scrapes too, which wait no more until it has answered."""

SLOW_TO_LOAD: Final = 15.0
"""Seconds after which the log names the children that a new version waits for."""

LAST_RESORT: Final = 20.0
"""Seconds beyond ``grace`` after which a child that was told to end is killed: its own watchdog, if
it still runs, has ended it by then."""

SUMMED: Final = frozenset(
    {
        "semid_queue_requests",
        "semid_queue_rows",
        "semid_queue_bytes",
        "semid_shared_memory_bytes",
        "semid_shared_memory_segments",
        "semid_device_memory_reserved_bytes",
        "process_virtual_memory_bytes",
        "process_resident_memory_bytes",
        "process_open_fds",
    }
)
"""Gauges of which all processes together have the sum. Counters and histograms are summed too."""

LEAST: Final = frozenset({"semid_serving", "process_start_time_seconds", "process_max_fds"})
"""Gauges of which the least of any process is shown: of all others, the greatest. But those of
`DRIFT` are figures of the rows of all processes together."""

OWN: Final = frozenset({"semid_serving", "semid_model_reloads"})
"""What the parent knows of all of them together, and shows beside what they tell."""


class _Version(NamedTuple):
    """A version that is served, or may be."""

    kept: Kept
    name: str
    fingerprint: str
    input_dim: int


class Processes:
    """Keeps ``config.processes`` servers running.

    Parameters
    ----------
    config : ServeConfig
        What each server is told to be; without ``threads``, they share the processors.
    announce : callable
        Told, a line each, where metrics and service can be reached: once all of them serve.
    prepare : callable
        Called first in each child; must be picklable. Sets up its logging.
    context : BaseContext, optional
        Makes the children's processes and pipes.

    Attributes
    ----------
    unfinished : bool
        Whether a thread of it goes on although it has ended: see `leave_at_once`.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        announce: Callable[[str], None],
        prepare: Callable[[], None],
        context: BaseContext | None = None,
    ) -> None:
        self._config, self._announce, self._prepare = config, announce, prepare
        self._context = context or multiprocessing.get_context("spawn")
        self._children: set[_Child] = set()
        self._past: dict[str, Metric] = {}
        self._metrics = Metrics()
        self._stop = asyncio.Event()
        self._told = asyncio.Event()
        self._versions: list[_Version] = []  # what is served, one of each model
        self._changing = asyncio.Lock()
        self._changes = 0
        self._news = asyncio.Event()  # a child has told something, or has ended
        self._reading: set[asyncio.Future[_Version]] = set()
        self.unfinished = False
        self._last_resort: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then have all children drain; SIGHUP reloads the models.

        Raises
        ------
        ConfigurationError
            An address cannot be had, or a child could not begin to serve; the message is its.
        CheckpointError
            A checkpoint cannot be used.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._signals())
            config = self._config
            service = stack.enter_context(share_address(service_address(config)))
            config = replace(config, port=service.getsockname()[1])
            if (admin := admin_address(config)) is not None:
                shared = stack.enter_context(share_address(admin))
                config = replace(config, admin_port=shared.getsockname()[1])
                self._announce(f"admin on {bracketed(admin.host)}:{config.admin_port}")
            stack.enter_context(self._metrics_endpoint())
            try:
                stamps = await self._read_all()
                if not self._stop.is_set():
                    names = [version.name for version in self._versions]
                    models = [
                        replace(source, name=name)
                        for source, name in zip(config.models, names, strict=True)
                    ]
                    await self._keep_all(replace(config, models=tuple(models)), stamps)
            finally:
                self.unfinished = bool(self._reading)

    async def _read_all(self) -> list[Stamp]:
        """Read what is to be served first, unless told to stop; return the state of its files."""
        stamps: list[Stamp] = []
        for source in self._config.models:
            if self._stop.is_set():
                break
            # Looked at before they are read: what changes from here on is a new version.
            stamps.append(await self._unless_stopped(in_daemon(stamp, source.path)))
            if (version := await self._unless_stopped(self._begin_to_read(source))) is not None:
                self._versions.append(version)
        return stamps

    async def _unless_stopped(self, work: asyncio.Future[T]) -> T | None:
        """Wait for it; None if told to stop before it is done."""
        stopping = asyncio.create_task(self._stop.wait())
        try:
            both: set[asyncio.Future[Any]] = {work, stopping}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            stopping.cancel()

    def _begin_to_read(self, source: ModelSource) -> asyncio.Future[_Version]:
        """Have a thread read what is at the path of a model, and keep it."""

        def begin() -> _Version:
            kept, checkpoint = read(source.path, self._config.overrides_of(source))
            spec = checkpoint.spec
            return _Version(kept, checkpoint.name, checkpoint.fingerprint, spec.input_dim)

        reading = in_daemon(begin)
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)
        return reading

    async def _keep_all(self, config: ServeConfig, stamps: list[Stamp]) -> None:
        cores = len(os.sched_getaffinity(0))
        config = replace(
            config,
            metrics=False,  # the parent's endpoint shows them
            threads=config.threads or max(1, cores // config.processes),
        )
        loop = asyncio.get_running_loop()
        begun: list[asyncio.Future[str]] = [loop.create_future() for _ in range(config.processes)]
        keepers = [asyncio.create_task(self._keep(config, first)) for first in begun]
        try:
            names = await asyncio.gather(*begun)
            if not self._stop.is_set():
                address = f"{bracketed(config.host)}:{config.port}"
                self._announce(f"serving {names[0]} on {address}")
            reloading = asyncio.create_task(self._reload(config, stamps))
            stopping = asyncio.create_task(self._stop.wait())
            stopping.add_done_callback(lambda _: reloading.cancel())
            try:
                await asyncio.gather(*keepers)
            finally:
                stopping.cancel()
        finally:
            self._tell_to_end()
            for first in begun:
                first.cancel()
            await asyncio.gather(*keepers)
            if self._last_resort is not None:
                self._last_resort.cancel()

    async def _keep(self, config: ServeConfig, first: asyncio.Future[str]) -> None:
        """Start a child, and start it again whenever it ends untold; `first` is its first word."""
        shortest, longest = PAUSES
        pause = shortest
        while (child := self._start(config)) is not None:
            started = time.monotonic()
            await self._begins(child, first)
            await child.ended
            self._children.discard(child)
            merge(self._past, [metric for metric in child.metrics if metric.type != "gauge"])
            if self._stop.is_set():
                if child.status:
                    logger.error("server process %d ended with status %s", child.pid, child.status)
                break
            if child.outdated:
                continue
            if time.monotonic() - started > STEADY:
                pause = shortest
            logger.error(
                "server process %d ended with status %s; another is started in %g s",
                child.pid,
                child.status,
                pause,
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)
            pause = min(2 * pause, longest)
        if not first.done():
            first.set_result("")

    async def _begins(self, child: _Child, first: asyncio.Future[str]) -> None:
        """Wait until a child serves, or tell why it does not."""
        try:
            names = await child.serving
            if not first.done():
                first.set_result(names)
        except SemidError as error:
            if self._stop.is_set() or child.outdated:
                return
            if first.done():
                logger.error("a server process could not be started again: %s", error)  # noqa: TRY400 - no bug
            else:
                self._stop.set()
                first.set_exception(error)

    def _start(self, config: ServeConfig) -> _Child | None:
        """Start a child with what is served, unless told to stop."""
        if self._stop.is_set():
            return None
        child = _Child(
            config,
            self._prepare,
            self._context,
            versions=lambda: [version.kept for version in self._versions],
            news=self._news.set,
        )
        self._children.add(child)
        return child

    async def _reload(self, config: ServeConfig, stamps: list[Stamp]) -> None:
        """Have new versions served when told to, or when files change; until cancelled."""
        indices = {source.name: index for index, source in enumerate(config.models)}

        async def change(source: ModelSource) -> None:
            version = await asyncio.shield(self._begin_to_read(source))
            await self._change(indices[source.name], version)

        await Reloads(
            config.models,
            stamps,
            told=self._told,
            watch=config.watch,
            replace=change,
            count=lambda *labels: self._metrics.reloads.labels(*labels).inc(),
        ).run()

    async def _change(self, index: int, version: _Version) -> None:
        """Have all children load a version, then serve it; or raise why not, and none does."""
        check_width(version.input_dim, self._versions[index].input_dim)
        async with self._changing:
            self._changes += 1
            change = self._changes
            loop = asyncio.get_running_loop()
            slow = loop.call_later(SLOW_TO_LOAD, self._tell_who_loads, change, version.name)
            try:
                await self._have_loaded(change, index, version.kept)
            except SemidError:
                for child in self._children:
                    child.settle("drop", change)
                raise
            finally:
                slow.cancel()
            before, self._versions[index] = self._versions[index], version
            for child in self._children:
                if child.is_there:
                    child.settle("put", change)
                elif child.has_versions and not child.ended.done():
                    child.outdate()
        before.kept.close()
        logger.info(
            "%s: all processes serve the new version, fingerprint %s (before: %s)",
            *(version.name, version.fingerprint, before.fingerprint),
        )

    async def _have_loaded(self, change: int, index: int, version: Kept) -> None:
        """Return once all that serve have loaded a version; raise why one of them cannot."""
        told: set[_Child] = set()
        while True:
            self._news.clear()
            there = {child for child in self._children if child.is_there}
            for child in there - told:
                if not child.is_loading:
                    child.load(change, index, version)
                    told.add(child)
            for child in told:
                child.check(change)
            if all(child.has_loaded(change) for child in there):
                return
            await self._news.wait()

    def _tell_who_loads(self, change: int, name: str) -> None:
        late = [
            str(child.pid)
            for child in self._children
            if child.is_there and not child.has_loaded(change)
        ]
        logger.warning(
            "server processes that have not loaded a new version of %s within %g s: %s; until they "
            "have, all serve the one before, and no new version of another model is taken",
            *(name, SLOW_TO_LOAD, ", ".join(late)),
        )

    @contextlib.contextmanager
    def _metrics_endpoint(self) -> Iterator[None]:
        if not self._config.metrics:
            yield
            return
        collector = _Together(self._collect, asyncio.get_running_loop())
        registry = CollectorRegistry()
        registry.register(collector)
        server, address = open_metrics(self._config, registry)
        self._announce(f"metrics on {address}")
        try:
            yield
        finally:
            collector.close()
            server.shutdown()
            server.server_close()

    async def _collect(self) -> list[Metric]:
        """Ask every child for its metrics, and add them up with those of children past."""
        asked = {
            child: child.ask_for_metrics()
            for child in self._children
            if child.has_versions and not child.is_late
        }
        if asked:
            await asyncio.wait(asked.values(), timeout=METRICS_PATIENCE)
        for child, answer in asked.items():
            child.is_late = not answer.done()
        together: dict[str, Metric] = {}
        merge(together, self._past.values())
        # Those that there are by now: one that ended meanwhile is among those past.
        for child in self._children:
            merge(together, child.metrics)
        merge(together, drift_families(add_drift(child.drift for child in self._children)))
        # One that is not there, or does not answer, tells nothing of itself.
        serving = sum(child.serves for child in self._children)
        self._metrics.serving.set(serving >= self._config.processes)
        merge(together, (own for own in self._metrics.registry.collect() if own.name in OWN))
        return list(together.values())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the children, SIGHUP has them reload; give all back at last."""
        loop = asyncio.get_running_loop()
        taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in taken}
        loop.add_signal_handler(signal.SIGHUP, self._told.set)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _end(self, number: signal.Signals) -> None:
        logger.info("%s received", signal.Signals(number).name)
        self._stop.set()
        self._tell_to_end()

    def _tell_to_end(self) -> None:
        for child in self._children:
            child.tell(signal.SIGTERM)
        if self._last_resort is None:
            patience = self._config.grace + LAST_RESORT
            self._last_resort = asyncio.get_running_loop().call_later(patience, self._kill)

    def _kill(self) -> None:
        for child in self._children:
            logger.error("server process %d does not end by itself: it is killed", child.pid)
            child.tell(signal.SIGKILL)


class _Child:
    """One server process, seen from the parent's event loop.

    Parameters
    ----------
    versions : callable
        Returns what it is to serve, when it asks: before it reads its pipe, the pipe might fill.
    news : callable
        Called when it has told something, or has ended.

    Attributes
    ----------
    metrics : list of Metric
        What it told last.
    is_late : bool
        Whether a scrape has waited for its metrics in vain, and it has not answered since.
    has_versions : bool
        Whether it has asked for what it is to serve: that is the first thing it reads.
    outdated : bool
        Whether another one is to take its place, since it would begin to serve what is not served.
    """

    def __init__(
        self,
        config: ServeConfig,
        prepare: Callable[[], None],
        context: BaseContext,
        *,
        versions: Callable[[], Sequence[Kept]],
        news: Callable[[], None],
    ) -> None:
        self._versions, self._news = versions, news
        self._loop = asyncio.get_running_loop()
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(  # type: ignore[attr-defined]  # each has one
            target=_serve, args=(config, prepare, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        self.pid = self._process.pid
        self.metrics: list[Metric] = []
        self.drift: Drift = {}
        self.is_late = self.has_versions = self.outdated = False
        self.serving: asyncio.Future[str] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._asked: asyncio.Future[None] | None = None
        # The change whose version it was told to load last, and the one it last answered for.
        self._told = self._loaded = 0
        self._refusal: SemidError | None = None
        _call_when_readable(self._loop, self._connection, self._listen)

    @property
    def status(self) -> int | None:
        """Exit status; negative, the signal that ended it."""
        return self._process.exitcode

    @property
    def is_there(self) -> bool:
        """Whether it has begun to serve, and has not ended."""
        begun = self.serving.done() and self.serving.exception() is None
        return begun and not self.ended.done() and not self.outdated

    @property
    def serves(self) -> bool:
        """Whether it is there, and answers."""
        return self.is_there and not self.is_late

    def tell(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self._process.is_alive() and self.pid is not None:
            os.kill(self.pid, number)

    def load(self, change: int, index: int, version: Kept) -> None:
        """Have it load a version of a model beside the one it serves, and wait to be told more.

        Not while it `is_loading`.
        """
        self._told = change
        self._hand(version, ("load", (change, index)))

    @property
    def is_loading(self) -> bool:
        """Whether it has yet to answer for the last version that it was told to load."""
        return self._loaded != self._told

    def has_loaded(self, change: int) -> bool:
        """Whether it has loaded the version of a change."""
        return self._loaded == change and self._refusal is None

    def check(self, change: int) -> None:
        """Raise why it cannot serve the version of a change, if it has told so, or has ended."""
        if self.ended.done():
            raise DeviceError(f"server process {self.pid} ended before all had loaded it")
        if self._loaded == change and self._refusal is not None:
            # Anew: one that was raised keeps what it went through, the version too.
            raise type(self._refusal)(*self._refusal.args)

    def settle(self, what: Literal["put", "drop"], change: int) -> None:
        """Have it serve what it has loaded, or let go of it, if it was told to load it."""
        if self._told == change:
            with contextlib.suppress(OSError):
                self._connection.send((what, change))

    def outdate(self) -> None:
        """Have it end, since it has not begun to serve and would serve what is not served."""
        self.outdated = True
        logger.info(
            "server process %d has begun to start with the version before, and is ended", self.pid
        )
        self.tell(signal.SIGTERM)

    def _hand(self, version: Kept, message: object = None) -> None:
        try:
            version.send(self._connection, message)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended; `_listen` is about to hear of it
        except OSError:
            logger.exception("server process %d could not be handed what it is to serve", self.pid)
            self._process.kill()  # it would wait for that

    def ask_for_metrics(self) -> asyncio.Future[None]:
        """Return a future that is done when `metrics` are fresh, or the child has ended.

        All who ask before the answer has come share it: a pipe that a child does not read takes
        some questions, and the next one would block the loop.
        """
        if self._asked is None:
            self._asked = self._loop.create_future()
            try:
                self._connection.send(("metrics", None))
            except OSError:  # it has ended; `_listen` is about to hear of it
                self._asked.set_result(None)
        return self._asked

    def _listen(self) -> None:
        try:
            kind, what = self._connection.recv()
        except (EOFError, OSError):
            self._finish()
            return
        if kind == "metrics":
            self.metrics, self.drift = what
            self._answer()
        elif kind == "loaded":
            self._loaded, self._refusal = what
        elif kind == "versions":
            self.has_versions = True
            for version in self._versions():
                self._hand(version)
        elif not self.serving.done():
            if kind == "serving":
                self.serving.set_result(what)
            else:
                self.serving.set_exception(ConfigurationError(what))
        self._news()

    def _finish(self) -> None:
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()
        self._process.join()  # the pipe's other end closes as the process ends
        self._answer()
        if not self.serving.done():
            self.serving.set_exception(
                ConfigurationError(
                    f"a server process ended with status {self.status} before it served; "
                    "its log is above"
                )
            )
        if not self.ended.done():
            self.ended.set_result(None)
        self._news()

    def _answer(self) -> None:
        self.is_late = False
        if self._asked is not None and not self._asked.done():
            self._asked.set_result(None)
        self._asked = None


class _Together(Collector):
    """The metrics of all processes, for the endpoint's threads."""

    def __init__(self, collect: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._collect, self._loop = collect, loop
        self._closed = False

    def close(self) -> None:
        """Answer nothing from now on: the loop is about to wait for the endpoint's end."""
        self._closed = True

    def collect(self) -> Iterable[Metric]:
        """Yield every family."""
        if not self._closed:
            future = asyncio.run_coroutine_threadsafe(self._collect(), self._loop)
            yield from future.result(2 * METRICS_PATIENCE)


def add_drift(processes: Iterable[Drift]) -> Drift:
    """Return what all processes tell together of each model."""
    windows: defaultdict[str, list[Sequence[LayerDrift]]] = defaultdict(list)
    for drift in processes:
        for model, window in drift.items():
            windows[model].append(window)
    return {model: add_windows(told) for model, told in windows.items()}


def merge(into: dict[str, Metric], metrics: Iterable[Metric]) -> None:
    """Add families to those of other processes, by name: sample by sample, as `SUMMED` says."""
    for metric in metrics:
        if metric.name not in into:
            into[metric.name] = Metric(metric.name, metric.documentation, metric.type, metric.unit)
        family = into[metric.name]
        values = {_identity(sample): index for index, sample in enumerate(family.samples)}
        for sample in metric.samples:
            index = values.get(_identity(sample))
            if index is None:
                family.samples.append(sample)
                continue
            here = family.samples[index].value
            if metric.type != "gauge" or metric.name in SUMMED:
                value = here + sample.value
            else:
                value = (min if metric.name in LEAST else max)(here, sample.value)
            family.samples[index] = family.samples[index]._replace(value=value)


def _identity(sample: Any) -> tuple[Any, ...]:
    return sample.name, *sorted(sample.labels.items())


def _call_when_readable(
    loop: asyncio.AbstractEventLoop, connection: Connection, listen: Callable[[], None]
) -> None:
    """Have the loop call ``listen`` whenever a message has come, or the other end has closed."""
    loop.add_reader(connection.fileno(), listen)
    # libuv has made it non-blocking, and a `Connection` would fail amid a message.
    os.set_blocking(connection.fileno(), True)


def _serve(config: ServeConfig, prepare: Callable[[], None], connection: Connection) -> None:
    """Be a child: the target of its process."""
    os.setpgid(0, 0)  # Ctrl-C is the parent's to hear; it passes it on
    prepare()

    def announce(line: str) -> None:
        if line.startswith("serving "):
            for source in config.models:
                if source.kept is not None:
                    source.kept.close()
            connection.send(("serving", line.removeprefix("serving ").rpartition(" on ")[0]))

    async def run(server: Server) -> None:
        parent = _Parent(connection, config, server)
        _call_when_readable(asyncio.get_running_loop(), connection, parent.listen)
        await server.run()
        with contextlib.suppress(OSError):
            parent.send_metrics()  # the last: counters do not go back when a process ends

    server = None
    status = 0
    try:
        connection.send(("versions", None))
        models = [replace(source, kept=Kept.receive(connection)) for source in config.models]
        config = replace(config, models=tuple(models))
        server = Server(config, announce=announce)
        uvloop.run(run(server))
    except EOFError:  # the parent is gone
        status = 1
    except (SemidError, OSError) as error:
        with contextlib.suppress(OSError):
            connection.send(("failed", str(error)))
        status = 1
    if server is not None and server.unfinished:
        leave_at_once(status)
    raise SystemExit(status)


class _Parent:
    """The parent, seen from a child's event loop, which does what it says."""

    def __init__(self, connection: Connection, config: ServeConfig, server: Server) -> None:
        self._connection, self._models, self._server = connection, config.models, server
        # The change that is neither put nor dropped, or 0, and what was loaded for it.
        self._change = 0
        self._loaded: Backend | None = None
        self._loading: asyncio.Task[None] | None = None

    def send_metrics(self) -> None:
        families = [each for each in self._server.registry.collect() if each.name not in DRIFT]
        self._connection.send(("metrics", (families, self._server.drift())))

    def listen(self) -> None:
        """Hear one message of it."""
        try:
            kind, what = self._connection.recv()
            if kind == "metrics":
                self.send_metrics()
            elif kind == "load":
                self._change, index = what
                source = replace(self._models[index], kept=Kept.receive(self._connection))
                self._loading = asyncio.create_task(self._load(self._change, source))
            elif what == self._change:
                self._settle(kind)
        except (EOFError, OSError):  # it is gone, and nobody will start another
            asyncio.get_running_loop().remove_reader(self._connection.fileno())
            self._server.request_stop()

    async def _load(self, change: int, source: ModelSource) -> None:
        error: SemidError | None = None
        try:
            backend = await self._server.prepare(source)
            if self._change == change:
                self._loaded = backend
            else:  # another could not use it
                self._server.drop(backend)
        except Exception as reason:
            if lies_in_the_files(reason):
                error = ConfigurationError(str(reason))
            else:
                if not isinstance(reason, SemidError):
                    logger.exception("a new version of %s could not be loaded", source.name)
                error = DeviceError(f"server process {os.getpid()} could not load it: {reason}")
        with contextlib.suppress(OSError):  # `listen` is about to hear of it
            self._connection.send(("loaded", (change, error)))

    def _settle(self, what: Literal["put", "drop"]) -> None:
        backend, self._loaded, self._change = self._loaded, None, 0
        if backend is None:
            return  # it could not be loaded here, or is not yet, and is served nowhere
        if what == "put":
            self._server.put(backend)
        else:
            self._server.drop(backend)
