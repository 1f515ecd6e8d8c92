"""Where files are: on this machine, or in an object store, named by a URL.

What is read or written by name is a `Place`. ``file://`` is this machine; all other URLs are
fsspec's, and what each store needs (endpoint, credentials) is taken from where its own tools look.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import io
import mmap
import os
import re
import shutil
import stat
import tempfile
from abc import ABC, abstractmethod
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Final, Protocol, TypeGuard

import numpy as np

from semid_client.files._errors import FileError
from semid_client.files._extras import need

if TYPE_CHECKING:
    from collections.abc import Iterator

    from semid_client.files.memory import Memory

EXTRAS: Final = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Extras that bring what speaks to a store, by the URL's scheme."""

REQUEST_BYTES: Final = 4 << 20
"""Bytes that are asked of a store at once; the parts of a larger range are asked for together."""

AHEAD_BYTES: Final = 32 << 20
"""Bytes of an object that are read ahead where it is read through."""

PART_BYTES: Final = 16 << 20
"""Bytes of a part of an upload, ten of which are under way."""

DIRECT_BYTES: Final = 1 << 20
"""Bytes that are worth a read past the page cache."""

NOT_DIRECT: Final = frozenset({errno.EINVAL, errno.EFAULT, errno.ENOTSUP})
"""What a file system says that cannot read past the page cache, or not into such memory."""

VERSIONS: Final = ("ETag", "etag", "generation", "mtime", "LastModified", "created")
"""What tells two contents of an object apart, whichever a store has."""

_URL: Final = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)", re.DOTALL)


class Ranges(Protocol):
    """An open file, of which any range of bytes can be read."""

    size: int

    def read_into(self, data: memoryview, at: int) -> None:
        """Fill ``data`` with what begins at byte ``at``."""

    def fetch(self, memory: Memory, at: int, n_bytes: int, unit: int) -> Memory:
        """Read ``n_bytes`` from byte ``at`` on to somewhere in ``memory``, and return that part.

        It begins at a multiple of ``unit``. ``memory`` begins with a page and has room for
        `memory.SLACK` bytes more. Several threads may read at once.
        """

    def close(self) -> None:
        """Close the file."""


class Place(ABC):
    """Something with a name that can be read or written.

    Attributes
    ----------
    name : str
        As it was given.
    """

    name: str

    @property
    def suffix(self) -> str:
        """What the name ends in, with its dot."""
        return suffix_of(self.name)

    @property
    @abstractmethod
    def local(self) -> Path | None:
        """The path, if it is on this machine."""

    @abstractmethod
    def sibling(self, ending: str) -> Place:
        """The place of this name and ``ending``."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether something is there."""

    @abstractmethod
    def is_folder(self) -> bool:
        """Whether there is a folder, or are objects of which this is the beginning."""

    @abstractmethod
    def identity(self) -> list[Any]:
        """Name, size and version: what changes when the content does.

        Raises
        ------
        FileError
            If there is nothing.
        """

    @abstractmethod
    def open(self, ahead: int = AHEAD_BYTES) -> IO[bytes]:
        """Open for reading; from a store, ``ahead`` bytes are asked for at a time."""

    @abstractmethod
    def ranges(self) -> Ranges:
        """Open for reading anywhere."""

    @abstractmethod
    def below(self, pattern: str) -> list[Place]:
        """All files in a folder whose names match; hidden ones, ``.x`` and ``_x``, do not."""

    @abstractmethod
    def matching(self, pattern: str) -> list[Place]:
        """All files whose names match this one, a pattern, and those `below` folders that do.

        After the part without wildcards a hidden name matches only what begins alike.
        """

    @abstractmethod
    def would_be_below(self, other: Place, pattern: str) -> bool:
        """Whether `below` would list another place, were a file there."""

    @abstractmethod
    def would_match(self, other: Place, pattern: str) -> bool:
        """Whether `matching` would list another place, were a file there."""

    @abstractmethod
    def put(self, made: Path) -> None:
        """Let the content of ``made`` appear here, at once and whole. It may be moved."""

    def takes(self, made: Path) -> bool:
        """Whether `put` moves ``made`` itself here, and not a copy."""
        del made
        return False

    @abstractmethod
    def remove(self) -> None:
        """Remove the file."""

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        """The content as a file of this machine; a copy, if need be, that goes away after."""
        if self.local is not None:
            yield self.local
            return
        with tempfile.TemporaryDirectory(prefix="semid-") as folder:
            path = Path(folder) / f"copy{self.suffix}"
            with self.open() as file, path.open("wb") as copy:
                shutil.copyfileobj(file, copy, PART_BYTES)
            yield path

    def holds(self, made: Path) -> bool:
        """Whether the content is that of ``made``, byte for byte."""
        with self.open() as found, made.open("rb") as expected:
            while True:
                some, same = found.read(PART_BYTES), expected.read(PART_BYTES)
                if some != same or not some:
                    return some == same

    def same_as(self, other: Place) -> bool:
        """Whether that is the same file under this or another name."""
        return self == other


class LocalPlace(Place):
    """A file or folder of this machine."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self._path = name, path

    @property
    def local(self) -> Path:
        """The path."""
        return self._path

    @property
    def target(self) -> Path:
        """The path of the file that is written, where the name is a symbolic link to it."""
        return Path(os.path.realpath(self._path))

    def sibling(self, ending: str) -> LocalPlace:
        """The path with a longer name."""
        return LocalPlace(self.name + ending, self._path.with_name(self._path.name + ending))

    def exists(self) -> bool:
        """Whether something is there."""
        return self._path.exists()

    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self._path.is_dir()

    def identity(self) -> list[Any]:
        """Name, size and time of the last change."""
        try:
            status = self._path.stat()
        except OSError as error:
            raise FileError.of(self.name, error) from error
        return [self.name, status.st_size, status.st_mtime_ns]

    def open(self, ahead: int = 0) -> IO[bytes]:
        """Open for reading; the system reads ahead."""
        del ahead
        try:
            mode = self._path.stat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of which opening says what is
                raise FileError(self.name, "is no regular file: only an Arrow stream is read, by -")
            return self._path.open("rb")
        except OSError as error:
            raise FileError.of(self.name, error) from error

    def ranges(self) -> Ranges:
        """Open for reading anywhere."""
        return LocalRanges(self.name, self.open())

    def below(self, pattern: str) -> list[Place]:
        """Files, in the order of their paths."""
        return [LocalPlace(str(path), path) for path in sorted(self._below(self._path, pattern))]

    def matching(self, pattern: str) -> list[Place]:
        """Files, in the order of their paths."""
        fixed, wild = _split(self._path.parts)
        found = set()
        for path in map(Path, glob.glob(str(self._path), recursive=True)):  # noqa: PTH207 -- any pattern
            if _fits(path.parts[len(fixed) :], wild):
                found |= self._below(path, pattern) if path.is_dir() else {path}
        return [LocalPlace(str(path), path) for path in sorted(found)]

    @staticmethod
    def _below(folder: Path, pattern: str) -> set[Path]:
        return {
            path
            for path in folder.rglob(pattern)
            if _shown(path.relative_to(folder).parts) and not path.is_dir()
        }

    def would_be_below(self, other: Place, pattern: str) -> bool:
        """By its path, or that of the file which it points to."""
        folder = Path(os.path.realpath(self._path)).parts
        return any(_is_below(parts, folder, pattern) for parts in _whole_paths(other))

    def would_match(self, other: Place, pattern: str) -> bool:
        """By its path, or that of the file which it points to."""
        fixed, wild = _split(self._path.parts)
        wild = (*Path(os.path.realpath(Path(*fixed))).parts, *wild)
        n_fixed = len(wild) - len(self._path.parts) + len(fixed)
        return any(
            _is_matched(parts, wild[:n_fixed], wild[n_fixed:], pattern)
            for parts in _whole_paths(other)
        )

    def put(self, made: Path) -> None:
        """Rename, on one file system; from another, copy beside it before that.

        Where the name is a symbolic link, what it points to is replaced, and the link stays.
        """
        try:
            to = self.target
            if not self.takes(made):
                beside = to.with_name(f"{to.name}.new")
                shutil.copyfile(made, beside)
                made = beside
            sync(made)
            made.replace(to)
            sync_folder(to.parent)
        except OSError as error:
            raise FileError.of(self.name, error) from error

    def takes(self, made: Path) -> bool:
        """Whether both are on one file system."""
        return made.stat().st_dev == self.target.parent.stat().st_dev

    def remove(self) -> None:
        """Remove the file."""
        try:
            self._path.unlink()
        except OSError as error:
            raise FileError.of(self.name, error) from error

    def same_as(self, other: Place) -> bool:
        """Whether both are one file, by whatever links."""
        if other.local is None or not self.exists() or not other.exists():
            return False
        return self._path.samefile(other.local)


class StoredPlace(Place):
    """An object of a store, or some whose names begin alike."""

    def __init__(self, name: str, store: Any, key: str) -> None:
        self.name, self._store, self._key = name, store, key

    @classmethod
    def of(cls, url: str, scheme: str) -> StoredPlace:
        """Find what speaks to the store."""
        extra = EXTRAS.get(scheme, "s3")
        fsspec = need("fsspec", url, extra)
        try:
            store, key = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            what = f"pip install 'semid[{extra}]'" if scheme in EXTRAS else str(error)
            raise FileError(url, f"what speaks to {scheme}:// is not installed: {what}") from error
        except ValueError as error:
            raise FileError(url, f"is no URL that can be used: {error}") from error
        return cls(url, store, key)

    @property
    def local(self) -> None:
        """None: it is elsewhere."""

    def sibling(self, ending: str) -> StoredPlace:
        """The object of a longer name."""
        return StoredPlace(self.name + ending, self._store, self._key + ending)

    def exists(self) -> bool:
        """Whether there is an object; a store or bucket that is not there is an error."""
        with self._asking():
            bucket = PurePosixPath(self._key.lstrip("/")).parts[:1]
            if self._store.isfile(self._key):
                return True
            # One may be allowed to write, and not to ask for the bucket.
            with suppress(PermissionError):
                if self._scheme in EXTRAS and not self._store.exists(*bucket):
                    raise FileError(self.name, f"there is no bucket {bucket[0]!r}")
            return False

    @property
    def _scheme(self) -> str:
        return self.name.partition("://")[0]

    def is_folder(self) -> bool:
        """Whether there are objects of which this is the beginning."""
        with self._asking():
            return bool(self._store.isdir(self._key))

    def identity(self) -> list[Any]:
        """Name, size, and what the store has to tell versions apart."""
        with self._asking():
            return _identity(self.name, self._store.info(self._key))

    def open(self, ahead: int = AHEAD_BYTES) -> IO[bytes]:
        """Open for reading, ``ahead`` bytes at a time."""
        return io.BufferedReader(_RangesFile(self.ranges()), ahead)

    def ranges(self) -> Ranges:
        """Ranges of the object; nothing stays open."""
        with self._asking():
            size = self._store.info(self._key)["size"]
        return _StoredRanges(self, int(size))

    def read(self, start: int, stop: int) -> list[bytes]:
        """The bytes of a range, in order, asked for in several parts at once."""
        starts = list(range(start, stop, REQUEST_BYTES))
        stops = [*starts[1:], stop]
        with self._asking():
            found: list[bytes] = self._store.cat_ranges(
                [self._key] * len(starts), starts, stops, on_error="raise"
            )
            return found

    def below(self, pattern: str) -> list[Place]:
        """Objects, in the order of their paths as on this machine."""
        with self._asking():
            found = self._store.find(self._key)
        folder = PurePosixPath(*self.parts)
        paths = {key: PurePosixPath(key) for key in found}
        return self._places(
            key
            for key, path in paths.items()
            if path.match(pattern) and _shown(path.relative_to(folder).parts)
        )

    def matching(self, pattern: str) -> list[Place]:
        """Objects, in the order of their paths."""
        fixed, wild = _split(self.parts)
        found: set[Place] = set()
        with self._asking():
            infos = self._store.glob(self._key, detail=True)
        for key, info in infos.items():
            if _fits(PurePosixPath(key).parts[len(fixed) :], wild):
                some = StoredPlace(self._store.unstrip_protocol(key), self._store, key)
                found.update(some.below(pattern) if info["type"] == "directory" else [some])
        return sorted(found, key=lambda place: PurePosixPath(place.name))

    def would_be_below(self, other: Place, pattern: str) -> bool:
        """By its key."""
        return self._beside(other) and _is_below(other.parts, self.parts, pattern)

    def would_match(self, other: Place, pattern: str) -> bool:
        """By its key."""
        return self._beside(other) and _is_matched(other.parts, *_split(self.parts), pattern)

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of the key, bucket and all."""
        return PurePosixPath(self._store._strip_protocol(self._key)).parts  # noqa: SLF001 -- fsspec's way

    def _beside(self, other: Place) -> TypeGuard[StoredPlace]:
        return isinstance(other, StoredPlace) and self._store == other._store  # noqa: SLF001 -- of its kind

    def _places(self, keys: Any) -> list[Place]:
        ordered = sorted(keys, key=PurePosixPath)
        return [StoredPlace(self._store.unstrip_protocol(key), self._store, key) for key in ordered]

    def put(self, made: Path) -> None:
        """Upload, in parts if it is large; only what is complete can be seen."""
        parts = {"chunksize": PART_BYTES} if "s3" in self._store.protocol else {}
        with self._asking():
            self._store.put_file(str(made), self._key, **parts)

    def remove(self) -> None:
        """Remove the object."""
        with self._asking():
            self._store.rm_file(self._key)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Let whatever a store's library raises be one sentence that begins with the URL."""
        try:
            yield
        except FileError:
            raise
        except FileNotFoundError as error:
            said = "" if "/" in str(error) else f" ({error})"
            raise FileError(self.name, f"there is no such object{said}") from error
        except Exception as error:
            # Stores' libraries raise their own: of credentials, of HTTP, of time.
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise FileError(self.name, f"the store says: {said}") from error

    def __eq__(self, other: object) -> bool:
        """Whether both name one object."""
        return isinstance(other, StoredPlace) and (self._store, self._key) == (
            other._store,
            other._key,
        )

    def __hash__(self) -> int:
        return hash(self._key)


class LocalRanges:
    """A file of this machine.

    What the page cache has not got is read past it, straight into the caller's memory: that takes
    a fraction of the processor's time, and leaves the cache to those who read a file twice.
    """

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self._name, self.file = name, file
        self.size = os.fstat(file.fileno()).st_size
        self._direct: int | None = None
        if self.size >= DIRECT_BYTES:
            # Of the same file, whatever has its name by now. Not all file systems have it.
            with suppress(OSError):
                self._direct = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_DIRECT)

    def read_into(self, data: memoryview, at: int) -> None:
        """Fill ``data`` with what begins at byte ``at``."""
        # Read, not mapped: that is faster, and a file that shrinks is an error, not the end.
        while data:
            try:
                n = os.preadv(self.file.fileno(), [data], at)
            except OSError as error:
                raise FileError.of(self._name, error) from error
            if not n:
                raise FileError(self._name, f"ended at byte {at} while it was read")
            data, at = data[n:], at + n

    def fetch(self, memory: Memory, at: int, n_bytes: int, unit: int) -> Memory:
        """Read past the page cache if nothing of the range seems to be there, or else from it."""
        shift = at % mmap.PAGESIZE
        if (
            self._direct is None
            or n_bytes < DIRECT_BYTES
            or shift % unit
            or _is_cached(self.file, at - shift, shift + n_bytes)
        ):
            found = memory[:n_bytes]
            self.read_into(found.data, at)
            return found
        found = memory[shift : shift + n_bytes]
        whole = -(-(shift + n_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            n = os.preadv(self._direct, [memory[:whole].data], at - shift) - shift
        except OSError as error:
            if error.errno not in NOT_DIRECT:
                raise FileError.of(self._name, error) from error
            n = 0
        done = min(max(0, n), n_bytes)
        if done < n_bytes:
            self.read_into(found[done:].data, at + done)
        return found

    def close(self) -> None:
        """Close the file."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None
        self.file.close()


# It waits for nothing, so that other threads need not be let on: they would be waited for, too.
_mincore: Final = ctypes.PyDLL(None).mincore


def _is_cached(file: IO[bytes], at: int, n_bytes: int) -> bool:
    """Whether the page cache has the first page of a range, the last, or that in the middle.

    ``at`` is that of a page. Of a file of somebody else's the kernel says yes.
    """
    try:
        mapped = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ, offset=at)
    except (OSError, ValueError):
        return True  # it has become shorter, or cannot be mapped: reading will tell
    with mapped:
        view = np.frombuffer(mapped, np.uint8)
        first, resident = view.ctypes.data, ctypes.c_ubyte(0)
        del view
        for place in (0, n_bytes // 2, n_bytes - 1):
            page = ctypes.c_void_p(first + place // mmap.PAGESIZE * mmap.PAGESIZE)
            failed = _mincore(page, ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(resident))
            if failed or resident.value & 1:
                return True
    return False


class _StoredRanges:
    def __init__(self, place: StoredPlace, size: int) -> None:
        self._place, self.size = place, size

    def read_into(self, data: memoryview, at: int) -> None:
        for some in self._place.read(at, at + len(data)):
            if not some or len(some) > len(data):
                raise FileError(self._place.name, f"changed at byte {at} while it was read")
            data[: len(some)] = some
            data, at = data[len(some) :], at + len(some)
        if data:
            raise FileError(self._place.name, f"ended at byte {at} while it was read")

    def fetch(self, memory: Memory, at: int, n_bytes: int, unit: int) -> Memory:
        del unit
        found = memory[:n_bytes]
        self.read_into(found.data, at)
        return found

    def close(self) -> None:
        pass


class _RangesFile(io.RawIOBase):
    """Ranges as a file of Python's, for the libraries that read formats."""

    def __init__(self, ranges: Ranges) -> None:
        self._ranges, self._at = ranges, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._ranges.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = memoryview(buffer).cast("B")
        data = data[: max(0, self._ranges.size - self._at)]
        if data:
            self._ranges.read_into(data, self._at)
        self._at += len(data)
        return len(data)


def place(path: str | os.PathLike[str]) -> Place:
    """Tell where a path or URL is.

    Raises
    ------
    FileError
        If what speaks to its store is not installed, or it is no URL of a file.
    """
    name = os.fspath(path)
    url = _URL.fullmatch(name)
    if url is None:
        return LocalPlace(name, Path(name))
    scheme, rest = url[1].lower(), url[2]
    if scheme != "file":
        return StoredPlace.of(name, scheme)
    if not rest.startswith("/"):
        raise FileError(name, "a file:// URL has a whole path after it: file:///folder/name")
    return LocalPlace(name, Path(rest))


def suffix_of(name: str | os.PathLike[str]) -> str:
    """What a path or URL ends in, with its dot."""
    return PurePosixPath(os.fspath(name)).suffix


def reserve(path: Path, n_bytes: int) -> None:
    """Make a file of zeros whose place on the disk is taken, so that it can be mapped.

    Into a hole of a file the system would write when it likes, and where there is no room left
    for that, end the process.
    """
    with path.open("wb") as file:
        if n_bytes:
            os.posix_fallocate(file.fileno(), 0, n_bytes)


def sync(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, or a power cut may take one away."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _shown(parts: tuple[str, ...]) -> bool:
    """Whether no part of a path is hidden, as Spark and Arrow see it."""
    return not any(part.startswith((".", "_")) for part in parts)


def _split(parts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A pattern's parts before the first wildcard, and the others."""
    n_fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return parts[:n_fixed], parts[n_fixed:]


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a pattern, part by part, and is hidden only where that says so."""
    if not pattern:
        return not parts
    first, *rest = pattern
    if first == "**" and _fits(parts, tuple(rest)):
        return True
    if not parts or not (_shown(parts[:1]) or parts[0][0] == first[0]):
        return False
    if first == "**":
        return _fits(parts[1:], pattern)
    return fnmatchcase(parts[0], first) and _fits(parts[1:], tuple(rest))


def _is_below(parts: tuple[str, ...], folder: tuple[str, ...], pattern: str) -> bool:
    """Whether a path is one of those in a folder that match and are not hidden."""
    inside = parts[len(folder) :]
    begins = parts[: len(folder)] == folder
    return begins and bool(inside) and _shown(inside) and fnmatchcase(inside[-1], pattern)


def _is_matched(
    parts: tuple[str, ...], fixed: tuple[str, ...], wild: tuple[str, ...], pattern: str
) -> bool:
    """Whether a path matches, or is one of those in a folder that does."""
    if parts[: len(fixed)] != fixed:
        return False
    inside = parts[len(fixed) :]
    return _fits(inside, wild) or any(
        _fits(inside[:n], wild) and _is_below(inside, inside[:n], pattern)
        for n in range(len(inside))
    )


def _whole_paths(place: Place) -> list[tuple[str, ...]]:
    """The path of a file of this machine without links before its name, and without any."""
    if place.local is None:
        return []
    beside = Path(os.path.realpath(place.local.parent), place.local.name)
    return [beside.parts, Path(os.path.realpath(place.local)).parts]


def _identity(name: str, info: dict[str, Any]) -> list[Any]:
    version = next((info[key] for key in VERSIONS if info.get(key) is not None), None)
    return [name, info["size"], None if version is None else str(version)]
