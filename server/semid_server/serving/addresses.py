"""Addresses to listen on: found free before anything is loaded, and named as people write them."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from prometheus_client import start_http_server

from semid_server.errors import ConfigurationError

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import CollectorRegistry

    from semid_server.serving.config import ServeConfig


def bracketed(host: str) -> str:
    """Write an IPv6 address as URLs do."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def cannot_listen(config: ServeConfig, why: str) -> ConfigurationError:
    """Build the error of an address that cannot be had."""
    return ConfigurationError(
        f"cannot listen on {bracketed(config.host)}:{config.port}: {why}; "
        "choose another with --port or --host"
    )


def check_address(config: ServeConfig) -> None:
    """Bind the address and let go of it: gRPC itself says why it cannot only to its own log."""
    _bind(config, config.port, shared=False).close()


def share_address(config: ServeConfig) -> socket.socket:
    """Take a port that several servers of this user may bind, and keep it until it is closed.

    The socket returned never listens: connections go to the servers alone.
    """
    check_address(config)
    return _bind(config, config.port, shared=True)


def _bind(config: ServeConfig, port: int, *, shared: bool) -> socket.socket:
    host = config.host.strip("[]")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            # As gRPC does: what a server before this one left in TIME_WAIT is no obstacle.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise cannot_listen(config, error.strerror or str(error)) from error
    return bound


def open_metrics(config: ServeConfig, registry: CollectorRegistry) -> tuple[WSGIServer, str]:
    """Start the metrics endpoint, and return it with its address.

    Raises
    ------
    ConfigurationError
        Its address cannot be had.
    """
    host = config.metrics_host or config.host
    try:
        server, _ = start_http_server(config.metrics_port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {bracketed(host)}:{config.metrics_port} for metrics: "
            f"{error.strerror}; choose another with --metrics-port or --metrics-host"
        ) from error
    return server, f"{bracketed(host)}:{server.server_port}"
