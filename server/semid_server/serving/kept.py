"""A version of a model as it was read once: in memory that no process can change, for all of them.

Its path may hold another version by the time that a second process reads it. What is kept is in a
file of memory without a name, sealed. The parent of several server processes holds it open for as
long as that version is the one to serve, and hands it to each. It is there once, whoever has it
open, and gone with the last of them, however they end. It is of semid's own format, whatever was
read: no pickle is in it, and every process checks it against its record and its fingerprint.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import weakref
from typing import TYPE_CHECKING, Final, Self

from semid_server.checkpoint import load_checkpoint, pack_checkpoint, unpack_checkpoint

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

    from semid_server.checkpoint import Checkpoint, Overrides

SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

_LENGTH: Final = struct.Struct("<Q")
"""What a file begins with: the length of the sizes of what follows them, by name, as JSON."""


class Kept:
    """A version, kept in memory until it is closed, or nobody refers to it any more.

    Parameters
    ----------
    descriptor : int
        The file it is in; belongs to it from now on.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Keep a checkpoint."""
        files = pack_checkpoint(checkpoint)
        sizes = json.dumps({name: len(data) for name, data in files.items()}).encode()
        descriptor = os.memfd_create("semid-version", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        kept = cls(descriptor)
        with open(descriptor, "wb", closefd=False) as file:
            file.writelines((_LENGTH.pack(len(sizes)), sizes, *files.values()))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        return kept

    def load(self, path: Path, overrides: Overrides) -> Checkpoint:
        """Load it; ``path`` and ``overrides`` are those with which it was read.

        Errors are those of `load_checkpoint`.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, 0))
        sizes: dict[str, int] = json.loads(self._read(length, _LENGTH.size))
        files: dict[str, bytes] = {}
        start = _LENGTH.size + length
        for name, size in sizes.items():
            files[name] = self._read(size, start)
            start += size
        return unpack_checkpoint(files, path=path, overrides=overrides)

    def close(self) -> None:
        """Let go of it."""
        self._close()

    def send(self, connection: Connection, message: object = None) -> None:
        """Hand it to the process at the other end, which calls `receive`; it stays here too.

        A ``message`` goes before it, as one of the connection's own.
        """
        with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as pipe:
            if message is not None:
                connection.send(message)
            socket.send_fds(pipe, [b"v"], [self._descriptor])

    @classmethod
    def receive(cls, connection: Connection) -> Self:
        """Wait for what the other end sends.

        Raises
        ------
        EOFError
            The other end has closed.
        """
        with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as pipe:
            _, descriptors, _, _ = socket.recv_fds(pipe, 1, 1)
        if not descriptors:
            raise EOFError("the other end has closed before it sent a version")
        os.set_inheritable(descriptors[0], False)  # noqa: FBT003 - its only way
        return cls(descriptors[0])

    def _read(self, size: int, start: int) -> bytes:
        # Not from the file's own position, which all who have it open share.
        parts: list[bytes] = []
        while size:
            part = os.pread(self._descriptor, size, start)  # not more than 2 GiB at once
            if not part:
                raise EOFError(f"a version that was kept ends at byte {start}")
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return b"".join(parts)


def read(path: Path, overrides: Overrides) -> tuple[Kept, Checkpoint]:
    """Read what is at a path now, and keep it; errors are those of `load_checkpoint`."""
    checkpoint = load_checkpoint(path, overrides=overrides)
    return Kept.of(checkpoint), checkpoint
