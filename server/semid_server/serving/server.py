"""The life of a server: startup, serving, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import sys
import weakref
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from semid.v1 import semid_pb2 as pb
from semid_server.encoding.rows import default_threads
from semid_server.errors import ConfigurationError, DeviceLostError
from semid_server.serving import asking
from semid_server.serving.addresses import (
    Address,
    admin_address,
    bracketed,
    check_address,
    open_metrics,
    service_address,
)
from semid_server.serving.backend import Backend, Device, collect_garbage
from semid_server.serving.batcher import AMONG_LARGE, Batcher, BatchLimits
from semid_server.serving.calls import Calls
from semid_server.serving.catalogue import Catalogue
from semid_server.serving.config import MOST_IN_GRPC
from semid_server.serving.disk import Lookout, in_daemon, patiently
from semid_server.serving.health import Health
from semid_server.serving.incoming import FEW, Guarded, Incoming
from semid_server.serving.listener import Listener
from semid_server.serving.memory import Memory, allowed
from semid_server.serving.metrics import Metrics
from semid_server.serving.peers import caller_of
from semid_server.serving.reloading import Reloads, Stamp, check_width, stamp
from semid_server.serving.servicer import SemanticIdServicer, add_to_server
from semid_server.serving.shared_memory import Bounds, SharedMemory
from semid_server.serving.tls import Certificates
from semid_server.serving.tokens import TokenFile
from semid_server.serving.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy.typing as npt
    from prometheus_client import CollectorRegistry

    from semid_server.serving.config import ModelSource, ServeConfig
    from semid_server.serving.metrics import Drift
    from semid_server.serving.tracing import Tracing
    from semid_server.serving.types import Payload, WorkKey

logger = logging.getLogger(__name__)

# Its asyncio half is public, but unknown to the type stubs.
ReflectionServicer: Any = reflection.aio.ReflectionServicer  # type: ignore[attr-defined]

SERVICE = pb.DESCRIPTOR.services_by_name["SemanticIdService"].full_name
METHODS = pb.DESCRIPTOR.services_by_name["SemanticIdService"].methods

EXPECTED_CODES = (
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
)

CALL_KINDS = {
    (False, False): "unary",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}
"""By whether the client, and the server, send more than one message: the metrics' ``grpc_type``."""

OTHERS = 1 << 16
"""Calls in progress beyond ``max_concurrent_rpcs``: those being refused, and those of health and
reflection. Each connection of a client keeps one that watches the health."""

LEAST_PENDING = 4096
"""Calls that gRPC keeps until Python asks for them, at least."""

COLLECT_EVERY = 1.0
"""Seconds from one time to the next that it is seen to that replaced versions are freed. It takes a
millisecond; a stream may need one for hours."""

QUIET = 0.05
"""Seconds without a call after which gRPC may stop."""

MEMORY_SHARE = 0.6
"""Of the memory that the models leave, what may be in use while messages come, unless told
otherwise: the rest is for what the allocator keeps, and for what comes before it is noticed."""

LOOK_AT_TOKENS = 0.1
"""Seconds from one look at the token file to the next: a token that was taken back is good for as
long, at most, while the disk answers."""

LOOK_AT_CERTIFICATES = 1.0
"""Seconds from one look at the files of TLS to the next."""

MAX_PING_PATIENCE = 20_000
"""Milliseconds in which a peer's machine has to take a ping, at most."""

MAX_ANSWER_PATIENCE = 60_000
"""Milliseconds until its answer has to be there, at most: gRPC's own patience."""

LAST_WORDS = 1.0
"""Seconds for the last answers to leave, and after the grace period for those who are told that
their turn never came."""


class Server:
    """One server process: gRPC and metrics around its models.

    Parameters
    ----------
    config : ServeConfig
        What it is told to be.
    announce : callable
        Told, a line each, where metrics and service can be reached.
    make_backend : callable
        Makes what runs the batches, in the thread that will own it.

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
        make_backend: Callable[..., Backend] = Backend,
    ) -> None:
        self._config, self._announce, self._make_backend = config, announce, make_backend
        self._metrics = Metrics()
        tracing = self._tracing = _open_tracing() if config.tracing else None
        self._catalogue = Catalogue()
        self._batcher: Batcher[WorkKey, Payload, npt.NDArray[Any]] = Batcher(
            limits=BatchLimits(
                max_batch_rows=config.max_batch_rows,
                max_batch_bytes=config.max_batch_bytes,
                max_batch_seconds=config.max_batch_seconds,
                max_queue_requests=config.max_queue_requests,
                max_queue_bytes=config.max_queue_bytes,
            ),
            observer=self._metrics if tracing is None else tracing.observe(self._metrics),
            processors=max(1, default_threads() // config.processes),
            coming=lambda: self._calls.coming,
        )
        memory = self._shared_memory = SharedMemory(Bounds(config.shared_memory_bytes))
        self._metrics.watch_shared_memory(lambda: memory.nbytes, lambda: memory.segments)
        self._memory = Memory(config.max_memory_bytes or allowed())
        self._incoming = Incoming(
            self._memory,
            caller=partial(
                caller_of,
                certificates=config.verifies_callers,
                tokens=config.token_file is not None,
            ),
        )
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        self._stamps: list[Stamp] = []
        self._reading: set[asyncio.Future[Backend]] = set()
        # Versions that were replaced and may still be needed, and what sees to it that they go.
        self._replaced: list[weakref.ref[Backend]] = []
        self._collecting: asyncio.Task[None] | None = None
        self.unfinished = False
        self._tokens: TokenFile | None = None
        self._certificates: Certificates | None = None
        self._device: Device
        self._calls: Calls
        self._listeners: list[Listener]

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `request_stop`, then drain; SIGHUP reloads the models.

        Raises
        ------
        ConfigurationError
            A port cannot be had, or the device asked for is not there.
        CheckpointError
            The checkpoint cannot be used.
        DeviceLostError
            The device has failed for good; calls in progress were told so.
        """
        with self._signals():
            try:
                await self._run()
            finally:
                if self._tracing is not None:  # in a thread, since it waits for who takes the spans
                    await asyncio.to_thread(self._tracing.close)

    def request_stop(self) -> None:
        """Begin the drain; may be called more than once."""
        self._stop.set()

    async def _run(self) -> None:
        if self._config.processes == 1:
            check_address(service_address(self._config))
            if (admin := admin_address(self._config)) is not None:
                check_address(admin)
        if not self._config.metrics:
            await self._serve()
            return
        metrics_server, address = open_metrics(self._config, self.registry)
        self._announce(f"metrics on {address}")
        try:
            await self._serve()
        finally:
            # In a thread, since it waits for the serving loop to notice.
            await asyncio.to_thread(metrics_server.shutdown)
            metrics_server.server_close()

    async def _serve(self) -> None:
        if not await self._read_who_may_call():
            return
        self._shared_memory.sweep()
        servicer = SemanticIdServicer(
            self._batcher,
            self._catalogue,
            config=self._config,
            shared_memory=self._shared_memory,
            on_received=self._metrics.received,
            on_refused=self._metrics.refused,
        )
        health_servicer = Health(("", SERVICE))
        self._calls = self._make_calls()
        service = Listener(partial(self._open_service, servicer, health_servicer))
        self._listeners = [service]
        if (admin_at := admin_address(self._config)) is not None:
            admin = Listener(partial(self._open_admin, health_servicer, admin_at))
            await admin.start()
            self._listeners.append(admin)
            self._announce(f"admin on {bracketed(admin_at.host)}:{admin.port}")
        await service.start()
        # The watchdog looks at the drain too: what hangs there keeps the process for ever.
        with self._watchdog(), contextlib.ExitStack() as looking:
            for lookout in self._lookouts():
                looking.enter_context(lookout)
            try:
                if await self._load():
                    health_servicer.set(health_pb2.HealthCheckResponse.SERVING)
                    self._metrics.serving.set(1)
                    names = ", ".join(model.name for model in self._catalogue.models)
                    where = f"{bracketed(service_address(self._config).host)}:{service.port}"
                    self._announce(f"serving {names} on {where}")
                    await self._serve_until_stopped()
                    logger.info("draining, for at most %g s", self._config.grace)
            finally:
                self._metrics.serving.set(0)
                health_servicer.set(health_pb2.HealthCheckResponse.NOT_SERVING)
                await self._drain(service, servicer)
                for listener in self._listeners[1:]:
                    await listener.stop(None)

    async def _read_who_may_call(self) -> bool:
        """Read tokens and certificates for the first time; False if told to stop meanwhile.

        By a thread, since their disk may hang.
        """
        config = self._config
        files = [config.token_file, *(config.tls.all if config.tls else ())]
        names = " or ".join(str(path) for path in files if path)
        if not names:
            return True

        def read() -> tuple[TokenFile | None, Certificates | None]:
            known = frozenset(method.name for method in METHODS)
            return (
                None if config.token_file is None else TokenFile(config.token_file, known),
                None if config.tls is None else Certificates(config.tls),
            )

        reading = asyncio.ensure_future(
            patiently(in_daemon(read), where=names, meanwhile="nobody can call")
        )
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return False
            self._tokens, self._certificates = reading.result()
        finally:
            reading.cancel()
            stopping.cancel()
        return True

    def _lookouts(self) -> Iterator[Lookout]:
        """Yield what looks, all the while, at files that say who may call."""
        if self._tokens is not None:
            yield Lookout(
                self._tokens.look,
                LOOK_AT_TOKENS,
                where=self._config.token_file,
                meanwhile="the tokens read before stay good",
            )
        if self._certificates is not None and self._config.tls is not None:
            yield Lookout(
                self._certificates.look,
                LOOK_AT_CERTIFICATES,
                where=" or ".join(map(str, self._config.tls.all)),
                meanwhile="the certificates read before stay in use",
            )

    async def _load(self) -> bool:
        """Load and warm up the models; False if told to stop before that was done."""
        # Hundreds of thousands of objects, most of them torch's, that stay: the collector need not
        # look through them again and again while calls wait. Before the models, which do not stay.
        gc.collect()
        gc.freeze()
        backends: list[Backend] = []

        def make_device() -> Device:
            # Looked at before they are read: what changes from here on is a new version.
            self._stamps = [stamp(source.path) for source in self._config.models]
            backends.extend(self._load_one(source) for source in self._config.models)
            return Device()

        loading = asyncio.ensure_future(self._batcher.start(make_device))
        stopping = asyncio.ensure_future(self._stop.wait())
        closed = asyncio.create_task(self._port_lost())
        try:
            await asyncio.wait({loading, stopping, closed}, return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                self.unfinished = True
                if closed.done():
                    await closed
                return False
            self._device = loading.result()
        finally:
            loading.cancel()
            stopping.cancel()
            closed.cancel()
        names = [backend.served.name for backend in backends]
        if len(set(names)) < len(names):
            raise ConfigurationError(
                f"two checkpoints are called the same ({', '.join(names)}); name each: NAME=PATH"
            )
        for backend in backends:
            self._show(backend)
        backends.clear()  # the worker keeps `make_device`, which must not keep them
        self._metrics.watch_queue(lambda: self._batcher.queue)
        self._limit_memory()
        return True

    def _limit_memory(self) -> None:
        """Set the limit of what may be in use, now that the models are; or judge the one set."""
        # Those that gRPC waits for, and as many before anybody looks.
        in_use, few = self._memory.in_use(), 2 * FEW * self._config.max_message_bytes
        if not self._config.max_memory_bytes:
            left = allowed() // self._config.processes - in_use
            self._memory.limit = in_use + max(few, round(MEMORY_SHARE * left))
        elif in_use + few > self._memory.limit:
            logger.warning(
                "%d bytes are in use with the models loaded, and %d messages may take %d: more "
                "than the limit of %d (--max-memory-bytes), beyond which callers are refused",
                *(in_use, 2 * FEW, few, self._memory.limit),
            )

    def _load_one(self, source: ModelSource) -> Backend:
        backend = self._make_backend(source, self._config, on_verified=self._metrics.verified)
        self._config.max_rows(backend.served.input_dim)  # refuses a model too wide for a message
        backend.warm_up()
        return backend

    def _show(self, backend: Backend) -> None:
        self._catalogue.put(backend.served)
        self._metrics.watch_device(backend.device_use)
        self._metrics.show_model(
            backend.served, proved_rows=backend.proved_rows, drift=backend.drift
        )

    async def _port_lost(self) -> None:
        """Wait until a port cannot be kept open, and raise why."""
        await asyncio.gather(*(listener.lost() for listener in self._listeners))

    async def _serve_until_stopped(self) -> None:
        """Wait for the end; meanwhile load new versions when told to, or when files change.

        One of several processes is told by its parent: see `processes`.
        """
        watchers: list[asyncio.Task[None]] = []
        if self._config.processes == 1:
            reloads = Reloads(
                [
                    replace(source, name=name)
                    for source, name in zip(self._config.models, self._catalogue.names, strict=True)
                ],
                self._stamps,
                told=self._reload,
                watch=self._config.watch,
                replace=self._replace,
                count=lambda *labels: self._metrics.reloads.labels(*labels).inc(),
            )
            watchers.append(asyncio.create_task(reloads.run()))
        stopping = asyncio.create_task(self._stop.wait())
        lost = asyncio.create_task(self._batcher.lost())
        closed = asyncio.create_task(self._port_lost())
        try:
            await asyncio.wait({stopping, lost, closed}, return_when=asyncio.FIRST_COMPLETED)
            # A supervisor starts another process; this one has nothing left to serve with, or at.
            if lost.done():
                raise lost.result()
            if closed.done():
                await closed
        finally:
            for task in (*watchers, stopping, lost, closed):
                task.cancel()
            if self._collecting is not None:
                self._collecting.cancel()

    def _watchdog(self) -> contextlib.AbstractContextManager[object]:
        if not self._config.max_stall:
            return contextlib.nullcontext()
        # A batch takes about max_batch_seconds, or some times that, by what earlier ones took and
        # not by a clock.
        limit = max(self._config.max_stall, 4 * AMONG_LARGE * self._config.max_batch_seconds)
        hung = DeviceLostError(
            f"a batch has not ended within {limit:g} s: the device, or what it runs, hangs"
        )
        return Watchdog(
            limit,
            batch=lambda: self._batcher.running,
            hung=lambda: self._batcher.give_up(hung),
            patience=self._config.grace + 10 * LAST_WORDS,
        )

    async def _replace(self, source: ModelSource) -> None:
        self.put(await self.prepare(source))

    async def prepare(self, source: ModelSource) -> Backend:
        """Load a version beside the one that serves, and warm it up; it is for `put` or `drop`.

        Whatever it raises is why the version cannot be used; the one before goes on.
        """
        self._device.loading += 1
        try:
            backend = await self._begin_to_read(source)
            before = self._catalogue.find(backend.served.name)
            check_width(backend.served.input_dim, before.input_dim)
        finally:
            self._device.loading -= 1
        return backend

    def put(self, backend: Backend) -> None:
        """Serve what was prepared, in place of the version before."""
        before = self._catalogue.find(backend.served.name)
        self._show(backend)
        self._let_go(before.backend)
        logger.info(
            "%s: a new version is served, fingerprint %s (before: %s)",
            *(before.name, backend.served.fingerprint, before.fingerprint),
        )

    def drop(self, backend: Backend) -> None:
        """Let go of what was prepared, and go on with the version before."""
        self._let_go(backend)

    def _let_go(self, replaced: Backend) -> None:
        """Have the memory of a replaced version given back once nothing needs it any more.

        It is part of cycles, and Python, which weighs them against all that torch keeps, would
        leave dozens of them.
        """
        self._replaced.append(weakref.ref(replaced))
        if self._collecting is None or self._collecting.done():
            self._collecting = asyncio.create_task(self._collect())

    async def _collect(self) -> None:
        while self._replaced:
            await asyncio.sleep(COLLECT_EVERY)
            # In a thread: a version that is loaded may have to be waited for.
            await in_daemon(collect_garbage)
            self._replaced = [version for version in self._replaced if version() is not None]

    def _begin_to_read(self, source: ModelSource) -> asyncio.Future[Backend]:
        """Return the future of a new version; the drain waits for it though nobody else does."""
        reading = in_daemon(self._load_one, source)
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)
        return asyncio.shield(reading)

    async def _drain(self, service: Listener, servicer: SemanticIdServicer) -> None:
        """Turn new calls away, finish those that began, and end by the grace period.

        Streams are read no further. What is still queued when the period ends is told so, rather
        than cut off. Only then does gRPC stop, at a moment when no calls come: it would cancel
        those that it has received and not handed over yet, and wait for who watches the health.
        For such a moment to come, those turned away last are told once gRPC has begun to stop: who
        is told to try again does so here as long as it can.

        A new version that is being read has the rest of the period too.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._config.grace
        self._calls.drain()
        servicer.drain()
        idle = asyncio.ensure_future(self._calls.idle())
        await asyncio.wait({idle}, timeout=self._config.grace)
        if not idle.done():
            left = self._batcher.queue.requests
            logger.warning("the grace period ended with %d requests still queued", left)
        self._batcher.stop()
        await asyncio.wait({idle}, timeout=LAST_WORDS)
        idle.cancel()
        self._calls.hold()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._calls.quiet(QUIET), LAST_WORDS)
        stopping = asyncio.ensure_future(service.stop(LAST_WORDS))
        await asyncio.sleep(QUIET)  # gRPC tells its peers meanwhile to send nothing more here
        self._calls.release()
        await stopping
        if self._reading:
            _, unread = await asyncio.wait(self._reading, timeout=max(0.0, end - loop.time()))
            for reading in unread:
                reading.cancel()
                self.unfinished = True
                logger.warning("the grace period ended with a new version still being read")
        self.unfinished |= self._batcher.running is not None

    def _make_calls(self) -> Calls:
        for method in METHODS:
            kind = CALL_KINDS[method.client_streaming, method.server_streaming]
            self._metrics.expect_method((kind, SERVICE, method.name), EXPECTED_CODES)
        return Calls(
            SERVICE,
            self._metrics,
            self._tokens,
            max_calls=self._config.max_concurrent_rpcs,
            incoming=self._incoming,
            trace=None if self._tracing is None else self._tracing.trace,
        )

    def _open_service(
        self, servicer: SemanticIdServicer, health_servicer: Health, port: int | None
    ) -> tuple[grpc.aio.Server, int]:
        most = self._config.max_concurrent_rpcs + OTHERS
        pending = min(max(self._config.max_concurrent_rpcs, LEAST_PENDING), MOST_IN_GRPC)
        server = asking.server(
            # gRPC counts those of all services; `Calls` keeps the limit on its own.
            maximum_concurrent_rpcs=most,
            options=(
                ("grpc.max_receive_message_length", self._config.max_message_bytes),
                ("grpc.max_send_message_length", self._config.max_message_bytes),
                # Calls that have come and that Python has not asked for yet. Of more than 1,000,
                # unless told otherwise, gRPC cancels some by chance, and nobody is told why. Each
                # may bring some of its message.
                ("grpc.server.max_pending_requests", pending),
                ("grpc.server.max_pending_requests_hard_limit", pending),
                *self._connection_options(),
            ),
        )
        add_to_server(servicer, server, self._calls)
        others = _Unregistered(server, self._incoming)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, others)
        if self._config.reflection and self._config.admin_port is None:
            _enable_reflection(others)
        return server, _listen(server, service_address(self._config), port, self._certificates)

    def _open_admin(
        self, health_servicer: Health, address: Address, port: int | None
    ) -> tuple[grpc.aio.Server, int]:
        """Make what serves health and reflection at an address of their own.

        Without encryption, tokens and limits, for who runs the service: a probe knows no
        certificate, and must not be refused because callers are many.
        """
        server = grpc.aio.server(options=self._connection_options())
        services = _Unregistered(server)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, services)
        if self._config.reflection:
            _enable_reflection(services)
        return server, _listen(server, address, port)

    def _connection_options(self) -> list[tuple[str, int]]:
        options = [
            # Unless asked for, a second server on the same port is a mistake.
            ("grpc.so_reuseport", int(self._config.processes > 1)),
            # Clients may ping an idle connection to keep it open.
            (
                "grpc.http2.min_ping_interval_without_data_ms",
                _milliseconds(self._config.min_ping_interval),
            ),
            ("grpc.max_concurrent_streams", self._config.max_connection_streams),
            ("grpc.keepalive_permit_without_calls", 1),
        ]
        if self._config.keepalive:
            milliseconds = _milliseconds(self._config.keepalive)
            options += [
                ("grpc.keepalive_time_ms", milliseconds),
                # How long TCP waits for the ping to be taken.
                ("grpc.keepalive_timeout_ms", min(milliseconds, MAX_PING_PATIENCE)),
                # How long gRPC waits for the answer, which comes behind what the peer is sending:
                # over a slow link that takes its time.
                ("grpc.http2.ping_timeout_ms", min(milliseconds, MAX_ANSWER_PATIENCE)),
            ]
        if self._config.max_connection_age:
            # Calls in progress end in their own time: gRPC sets no limit unless told one.
            milliseconds = _milliseconds(self._config.max_connection_age)
            options.append(("grpc.max_connection_age_ms", milliseconds))
            if self._config.max_connection_age_grace:
                milliseconds = _milliseconds(self._config.max_connection_age_grace)
                options.append(("grpc.max_connection_age_grace_ms", milliseconds))
        if self._config.max_connection_idle:
            milliseconds = _milliseconds(self._config.max_connection_idle)
            options.append(("grpc.max_connection_idle_ms", milliseconds))
        return options

    @property
    def registry(self) -> CollectorRegistry:
        """What the metrics endpoint shows."""
        return self._metrics.registry

    def drift(self) -> Drift:
        """Return what its models' last rows tell; see `Metrics.drift`."""
        return self._metrics.drift()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask for the drain, SIGHUP for a reload; give all back at last."""
        loop = asyncio.get_running_loop()
        taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.getsignal(number) for number in taken}
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _on_hangup(self) -> None:
        if self._config.processes == 1:
            self._reload.set()
        else:
            logger.warning(
                "SIGHUP to one of %d server processes; it is for their parent, process %d, which "
                "has all of them reload",
                *(self._config.processes, os.getppid()),
            )

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():  # asked a second time: somebody is in a hurry
            self._batcher.stop()
            logger.warning("%s again: what is queued is given up", signal.Signals(number).name)
        logger.info("%s received", signal.Signals(number).name)
        self.request_stop()


def leave_at_once(status: int) -> NoReturn:
    """End the process while a thread of it still computes.

    Python stops such a thread where it comes back from torch, in the midst of C++, which aborts.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def _open_tracing() -> Tracing:
    try:
        from semid_server.serving.tracing import open_tracing  # noqa: PLC0415 - needs an extra
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigurationError(
            f"tracing needs {error.name}, which is not installed: pip install 'semid[tracing]'"
        ) from error
    return open_tracing()


def _milliseconds(seconds: float) -> int:
    return math.ceil(min(1000 * seconds, MOST_IN_GRPC))


def _enable_reflection(services: _Unregistered) -> None:
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names), services)


def _listen(
    server: grpc.aio.Server,
    address: Address,
    port: int | None,
    certificates: Certificates | None = None,
) -> int:
    """Have a server listen; return its port."""
    if port is not None:
        address = address._replace(port=port)
    try:
        if certificates is None:
            return server.add_insecure_port(str(address))
        return server.add_secure_port(str(address), certificates.credentials())
    except RuntimeError as error:
        raise address.refused("gRPC could not bind it") from error


class _Unregistered:
    """A server to which generated code adds methods without registering them with gRPC.

    For each registered method gRPC's asyncio server waits apart, and goes through all of them at
    every call.
    """

    def __init__(self, server: grpc.aio.Server, incoming: Incoming | None = None) -> None:
        self._server, self._incoming = server, incoming

    def add_generic_rpc_handlers(
        self, handlers: Iterable[grpc.GenericRpcHandler[Any, Any]]
    ) -> None:
        """Add them, and have their messages waited for by ``incoming``, if that is given."""
        if self._incoming is not None:
            handlers = [Guarded(handler, self._incoming) for handler in handlers]
        self._server.add_generic_rpc_handlers(tuple(handlers))

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Leave it at the generic handlers, which are the same."""
