"""A request that was cut apart says what the whole one says, whoever wrote it and however."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from semid.v1 import semid_pb2 as pb
from semid_server.errors import InvalidInputError, MessageTooLargeError
from semid_server.serving.received import (
    MAX_HEADS,
    MAX_UNCOUNTED,
    cut_out,
    decode_reader,
    decode_stream_reader,
    encode_reader,
    encode_stream_reader,
    varint,
)

LARGE = bytes(range(256)) * 64
MAX_ROWS = 1000


def read_encode_request(message):
    return encode_reader(MAX_ROWS)(message)


def read_encode_stream_request(message):
    return encode_stream_reader(MAX_ROWS)(message)


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


def oddly(value, added, length):
    """A number with bits that it lacks and leading zeros, as no writer of messages has it."""
    groups = varint(value | added)
    zeros = length - len(groups)
    if zeros <= 0:
        return groups
    return groups[:-1] + bytes([groups[-1] | 0x80]) + b"\x80" * (zeros - 1) + b"\x00"


ODD = st.tuples(st.sampled_from([0, 0, 0, 1 << 31, 1 << 32, 1 << 63]), st.integers(1, 11))


def each_alone(odd):
    """Add the examples in which one number of the message alone is written so."""

    def with_examples(test):
        for at in range(8):
            test = example({at: odd}, 1, 3, False)(test)
        return test

    return with_examples


@given(
    st.dictionaries(st.integers(0, 7), ODD, max_size=2),
    st.integers(0, 1),
    st.sampled_from([0, 3, 4]),
    st.booleans(),
)
@each_alone((0, 5))
@each_alone((0, 6))
@each_alone((0, 10))
@each_alone((1 << 31, 1))
@each_alone((1 << 32, 1))
def test_numbers_that_are_oddly_written_are_read_as_protobuf_reads_them(odd, unknown, inner, long):
    written = iter(range(8))

    def number(value):
        return oddly(value, *odd.get(next(written), (0, 1)))

    data = LARGE * 5 if long else b"\x00" * 4
    assert not long or len(data) > MAX_UNCOUNTED
    first = number((9 if unknown else 0) << 3) + number(1)
    tensor = number(inner << 3 | 2) + number(len(data)) + data
    request = first + number(3 << 3 | 2) + number(len(tensor)) + tensor
    message = number(1 << 3 | 2) + number(len(request)) + request
    for read, kind, sent in [
        (read_encode_request, pb.EncodeRequest, request),
        (read_encode_stream_request, pb.EncodeStreamRequest, message),
    ]:
        try:
            meant = kind.FromString(sent)
        except DecodeError:
            with pytest.raises(DecodeError):
                read(sent)
        else:
            meant = meant if kind is pb.EncodeRequest else meant.request
            assert put_together(read(sent)) == meant


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
    read = encode_stream_reader(MAX_ROWS) if streamed else encode_reader(MAX_ROWS)
    for request in requests:
        message = pb.EncodeStreamRequest(request=request) if streamed else request
        assert put_together(read(message.SerializeToString())) == request


def test_messages_that_begin_alike_are_parsed_once():
    read = encode_reader(MAX_ROWS)
    first, second = (
        pb.EncodeRequest(model="m", tensor=tensor_of(data)).SerializeToString()
        for data in (LARGE, LARGE[::-1])
    )
    assert read(first).head is read(second).head
    assert read(second).data == LARGE[::-1]


def test_a_length_is_forgotten_when_very_many_others_have_come():
    read = encode_reader(MAX_ROWS)
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


# -- what protobuf need not parse ------------------------------------------------------------------

READERS = {
    "Encode": (encode_reader, pb.EncodeRequest, None),
    "EncodeStream": (encode_stream_reader, pb.EncodeRequest, pb.EncodeStreamRequest),
    "Decode": (decode_reader, pb.DecodeRequest, None),
    "DecodeStream": (decode_stream_reader, pb.DecodeRequest, pb.DecodeStreamRequest),
}


def with_length(number, body):
    return varint(number << 3 | 2) + varint(len(body)) + body


@pytest.fixture(params=READERS)
def method(request):
    """A reader, the fields of its request that have rows and a tensor, and what wraps a request."""
    make, kind, stream = READERS[request.param]
    fields = kind.DESCRIPTOR.fields_by_name
    wrap = (lambda body: body) if stream is None else (lambda body: with_length(1, body))
    return make(MAX_ROWS), fields["rows"].number, fields["tensor"].number, wrap


def test_a_long_message_of_as_many_rows_as_may_be_is_read(method):
    read, rows, _, wrap = method
    row = with_length(1, with_length(1, bytes(400)))
    message = wrap(with_length(1, b"model") + with_length(rows, row * MAX_ROWS))
    assert len(message) > MAX_UNCOUNTED
    read(message)


@pytest.mark.parametrize("many", [MAX_ROWS + 1, MAX_UNCOUNTED], ids=["long", "empty"])
@pytest.mark.parametrize("before", [b"", b"\x08\xff\xff\x7f"], ids=["", "a number"])
def test_more_rows_than_any_request_may_have_are_not_parsed(method, many, before):
    read, rows, _, wrap = method
    row = with_length(1, bytes(400) if many == MAX_ROWS + 1 else b"")
    message = wrap(with_length(rows, before + row * many))
    with pytest.raises(MessageTooLargeError, match="more than 1000 rows in one request"):
        read(message)


def test_rows_in_several_fields_are_counted_together(method):
    read, rows, _, wrap = method
    # Some as long as one another, and some not.
    one, other = (with_length(1, with_length(1, bytes(length))) for length in (400, 404))
    some = with_length(rows, one * (MAX_ROWS // 4)) + with_length(
        rows, (one + other) * (MAX_ROWS // 8)
    )
    read(wrap(some * 2))
    with pytest.raises(MessageTooLargeError):
        read(wrap(some * 3))


FIELDS = [b"\x0a\x00", b"\x0a\x02\x0a\x00", b"\x08\x01", b"\x08\x80\x00", b"\x15abcd"]
LIMIT = 40_000
HIDING = [b"\x08\x80\x00"] + [b"\x0a\x00"] * 4
"""A number, and rows after it: together as long as the longest number, and beginning like it."""


@given(st.integers(0, 9), st.lists(st.sampled_from(FIELDS), min_size=1, max_size=6))
@example(9, HIDING)
def test_whatever_is_read_has_no_more_rows_than_it_may(longer, some):
    block = b"".join(some)
    first = b"\x08" + b"\xff" * longer + b"\x01"
    # As many bytes as there may be rows, three times, so that it is looked at and may be read.
    message = with_length(4, first + block * (3 * LIMIT // len(block)))
    try:
        received = encode_reader(LIMIT)(message)
    except MessageTooLargeError:
        # What is no row counts as well: nobody who means well sends it.
        assert 1 + len(some) * (3 * LIMIT // len(block)) > LIMIT
        return
    assert len(received.head.request.rows.rows) <= LIMIT


def test_a_shape_of_very_many_numbers_is_not_parsed(method):
    read, _, tensor, wrap = method
    message = wrap(with_length(tensor, with_length(2, b"\x01" * MAX_UNCOUNTED)))
    with pytest.raises(InvalidInputError, match="shape: 65536 bytes"):
        read(message)


def test_very_many_fields_are_not_parsed(method):
    read, _, tensor, wrap = method
    for message in (b"\x78\x01" * MAX_UNCOUNTED, with_length(tensor, b"\x10\x01" * MAX_UNCOUNTED)):
        with pytest.raises(InvalidInputError, match="more than 16 fields at one level"):
            read(wrap(message))


@pytest.mark.parametrize("end", [b"\xff" * 11, b"\x0b\x0c"], ids=["no number", "a group"])
def test_what_is_no_message_is_told_as_if_protobuf_had(method, end):
    read, _, _, wrap = method
    with pytest.raises(DecodeError):
        read(wrap(with_length(1, bytes(MAX_UNCOUNTED)) + end))
