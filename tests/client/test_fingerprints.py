"""What a client does when the servers behind its target do not all serve the same model."""

import warnings

import numpy as np
import pytest

from semid_client import Client, FingerprintChangedWarning, FingerprintMismatchError

FINGERPRINT = "f" * 64
OTHER_FINGERPRINT = "0" * 64


def rows(n):
    array = np.zeros((n, 4), np.float32)
    array[:, 0] = np.arange(n) % 200
    return array


class Mixed:
    """Two servers behind one target, of models that give different codes."""

    def __init__(self, make_server):
        self.old = make_server(max_rows=10)
        self.new = make_server(max_rows=10, n_layers=2, fingerprint=OTHER_FINGERPRINT)
        self.target = f"ipv4:{self.old.target},{self.new.target}"

    def both_answered(self, method="Encode"):
        return self.old.calls(method) and self.new.calls(method)


@pytest.fixture
def mixed(make_server):
    return Mixed(make_server)


def test_a_replaced_model_is_warned_of_once(server, connect):
    client = connect(server)
    client.encode(rows(1))
    server.fingerprint = OTHER_FINGERPRINT
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            client.encode(rows(1))
            client.decode([[1]])
    assert [warning.category for warning in warned] == [FingerprintChangedWarning]
    for part in (server.target, FINGERPRINT, OTHER_FINGERPRINT, "must not be mixed"):
        assert part in str(warned[0].message)
    assert client.fingerprints == (FINGERPRINT, OTHER_FINGERPRINT)


def test_the_warning_points_at_the_callers_line(server):
    with Client(server.target) as client:
        client.encode(rows(1))
        server.fingerprint = OTHER_FINGERPRINT
        with pytest.warns(FingerprintChangedWarning) as warned:
            client.encode(rows(1))
    assert warned[0].filename == __file__


def test_asking_what_the_model_is_notices_too(server, connect):
    client = connect(server)
    client.model()
    server.fingerprint = OTHER_FINGERPRINT
    with pytest.warns(FingerprintChangedWarning):
        client.model()


def test_a_client_that_asks_for_an_error_keeps_to_the_model_it_met_first(server, connect):
    client = connect(server, on_fingerprint_change="error")
    client.encode(rows(1))
    server.fingerprint = OTHER_FINGERPRINT
    for _ in range(2):
        with pytest.raises(FingerprintMismatchError, match=f"{OTHER_FINGERPRINT}.*{FINGERPRINT}"):
            client.encode(rows(1))
        with pytest.raises(FingerprintMismatchError):
            client.decode([[1]])
        with pytest.raises(FingerprintMismatchError, match="answered this client before"):
            client.model()
    server.fingerprint = FINGERPRINT
    client.encode(rows(1))
    assert client.fingerprints == (FINGERPRINT,)


def test_the_answers_to_one_call_are_of_one_model_while_replicas_differ(mixed, connect):
    client = connect(mixed.target, max_in_flight=4)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        while not mixed.both_answered() or len(client.fingerprints) < 2:
            codes = client.encode(rows(100))
            server = mixed.old if codes.shape == (100, 3) else mixed.new
            np.testing.assert_array_equal(codes, server.expected_codes(rows(100)))
    assert len(warned) == 1
    assert set(client.fingerprints) == {FINGERPRINT, OTHER_FINGERPRINT}


@pytest.mark.parametrize("settings", [
    {"expected_fingerprint": FINGERPRINT},
    {"on_fingerprint_change": "error"},
])  # fmt: skip
def test_a_client_of_one_model_is_served_by_the_replicas_that_have_it(mixed, connect, settings):
    client = connect(mixed.target, **settings)
    client.model()
    wanted = mixed.old if client.fingerprints == (FINGERPRINT,) else mixed.new
    while not (mixed.both_answered() and mixed.both_answered("GetModel")):
        np.testing.assert_array_equal(client.encode(rows(5)), wanted.expected_codes(rows(5)))
        client.model()
    assert client.fingerprints == (wanted.fingerprint,)


def test_rows_that_go_into_a_sink_are_of_one_model_while_replicas_differ(mixed, connect):
    client = connect(mixed.target, on_fingerprint_change="error", max_in_flight=2)
    while not mixed.both_answered("GetModel"):  # then there is a connection to each
        client.model()
    pieces = []
    fingerprint = client.encode_into(rows(200), lambda start, codes: pieces.append((start, codes)))
    assert mixed.both_answered()
    assert [start for start, _ in pieces] == list(range(0, 200, 10))
    assert client.fingerprints == (fingerprint,)
    server = mixed.old if fingerprint == FINGERPRINT else mixed.new
    np.testing.assert_array_equal(
        np.concatenate([codes for _, codes in pieces]), server.expected_codes(rows(200))
    )
