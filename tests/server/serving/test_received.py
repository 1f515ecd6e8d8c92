"""A request that was cut apart says what the whole one says, whoever wrote it and however."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semid.v1 import semid_pb2 as pb
from semid_server.serving.received import (
    MAX_HEADS,
    cut_out,
    encode_reader,
    encode_stream_reader,
)

LARGE = bytes(range(256)) * 64


def read_encode_request(message):
    return encode_reader()(message)


def read_encode_stream_request(message):
    return encode_stream_reader()(message)


def tensor_of(data, shape=(4, 1024)):
    return pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=shape, data=data)


def put_together(received):
    request = pb.EncodeRequest()
    request.CopyFrom(received.head.request)
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
    assert received.head.request == pb.EncodeRequest(model="m", tensor=tensor_of(b""))


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
    message = b"\x78\x01" * 100 + pb.EncodeRequest(tensor=tensor_of(LARGE)).SerializeToString()
    assert cut_out(message, (3, 3)) is None


REQUESTS = st.builds(
    lambda model, fingerprint, shape, data: pb.EncodeRequest(
        model=model, expected_fingerprint=fingerprint, tensor=tensor_of(data, shape)
    ),
    st.sampled_from(["", "a", "b", "longer"]),
    st.sampled_from(["", "f" * 4, "g" * 4]),
    st.sampled_from([(4, 1), (1, 4), (2, 2), ()]),
    st.binary(max_size=4),
)


@given(st.lists(REQUESTS, max_size=20), st.booleans())
def test_what_was_read_before_changes_nothing(requests, streamed):
    read = encode_stream_reader() if streamed else encode_reader()
    for request in requests:
        message = pb.EncodeStreamRequest(request=request) if streamed else request
        assert put_together(read(message.SerializeToString())) == request


def test_messages_that_begin_alike_are_parsed_once():
    read = encode_reader()
    first, second = (
        pb.EncodeRequest(model="m", tensor=tensor_of(data)).SerializeToString()
        for data in (LARGE, LARGE[::-1])
    )
    assert read(first).head is read(second).head
    assert read(second).data == LARGE[::-1]


def test_a_length_is_forgotten_when_very_many_others_have_come():
    read = encode_reader()
    messages = [
        pb.EncodeRequest(tensor=tensor_of(bytes(size))).SerializeToString()
        for size in range(1, MAX_HEADS + 2)
    ]
    first = read(messages[0]).head
    for message in messages[1:-1]:
        read(message)
    assert read(messages[0]).head is first
    read(messages[-1])
    assert read(messages[0]).head is not first
