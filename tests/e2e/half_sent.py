"""A client that begins calls and sends their messages but for the last byte.

No gRPC client does so: https://www.rfc-editor.org/rfc/rfc9113 by the library h2.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass, field

from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes

CHUNK = bytes(16384)

AT_ONCE, PAUSE = 1 << 20, 0.01
"""Bytes that are sent before a pause of so many seconds."""


@dataclass
class HalfSent:
    """Calls over one connection, from an address of this machine.

    Attributes
    ----------
    left, heads : dict
        How many bytes each call has yet to send, and those that come before the zeros.
    statuses : list of bytes
        What calls that have ended were told, as gRPC writes it.
    sent : int
        Bytes of messages, in all.
    """

    left: dict[int, int] = field(default_factory=dict)
    heads: dict[int, bytes] = field(default_factory=dict)
    statuses: list[bytes] = field(default_factory=list)
    sent: int = 0

    async def send(
        self, target, path, *, calls, message_bytes, source="127.0.0.1", first=b"", window=None
    ):
        """Begin calls, and send for as long as the server takes it.

        Each sends the message ``first`` before the one that it sends but for the last byte. Of what
        it is answered it takes ``window`` bytes, if that is given.
        """
        host, _, port = target.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), local_addr=(source, 0))
        connection = H2Connection()
        connection.initiate_connection()
        if window is not None:
            connection.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        for _ in range(calls):
            stream = connection.get_next_available_stream_id()
            connection.send_headers(
                stream,
                [
                    (":method", "POST"),
                    (":scheme", "http"),
                    (":path", path),
                    (":authority", target),
                    ("content-type", "application/grpc"),
                    ("te", "trailers"),
                ],
            )
            whole = _prefix(len(first)) + first if first else b""
            self.heads[stream] = whole + _prefix(message_bytes)
            self.left[stream] = len(self.heads[stream]) + message_bytes - 1
        reading = asyncio.ensure_future(reader.read(1 << 16))
        try:
            while True:
                moved = self._send(connection)
                writer.write(connection.data_to_send())
                await writer.drain()
                # At a pace that shows what the server does, not how fast its machine is.
                await asyncio.wait({reading}, timeout=PAUSE if moved else None)
                if moved:
                    await asyncio.sleep(PAUSE)
                if not reading.done():
                    continue
                if not (received := reading.result()):
                    return
                reading = asyncio.ensure_future(reader.read(1 << 16))
                for event in connection.receive_data(received):
                    self._note(connection, event)
        except ConnectionError:
            return
        finally:
            reading.cancel()
            writer.transport.abort()  # what it has yet to send is not waited for

    def _send(self, connection) -> int:
        """Send some, and return how much."""
        before = self.sent
        for stream in list(self.left):
            room = min(len(CHUNK), self.left[stream], connection.local_flow_control_window(stream))
            if room > 0:
                head = self.heads[stream]
                self.heads[stream] = head[room:]
                connection.send_data(stream, (head + CHUNK)[:room])
                self.left[stream] -= room
                self.sent += room
            if self.sent - before >= AT_ONCE:
                break
        # Those that have waited go first.
        self.left = dict(sorted(self.left.items(), key=lambda call: -call[1]))
        return self.sent - before

    def _note(self, connection, event):
        if isinstance(event, (ResponseReceived, TrailersReceived)):
            status = dict(event.headers).get(b"grpc-status")
            if status is not None:
                self.statuses.append(status)
        if isinstance(event, DataReceived):
            connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        if isinstance(event, (StreamEnded, StreamReset)):
            self.left.pop(event.stream_id, None)
        if isinstance(event, ConnectionTerminated):
            self.left.clear()


def _prefix(length: int) -> bytes:
    """What a message begins with that is not compressed and so long."""
    return struct.pack(">?I", False, length)
