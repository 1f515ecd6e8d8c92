"""Requests to Encode whose numbers stay where gRPC put them: in the bytes of the message.

protobuf copies a bytes field when it parses a message, and once more whenever Python looks at it.
A large tensor is therefore cut out first, and what is left, a few bytes, is parsed. Anything that
is not as every known client writes it is parsed whole, by protobuf.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from semid.v1 import semid_pb2 as pb

SMALL: Final = 16 * 1024
"""Bytes of a message that protobuf copies faster than it is cut here."""

_MOST_FIELDS: Final = 16
"""Fields before the tensor's bytes, at any level: a message of more is not worth the walk."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class ReceivedEncode(NamedTuple):
    """A request, and the bytes of its tensor if they are not in it."""

    request: pb.EncodeRequest
    data: memoryview | None


def read_encode_request(message: bytes) -> ReceivedEncode:
    """Parse an EncodeRequest."""
    if len(message) >= SMALL and (cut := cut_out(message, (3, 3))) is not None:
        rest, data = cut
        return ReceivedEncode(pb.EncodeRequest.FromString(rest), data)
    return ReceivedEncode(pb.EncodeRequest.FromString(message), None)


def read_encode_stream_request(message: bytes) -> ReceivedEncode:
    """Parse an EncodeStreamRequest into the request that it holds."""
    if len(message) >= SMALL and (cut := cut_out(message, (1, 3, 3))) is not None:
        rest, data = cut
        return ReceivedEncode(pb.EncodeStreamRequest.FromString(rest).request, data)
    return ReceivedEncode(pb.EncodeStreamRequest.FromString(message).request, None)


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
        rest = fields + bytes([number << 3 | _LENGTH]) + _varint(len(rest)) + rest
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


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
