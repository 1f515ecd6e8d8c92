"""TLS, mutual TLS and tokens as a client meets them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from semid.v1 import semid_pb2 as pb
from semid.v1 import semid_pb2_grpc as pb_grpc
from semid_server.errors import ConfigurationError
from semid_server.serving.tls import Certificates, TlsFiles, grpc_takes, read_pems

MODEL = pb.GetModelRequest()


class Identity:
    """An authority, and a server certificate of its in files that can be replaced."""

    def __init__(self, folder):
        self.folder = folder
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        self.client_ca = folder / "clients.pem"
        self.renew()

    def renew(self):
        """Write a new identity by a new authority over the old one."""
        self.authority = trustme.CA()
        issued = self.authority.issue_cert("localhost")
        issued.private_key_pem.write_to_path(self.key)
        self.certificate.unlink(missing_ok=True)
        for pem in issued.cert_chain_pems:
            pem.write_to_path(self.certificate, append=True)
        later = self.key.stat().st_mtime_ns + 10**9
        os.utime(self.certificate, ns=(later, later))

    @property
    def root(self):
        return self.authority.cert_pem.bytes()

    def files(self, *, mutual=False):
        return TlsFiles(
            certificate=self.certificate,
            key=self.key,
            client_ca=self.client_ca if mutual else None,
        )


@pytest.fixture
def identity(tmp_path):
    return Identity(tmp_path)


@pytest.fixture
def ready(backend, device):
    backend.may_load.set()
    device.free()
    return backend


async def ask(address, credentials=None, metadata=None):
    """Ask for the model over a connection of its own; return the status code."""
    port = address.rsplit(":", 1)[1]
    options = [("grpc.enable_retries", 0)]
    channel = (
        grpc.aio.insecure_channel(address, options)
        if credentials is None
        else grpc.aio.secure_channel(f"localhost:{port}", credentials, options)
    )
    async with channel:
        call = pb_grpc.SemanticIdServiceStub(channel).GetModel(MODEL, metadata=metadata)
        return await call.code()


async def test_with_a_certificate_the_service_speaks_tls_only(run_server, ready, identity):
    address = await run_server(ready, tls=identity.files()).address()
    assert await ask(address, grpc.ssl_channel_credentials(identity.root)) == grpc.StatusCode.OK
    assert await ask(address) == grpc.StatusCode.UNAVAILABLE
    stranger = trustme.CA().cert_pem.bytes()
    assert await ask(address, grpc.ssl_channel_credentials(stranger)) == (
        grpc.StatusCode.UNAVAILABLE
    )


async def test_with_authorities_a_client_without_a_certificate_is_turned_away(
    run_server, ready, identity
):
    clients = trustme.CA()
    clients.cert_pem.write_to_path(identity.client_ca)
    address = await run_server(ready, tls=identity.files(mutual=True)).address()

    def presenting(authority):
        issued = authority.issue_cert("client.example")
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        return grpc.ssl_channel_credentials(identity.root, issued.private_key_pem.bytes(), chain)

    assert await ask(address, presenting(clients)) == grpc.StatusCode.OK
    assert await ask(address, presenting(trustme.CA())) == grpc.StatusCode.UNAVAILABLE
    assert await ask(address, grpc.ssl_channel_credentials(identity.root)) == (
        grpc.StatusCode.UNAVAILABLE
    )


async def test_a_renewed_certificate_is_taken_up_by_connections_a_moment_later(
    run_server, ready, identity
):
    address = await run_server(ready, tls=identity.files()).address()
    old = identity.root
    identity.renew()
    new = grpc.ssl_channel_credentials(identity.root)
    async with asyncio.timeout(60):
        while await ask(address, new) != grpc.StatusCode.OK:
            await asyncio.sleep(0.01)
    assert await ask(address, grpc.ssl_channel_credentials(old)) == grpc.StatusCode.UNAVAILABLE


async def test_while_renewed_files_do_not_fit_the_old_certificate_stays(
    run_server, ready, identity, caplog
):
    address = await run_server(ready, tls=identity.files()).address()
    old = identity.root
    kept = identity.certificate.read_bytes()
    identity.renew()
    identity.certificate.write_bytes(kept)  # a renewal that has written one file of two
    async with asyncio.timeout(60):
        while "the certificates read before stay in use" not in caplog.text:
            await asyncio.sleep(0.01)
    assert await ask(address, grpc.ssl_channel_credentials(old)) == grpc.StatusCode.OK


async def test_handshakes_do_not_wait_for_the_disk_of_the_certificates(
    run_server, ready, identity, hanging
):
    identity.certificate = hanging.path(identity.certificate)
    address = await run_server(ready, tls=identity.files()).address()
    hanging.begin()
    await asyncio.to_thread(hanging.asked.wait, 60)
    async with asyncio.timeout(60):
        for _ in range(3):
            credentials = grpc.ssl_channel_credentials(identity.root)
            assert await ask(address, credentials) == grpc.StatusCode.OK
    assert len(hanging.who) == 1, "what looks at the files, and nobody else"


def told(caplog):
    return caplog.text.count("the certificates read before stay in use")


def test_files_that_do_not_fit_are_told_of_once_for_each_state(identity, caplog):
    certificates = Certificates(identity.files())
    kept = identity.certificate.read_bytes()
    for states in (1, 2):
        identity.renew()
        identity.certificate.write_bytes(kept)
        for _ in range(3):
            certificates.look()
        assert told(caplog) == states


@pytest.mark.parametrize(("make", "kind"), [(os.mkdir, "folder"), (os.mkfifo, "pipe")])
def test_what_takes_the_place_of_a_file_is_not_waited_for(identity, caplog, make, kind):
    certificates = Certificates(identity.files())
    identity.key.unlink()
    make(identity.key)
    certificates.look()
    text = f"server.key: not a regular file but a {kind}; the certificates read before stay"
    assert text in caplog.text


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda identity: identity.key.unlink(), "server.key: No such file"),
        (
            lambda identity: identity.key.unlink() or os.mkfifo(identity.key),
            "server.key: not a regular file but a pipe",
        ),
        (lambda identity: identity.key.write_text("x"), "cannot be used together"),
        (
            lambda identity: (
                trustme.CA().issue_cert("x").private_key_pem.write_to_path(identity.key)
            ),
            "cannot be used together",
        ),
    ],
)
def test_files_that_cannot_be_used_are_refused_at_the_start(identity, break_it, text):
    break_it(identity)
    with pytest.raises(ConfigurationError, match=text):
        Certificates(identity.files())


class SelfSigned:
    """A certificate of a key of any kind, which signs it if no other does, in files as above."""

    def __init__(self, folder, key, by=None):
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        by = by or key
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        now = datetime.now(UTC)
        signed = (
            x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
        ).sign(by, None if isinstance(by, (Ed448PrivateKey, Ed25519PrivateKey)) else SHA256())
        self.certificate.write_bytes(signed.public_bytes(Encoding.PEM))
        self.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    def files(self):
        return TlsFiles(certificate=self.certificate, key=self.key)


TAKEN = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "RSA": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
}
REFUSED_BY_CLIENTS = {
    "Ed25519": Ed25519PrivateKey.generate,
    "ECDSA P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
}
NOT_TAKEN = {
    "Ed448": Ed448PrivateKey.generate,
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "brainpool": lambda: ec.generate_private_key(ec.BrainpoolP256R1()),
}


async def is_heard_over(files):
    """Whether a client of gRPC is heard by a server of its with that certificate."""
    key, certificate = files.key.read_bytes(), files.certificate.read_bytes()
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    await server.start()
    try:
        status = await ask(f"localhost:{port}", grpc.ssl_channel_credentials(certificate))
    finally:
        await server.stop(None)
    return status == grpc.StatusCode.UNIMPLEMENTED  # it has no service


@pytest.mark.parametrize("kind", TAKEN)
async def test_certificates_that_grpc_takes_are_taken(tmp_path, kind, caplog):
    files = SelfSigned(tmp_path, TAKEN[kind]()).files()
    Certificates(files)
    assert not caplog.records
    assert await is_heard_over(files)


@pytest.mark.parametrize("kind", NOT_TAKEN)
def test_a_certificate_that_grpc_does_not_take_is_refused_at_the_start_by_name(tmp_path, kind):
    with pytest.raises(
        ConfigurationError, match=r"gRPC takes no .* such as .*server\.pem and .*key"
    ):
        Certificates(SelfSigned(tmp_path, NOT_TAKEN[kind]()).files())


@pytest.mark.parametrize("kind", REFUSED_BY_CLIENTS)
async def test_a_certificate_that_clients_of_grpc_refuse_is_refused_at_the_start_by_name(
    tmp_path, kind
):
    files = SelfSigned(tmp_path, REFUSED_BY_CLIENTS[kind]()).files()
    assert grpc_takes(read_pems(files))
    assert not await is_heard_over(files)
    with pytest.raises(ConfigurationError, match=rf"key of .*server\.pem is of type {kind}, which"):
        Certificates(files)


def test_what_a_certificate_is_signed_with_is_no_reason_to_refuse_it(tmp_path):
    files = SelfSigned(tmp_path, TAKEN["P-256"](), by=Ed25519PrivateKey.generate()).files()
    Certificates(files)


@pytest.mark.parametrize("kind", NOT_TAKEN | REFUSED_BY_CLIENTS)
def test_a_renewed_certificate_that_grpc_does_not_take_is_not_said_to_be_in_use(
    identity, kind, caplog
):
    certificates = Certificates(identity.files())
    SelfSigned(identity.folder, (NOT_TAKEN | REFUSED_BY_CLIENTS)[kind]())
    with caplog.at_level("INFO"):
        for _ in range(3):
            certificates.look()
    assert told(caplog) == 1
    assert "new certificates read" not in caplog.text


def test_to_see_what_grpc_takes_leaves_nothing_open(tmp_path):
    def open_files():
        return len(list(Path("/proc/self/fd").iterdir()))

    good = read_pems(SelfSigned(tmp_path, TAKEN["P-256"]()).files())
    other = read_pems(SelfSigned(tmp_path, NOT_TAKEN["Ed448"]()).files())
    assert (grpc_takes(good), grpc_takes(other)) == (True, False)
    before = open_files()
    for _ in range(10):
        grpc_takes(good)
        grpc_takes(other)
    # What tests before this one have left may come and go meanwhile.
    assert open_files() < before + 10


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(
        f"{hashlib.sha256(b'all').hexdigest()}\n{hashlib.sha256(b'none').hexdigest()} Decode\n"
    )
    return path


@pytest.mark.parametrize("place", range(4))
def test_a_renewal_while_the_files_are_read_never_mixes_old_and_new(identity, place):
    clients = trustme.CA()
    reads = []

    def read(path):
        if len(reads) == place:
            identity.renew()
        reads.append(path)
        return path.read_bytes()

    clients.cert_pem.write_to_path(identity.client_ca)
    pems = read_pems(identity.files(mutual=True), read=read)
    assert len(reads) > place
    assert pems.key == identity.key.read_bytes()
    assert pems.certificate == identity.certificate.read_bytes()
    assert pems.client_ca == clients.cert_pem.bytes()
    assert str(pems.key) not in repr(pems)


def test_files_that_change_whenever_they_are_read_are_refused(identity):
    def read(path):
        identity.renew()
        return path.read_bytes()

    with pytest.raises(ConfigurationError, match=r"server\.key.* changed each of 3 times"):
        read_pems(identity.files(), read=read)


async def test_with_a_token_file_calls_need_a_token_that_is_good_for_them(
    run_server, ready, token_file
):
    server = run_server(ready, token_file=token_file)
    address = await server.address()

    async def with_token(token):
        return await ask(address, metadata=[("authorization", f"Bearer {token}")])

    assert await ask(address) == grpc.StatusCode.UNAUTHENTICATED
    assert await with_token("guess") == grpc.StatusCode.UNAUTHENTICATED
    assert await with_token("none") == grpc.StatusCode.PERMISSION_DENIED
    assert await with_token("all") == grpc.StatusCode.OK
    text = await server.metrics()
    for code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        assert f'grpc_code="{code}",grpc_method="GetModel"' in text


async def test_a_token_that_is_taken_back_is_refused_a_moment_later(run_server, ready, token_file):
    address = await run_server(ready, token_file=token_file).address()
    metadata = [("authorization", "Bearer all")]
    assert await ask(address, metadata=metadata) == grpc.StatusCode.OK
    token_file.write_text(f"{hashlib.sha256(b'other').hexdigest()}\n")
    async with asyncio.timeout(60):
        while await ask(address, metadata=metadata) == grpc.StatusCode.OK:
            await asyncio.sleep(0.01)
    assert await ask(address, metadata=metadata) == grpc.StatusCode.UNAUTHENTICATED


async def test_calls_do_not_wait_for_the_disk_of_the_token_file(
    run_server, ready, token_file, hanging
):
    address = await run_server(ready, token_file=hanging.path(token_file)).address()
    hanging.begin()
    await asyncio.to_thread(hanging.asked.wait, 60)
    metadata = [("authorization", "Bearer all")]
    for _ in range(3):
        assert await ask(address, metadata=metadata) == grpc.StatusCode.OK
    assert await ask(address) == grpc.StatusCode.UNAUTHENTICATED
    assert threading.get_ident() not in hanging.who


@pytest.fixture(params=["tokens", "certificate"])
def on_hanging_disk(request, hanging, token_file, identity):
    """Settings with a file on that disk."""
    if request.param == "tokens":
        return {"token_file": hanging.path(token_file)}
    identity.certificate = hanging.path(identity.certificate)
    return {"tls": identity.files()}


async def test_a_disk_that_hangs_at_the_start_keeps_neither_the_loop_nor_the_end_waiting(
    run_server, ready, hanging, on_hanging_disk
):
    hanging.begin()
    server = run_server(ready, **on_hanging_disk)
    assert await asyncio.to_thread(hanging.asked.wait, 60)
    server.server.request_stop()
    async with asyncio.timeout(60):
        await server.task
    assert threading.get_ident() not in hanging.who
    assert not any(line.startswith("serving") for line in server.lines)


async def test_a_stream_needs_a_token_too(run_server, ready, token_file):
    address = await run_server(ready, token_file=token_file).address()
    async with grpc.aio.insecure_channel(address) as channel:
        call = pb_grpc.SemanticIdServiceStub(channel).EncodeStream()
        assert await call.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_who_may_not_call_is_told_before_the_message_is_read(run_server, ready, token_file):
    address = await run_server(ready, token_file=token_file).address()
    async with grpc.aio.insecure_channel(address) as channel:
        # A unary method of which the message never comes.
        encode = channel.stream_unary("/semid.v1.SemanticIdService/Encode")
        assert await encode().code() == grpc.StatusCode.UNAUTHENTICATED
        not_for_this = (("authorization", "Bearer none"),)
        call = encode(metadata=not_for_this)
        assert await call.code() == grpc.StatusCode.PERMISSION_DENIED


async def test_a_probe_of_health_needs_no_token(run_server, ready, token_file):
    address = await run_server(ready, token_file=token_file).address()
    async with grpc.aio.insecure_channel(address) as channel:
        status = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert status.status == health_pb2.HealthCheckResponse.SERVING


async def services(address):
    # In a thread: a client on an event loop that is refused while it still sends may tell of the
    # sending, in place of the status that it was refused with.
    return await asyncio.to_thread(services_told, address)


def services_told(address):
    with grpc.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (response,) = stub.ServerReflectionInfo(iter([request]), timeout=60)
        return {service.name for service in response.list_services_response.service}


async def test_reflection_can_be_turned_off(run_server, ready):
    assert "semid.v1.SemanticIdService" in await services(await run_server(ready).address())
    address = await run_server(ready, reflection=False).address()
    with pytest.raises(grpc.RpcError) as caught:
        await services(address)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def status_of_health(address):
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        return answer.status


async def test_with_an_admin_port_reflection_is_there_alone(run_server, ready):
    server = run_server(ready, admin_port=0, admin_host="127.0.0.1")
    address = await server.address()
    admin = await server.line("admin on ")
    assert "semid.v1.SemanticIdService" in await services(admin)
    with pytest.raises(grpc.RpcError) as caught:
        await services(address)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert await ask(admin) == grpc.StatusCode.UNIMPLEMENTED, "no calls are served there"


async def test_at_the_admin_port_a_probe_needs_neither_certificate_nor_token(
    run_server, backend, device, identity, token_file
):
    trustme.CA().cert_pem.write_to_path(identity.client_ca)
    server = run_server(
        backend,
        tls=identity.files(mutual=True),
        token_file=token_file,
        admin_port=0,
        reflection=False,
    )
    admin = await server.line("admin on ")
    assert await status_of_health(admin) == health_pb2.HealthCheckResponse.NOT_SERVING
    backend.may_load.set()
    device.free()
    await server.address()
    assert await status_of_health(admin) == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        await services(admin)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_probe_at_the_admin_port_is_not_crowded_out_by_callers(run_server, ready):
    server = run_server(ready, admin_port=0, max_concurrent_rpcs=1)
    address, admin = await server.address(), await server.line("admin on ")
    async with grpc.aio.insecure_channel(address) as channel:
        stream = pb_grpc.SemanticIdServiceStub(channel).EncodeStream()
        await stream.wait_for_connection()
        while await ask(address) != grpc.StatusCode.RESOURCE_EXHAUSTED:
            await asyncio.sleep(0)
        assert await status_of_health(admin) == health_pb2.HealthCheckResponse.SERVING
        stream.cancel()


async def test_metrics_can_be_turned_off(run_server, ready):
    server = run_server(ready, metrics=False)
    await server.address()
    assert not any(line.startswith("metrics") for line in server.lines)
