"""`semid health` is 0 for a server that serves and 1 for every other, with the reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import trustme
from click.testing import CliRunner
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc

from semid_server.cli.health import health

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def authority(tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return authority


@pytest.fixture
def start():
    """Start servers of nothing but health; return where."""
    servers = []

    def serve(status, credentials=None) -> str:
        server = grpc.server(ThreadPoolExecutor(1))
        servicer = grpc_health.HealthServicer()
        servicer.set("", status)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        port = (
            server.add_insecure_port("127.0.0.1:0")
            if credentials is None
            else server.add_secure_port("localhost:0", credentials)
        )
        server.start()
        servers.append(server)
        return f"{'127.0.0.1' if credentials is None else 'localhost'}:{port}"

    yield serve
    for server in servers:
        server.stop(None).wait()


def _run(*arguments):
    return CliRunner().invoke(health, [*map(str, arguments), "--timeout", "60"])


def test_a_server_that_serves_is_healthy(start):
    target = start(SERVING)
    told = _run("--target", target)
    assert (told.exit_code, told.output) == (0, f"{target}: SERVING\n")


def test_a_server_that_drains_is_not(start):
    target = start(NOT_SERVING)
    told = _run("--target", target)
    assert (told.exit_code, told.output) == (1, f"Error: {target}: NOT_SERVING\n")


def test_no_server_is_not():
    told = _run("--target", "127.0.0.1:1")
    assert told.exit_code == 1
    assert "UNAVAILABLE" in told.output


def test_an_encrypted_server_is_asked_with_its_authority(start, authority, tmp_path):
    issued = authority.issue_cert("localhost")
    pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    target = start(SERVING, grpc.ssl_server_credentials([pair]))
    assert _run("--target", target, "--ca", tmp_path / "ca.pem").exit_code == 0
    plain = _run("--target", target)
    assert plain.exit_code == 1
    assert "UNAVAILABLE" in plain.output
