"""What happens to a call: retries, deadlines, order, fingerprints, and every way to fail."""

import pickle
import threading
import time

import grpc
import numpy as np
import pytest

import semid_client
from semid.v1 import semid_pb2 as pb
from semid_client import (
    CallError,
    CancelledError,
    Client,
    ClientClosedError,
    DeadlineExceededError,
    FailedPreconditionError,
    FingerprintChangedWarning,
    FingerprintMismatchError,
    InvalidInputError,
    ProtocolError,
    ResourceExhaustedError,
    SemidClientError,
    UnavailableError,
)
from semid_client._errors import ERROR_OF_STATUS

FINGERPRINT = "f" * 64
OTHER_FINGERPRINT = "0" * 64
STATUSES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


class Fail:
    """An answer that is a status."""

    def __init__(self, code=grpc.StatusCode.UNAVAILABLE, details="out for lunch", metadata=()):
        self.code, self.details, self.metadata = code, details, metadata

    def __call__(self, request, context):
        context.set_trailing_metadata(self.metadata)
        context.abort(self.code, self.details)


def busy(milliseconds):
    return Fail(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full",
        (("grpc-retry-pushback-ms", str(milliseconds)),),
    )


def rows(n, input_dim=4):
    array = np.zeros((n, input_dim), np.float32)
    array[:, 0] = np.arange(n) % 200
    return array


# Retries.


@pytest.mark.parametrize("method", ["GetModel", "Encode", "Decode", "ListModels"])
def test_a_server_that_is_unavailable_three_times_is_asked_a_fourth(server, connect, method):
    client = connect(server)
    client.model()
    server.requests.clear()
    server.script[method] += [Fail()] * 3
    calls = {
        "GetModel": client.model,
        "ListModels": client.models,
        "Encode": lambda: client.encode(rows(1)),
        "Decode": lambda: client.decode([[1]]),
    }
    calls[method]()
    assert server.calls(method) == 4


def test_after_four_attempts_the_caller_is_told(server, connect):
    server.script["GetModel"] += [Fail()] * 10
    with pytest.raises(UnavailableError, match=r"GetModel at 127.* UNAVAILABLE: out for lunch; ch"):
        connect(server).model()
    assert server.calls("GetModel") == 4


def test_a_message_larger_than_grpcs_retry_buffer_is_retried_too(make_server, connect):
    server = make_server(input_dim=1 << 20, max_message_bytes=8 << 20)
    server.script["Encode"].append(Fail())
    connect(server).encode(rows(1, input_dim=1 << 20))
    assert server.calls("Encode") == 2


def test_a_full_queue_is_asked_again_when_it_says(server, connect):
    client = connect(server)
    client.model()
    server.script["Encode"] += [busy(1), busy(1), busy(700)]
    came = []
    usual = server.usual_Encode
    server.usual_Encode = lambda *call: came.append(time.monotonic()) or usual(*call)
    began = time.monotonic()
    client.encode(rows(1))
    assert server.calls("Encode") == 4
    assert came[0] - began >= 0.7  # the third backoff of its own would have been 0.4 s, or 0.48


def test_a_queue_that_stays_full_is_told_with_its_hint(server, connect):
    server.script["Encode"] += [busy(7)] * 4
    with pytest.raises(ResourceExhaustedError, match="the queue is full") as caught:
        connect(server).encode(rows(1))
    assert caught.value.retry_after == 0.007


def test_a_server_that_asks_not_to_be_asked_again_is_not(server, connect):
    server.script["Encode"].append(busy(-1))
    with pytest.raises(ResourceExhaustedError):
        connect(server).encode(rows(1))
    assert server.calls("Encode") == 1


def test_a_refusal_is_not_repeated(server, connect):
    server.script["Encode"].append(Fail(grpc.StatusCode.INVALID_ARGUMENT))
    with pytest.raises(InvalidInputError):
        connect(server).encode(rows(1))
    assert server.calls("Encode") == 1


def test_retries_stop_when_most_calls_fail(server):
    server.script["GetModel"] += [Fail()] * 1000
    with Client(server.target) as client:
        failing = [threading.Thread(target=pytest.raises, args=(UnavailableError, client.model))
                   for _ in range(40)]  # fmt: skip
        for thread in failing:
            thread.start()
        for thread in failing:
            thread.join()
        before = server.calls("GetModel")
        assert before < 40 * 4
        with pytest.raises(UnavailableError):
            client.model()
        assert server.calls("GetModel") == before + 1


# Deadlines.


def test_one_deadline_bounds_all_messages_of_a_call(make_server, connect):
    server = make_server(max_rows=10)
    client = connect(server, max_in_flight=1)
    client.model()
    inner, given = getattr(client, "client", client), []
    start = inner._start  # gRPC sends the time that it is given to no more than two digits

    def noting(method, request, timeout, **how):
        given.append(timeout)
        return start(method, request, timeout, **how)

    inner._start = noting
    server.script["Encode"] += [lambda *_: time.sleep(0.05)] * 6
    client.encode(rows(60), timeout=60)
    assert len(given) == 6
    # Each message has what those before it left.
    for number, timeout in enumerate(given):
        assert timeout <= 60 - 0.05 * number


def test_there_is_a_deadline_by_default(server, connect):
    connect(server).model()
    assert 30 < server.time_remaining[0] <= 61


def test_an_answer_that_does_not_come_ends_the_call_at_its_deadline(make_server, connect, release):
    server = make_server(max_rows=10)
    server.script["Encode"] += [None, None, lambda *_: release.wait()]
    client = connect(server)
    client.model()
    with pytest.raises(TimeoutError, match="longer timeout, or send fewer rows") as caught:
        client.encode(rows(100), timeout=0.2)
    assert isinstance(caught.value, DeadlineExceededError)


def test_a_timeout_that_is_no_time_is_refused(server, connect):
    for timeout in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected a positive number of seconds"):
            connect(server).encode(rows(1), timeout=timeout)


# Order and number in flight.


def test_answers_that_come_in_another_order_are_put_together_in_the_rows_own(make_server, connect):
    server, second_came = make_server(max_rows=10), threading.Event()

    def wait_for_the_second(_request, _context):
        assert second_came.wait(60)

    server.script["Encode"] += [wait_for_the_second, lambda *_: second_came.set()]
    client = connect(server, max_in_flight=2)
    np.testing.assert_array_equal(client.encode(rows(45)), server.expected_codes(rows(45)))


def test_no_more_messages_are_under_way_than_asked_for(make_server, connect):
    server, at_once, most = make_server(max_rows=1), [], []
    lock = threading.Lock()

    def count(request, context):
        with lock:
            at_once.append(1)
            most.append(len(at_once))
        answer = server.usual_Encode(request, context)
        with lock:
            at_once.pop()
        return answer

    server.script["Encode"] += [count] * 50
    connect(server, max_in_flight=3).encode(rows(50))
    assert 1 <= max(most) <= 3


def test_one_client_serves_many_threads(make_server):
    server = make_server(max_rows=10)
    answers = {}
    with Client(server.target) as client:

        def encode(n):
            answers[n] = client.encode(rows(n))

        threads = [threading.Thread(target=encode, args=(n,)) for n in range(1, 60, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for n, codes in answers.items():
        np.testing.assert_array_equal(codes, server.expected_codes(rows(n)))


# Fingerprints.


def test_a_model_replaced_within_a_call_gives_no_codes_at_all(make_server, connect):
    server = make_server(max_rows=10)

    def replace(_request, _context):
        server.fingerprint = OTHER_FINGERPRINT

    server.script["Encode"] += [None, None, replace]
    with pytest.raises(FingerprintMismatchError, match=f"{OTHER_FINGERPRINT}.* {FINGERPRINT}"):
        connect(server, max_in_flight=1).encode(rows(100))


@pytest.mark.parametrize("call", [
    lambda client: client.model(),
    lambda client: client.encode(rows(1)),
    lambda client: client.decode([[1]]),
    lambda client: client.wait_ready(),
])  # fmt: skip
def test_a_model_that_is_not_the_one_expected_is_refused(server, connect, call):
    client = connect(server, expected_fingerprint=OTHER_FINGERPRINT)
    for _ in range(2):
        with pytest.raises(FingerprintMismatchError, match=OTHER_FINGERPRINT):
            call(client)


def test_the_server_too_is_told_which_model_is_expected(server, connect):
    client = connect(server, expected_fingerprint=FINGERPRINT)
    client.model()
    server.fingerprint = OTHER_FINGERPRINT
    with pytest.raises(FingerprintMismatchError, match="FAILED_PRECONDITION") as caught:
        client.encode(rows(1))
    assert server.requests["Encode"][0].expected_fingerprint == FINGERPRINT
    assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_a_missing_decode_mode_is_no_mismatch(server, connect):
    client = connect(server, expected_fingerprint=FINGERPRINT)
    with pytest.raises(FailedPreconditionError, match="no norms"):
        client.decode([[1]], "calibrated")


def test_the_limits_are_asked_for_once(server, connect):
    client = connect(server)
    for _ in range(3):
        client.encode(rows(1))
        client.decode([[1]])
    assert server.calls("GetModel") == 1


def test_the_limits_are_asked_for_again_when_another_model_answers(server, connect):
    client = connect(server)
    client.encode(rows(20))
    server.fingerprint, server.max_rows = OTHER_FINGERPRINT, 10
    with pytest.warns(FingerprintChangedWarning):
        client.encode(rows(5))
    client.encode(rows(20))
    assert server.calls("GetModel") == 2


def test_the_limits_are_asked_for_again_after_a_failure(server, connect):
    client = connect(server)
    client.encode(rows(20))
    server.max_rows = 10
    with pytest.raises(InvalidInputError, match="20 rows"):
        client.encode(rows(20))
    client.encode(rows(20))


# Errors.


def test_every_status_has_an_error():
    assert set(ERROR_OF_STATUS) == set(STATUSES)


def test_every_error_is_public():
    def tree(kind):
        return {kind}.union(*map(tree, kind.__subclasses__()))

    here = {kind for kind in tree(SemidClientError) if kind.__module__ == "semid_client._errors"}
    assert {kind.__name__ for kind in here} <= set(semid_client.__all__)


@pytest.mark.parametrize("code", STATUSES)
@pytest.mark.parametrize("call", ["model", "encode", "many"])
def test_every_status_becomes_its_error_from_the_original(make_server, connect, code, call):
    server = make_server(max_rows=2)
    client = connect(server)
    if call == "model":
        server.script["GetModel"] += [Fail(code, "so it is")] * 4
    else:
        server.script["Encode"] += [Fail(code, "so it is")] * 40
    with pytest.raises(CallError, match="so it is") as caught:
        client.model() if call == "model" else client.encode(rows(2 if call == "encode" else 9))
    error = caught.value
    assert type(error) is ERROR_OF_STATUS[code]
    assert isinstance(error.__cause__, grpc.RpcError)
    assert (error.target, error.code, error.details) == (server.target, code, "so it is")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(again), str(again), again.__dict__) == (type(error), str(error), error.__dict__)


def test_nobody_at_the_address_is_said_with_the_address(connect):
    with pytest.raises(ConnectionError, match=r"127.0.0.1:1 .*; check that a semid server runs"):
        connect("127.0.0.1:1").encode(rows(1))


def test_a_server_that_is_still_loading_may_be_why_nobody_is_at_one_of_its_addresses(
    server, connect
):
    server.says_serving(serving=False)
    refused = r"address, and whether it is still loading: `semid health` tells, and wait_ready\(\)"
    with pytest.raises(UnavailableError, match=refused):
        connect("127.0.0.1:1").encode(rows(1))
    # Of the addresses of one name gRPC tells the last that failed: the one where nobody is, or not.
    both = f"ipv4:127.0.0.1:{server.port},127.0.0.1:1"
    for target in (f"localhost:{server.port}", both):
        with pytest.raises(UnavailableError, match="loading"):
            connect(target).encode(rows(1))


def tensor(dtype=pb.DATA_TYPE_UINT8, shape=(2, 3), data=b"123456", fingerprint=FINGERPRINT):
    body = pb.Tensor(dtype=dtype, shape=shape, data=data)
    return lambda *_: pb.EncodeResponse(fingerprint=fingerprint, tensor=body)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda *_: pb.EncodeResponse(), "without a fingerprint"),
        (lambda *_: pb.EncodeResponse(fingerprint=FINGERPRINT), "numbers of type 0"),
        (tensor(fingerprint=""), "without a fingerprint"),
        (tensor(dtype=pb.DATA_TYPE_FLOAT32), "numbers of type 1"),
        (tensor(dtype=99), "numbers of type 99"),
        (tensor(shape=(3, 2)), r"2 rows with shape \(3, 2\)"),
        (tensor(shape=(6,)), r"2 rows with shape \(6,\)"),
        (tensor(shape=(2, -3)), r"2 rows with shape \(2, -3\)"),
        (tensor(shape=(2, 3, 1)), r"2 rows with shape \(2, 3, 1\)"),
        (tensor(data=b"12345"), r"5 bytes for shape \(2, 3\) of uint8"),
        (tensor(shape=(2, 1 << 62)), "6 bytes for shape"),
    ],
)
def test_an_answer_that_is_not_sound_is_refused(server, connect, answer, says):
    server.script["Encode"].append(answer)
    with pytest.raises(ProtocolError, match=says):
        connect(server).encode(rows(2))


def test_answers_of_different_widths_within_a_call_are_refused(make_server, connect):
    server = make_server(max_rows=2)
    server.script["Encode"] += [None, tensor(shape=(2, 2), data=b"1234")]
    with pytest.raises(ProtocolError, match="rows of 2 uint8 after rows of 3 uint8"):
        connect(server, max_in_flight=1).encode(rows(4))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("fingerprint", "", "without a fingerprint"),
        ("input_dim", 0, "input_dim = 0"),
        ("n_layers", 0, "layers = 0"),
        ("max_rows", 0, "limits.max_rows = 0"),
        ("max_message_bytes", -1, "limits.max_message_bytes = -1"),
        ("code_dtype", pb.DATA_TYPE_FLOAT32, "code_dtype 1"),
    ],
)
def test_a_model_that_cannot_be_is_refused(make_server, connect, field, value, says):
    server = make_server()
    setattr(server, field, value)
    with pytest.raises(ProtocolError, match=says):
        connect(server).model()


# The life of a client.


def test_a_closed_client_says_so(server, connect):
    client = connect(server)
    client.model()
    client.close()
    for call in (client.model, lambda: client.encode(rows(1)), lambda: client.decode([[1]])):
        with pytest.raises(ClientClosedError, match=f"client of {server.target} is closed"):
            call()


def test_a_client_closed_by_another_thread_ends_its_calls(make_server, release):
    server, came = make_server(max_rows=10), threading.Event()

    def hold(_request, _context):
        came.set()
        release.wait()

    server.script["Encode"] += [None, hold]
    client = Client(server.target)
    closing = threading.Thread(target=lambda: came.wait() and client.close())
    closing.start()
    with pytest.raises(ClientClosedError, match="closed"):
        client.encode(rows(100))
    closing.join()


def test_a_server_that_cancels_is_tried_again(server, connect):
    server.script["Encode"].append(lambda _, context: context.cancel())
    assert len(connect(server).encode(rows(1))) == 1


def test_a_server_that_cancels_again_and_again_is_no_closed_client(server, connect):
    server.script["Encode"] += [lambda _, context: context.cancel()] * 10
    with pytest.raises(UnavailableError) as caught:
        connect(server).encode(rows(1))
    assert isinstance(caught.value, CancelledError)


def test_the_server_learns_who_calls(server, connect):
    connect(server, token="an open secret").model()  # noqa: S106 - it opens nothing
    metadata = server.metadata[0]
    assert metadata["user-agent"].startswith("semid-client/")
    assert metadata["authorization"] == "Bearer an open secret"


def test_the_model_and_the_expected_fingerprint_go_along(server, connect):
    client = connect(server, model="fake", expected_fingerprint=FINGERPRINT)
    client.encode(rows(1))
    client.decode([[1]])
    assert server.requests["GetModel"][0].model == "fake"
    for method in ("Encode", "Decode"):
        request = server.requests[method][0]
        assert (request.model, request.expected_fingerprint) == ("fake", FINGERPRINT)


def test_what_a_model_is_comes_as_plain_values(server, connect):
    client = connect(server)
    info = client.model()
    assert (info.name, info.fingerprint, info.kind) == ("fake", FINGERPRINT, "rq-kmeans")
    assert (info.input_dim, info.n_layers, info.decode_modes) == (4, 3, ("sum",))
    assert info.code_dtype == np.uint8
    assert [layer.codebook_width for layer in info.layers] == [256] * 3
    assert info.limits == semid_client.Limits(max_message_bytes=1 << 20, max_rows=1000)
    assert client.models() == (info,)


# Readiness.


def test_waiting_lasts_until_the_model_is_loaded(server, connect):
    server.script["GetModel"] += [Fail(details="loading")] * 5
    assert connect(server).wait_ready(60).name == "fake"


def test_waiting_in_vain_ends_in_time_with_the_reason(server, connect):
    server.script["GetModel"] += [Fail(details="loading")] * 10_000
    client = connect(server)
    for seconds in (0.9, 9, 90):  # where the machine is so slow that none has an answer in time
        before = server.calls("GetModel")
        with pytest.raises(DeadlineExceededError, match=f"not ready within {seconds} s: ") as said:
            client.wait_ready(seconds)
        if "loading" in str(said.value):
            break
    assert "loading" in str(said.value)
    assert server.calls("GetModel") > before


def test_waiting_ends_at_once_for_what_it_does_not_cure(server, connect):
    server.script["GetModel"].append(Fail(grpc.StatusCode.UNAUTHENTICATED, "who are you"))
    with pytest.raises(semid_client.AuthenticationError, match="who are you"):
        connect(server).wait_ready(60)
