"""Requests to Encode whose numbers stay where gRPC put them: in the bytes of the message.

protobuf copies a bytes field when it parses a message, and once more whenever Python looks at it.
A tensor's numbers are therefore cut off first, and what is left, a few bytes, is parsed. Anything
that is not as every known client writes it is parsed whole, by protobuf.

What is left, the *head*, is the same in almost all messages of a caller. A message that is as long
as an earlier one and begins with the same head says the same, so that it is not parsed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from semid.v1 import semid_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_FIELDS: Final = 16
"""Fields before the tensor's bytes, at any level: a message of more is not worth the walk."""

MAX_HEAD: Final = 512
"""Bytes of a head that is remembered: names and fingerprints are short."""

MAX_HEADS: Final = 512
"""Heads that are remembered, one for each length of a message; the oldest makes room."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


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
    """

    def __init__(self, path: tuple[int, ...], parse: Callable[[bytes], pb.EncodeRequest]) -> None:
        self._path, self._parse = path, parse
        self._heads: dict[int, tuple[bytes, Head]] = {}

    def __call__(self, message: bytes) -> ReceivedEncode:
        """Read a message; `DecodeError` if it is none."""
        known = self._heads.get(len(message))
        if known is not None and message.startswith(known[0]):
            return ReceivedEncode(known[1], memoryview(message)[len(known[0]) :])
        cut = cut_out(message, self._path)
        if cut is None:
            return ReceivedEncode(Head(self._parse(message)), None)
        rest, data = cut
        head = Head(self._parse(rest))
        begin = len(message) - len(data)
        if begin <= MAX_HEAD:
            self._heads[len(message)] = message[:begin], head
            if len(self._heads) > MAX_HEADS:
                del self._heads[next(iter(self._heads))]
        return ReceivedEncode(head, data)


def encode_reader() -> EncodeReader:
    """Return what reads an EncodeRequest."""
    return EncodeReader((3, 3), pb.EncodeRequest.FromString)


def encode_stream_reader() -> EncodeReader:
    """Return what reads an EncodeStreamRequest, as the request that it holds."""
    return EncodeReader(
        (1, 3, 3), lambda message: pb.EncodeStreamRequest.FromString(message).request
    )


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
    except IndexError:  # it ends within a number: protobuf will say what is wrong with it
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
        key, position = _read_varint(message, position)
        wire_type = key & 7
        if wire_type == _VARINT:
            _, position = _read_varint(message, position)
        elif wire_type == _FIXED64:
            position += 8
        elif wire_type == _FIXED32:
            position += 4
        elif wire_type == _LENGTH:
            length, position = _read_varint(message, position)
            if position + length == end:
                return (tag, position) if key >> 3 == number else None
            position += length
        else:
            return None
        if position >= end:
            return None
    return None


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
