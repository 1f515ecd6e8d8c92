"""A request that was cut apart says what the whole one says, whoever wrote it and however."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semid.v1 import semid_pb2 as pb
from semid_server.serving.received import (
    SMALL,
    cut_out,
    read_encode_request,
    read_encode_stream_request,
)

LARGE = bytes(range(256)) * (SMALL // 256)


def tensor_of(data, shape=(4, 1024)):
    return pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=shape, data=data)


def put_together(received):
    request = pb.EncodeRequest()
    request.CopyFrom(received.request)
    if received.data is not None:
        request.tensor.data = bytes(received.data)
    return request


@given(
    model=st.text(max_size=300),
    fingerprint=st.text(max_size=80),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20),
    data=st.binary(max_size=200).map(lambda some: some * 200),
)
def test_both_parts_make_the_request_again(model, fingerprint, shape, data):
    request = pb.EncodeRequest(
        model=model, expected_fingerprint=fingerprint, tensor=tensor_of(data, shape)
    )
    assert put_together(read_encode_request(request.SerializeToString())) == request
    message = pb.EncodeStreamRequest(request=request).SerializeToString()
    assert put_together(read_encode_stream_request(message)) == request


def test_a_large_tensor_is_not_copied():
    message = pb.EncodeRequest(model="m", tensor=tensor_of(LARGE)).SerializeToString()
    received = read_encode_request(message)
    assert received.data.obj is message
    assert received.data == LARGE
    assert received.request == pb.EncodeRequest(model="m", tensor=tensor_of(b""))


@pytest.mark.parametrize(
    "after",
    [
        pb.EncodeRequest(model="later").SerializeToString(),
        pb.EncodeRequest(tensor=pb.Tensor(shape=[7])).SerializeToString(),
        pb.EncodeRequest(rows=pb.FloatRows()).SerializeToString(),
        b"\xf8\x07\x01",  # an unknown field
    ],
)
def test_what_comes_after_the_tensor_counts(after):
    message = pb.EncodeRequest(tensor=tensor_of(LARGE)).SerializeToString() + after
    assert put_together(read_encode_request(message)) == pb.EncodeRequest.FromString(message)


def test_of_two_tensors_the_last_counts():
    first = pb.EncodeRequest(tensor=tensor_of(LARGE, [1, 2])).SerializeToString()
    message = first + pb.EncodeRequest(tensor=tensor_of(LARGE[::-1], [])).SerializeToString()
    assert put_together(read_encode_request(message)) == pb.EncodeRequest.FromString(message)


@given(st.binary(max_size=60), st.lists(st.integers(1, 15), min_size=1, max_size=3).map(tuple))
def test_no_bytes_upset_the_cut(message, path):
    cut_out(message, path)


def test_a_message_of_very_many_fields_is_left_to_protobuf():
    message = b"\x78\x01" * SMALL + pb.EncodeRequest(tensor=tensor_of(LARGE)).SerializeToString()
    assert cut_out(message, (3, 3)) is None
