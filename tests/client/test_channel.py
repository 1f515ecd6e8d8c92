"""How a client reaches its server: addresses, tokens, encryption, processes."""

import socket
import struct
import threading
import time
from pathlib import Path

import grpc
import pytest
import trustme

from semid_client import (
    TLS,
    Client,
    ConfigurationError,
    DeadlineExceededError,
    UnavailableError,
)
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
    with Client("localhost:1", token=TOKEN) as client:
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
        ({"hedge_after": 0}, "hedge_after is 0"),
        ({"hedge_after": float("nan")}, "hedge_after is nan"),
        ({"on_fingerprint_change": "ignore"}, "'ignore'; expected one of warn, error"),
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


def test_a_file_that_is_no_certificate_is_named(tmp_path):
    (tmp_path / "ca.der").write_bytes(b"0\x82")
    with pytest.raises(ConfigurationError, match=r"ca.der: holds no PEM"):
        TLS.from_files(tmp_path / "ca.der")


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


def test_a_client_carried_over_a_fork_is_closed_there_without_waiting(server, run_python):
    done = run_python(
        "import os, sys, semid_client\n"
        "with semid_client.Client(sys.argv[1]) as client:\n"
        "    client.model()\n"
        "    pid = os.fork()\n"
        "if pid: sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "os._exit(0)",
        server.target,
    )
    assert done.returncode == 0, done.stderr


# What is said when nobody answers.


@pytest.fixture
def name_server():
    """The address of a name server, of the test's own, that knows no name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.bind(("127.0.0.1", 0))

        def answer():
            while question := asked.recvfrom(512):
                message, sender = question
                if not message:
                    return
                header = struct.pack(">5H", 0x8183, 1, 0, 0, 0)  # RFC 1035: NXDOMAIN
                asked.sendto(message[:2] + header + message[12:], sender)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"127.0.0.1:{asked.getsockname()[1]}"
        asked.sendto(b"", asked.getsockname())
        thread.join()


def test_a_name_that_does_not_resolve_is_named(connect, name_server):
    with pytest.raises(UnavailableError, match=r"no-such-name.invalid:1.*; check the name") as said:
        connect(f"dns://{name_server}/no-such-name.invalid:1").model()
    assert "semid server runs" not in str(said.value)


def test_a_certificate_of_another_name_is_told_from_a_wrong_authority(make_server, connect):
    authority = trustme.CA()
    issued = authority.issue_cert("semid.example")
    key, chain = issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes()
    server = make_server(credentials=grpc.ssl_server_credentials([(key, chain)]))
    with pytest.raises(UnavailableError, match=f"{server.target}.*is of another name"):
        connect(server, tls=TLS(authority.cert_pem.bytes())).model()
    with pytest.raises(UnavailableError, match=f"{server.target}.*not of the authorities given"):
        connect(server, tls=TLS(trustme.CA().cert_pem.bytes())).model()
    with pytest.raises(UnavailableError, match=r"if the server speaks TLS, so must the client"):
        connect(server).model()
    assert not server.metadata


def test_tls_to_a_server_without_it_is_told(server, connect):
    with pytest.raises(UnavailableError, match="speaks no TLS, while this client does"):
        connect(server, tls=TLS(pem("server.pem"))).model()


def test_a_target_that_never_answered_is_told_from_a_slow_one(make_server, connect, release):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        target = f"127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(DeadlineExceededError, match=f"{target}.*no answer has ever come"):
            connect(target, timeout=0.3).model()
    server = make_server()
    client = connect(server)
    client.model()
    server.script["GetModel"].append(lambda *_: release.wait())
    with pytest.raises(DeadlineExceededError, match="longer timeout"):
        client.model(timeout=0.3)


# Several servers behind one target.


def test_a_new_client_does_not_wait_because_another_one_was_refused(
    make_server, connect, monkeypatch
):
    monkeypatch.setitem(SERVICE_CONFIG, "methodConfig", [])  # no retries: the first answer counts
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        port = nobody.getsockname()[1]
        early = connect(f"127.0.0.1:{port}")
        refused_until = time.monotonic() + 2  # from then on it asks about once a second
        while time.monotonic() < refused_until:
            with pytest.raises(UnavailableError):
                early.model()
    assert connect(make_server(port=port)).model().name == "fake"


@pytest.fixture
def pair(make_server):
    return make_server(), make_server()


def target_of(servers):
    return "ipv4:" + ",".join(server.target for server in servers)


def test_calls_go_to_all_servers_in_turn(pair, connect):
    client = connect(target_of(pair))
    while not all(server.calls("GetModel") for server in pair):
        client.model()
    for server in pair:
        server.requests.clear()
    for _ in range(10):
        client.model()
    assert [server.calls("GetModel") for server in pair] == [5, 5]


def test_a_call_that_one_server_turns_away_is_tried_on_the_next(pair, connect):
    client = connect(target_of(pair))
    while not all(server.calls("GetModel") for server in pair):
        client.model()
    for server in pair:
        server.requests.clear()
    turned_away = iter([True])

    def turn_away_once(_request, context):
        if next(turned_away, False):
            context.abort(grpc.StatusCode.UNAVAILABLE, "draining")

    for server in pair:
        server.script["GetModel"].append(turn_away_once)
    client.model()
    assert [server.calls("GetModel") for server in pair] == [1, 1]


def test_a_server_that_says_it_stops_gets_no_calls_until_it_is_back(pair, connect):
    one, other = pair
    client = connect(target_of(pair))
    one.says_serving(serving=False)
    streak = 0
    while streak < 20:  # the news takes a moment
        before = one.calls("GetModel")
        client.model()
        streak = streak + 1 if one.calls("GetModel") == before else 0
    one.says_serving(serving=True)
    while one.calls("GetModel") == before:
        client.model()
    assert other.calls("GetModel") >= 20


def test_a_target_without_a_server_that_serves_says_so(server, connect):
    server.says_serving(serving=False)
    with pytest.raises(UnavailableError, match=r"unhealthy.*every server there is loading"):
        connect(server).model()


def test_health_can_be_left_alone(server, connect):
    server.says_serving(serving=False)
    assert connect(server, health_checks=False).model().name == "fake"
