"""What people give a client by mistake, and are told of it before anything goes wrong quietly."""

import copy
import pickle
import re

import grpc
import numpy as np
import pytest
import torch

from semid.v1 import semid_pb2 as pb
from semid_client import (
    Client,
    ClientClosedError,
    ConfigurationError,
    FingerprintMismatchError,
    InvalidInputError,
    NotFoundError,
    ProtocolError,
    SemidClientError,
)


def column_of(*rows):
    column = np.empty(len(rows), object)
    column[:] = rows
    return column


@pytest.mark.parametrize(
    "target",
    [
        "localhost:50051",
        "semid.example:1",
        "10.0.0.7:65535",
        "[::1]:50051",
        "dns:localhost:50051",
        "dns:///semid.example:50051",
        "dns://8.8.8.8/semid.example:50051",
        "ipv4:10.0.0.7:50051",
        "ipv4:10.0.0.7:50051,10.0.0.8:50051",
        "ipv6:[::1]:50051,[2001:db8::1]:50051",
        "ipv6:%5B::1%5D:50051",
        "unix:relative",
        "unix:///run/semid.sock",
        "unix-abstract:semid",
        "xds:///semid",
    ],
)
def test_every_way_to_name_a_server_is_taken(target):
    Client(target).close()


@pytest.mark.parametrize(
    "target",
    [
        None,
        50051,
        ("localhost", 50051),
        b"localhost:50051",
        "",
        "localhost",  # gRPC would try port 443
        "50051",
        ":50051",
        "localhost:",
        "localhost:grpc",
        "localhost:0",
        "localhost:99999",  # gRPC would try port 34463
        "::1",
        "[::1]",
        " localhost:50051",
        "localhost:50051\n",
        "localhost:50051/",
        "http://localhost:50051",
        "https://localhost:50051",
        "grpc://localhost:50051",
        "dns://localhost:50051",  # that is a name server, and no name
        "dns:///localhost",
        "ipv4:127.0.0.1",
        "ipv4:127.0.0.1:50051,127.0.0.1",
        "ipv4:127.0.0.1:50051,",
    ],
)
def test_what_names_no_server_is_refused_with_what_would(target):
    with pytest.raises(ConfigurationError, match=r"target is .*; expected HOST:PORT, such as"):
        Client(target)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"timeout": None}, "timeout is None"),
        ({"timeout": "5"}, "timeout is '5'"),
        ({"max_in_flight": 2.5}, "max_in_flight is 2.5; expected a whole number"),
        ({"max_in_flight": "4"}, "max_in_flight is '4'"),
        ({"hedge_after": "1"}, "hedge_after is '1'"),
        ({"model": None}, "model is None"),
        ({"expected_fingerprint": None}, "expected_fingerprint is None"),
        ({"expected_fingerprint": "9940962a"}, "'9940962a'; expected 64 digits"),
        ({"expected_fingerprint": "F" * 64}, "expected 64 digits of 0 to 9 and a to f"),
        ({"tls": True}, r"tls is True; expected TLS\(...\)"),
        ({"token": b"secret"}, "token is of type bytes, not text"),
    ],
)
def test_an_argument_of_another_type_is_refused(wrong, says):
    with pytest.raises(ConfigurationError, match=says) as caught:
        Client("localhost:50051", **wrong)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("seconds", ["1", None, -1])
def test_a_timeout_of_another_type_is_refused(server, connect, seconds):
    with pytest.raises(ConfigurationError, match=f"timeout is {seconds!r}"):
        connect(server).wait_ready(timeout=seconds)


@pytest.mark.parametrize(
    "array",
    [
        torch.ones(2, 4),
        np.ma.ones((2, 4)),
        [np.ones(4), np.ones(4)],
        (1.0, 1, 1, 1),
    ],
    ids=["torch", "masked, but nowhere", "list of arrays", "tuple"],
)
def test_what_is_an_array_to_numpy_is_encoded(server, connect, array):
    codes = connect(server).encode(array)
    assert (codes == [1, 2, 3]).all()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (torch.ones(2, 4, requires_grad=True), r"do not form an array: .* requires grad.*detach"),
        (torch.ones(2, 4).bfloat16(), "do not form an array: .*BFloat16"),
        (column_of(np.ones(4), np.ones(4)), r"objects of Python, .*numpy.stack\(column\)"),
        (column_of([1.0] * 4, None), "objects of Python"),
        ({"embedding": [1.0]}, r"of type dict and shape \(\)"),
        (None, r"of type NoneType and shape \(\)"),
        ((row for row in [[1.0]]), "of type generator"),
        ([], r"are empty .* shape \(0, columns\)"),
        (["a", "b"], "are str32; expected float32"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_what_is_no_array_of_numbers_is_refused_with_what_to_do(
    server, connect, method, array, says
):
    if method == "decode":
        says = says.replace("expected float32", "expected an integer")
    with pytest.raises(InvalidInputError, match=says):
        getattr(connect(server), method)(array)
    assert not server.metadata


def test_a_masked_number_is_not_taken_for_what_lies_under_the_mask(server, connect):
    rows = np.ma.ones((3, 4), np.float32)
    rows[2, 3] = np.ma.masked
    with pytest.raises(InvalidInputError, match="row 2: number 3 is masked") as caught:
        connect(server).encode(rows)
    assert caught.value.row == 2
    with pytest.raises(InvalidInputError, match="row 0: number 3 is masked"):
        connect(server).encode(rows[2])


def test_a_wrong_width_is_told_and_not_a_number_in_it(server, connect):
    with pytest.raises(InvalidInputError, match="rows of 5 numbers"):
        connect(server).encode(np.full((2, 5), np.nan))


@pytest.mark.parametrize("again", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_client_that_is_to_be_copied_says_what_to_do_instead(again):
    with (
        Client("localhost:1") as client,
        pytest.raises(TypeError, match=r"a Client holds connections .* make one in each process"),
    ):
        again(client)


def test_a_proxy_is_not_asked_for_the_way_to_this_very_machine(server, run_python):
    """Nor given the token, which may go to this machine unencrypted."""
    done = run_python(
        "import os, socket, sys, semid_client\n"
        "proxy = socket.create_server(('127.0.0.1', 0))\n"
        "for name in ('http_proxy', 'https_proxy', 'grpc_proxy'):\n"
        "    os.environ[name] = f'http://127.0.0.1:{proxy.getsockname()[1]}'\n"
        "with semid_client.Client(sys.argv[1], token='secret') as client:\n"
        "    print(client.model().name)",
        server.target,
    )
    assert done.stdout == "fake\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((-1, 4), "rows is -1; expected a whole number, at least 0"),
        ((4, -1), "width is -1; expected"),
        ((1.5, 4), "rows is 1.5; expected"),
        ((4, "384"), "width is '384'; expected"),
        ((None, 4), "rows is None; expected"),
        ((1, 384, "nonsense"), "dtype is 'nonsense'; expected float32, float16, bfloat16"),
        ((1, 384, 7), "dtype is 7; expected float32"),
        ((1, 384, "int8"), "embeddings are int8; expected float32"),
    ],
)
def test_an_array_that_cannot_be_is_refused_with_what_it_would_be(server, connect, arguments, says):
    with pytest.raises(InvalidInputError, match=says):
        connect(server).allocate(*arguments)


def unsound(_request, _context):
    return pb.GetModelResponse()


def refused(_request, context):
    context.abort(grpc.StatusCode.NOT_FOUND, "no such model")


METHODS = {
    "encode": lambda client, **how: client.encode(np.ones((1, 4), np.float32), **how),
    "decode": lambda client, **how: client.decode([[1, 2, 3]], **how),
    "allocate": lambda client, **how: client.allocate(1, 4, **how),
    "model": lambda client, **how: client.model(**how),
    "models": lambda client, **how: client.models(**how),
    "wait_ready": lambda client, **how: client.wait_ready(**how),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_raises_the_errors_that_its_docstring_names(server, connect, method):
    call = METHODS[method]
    caught = []

    def fails(client, **how):
        with pytest.raises(SemidClientError) as error:
            call(client, **how)
        caught.append(type(error.value))

    asked = "ListModels" if method == "models" else "GetModel"
    fails(connect(server), timeout=-1)
    server.script[asked].append(refused)
    fails(connect(server))
    server.script[asked].append(
        (lambda *_: pb.ListModelsResponse(models=[pb.Model()])) if method == "models" else unsound
    )
    fails(connect(server))
    expected = [ConfigurationError, NotFoundError, ProtocolError]
    if method != "models":
        fails(connect(server, expected_fingerprint="0" * 64))
        expected.append(FingerprintMismatchError)
    closed = connect(server)
    closed.close()
    fails(closed)
    assert caught == [*expected, ClientClosedError]
    _, _, told = getattr(Client, method).__doc__.partition("Raises")
    named = set(re.findall(r"^ +(\w+Error)$", told, re.MULTILINE))
    for error in caught:
        assert named & {base.__name__ for base in error.__mro__}, error


def test_a_port_that_speaks_another_protocol_is_told(connect):
    import http.server  # noqa: PLC0415
    import threading  # noqa: PLC0415

    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as web:
        serving = threading.Thread(target=web.serve_forever, daemon=True)
        serving.start()
        with pytest.raises(ConnectionError, match="no gRPC server: is it the port of the metrics"):
            connect(f"127.0.0.1:{web.server_port}").model()
        web.shutdown()
        serving.join()
