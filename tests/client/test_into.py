"""Transfers that need not fit in memory, and that outlast a busy or restarting server."""

import grpc
import numpy as np
import pytest

from semid_client import (
    FingerprintMismatchError,
    InvalidInputError,
    ResourceExhaustedError,
    UnavailableError,
)

FINGERPRINT = "f" * 64


class Rows:
    """A source that makes its rows as they are asked for, and remembers which were."""

    def __init__(self, n, n_columns=4, dtype=np.float32):
        self.shape, self.dtype = (n, n_columns), np.dtype(dtype)
        self.asked = []

    def __getitem__(self, rows):
        self.asked.append(rows)
        array = np.zeros((rows.stop - rows.start, self.shape[1]), self.dtype)
        array[:, 0] = np.arange(rows.start, rows.stop) % 50
        return array


class Sink:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.pieces = []
        self.n_rows = 0

    def __call__(self, start, rows):
        assert start == self.n_rows
        self.n_rows += len(rows)
        self.pieces.append(rows)


def fail(code, *metadata):
    def abort(_request, context):
        context.set_trailing_metadata(metadata)
        context.abort(code, "not now")

    return abort


BUSY = fail(grpc.StatusCode.RESOURCE_EXHAUSTED, ("grpc-retry-pushback-ms", "1"))
AWAY = fail(grpc.StatusCode.UNAVAILABLE)


def test_rows_are_encoded_piece_by_piece_in_order(make_server, connect):
    server, source, sink = make_server(max_rows=10), Rows(95), Sink()
    assert connect(server).encode_into(source, sink) == FINGERPRINT
    np.testing.assert_array_equal(
        np.concatenate(sink.pieces), server.expected_codes(source[slice(0, 95)])
    )
    assert [len(piece) for piece in sink.pieces] == [10] * 9 + [5]


def test_codes_are_decoded_piece_by_piece_in_order(make_server, connect):
    server, source, sink = make_server(max_rows=10), Rows(95, 3, np.int64), Sink()
    assert connect(server).decode_into(source, sink) == FINGERPRINT
    np.testing.assert_array_equal(
        np.concatenate(sink.pieces), server.expected_reconstruction(source[slice(0, 95)])
    )


def test_vectors_of_another_calibration_than_expected_are_refused(make_server, connect):
    client = connect(make_server(max_rows=10))
    with pytest.raises(FingerprintMismatchError, match="calibration none, but abc is expected"):
        client.decode_into(Rows(5, 3, np.int64), Sink(), "sum", calibration="abc")
    client.decode_into(Rows(5, 3, np.int64), Sink(), "sum", calibration="")


def test_no_more_is_read_than_there_is_room_to_send(make_server, connect):
    server, source = make_server(max_rows=10), Rows(1000)
    furthest = []
    connect(server, max_in_flight=3).encode_into(
        source, lambda start, _: furthest.append(source.asked[-1].start - start)
    )
    assert max(furthest) <= 30


@pytest.mark.parametrize("trouble", [BUSY, AWAY])
def test_a_server_in_trouble_is_waited_for(make_server, connect, trouble):
    server, source, sink = make_server(max_rows=10), Rows(30), Sink()
    server.script["Encode"] += [trouble] * 10
    client = connect(server, max_in_flight=1)
    client.encode_into(source, sink)
    assert sink.n_rows == 30


@pytest.mark.parametrize(
    ("trouble", "error"), [(BUSY, ResourceExhaustedError), (AWAY, UnavailableError)]
)
def test_waiting_for_a_server_ends_at_the_timeout_of_a_message(
    make_server, connect, trouble, error
):
    server = make_server(max_rows=10)
    client = connect(server, max_in_flight=1)
    client.model()
    server.script["Encode"] += [trouble] * 10_000
    with pytest.raises((error, TimeoutError)):
        client.encode_into(Rows(30), Sink(), timeout=0.5)


def test_a_message_too_large_for_the_server_is_not_waited_for(server, connect):
    server.script["Encode"] += [fail(grpc.StatusCode.RESOURCE_EXHAUSTED)] * 4
    with pytest.raises(ResourceExhaustedError):
        connect(server).encode_into(Rows(1), Sink())


def test_a_server_that_comes_back_with_another_model_ends_the_transfer(make_server, connect):
    server, sink = make_server(max_rows=10), Sink()

    def replace(request, context):
        server.fingerprint = "0" * 64
        AWAY(request, context)

    server.script["Encode"] += [None, None, replace]
    with pytest.raises(FingerprintMismatchError):
        connect(server, max_in_flight=1).encode_into(Rows(100), sink)
    assert sink.n_rows == 20


def test_a_sink_that_fails_ends_the_transfer_with_its_own_error(make_server, connect):
    def full(_start, _rows):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        connect(make_server(max_rows=1)).encode_into(Rows(100), full)


@pytest.mark.parametrize("error", [UnavailableError, FingerprintMismatchError])
def test_an_error_of_a_sink_is_not_taken_for_one_of_the_server(make_server, connect, error):
    """A sink may itself call a server, and must not be given the same rows again."""
    given = []

    def call_another_server(start, _rows):
        given.append(start)
        raise error("another server")

    server = make_server(max_rows=10)
    with pytest.raises(error, match="another server"):
        connect(server, max_in_flight=1).encode_into(Rows(100), call_another_server)
    assert given == [0]
    assert server.calls("Encode") == 1


def test_a_source_that_is_no_matrix_is_refused(server, connect):
    with pytest.raises(InvalidInputError, match=r"shape \(3,\); expected \(rows, columns\)"):
        connect(server).encode_into(np.zeros(3), Sink())
