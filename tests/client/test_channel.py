"""How a client reaches its server: addresses, tokens, encryption, processes."""

from pathlib import Path

import grpc
import pytest

from semid_client import TLS, Client, ConfigurationError, UnavailableError
from semid_client._channel import SERVICE_CONFIG, is_loopback

PEMS = Path(__file__).parent / "tls"
TOKEN = "an open secret"  # noqa: S105 - it opens nothing


@pytest.mark.parametrize(
    "target",
    [
        "localhost:50051",
        "localhost",
        "127.0.0.1:50051",
        "127.1.2.3:1",
        "[::1]:50051",
        "::1",
        "dns:///localhost:50051",
        "dns:localhost:50051",
        "dns://8.8.8.8/localhost:50051",
        "ipv4:127.0.0.1:50051",
        "ipv6:[::1]:50051",
        "unix:/run/semid.sock",
        "unix-abstract:semid",
    ],
)
def test_an_address_of_this_machine_is_known(target):
    assert is_loopback(target)


@pytest.mark.parametrize(
    "target",
    [
        "semid.example:50051",
        "localhost.example:50051",
        "10.0.0.1:50051",
        "[2001:db8::1]:50051",
        "dns:///semid.example:50051",
        "dns://127.0.0.1/semid.example:50051",
        "ipv4:127.0.0.1:50051,10.0.0.1:50051",
        "ipv4:10.0.0.1:50051,127.0.0.1:50051",
        "127.0.0.1.example:50051",
        "unix",
        "xds:///localhost:1",
    ],
)
def test_an_address_that_may_be_elsewhere_is_not_taken_for_this_machine(target):
    assert not is_loopback(target)


def test_a_token_is_not_sent_unencrypted_to_another_machine():
    with pytest.raises(ConfigurationError, match=r"travel unencrypted to semid.example:50051"):
        Client("semid.example:50051", token=TOKEN)


@pytest.mark.parametrize("how", [{"tls": TLS()}, {"allow_plaintext_token": True}])
def test_a_token_is_sent_to_another_machine_encrypted_or_if_told_so(how):
    Client("semid.example:50051", token=TOKEN, **how).close()


def test_a_token_is_shown_nowhere():
    with Client("localhost:1", token=TOKEN, timeout=5) as client:
        assert TOKEN not in repr(client)
        assert TOKEN not in repr(client._settings)
        with pytest.raises(UnavailableError) as caught:
            client.model()
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"target": ""}, "target is empty"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"max_in_flight": 0}, "max_in_flight is 0"),
        ({"token": ""}, "token is empty"),
        ({"token": "a\nb"}, "token is empty, or holds other than printable ASCII"),
        ({"token": "é"}, "token is empty, or holds other than printable ASCII"),
    ],
)
def test_an_argument_that_cannot_work_is_refused(wrong, says):
    with pytest.raises(ConfigurationError, match=says):
        Client(**{"target": "localhost:50051"} | wrong)


def test_half_a_client_certificate_is_refused():
    with pytest.raises(ConfigurationError, match="give both or none"):
        TLS(certificate_chain=b"")


def test_a_certificate_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none.pem: No such file"):
        TLS.from_files(tmp_path / "none.pem")


def pem(name):
    return (PEMS / name).read_bytes()


@pytest.fixture
def encrypted_server(make_server):
    return make_server(
        credentials=grpc.ssl_server_credentials(
            [(pem("server.key"), pem("server.pem"))],
            root_certificates=pem("client.pem"),
            require_client_auth=True,
        )
    )


def test_a_server_and_a_client_that_show_their_certificates_talk(encrypted_server, connect):
    tls = TLS.from_files(PEMS / "server.pem", PEMS / "client.pem", PEMS / "client.key")
    assert connect(encrypted_server, tls=tls, token=TOKEN).model().name == "fake"
    assert encrypted_server.metadata[0]["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize(
    "tls",
    [
        TLS(),
        TLS(pem("client.pem"), pem("client.pem"), pem("client.key")),
        TLS(pem("server.pem")),
        None,
    ],
    ids=["public authorities", "another authority", "no certificate", "no encryption"],
)
def test_without_the_right_certificates_nothing_is_said(encrypted_server, connect, tls):
    with pytest.raises(UnavailableError):
        connect(encrypted_server, tls=tls).model()
    assert not encrypted_server.metadata


def test_every_method_that_is_retried_exists():
    from semid.v1 import semid_pb2  # noqa: PLC0415

    service = semid_pb2.DESCRIPTOR.services_by_name["SemanticIdService"]
    for name in SERVICE_CONFIG["methodConfig"][0]["name"]:
        assert name["service"] == service.full_name
        assert name["method"] in service.methods_by_name


def test_importing_the_client_imports_neither_torch_nor_what_the_commands_need(run_python):
    done = run_python(
        "import sys, semid_client\n"
        "heavy = {'torch', 'click', 'tqdm', 'semid_server', 'scipy', 'pyarrow', 'ml_dtypes'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_client_carried_over_a_fork_says_so_and_does_not_hang(server, run_python):
    done = run_python(
        "import os, sys, semid_client\n"
        "client = semid_client.Client(sys.argv[1])\n"
        "pid = os.fork()\n"
        "if pid: sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "try: client.model()\n"
        "except semid_client.ClientClosedError as error: print(error, flush=True)\n"
        "os._exit(0)",
        server.target,
    )
    assert "made before a fork" in done.stdout
    assert done.returncode == 0
