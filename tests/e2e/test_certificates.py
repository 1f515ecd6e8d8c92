"""Certificates that are renewed while a server is under load: no call fails of it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading

import grpc
import numpy as np
import pytest
import trustme
from waiting import wait_until

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub

# A machine that takes minutes is slow, not wrong.
pytestmark = pytest.mark.timeout(400)


class Identity:
    """The files of a server whose certificates come from one authority, and of its clients."""

    def __init__(self, folder):
        self.authority = trustme.CA()
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        self.clients, self.client = folder / "clients.pem", folder / "client.pem"
        self.authority.cert_pem.write_to_path(self.clients)
        issued = self.authority.issue_cert("caller.example")
        self.root = self.authority.cert_pem.bytes()
        self.client_key = issued.private_key_pem.bytes()
        self.client_chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        issued.private_key_and_cert_chain_pem.write_to_path(self.client)
        self.renew()

    def renew(self):
        """Write a new certificate over the old one, key first: for a moment they are no pair."""
        issued = self.authority.issue_cert("localhost")
        issued.private_key_pem.write_to_path(self.key)
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))

    def serial(self, port):
        """Connect anew, and return the number of the certificate that the server shows."""
        context = ssl.create_default_context(cadata=self.root.decode())
        context.load_cert_chain(self.client)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", port), 60) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secured,
        ):
            return secured.getpeercert()["serialNumber"]


class Caller:
    """Calls all the while, and tries nothing twice; each time over a new connection, or never."""

    def __init__(self, connect, request, truth, *, anew):
        self._connect, self._request, self._truth, self._anew = connect, request, truth, anew
        self.answers, self.failure = 0, None
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._call, daemon=True)

    def _call(self):
        channel = self._connect()
        try:
            while not self._leave.wait(0.005):
                stub = SemanticIdServiceStub(channel)
                assert stub.Encode(self._request, timeout=60).tensor.data == self._truth
                self.answers += 1
                if self._anew:
                    channel.close()
                    channel = self._connect()
        except (grpc.RpcError, AssertionError) as error:
            self.failure = error
        finally:
            channel.close()

    def is_served(self):
        """Wait for an answer to a call that begins from now on."""
        before = self.answers
        wait_until(lambda: self.failure or self.answers > before + 1)
        assert self.failure is None

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._leave.set()
        self._thread.join(90)


def test_certificates_renewed_under_load_fail_no_call(serve, reference_dir, digits, tmp_path):
    identity = Identity(tmp_path)
    server = serve(
        reference_dir / "digits_rkmeans/model.ckpt",
        "--tls-cert",
        identity.certificate,
        "--tls-key",
        identity.key,
        "--tls-client-ca",
        identity.clients,
    )
    port = int(server.target.rpartition(":")[2])

    def connect():
        credentials = grpc.ssl_channel_credentials(
            identity.root, identity.client_key, identity.client_chain
        )
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        return grpc.secure_channel(f"localhost:{port}", credentials, options)

    tensor = pb.Tensor(
        dtype=pb.DATA_TYPE_FLOAT32, shape=[9, 64], data=np.array(digits[:9], "<f4").tobytes()
    )
    request = pb.EncodeRequest(tensor=tensor)
    with connect() as channel:
        truth = SemanticIdServiceStub(channel).Encode(request, timeout=60).tensor.data
    with (
        Caller(connect, request, truth, anew=False) as lasting,
        Caller(connect, request, truth, anew=True) as first,
        Caller(connect, request, truth, anew=True) as second,
    ):
        shown = [identity.serial(port)]
        for _ in range(3):
            identity.renew()
            wait_until(lambda: identity.serial(port) != shown[-1])
            shown.append(identity.serial(port))
            for caller in (lasting, first, second):
                caller.is_served()
    assert [caller.failure for caller in (lasting, first, second)] == [None] * 3
    assert len(set(shown)) == 4
    assert server.stop() == 0


JUNK = 700
"""Handshakes that fail: twice as many as there are lines of gRPC's own in the 64 KiB of a pipe."""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_handshakes_that_fail_neither_write_to_the_log_nor_wait_for_who_reads_it(
    serve, reference_dir, tmp_path, processes
):
    identity = Identity(tmp_path)
    reader, writer = os.pipe()
    server = serve(
        reference_dir / "digits_rkmeans/model.ckpt",
        *("--tls-cert", identity.certificate, "--tls-key", identity.key),
        *("--log-format", "json", "--processes", processes),
        stderr=writer,
    )
    os.close(writer)
    port = int(server.target.rpartition(":")[2])
    for _ in range(JUNK):
        with socket.create_connection(("127.0.0.1", port), 60) as peer:
            peer.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                peer.recv(100)  # an alert: the handshake has failed
    credentials = grpc.ssl_channel_credentials(identity.root)
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        SemanticIdServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=60)
    assert server.stop() == 0
    with os.fdopen(reader) as log:
        lines = log.read().splitlines()
    assert lines
    assert all(isinstance(json.loads(line), dict) for line in lines)
