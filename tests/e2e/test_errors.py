"""Each thing that a caller can do wrong has its status, its sentence and its place."""

from __future__ import annotations

import re

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from semid.v1 import semid_pb2 as pb
from semid_client import Client, InvalidArgumentError

FLOAT32, UINT8 = pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_UINT8
OTHER = "0" * 64


def _embeddings(shape=(2, 64), dtype=FLOAT32, data=None):
    data = bytes(4 * int(np.prod(shape))) if data is None else data
    return pb.EncodeRequest(tensor=pb.Tensor(dtype=dtype, shape=shape, data=data))


def _rows_with(value, row, column):
    rows = np.zeros((3, 64), np.float32)
    rows[row, column] = value
    return _embeddings((3, 64), data=rows.tobytes())


def _codes(shape=(2, 3), dtype=UINT8, data=bytes(6), **fields):
    return pb.DecodeRequest(tensor=pb.Tensor(dtype=dtype, shape=shape, data=data), **fields)


def _written(message, row, field, lengths):
    return message(rows=[row(**{field: [0] * length}) for length in lengths])


INVALID = [
    ("no embeddings", "Encode", pb.EncodeRequest(), "embeddings", "missing"),
    ("no codes", "Decode", pb.DecodeRequest(), "codes", "missing"),
    ("an empty tensor", "Encode", pb.EncodeRequest(tensor=pb.Tensor()), "dtype", "UNSPECIFIED"),
    ("codes to encode", "Encode", _embeddings(dtype=UINT8, data=bytes(128)), "dtype", "UINT8"),
    ("embeddings to decode", "Decode", _codes(dtype=FLOAT32, data=bytes(24)), "dtype", "FLOAT32"),
    ("an unknown type", "Encode", _embeddings(dtype=99), "dtype", "99"),
    ("a vector", "Encode", _embeddings((64,)), "shape", "1 dimensions"),
    ("a cube", "Encode", _embeddings((1, 2, 64)), "shape", "3 dimensions"),
    ("a negative shape", "Encode", _embeddings((-1, 64), data=b""), "shape", "negative"),
    ("too narrow rows", "Encode", _embeddings((2, 63)), "shape", "63 numbers.* 64"),
    ("too few bytes", "Encode", _embeddings(data=bytes(511)), "data", "511 bytes.* 512"),
    ("too many bytes", "Encode", _embeddings(data=bytes(513)), "data", "513 bytes.* 512"),
    ("NaN", "Encode", _rows_with(np.nan, 1, 7), r"\[1\]", "(?i)nan"),
    ("infinity", "Encode", _rows_with(-np.inf, 2, 0), r"\[2\]", "(?i)inf"),
    (
        "rows of two lengths",
        "Encode",
        pb.EncodeRequest(rows=_written(pb.FloatRows, pb.FloatRows.Row, "values", [64, 64, 3])),
        r"\[2\]",
        "3 numbers.* 64",
    ),
    ("too many codes a row", "Decode", _codes((1, 4), data=bytes(4)), "shape", "4 codes.* 3"),
    ("no codes a row", "Decode", _codes((2, 0), data=b""), "shape", "0 codes"),
    (
        "a code out of range",
        "Decode",
        _codes(data=bytes([0, 31, 31, 31, 32, 0])),
        r"codes\[1\]\[1\]",
        "32 .* 31",
    ),
    (
        "a large code",
        "Decode",
        _codes((1, 1), dtype=pb.DATA_TYPE_UINT32, data=b"\xff\xff\xff\xff"),
        r"codes\[0\]\[0\]",
        "4294967295",
    ),
    ("an unknown mode", "Decode", _codes(mode=9), "mode", "9"),
]


@pytest.mark.parametrize(
    ("method", "request_", "field", "sentence"),
    [case[1:] for case in INVALID],
    ids=[case[0] for case in INVALID],
)
def test_an_invalid_request_is_refused_with_the_place(stub, method, request_, field, sentence):
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, method)(request_)
    error = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    bad_request = error_details_pb2.BadRequest()
    (packed,) = rpc_status.from_call(error).details
    assert packed.Unpack(bad_request)
    violation = bad_request.field_violations[0]
    assert re.search(field, violation.field), violation
    assert re.search(sentence, violation.description), violation
    assert re.search(sentence, error.details()), error.details()


@pytest.mark.parametrize(
    ("request_", "code", "sentence"),
    [
        (
            pb.EncodeRequest(expected_fingerprint=OTHER, tensor=_embeddings().tensor),
            grpc.StatusCode.FAILED_PRECONDITION,
            f"expects {OTHER}",
        ),
        (
            pb.EncodeRequest(model="nobody", tensor=_embeddings().tensor),
            grpc.StatusCode.NOT_FOUND,
            "no model named 'nobody' is served here",
        ),
        (
            _codes(mode=pb.DECODE_MODE_CALIBRATED),
            grpc.StatusCode.FAILED_PRECONDITION,
            "residual norms",
        ),
    ],
    ids=["another fingerprint", "another model", "a mode that the checkpoint lacks"],
)
def test_what_the_model_cannot_do_has_its_own_status(stub, request_, code, sentence):
    method = stub.Encode if isinstance(request_, pb.EncodeRequest) else stub.Decode
    with pytest.raises(grpc.RpcError) as caught:
        method(request_)
    assert caught.value.code() is code
    assert sentence in caught.value.details()


def test_an_unknown_method_is_unimplemented(digits_server):
    with digits_server.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/semid.v1.SemanticIdService/Forget")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("path", ["/", "/a", "/a/b/c", "//", "/semid.v1.SemanticIdService/"])
def test_an_odd_path_is_unimplemented_too(digits_server, path):
    with digits_server.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path)(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_message_above_the_limit_is_refused_and_the_limit_published(digits_server, stub):
    limits = stub.GetModel(pb.GetModelRequest()).model.limits
    rows = limits.max_message_bytes // (64 * 4) + 1
    with pytest.raises(grpc.RpcError) as caught:
        stub.Encode(_embeddings((rows, 64)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as caught:
        stub.Decode(_codes((limits.max_rows + 1, 1), data=bytes(limits.max_rows + 1)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(limits.max_rows) in caught.value.details()


def test_an_array_above_every_limit_is_split_by_the_client(digits_server, client, digits):
    limits = client.model().limits
    times = 2 * limits.max_rows // len(digits) + 1
    codes = client.encode(np.tile(digits, (times, 1)))
    np.testing.assert_array_equal(codes, np.tile(codes[: len(digits)], (times, 1)))
    assert client.decode(codes).shape == (len(codes), 64)


def test_the_largest_request_allowed_is_answered_both_ways(stub):
    rows = stub.GetModel(pb.GetModelRequest()).model.limits.max_rows
    codes = stub.Encode(_embeddings((rows, 64))).tensor
    assert list(codes.shape) == [rows, 3]
    answer = stub.Decode(pb.DecodeRequest(tensor=codes)).tensor
    assert list(answer.shape) == [rows, 64]


def test_no_rows_have_no_codes(stub):
    answer = stub.Encode(_embeddings((0, 64), data=b""))
    assert list(answer.tensor.shape) == [0, 3]
    assert answer.fingerprint
    answer = stub.Decode(_codes((0, 3), data=b""))
    assert list(answer.tensor.shape) == [0, 64]


def test_a_deadline_in_the_past_is_exceeded(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Encode(_embeddings(), timeout=-1.0)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_an_error_in_a_stream_names_its_message_and_comes_after_the_answers_before_it(stub):
    good = pb.EncodeStreamRequest(request=_embeddings())
    bad = pb.EncodeStreamRequest(request=_rows_with(np.nan, 1, 0))
    answers = stub.EncodeStream(iter([good, good, bad, good]))
    assert [list(next(answers).response.tensor.shape) for _ in range(2)] == [[2, 3]] * 2
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "message 2" in caught.value.details()


def test_a_bad_neighbour_changes_nothing_for_others(digits_server, digits):
    """Good and bad requests at once, so that they meet in batches."""
    with digits_server.stub() as stub, Client(digits_server.target) as client:
        expected = client.encode(digits[:3])
        bad = [stub.Encode.future(_rows_with(np.nan, row % 3, 5)) for row in range(40)]
        good = [stub.Encode.future(_embeddings((3, 64), data=digits[:3].tobytes())) for _ in bad]
        for call in good:
            codes = np.frombuffer(call.result().tensor.data, "u1").reshape(3, 3)
            np.testing.assert_array_equal(codes, expected)
        for row, call in enumerate(bad):
            assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert f"[{row % 3}]" in call.details()


def test_the_client_names_the_row_of_the_array_it_was_given(client, digits):
    rows = np.tile(digits, (30, 1))
    rows[41_234, 3] = np.nan
    with pytest.raises(InvalidArgumentError, match=r"row 41,?234") as caught:
        client.encode(rows)
    assert caught.value.row == 41_234
