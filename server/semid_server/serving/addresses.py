"""Addresses to listen on: found free before anything is loaded, and named as people write them."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import itertools
import logging
import socket
import sys
import threading
import time
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

from semid_server.errors import ConfigurationError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from semid_server.serving.config import ServeConfig

logger = logging.getLogger(__name__)

SCRAPE_PATIENCE: Final = 10.0
"""Seconds that a scraper may take to ask, and to read each piece of the answer."""

SCRAPE_LIMIT: Final = 60.0
"""Seconds that a scrape may take in all, however little at a time its scraper sends or reads."""

MAX_SCRAPES: Final = 256
"""Scrapes at one moment: many times as many as there are scrapers, and threads do not run out."""

BUSY: Final = b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


def bracketed(host: str) -> str:
    """Write an IPv6 address as URLs do."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


class Address(NamedTuple):
    """Where to listen, and the flags that say so."""

    host: str
    port: int
    flags: str

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    def refused(self, why: str) -> ConfigurationError:
        """Build the error of an address that cannot be had."""
        return ConfigurationError(
            f"cannot listen on {self}: {why}; choose another with {self.flags}"
        )

    def find(self) -> tuple[socket.AddressFamily, socket.SocketKind, int, Any]:
        """Look it up; return family, kind, protocol and what `socket.bind` takes.

        Raises
        ------
        OSError
            There is no such host.
        """
        host = self.host.strip("[]")
        found = socket.getaddrinfo(
            host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        return family, kind, protocol, address


def service_address(config: ServeConfig) -> Address:
    """Where calls are served."""
    return Address(config.host, config.port, "--port or --host")


def admin_address(config: ServeConfig) -> Address | None:
    """Where health and reflection are served to those who run the service; None if nowhere."""
    if config.admin_port is None:
        return None
    return Address(
        config.admin_host or config.host, config.admin_port, "--admin-port or --admin-host"
    )


def metrics_address(config: ServeConfig) -> Address:
    """Where metrics are shown, if they are."""
    return Address(
        config.metrics_host or config.host, config.metrics_port, "--metrics-port or --metrics-host"
    )


def check_apart(config: ServeConfig) -> None:
    """See that no two addresses of one configuration are in each other's way.

    Several processes bind theirs so that others may bind the same (SO_REUSEPORT): service and
    admin port on one address would start, and share the connections at random.

    Raises
    ------
    ConfigurationError
        Two are, or the host of one is not known.
    """
    addresses = [service_address(config)]
    if (admin := admin_address(config)) is not None:
        addresses.append(admin)
    if config.metrics:
        addresses.append(metrics_address(config))
    for first, second in itertools.combinations(addresses, 2):
        if first.port == second.port != 0 and _meet(first, second):
            raise second.refused(f"it would share its connections with {first}, of {first.flags}")


def _meet(first: Address, second: Address) -> bool:
    """Whether two addresses of one port are the same, or one is any address of the machine."""
    hosts = []
    for address in (first, second):
        try:
            where = address.find()[3]
        except OSError as error:
            raise address.refused(error.strerror or str(error)) from error
        hosts.append(where)
        if ipaddress.ip_address(where[0].partition("%")[0]).is_unspecified:
            return True
    return bool(hosts[0] == hosts[1])


def check_address(address: Address) -> None:
    """Bind the address and let go of it: gRPC itself says why it cannot only to its own log."""
    _bind(address, shared=False).close()


def share_address(address: Address) -> socket.socket:
    """Take a port that several servers of this user may bind, and keep it until it is closed.

    The socket returned never listens: connections go to the servers alone.
    """
    check_address(address)
    return _bind(address, shared=True)


def _bind(address: Address, *, shared: bool) -> socket.socket:
    try:
        family, kind, protocol, where = address.find()
        bound = socket.socket(family, kind, protocol)
        try:
            # As gRPC does: what a server before this one left in TIME_WAIT is no obstacle.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(where)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise address.refused(error.strerror or str(error)) from error
    return bound


FULL_PAUSE: Final = 0.1
"""Seconds until a scrape is accepted after all that could not be for want of open files."""


class _MetricsServer(ThreadingMixIn, WSGIServer):
    """A thread for each scrape: a slow one holds up neither others nor the end of the process.

    `MAX_SCRAPES` of them at most, for `SCRAPE_LIMIT`: beyond, connections are answered 503 and
    closed.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.Semaphore(MAX_SCRAPES)
        self._ends: dict[socket.socket, float] = {}
        super().__init__(*arguments)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; wait a moment if the process may open no more files.

        The connection stays where it is, and would be found there again at once, for ever.
        """
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(FULL_PAUSE)  # of the thread that accepts, which has nothing else to do
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, if there may be one more."""
        if not self._free.acquire(blocking=False):
            logger.info(
                "a scrape by %s is refused: %d are under way", client_address[0], MAX_SCRAPES
            )
            with contextlib.suppress(OSError):
                request.sendall(BUSY)
            self.shutdown_request(request)
            return
        self._ends[request] = time.monotonic() + SCRAPE_LIMIT
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._forget(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection, and make room for another."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def _forget(self, request: socket.socket) -> None:
        del self._ends[request]
        self._free.release()

    def service_actions(self) -> None:
        """End connections whose time is over: called twice a second, and after each connection."""
        now = time.monotonic()
        for request, end in self._ends.copy().items():  # in one step: threads come and go
            if now > end:
                with contextlib.suppress(OSError):  # its thread has closed it just now
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: Any) -> None:  # noqa: ARG002 - inherited
        """Say that a scrape failed: the scraper was too slow, or left."""
        logger.info("a scrape by %s failed: %s", client_address[0], sys.exception())


class _ScrapeHandler(WSGIRequestHandler):
    timeout = SCRAPE_PATIENCE

    def log_message(self, *_: object) -> None:
        """Log no line for each scrape."""


def open_metrics(config: ServeConfig, registry: CollectorRegistry) -> tuple[WSGIServer, str]:
    """Start the metrics endpoint, and return it with its address.

    Raises
    ------
    ConfigurationError
        Its address cannot be had.
    """
    address = metrics_address(config)
    try:
        family, _, _, where = address.find()
        kind = type("_MetricsServer", (_MetricsServer,), {"address_family": family})
        server: WSGIServer = kind(where[:2], _ScrapeHandler)
    except OSError as error:
        raise address.refused(f"{error.strerror or error} (for metrics)") from error
    server.set_app(make_wsgi_app(registry))
    threading.Thread(target=server.serve_forever, name="semid-metrics", daemon=True).start()
    return server, f"{bracketed(address.host)}:{server.server_port}"
