"""Embeddings in memory that a caller on this machine shares: read from there, never sent.

A message of embeddings crosses the loopback at some hundred megabytes a second, most of them spent
in copies that neither side wants. A caller on the same machine may put them into a file in
``/dev/shm`` instead, of which its requests say name, offset and shape::

    caller                                    server
    makes /dev/shm/semid-<random>,
    which begins with a random proof
    ShareMemory(name, size, proof)  ────────> opens it, compares the proof, removes the name
                                    <──────── a handle
    grows the file, maps it, fills it
    Encode(handle, offset, shape)   ────────> reads the rows into the batch: the one copy
                                    <──────── codes, in the message
    ...
    ends, or is killed              ────────> the call ShareMemory ends, and with it the sharing

What was decided, and why:

**The call is the lease.** ShareMemory stays open for as long as the memory is shared. Whatever ends
the caller (a return, SIGKILL, the loss of its machine) closes its connection, which ends the call,
which lets go of the file. No time-outs, no heartbeats, no list of who is still alive.

**The name is gone once both have the file open.** From then on the kernel frees the memory when
neither side holds it, however they end, both at once included; nobody else can open it, and a
listing of ``/dev/shm`` tells nothing. What is left to sweep is the file of a caller that was killed
between making it and being answered: one page, since it grows only afterwards, found at the
next start of a server by the lock that nobody holds on it (`sweep`).

**A proof, not an address.** The server may be able to open what the caller may not. It therefore
reads nothing to a caller who cannot say what the file begins with: who can has made the file, or
may read it anyway. This shows besides that both see the same ``/dev/shm``, which no address does: a
forwarded port looks like the loopback, and containers may share one and not the other. So there
is no test of the peer's address. Names are of one form, without a slash; links, FIFOs, devices,
files with a second name and files of another file system are refused, and an open that would wait
(for a file lease, for a writer) fails instead. Requests use a handle that the server drew at random
and that only this process knows: under ``--processes`` a request that reaches another process
is told NOT_FOUND, as after a restart, and the caller shares anew.

**Read, not mapped.** A caller can truncate its file at any moment. A mapping would then end the
server by SIGBUS; ``preadv`` just returns less, and that request alone is refused. It also costs no
address space and no page faults, and a file that was never filled takes no memory. What is found
finite, encoded and verified is the copy in the batch. So a caller that writes to its memory
meanwhile gets the codes of some numbers that it wrote, never codes that belong to none, and never
changes a neighbour's.

**Only embeddings.** Codes are a thousandth of them and come in the message. Reconstructions could
be written back, but an answer whose caller has given up would be written too, into memory that may
hold the rows of its next request by then: codes of a mixture, which nobody would notice.

**Bounded, and on unless told otherwise.** The memory is the caller's own (the kernel charges it
to who filled it); what the server spends is a file descriptor each. All callers together, and each
connection, may share so many bytes and files; one more is RESOURCE_EXHAUSTED, and clients then send
bytes as ever. Not each caller: those of one machine mostly have one address, and would have one
share between them. So who opens four connections can have everything; what the others lose by it is
speed. It is on because it asks for nothing, opens nothing by itself, and reads only what
was proved to be the caller's; ``--shared-memory-bytes 0`` turns it off.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import logging
import os
import re
import secrets
import stat
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from semid_server.errors import (
    DeviceError,
    InvalidInputError,
    SegmentNotFoundError,
    SharedMemoryFullError,
    SharedMemoryRefusedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

FOLDER: Final = Path("/dev/shm")  # noqa: S108 - where the contract says that the memory is
NAME: Final = re.compile(r"semid-[0-9a-f]{32}")
PROOF_BYTES: Final = range(16, 65)

CONNECTION_SHARE: Final = 4
"""One connection may have a quarter of everything: no client takes it all by mistake."""

MAX_SEGMENTS: Final = 256
"""Files of all callers: far below the descriptors that a process may have open."""

_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much may be shared, in bytes and in files."""

    nbytes: int
    segments: int = MAX_SEGMENTS

    @property
    def of_connection(self) -> Bounds:
        """The part that a single connection may have."""
        return Bounds(self.nbytes // CONNECTION_SHARE, self.segments // CONNECTION_SHARE)


class Segment:
    """Memory that a caller shares; readable until the sharing has ended and nobody needs it more.

    Requests that were admitted before the end are still answered. The descriptor is closed with
    the last of them, not before: it would be given to another file while the device's thread reads.

    Attributes
    ----------
    handle : str
        By which requests name it.
    nbytes : int
        As far as requests may refer to.
    """

    def __init__(self, fd: int, handle: str, nbytes: int) -> None:
        self.handle, self.nbytes = handle, nbytes
        self._fd: int | None = fd
        self._needed = 0
        self._ended = False
        self._lock = threading.Lock()

    def need(self) -> None:
        """Keep it readable until as many calls of `release`."""
        with self._lock:
            self._needed += 1

    def release(self) -> None:
        """Take back one call of `need`."""
        with self._lock:
            self._needed -= 1
            self._close_if_unused()

    def end(self) -> None:
        """End the sharing."""
        with self._lock:
            self._ended = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._ended and not self._needed and self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def read(self, into: memoryview, offset: int) -> int:
        """Read from ``offset`` on; returns the number of bytes, less where the file ends.

        Raises
        ------
        SegmentNotFoundError
            It is closed: whoever asked for it has left.
        """
        with self._lock:
            fd = self._fd
            if fd is None:
                raise SegmentNotFoundError(f"the memory {self.handle!r} is no longer shared")
            self._needed += 1  # whoever else needed it may leave meanwhile
        done = 0
        try:
            while done < len(into):
                # A single call may return less, at 2 GiB or on a signal; 0 is the end of the file.
                count = os.preadv(fd, [into[done:]], offset + done)
                if count == 0:
                    break
                done += count
        finally:
            self.release()
        return done


class SharedRows:
    """A matrix in shared memory, to be read once.

    Attributes
    ----------
    shape : (int, int)
        Rows and columns.
    nbytes : int
        Bytes of all of them.
    """

    __slots__ = ("_offset", "_segment", "nbytes", "shape")

    def __init__(self, segment: Segment, offset: int, shape: tuple[int, int], nbytes: int) -> None:
        self._segment, self._offset = segment, offset
        self.shape, self.nbytes = shape, nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def need(self) -> None:
        """Keep them readable until `release`, even if the sharing ends."""
        self._segment.need()

    def release(self) -> None:
        """Let go of them: they have been answered, or nobody waits for an answer."""
        self._segment.release()

    def part(self, start: int, stop: int) -> SharedRows:
        """Rows ``start`` to ``stop``."""
        rows, columns = self.shape
        row_bytes = self.nbytes // rows
        return SharedRows(
            self._segment,
            self._offset + start * row_bytes,
            (stop - start, columns),
            (stop - start) * row_bytes,
        )

    def read(self, into: memoryview, start: int) -> None:
        """Read the bytes from ``start`` on.

        Raises
        ------
        InvalidInputError
            The file ends before.
        DeviceError
            The memory itself has failed.
        """
        try:
            count = self._segment.read(into, self._offset + start)
        except OSError as error:
            raise DeviceError(f"the shared memory cannot be read: {error.strerror}") from error
        if count < len(into):
            raise InvalidInputError.at(
                "shared.offset",
                f"the shared file ends at byte {self._offset + start + count}; {self.nbytes} bytes "
                f"were to follow byte {self._offset}: it was truncated, or never grown",
            )


class SharedMemory:
    """What callers share with this process, by handle.

    Parameters
    ----------
    bounds : Bounds
        Of all callers together; 0 bytes for no sharing at all.
    folder : Path
        Where the files are.
    """

    def __init__(self, bounds: Bounds, *, folder: Path = FOLDER) -> None:
        self._bounds, self._folder = bounds, folder
        self._segments: dict[str, Segment] = {}
        self._bytes_of: Counter[str] = Counter()
        self._segments_of: Counter[str] = Counter()

    @property
    def offered(self) -> bool:
        """Whether callers may share memory here."""
        return self._bounds.of_connection.nbytes > 0

    @property
    def of_connection(self) -> Bounds:
        """What one connection may share."""
        return self._bounds.of_connection

    @property
    def segments(self) -> int:
        """Files that are shared now."""
        return len(self._segments)

    @property
    def nbytes(self) -> int:
        """Bytes that are shared now."""
        return self._bytes_of.total()

    @contextlib.contextmanager
    def shared(self, name: str, nbytes: int, proof: bytes, peer: str) -> Iterator[Segment]:
        """Share a file for as long as the context lasts.

        Parameters
        ----------
        name : str
            Of the file, which is removed.
        nbytes : int
            As far as requests will refer to.
        proof : bytes
            What the file begins with.
        peer : str
            The connection.

        Raises
        ------
        InvalidInputError
            The name, the size or the proof is not of the form that the contract asks for.
        SharedMemoryRefusedError
            Nothing is shared here, or there is no such file that this process and the caller may
            read.
        SharedMemoryFullError
            It is more than may be shared.
        """
        self._check(name, nbytes, proof, peer)
        segment = Segment(_open(self._folder, name, proof), secrets.token_hex(16), nbytes)
        self._segments[segment.handle] = segment
        self._bytes_of[peer] += nbytes
        self._segments_of[peer] += 1
        logger.debug("%s shares %d bytes", peer, nbytes)
        try:
            yield segment
        finally:
            del self._segments[segment.handle]
            segment.end()
            for count, size in ((self._bytes_of, nbytes), (self._segments_of, 1)):
                count[peer] -= size
                if not count[peer]:
                    del count[peer]
            logger.debug("%s no longer shares %d bytes", peer, nbytes)

    def find(self, handle: str) -> Segment:
        """Return what is shared under a handle; `SegmentNotFoundError` if nothing is."""
        segment = self._segments.get(handle)
        if segment is None:
            raise SegmentNotFoundError(
                f"no memory is shared as {handle[:64]!r} with this server process: the call "
                "ShareMemory has ended, or reached another one; share it again"
            )
        return segment

    def sweep(self) -> None:
        """Remove files of callers that were killed before they could share them.

        A caller holds a lock on its file from before it has a name, so that one which can be
        locked belongs to nobody. What this user may not open is its owner's to remove.
        """
        if not self.offered:
            return
        for name in _names(self._folder):
            with contextlib.suppress(OSError):
                fd = os.open(self._folder / name, _OPEN)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(self._folder / name)  # noqa: PTH108 - as it was opened
                    logger.info("removed %s: its owner is gone", self._folder / name)
                finally:
                    os.close(fd)

    def _check(self, name: str, nbytes: int, proof: bytes, peer: str) -> None:
        if not self.offered:
            raise SharedMemoryRefusedError(
                "this server takes no shared memory (--shared-memory-bytes): send the embeddings"
            )
        if not NAME.fullmatch(name):
            raise InvalidInputError.at(
                "name", f"{name[:64]!r}; expected 'semid-' and 32 hexadecimal digits in lower case"
            )
        if len(proof) not in PROOF_BYTES:
            raise InvalidInputError.at(
                "proof",
                f"{len(proof)} bytes; expected {PROOF_BYTES.start} to {PROOF_BYTES.stop - 1}",
            )
        if nbytes < len(proof):
            raise InvalidInputError.at(
                "size_bytes", f"{nbytes}; expected at least the {len(proof)} bytes of the proof"
            )
        mine = Bounds(self._bytes_of[peer] + nbytes, self._segments_of[peer] + 1)
        all_ = Bounds(self.nbytes + nbytes, self.segments + 1)
        for whose, wanted, bound in (
            ("this connection", mine, self._bounds.of_connection),
            ("all callers together", all_, self._bounds),
        ):
            if wanted.nbytes > bound.nbytes or wanted.segments > bound.segments:
                raise SharedMemoryFullError(
                    f"{whose} would share {wanted.nbytes} bytes in {wanted.segments} files; at "
                    f"most {bound.nbytes} bytes in {bound.segments} may be"
                )


def _open(folder: Path, name: str, proof: bytes) -> int:
    """Open a file that begins with ``proof``, remove its name, and return its descriptor."""
    path = folder / name
    try:
        fd = os.open(path, _OPEN)
    except OSError as error:
        raise SharedMemoryRefusedError(
            f"{path}: {error.strerror}: client and server need the same user and the same {folder}"
        ) from error
    try:
        _check_file(fd, path, proof)
        # Its owner does so too; sooner is better, but in this folder it may be its alone to do.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.unlink()
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_file(fd: int, path: Path, proof: bytes) -> None:
    """Raise unless this is a file that whoever knows ``proof`` may share."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise SharedMemoryRefusedError(f"{path} is not a regular file of one name")
    if status.st_dev != path.parent.stat().st_dev:
        raise SharedMemoryRefusedError(f"{path} lies in another file system than {path.parent}")
    if not hmac.compare_digest(os.pread(fd, len(proof), 0), proof):
        raise SharedMemoryRefusedError(f"{path} does not begin with the proof")


def _names(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if NAME.fullmatch(name)]  # noqa: PTH208 - names
    except OSError as error:
        logger.warning("%s cannot be read, so nothing can be shared there: %s", folder, error)
        return []
