"""Messages read: requests to Encode whose numbers stay where gRPC put them, in the bytes of theirs.

protobuf copies a bytes field when it parses a message, and once more whenever Python looks at it.
A tensor's numbers are therefore cut off first, and what is left, a few bytes, is parsed. Anything
that is not as every known client writes it is parsed whole, by protobuf, unless it is long and of
more parts than any request has.

What is left, the *head*, is the same in almost all messages of a caller. A message that is as long
as an earlier one and begins with the same head says the same, so that it is not parsed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError

from semid.v1 import semid_pb2 as pb
from semid_server.errors import InvalidInputError, MessageTooLargeError

if TYPE_CHECKING:
    from collections.abc import Callable

Message = TypeVar("Message")

_MOST_FIELDS: Final = 16
"""Fields before the tensor's bytes, at any level: a message of more is not worth the walk, and a
long one not worth parsing."""

MAX_UNCOUNTED: Final = 1 << 16
"""Bytes that protobuf may parse whatever is in them."""

MAX_SHAPE: Final = 256
"""Bytes of the shape of a tensor in a message that is longer than that."""

MAX_HEAD: Final = 512
"""Bytes of a head that is remembered: names and fingerprints are short."""

MAX_HEADS: Final = 512
"""Heads that are remembered, one for each length of a message; the oldest makes room."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_SIZES: Final = {_FIXED64: 8, _FIXED32: 4}
_SHAPE = 2  # in a Tensor, and in a SharedTensor
_ROW = 1 << 3 | _LENGTH  # how a row begins, in FloatRows and in CodeRows
_LEAST_ROW = 2  # bytes
_LONG = 0x80  # the least tag or length that takes more than a byte
_LEAST_TAG = 1 << 3
_SHORT = 5  # bytes of a tag or of a length, at most, with leading zeros
_TAG_BITS, _LENGTH_BITS = 32, 31


class Head:
    """What a message says besides its numbers. Others may begin with the same: it never changes.

    Attributes
    ----------
    request : EncodeRequest
        Without the numbers, if they were cut off.
    model, fingerprint : str
        Of the request.
    form : str or None
        In which its embeddings came: the name of the field.
    fits : object
        For whoever reads the numbers, to note what has been checked: all that a check of them, but
        not of their values, can depend on is the same in every message of this head.
    """

    __slots__ = ("fingerprint", "fits", "form", "model", "request")

    def __init__(self, request: pb.EncodeRequest) -> None:
        self.request = request
        self.model, self.fingerprint = request.model, request.expected_fingerprint
        self.form = request.WhichOneof("embeddings")
        self.fits: Any = None


class ReceivedEncode(NamedTuple):
    """A request, and the bytes of its tensor if they are not in it."""

    head: Head
    data: memoryview | None


class EncodeReader:
    """Reads the messages of one method. Called by one thread at a time.

    Parameters
    ----------
    path : tuple of int
        Number of the field, at each level, that leads to the tensor's bytes.
    parse : callable
        Given a serialised message, returns the request in it.
    check : PartLimit
        Of the messages that protobuf is to parse.
    """

    def __init__(
        self,
        path: tuple[int, ...],
        parse: Callable[[bytes], pb.EncodeRequest],
        check: PartLimit,
    ) -> None:
        self._path, self._parse, self._check = path, parse, check
        self._heads: dict[int, tuple[bytes, Head]] = {}

    def __call__(self, message: bytes) -> ReceivedEncode:
        """Read a message; `DecodeError` if it is none, or raise as ``check`` does."""
        known = self._heads.get(len(message))
        if known is not None and message.startswith(known[0]):
            return ReceivedEncode(known[1], memoryview(message)[len(known[0]) :])
        cut = cut_out(message, self._path)
        if cut is None:
            self._check(message)
            return ReceivedEncode(Head(self._parse(message)), None)
        rest, data = cut
        if len(rest) > MAX_UNCOUNTED:
            self._check(message)
        head = Head(self._parse(rest))
        begin = len(message) - len(data)
        if begin <= MAX_HEAD:
            self._heads[len(message)] = message[:begin], head
            if len(self._heads) > MAX_HEADS:
                del self._heads[next(iter(self._heads))]
        return ReceivedEncode(head, data)


class PartLimit:
    """Refuses a message of very many parts before protobuf makes an object of each.

    2 bytes of an empty row become 32, and nothing else of this process runs meanwhile. What is
    short is left to protobuf.

    Parameters
    ----------
    request : type
        Of the request: `EncodeRequest` or `DecodeRequest`.
    max_rows : int
        Rows of a request, at most.
    in_stream : bool
        Whether the request is the first field of the message, and not all of it.
    """

    def __init__(
        self,
        request: type[pb.EncodeRequest | pb.DecodeRequest],
        max_rows: int,
        *,
        in_stream: bool = False,
    ) -> None:
        numbers = {field.name: field.number for field in request.DESCRIPTOR.fields}
        self._rows = numbers["rows"]
        self._tensors = {numbers[name] for name in ("tensor", "shared") if name in numbers}
        self._max_rows, self._in_stream = max_rows, in_stream

    def __call__(self, message: bytes) -> None:
        """Raise if the message has more parts than any request.

        Raises
        ------
        DecodeError
            It is none.
        InvalidInputError
            It has too many fields, or a shape too long.
        MessageTooLargeError
            It has too many rows.
        """
        # Nor has what is shorter than so many empty rows too many of them.
        if len(message) <= max(MAX_UNCOUNTED, _LEAST_ROW * self._max_rows):
            return
        parts = [(0, len(message))]
        try:
            if self._in_stream:
                parts = [part for number, part in _fields(message, parts) if number == 1]
            inside = _fields(message, parts)
            tensors = [part for number, part in inside if number in self._tensors]
            for number, (start, end) in _fields(message, tensors):
                if number == _SHAPE and end - start > MAX_SHAPE:
                    raise InvalidInputError.at(
                        "shape", f"{end - start} bytes of it; a shape has two numbers"
                    )
            self._count_rows(message, [part for number, part in inside if number == self._rows])
        except IndexError as error:
            raise DecodeError("it ends within a number, or has a field of no type") from error

    def _count_rows(self, message: bytes, parts: list[tuple[int, int]]) -> None:
        left = self._max_rows
        for start, end in parts:
            # As a rule all are as long. Only looked at once: it takes a look at all that is left.
            alike, position = _alike(message, start, end)
            left -= alike
            while position < end and left >= 0:
                left -= 1
                # As most short ones are: this is gone through row by row while all else waits.
                if message[position] == _ROW and (length := message[position + 1]) < _LONG:
                    position += 2 + length
                else:
                    key, position = _read_tag(message, position)
                    _, position = _skip(message, position, key & 7)
        if left < 0:
            raise MessageTooLargeError(
                f"more than {self._max_rows} rows in one request; this server takes no more "
                "(--max-batch-rows): send them in several"
            )


def _fields(message: bytes, parts: list[tuple[int, int]]) -> list[tuple[int, tuple[int, int]]]:
    """Return the fields of parts of a message that have a length: number, begin and end."""
    found: list[tuple[int, tuple[int, int]]] = []
    count = 0
    for start, end in parts:
        position = start
        while position < end:
            if (count := count + 1) > _MOST_FIELDS:
                raise InvalidInputError(
                    f"the message cannot be read: more than {_MOST_FIELDS} fields at one level"
                )
            key, position = _read_tag(message, position)
            body, after = _skip(message, position, key & 7)
            if key & 7 == _LENGTH:
                found.append((key >> 3, (body, min(after, end))))
            position = after
    return found


def _alike(message: bytes, start: int, end: int) -> tuple[int, int]:
    """Return how many fields there are, and where they end, if all are as long as the first.

    Else none, and where they begin.
    """
    if start == end:
        return 0, start
    key, body = _read_tag(message, start)
    if key & 7 != _LENGTH:  # of others, what they begin with does not say where they end
        return 0, start
    body, after = _skip(message, body, key & 7)
    stride = after - start
    count, rest = divmod(end - start, stride)
    heads = range(start, body)
    if not rest and all(message[at:end:stride].count(message[at]) == count for at in heads):
        return count, end
    return 0, start


def _skip(message: bytes, position: int, wire_type: int) -> tuple[int, int]:
    """Return where the contents of a field begin, and where they end."""
    if wire_type == _VARINT:
        return position, _read_varint(message, position)[1]
    if wire_type == _LENGTH:
        length, position = _read_short(message, position, _LENGTH_BITS)
        return position, position + length
    if wire_type not in _SIZES:
        raise IndexError  # a group, which nothing writes any more, or none
    return position, position + _SIZES[wire_type]


def encode_reader(max_rows: int) -> EncodeReader:
    """Return what reads an EncodeRequest, or raises as `PartLimit` does."""
    check = PartLimit(pb.EncodeRequest, max_rows)
    return EncodeReader((3, 3), pb.EncodeRequest.FromString, check)


def encode_stream_reader(max_rows: int) -> EncodeReader:
    """Return what reads an EncodeStreamRequest, as the request that it holds, or raises so."""
    return EncodeReader(
        (1, 3, 3),
        lambda message: pb.EncodeStreamRequest.FromString(message).request,
        PartLimit(pb.EncodeRequest, max_rows, in_stream=True),
    )


def decode_reader(max_rows: int) -> Callable[[bytes], pb.DecodeRequest]:
    """Return what reads a DecodeRequest, or raises as `PartLimit` does."""
    return _checked(PartLimit(pb.DecodeRequest, max_rows), pb.DecodeRequest.FromString)


def decode_stream_reader(max_rows: int) -> Callable[[bytes], pb.DecodeStreamRequest]:
    """Return what reads a DecodeStreamRequest, or raises as `PartLimit` does."""
    check = PartLimit(pb.DecodeRequest, max_rows, in_stream=True)
    return _checked(check, pb.DecodeStreamRequest.FromString)


def _checked(check: PartLimit, parse: Callable[[bytes], Message]) -> Callable[[bytes], Message]:
    def read(message: bytes) -> Message:
        check(message)
        return parse(message)

    return read


def cut_out(message: bytes, path: tuple[int, ...]) -> tuple[bytes, memoryview] | None:
    """Cut a field out of a serialised message.

    Parameters
    ----------
    message : bytes
        As protobuf's encoding has it: https://protobuf.dev/programming-guides/encoding/.
    path : tuple of int
        Number of the field at each level; all are length-delimited.

    Returns
    -------
    (bytes, memoryview) or None
        The message without the field, and the field. None unless, at every level, the field comes
        last, so that nothing after it can change what it means.
    """
    start, end = 0, len(message)
    before: list[tuple[bytes, int]] = []
    try:
        for number in path:
            found = _last_field(message, start, end, number)
            if found is None:
                return None
            tag, body = found
            before.append((message[start:tag], number))
            start = body
    except IndexError:  # it is no message: protobuf will say what is wrong with it
        return None
    # From the inside out: the fields before the one at the next level, and that level's rest.
    rest = before[-1][0]
    for fields, number in reversed(before[:-1]):
        rest = fields + bytes([number << 3 | _LENGTH]) + varint(len(rest)) + rest
    return rest, memoryview(message)[start:end]


def _last_field(message: bytes, start: int, end: int, number: int) -> tuple[int, int] | None:
    """Return where the last field of ``message[start:end]`` begins, and where its contents do.

    None if it is not the one asked for.
    """
    position = start
    for _ in range(_MOST_FIELDS):
        tag = position
        key, position = _read_tag(message, position)
        body, position = _skip(message, position, key & 7)
        if key & 7 == _LENGTH and position == end:
            return (tag, body) if key >> 3 == number else None
        if position >= end:
            return None
    return None


def _read_tag(message: bytes, position: int) -> tuple[int, int]:
    key = message[position]
    if _LEAST_TAG <= key < _LONG:  # nearly all: each call more costs a short message its part
        return key, position + 1
    key, position = _read_short(message, position, _TAG_BITS)
    if key >> 3 == 0:
        raise IndexError  # there is no such field
    return key, position


def _read_short(message: bytes, position: int, bits: int) -> tuple[int, int]:
    """Read a tag or a length: protobuf refuses what is longer or larger than one can be."""
    if (value := message[position]) < _LONG:
        return value, position + 1
    value, after = _read_varint(message, position)
    if after - position > _SHORT or value >> bits:
        raise IndexError
    return value, after


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:  # noqa: PLR2004 - the longest that protobuf knows
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the highest bit: there is more
            return value, position
        shift += 7
    raise IndexError


def varint(value: int) -> bytes:
    """Write a number as protobuf does."""
    encoded = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
