"""numpy's own format, ``.npy``: one array in a file.

Reading takes one piece of the file at a time, so that the memory of the process stays that of a
piece whatever the file's size. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
from numpy.lib import format as npy

from semid_client.files._errors import FileError
from semid_client.files.places import LocalRanges, Place, place

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

    from semid_client.files.memory import Memory
    from semid_client.files.places import Ranges

HEADER_BYTES: Final = 1 << 17
"""More than the header of a matrix takes."""


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, whether columns come first, and type."""
    version = npy.read_magic(file)
    if version == (1, 0):
        return npy.read_array_header_1_0(file)
    if version in {(2, 0), (3, 0)}:  # 3 differs in names of fields, which a matrix has none of
        return npy.read_array_header_2_0(file)
    raise ValueError(f"version {version[0]}.{version[1]} of the format is unknown")


class Matrix:
    """The rows of a matrix that is part of a file, by slices, until it is closed.

    Attributes
    ----------
    name : str
        The file's, as given.
    shape : tuple of int
        ``(n, m)``.
    dtype : numpy.dtype
        Type of the numbers, in this machine's byte order, whatever the file's.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    _stored: np.dtype[Any]

    def __init__(self, path: str | os.PathLike[str] | Place) -> None:
        self.place = path if isinstance(path, Place) else place(path)
        self.name = self.place.name
        self._file: Ranges = self.place.ranges()
        self._offset = 0
        self._by_columns = False

    def _store(self, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int) -> None:
        """Take what the header says, and make sure that so many numbers are there."""
        self.shape, self._stored, self._offset = shape, dtype, offset
        self.dtype = dtype.newbyteorder("=")
        expected = self._offset + self.shape[0] * self.shape[1] * dtype.itemsize
        if self._file.size < expected:
            raise FileError(
                self.name,
                f"is truncated: {self._file.size} bytes where {self.shape[0]} x {self.shape[1]} "
                f"{dtype} takes {expected}",
            )

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """Read the rows of a slice."""
        start, stop, step = rows.indices(self.shape[0])
        if self._by_columns or step != 1:
            return self._native(np.ascontiguousarray(self._mapped()[rows]))
        found: NDArray[Any] = np.empty((max(0, stop - start), self.shape[1]), self._stored)
        self._file.read_into(found.reshape(-1).view(np.uint8).data, self._place_of(start))
        return self._native(found)

    def read(self, start: int, stop: int, memory: Memory) -> NDArray[Any]:
        """Read rows ``start`` to ``stop - 1`` into ``memory``; see `Ranges.fetch`."""
        shape = (stop - start, self.shape[1])
        n_bytes, unit = shape[0] * shape[1] * self._stored.itemsize, self._stored.itemsize
        if self._by_columns:
            rows = memory[:n_bytes].view(self._stored).reshape(shape)
            rows[:] = self._mapped()[start:stop]
        else:
            found = self._file.fetch(memory, self._place_of(start), n_bytes, unit)
            rows = found.view(self._stored).reshape(shape)
        return self._native(rows)

    def _place_of(self, row: int) -> int:
        return self._offset + row * self.shape[1] * self._stored.itemsize

    def _native(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Turn the bytes of numbers, in their place, that another kind of machine has stored."""
        if self._stored != self.dtype:
            rows = rows.byteswap(inplace=rows.flags.writeable).view(self.dtype)
        return rows

    def _mapped(self) -> NDArray[Any]:
        """All rows as they are stored, in memory that is the file's."""
        if not self.shape[0] * self.shape[1]:
            return np.empty(self.shape, self._stored)
        if not isinstance(self._file, LocalRanges):
            raise FileError(self.name, "is stored by columns: save a copy in C order")
        # Mapped anew each time: pages of a map count as the process's own while it exists.
        order: Any = "F" if self._by_columns else "C"
        return np.memmap(self._file.file, self._stored, "r", self._offset, self.shape, order)

    def mapped(self) -> NDArray[Any]:
        """All rows, in memory that is the file's until they are written to."""
        assert isinstance(self._file, LocalRanges)  # noqa: S101 -- a file of work
        if not self.shape[0] * self.shape[1]:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self._file.file, self.dtype, "c", self._offset, self.shape)

    def head(self, n_bytes: int, at: int = 0) -> bytes:
        """The first bytes of the file, or some from byte ``at``; fewer where it ends."""
        data = bytearray(max(0, min(n_bytes, self._file.size - at)))
        self._file.read_into(memoryview(data), at)
        return bytes(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NpyReader(Matrix):
    """The rows of a two-dimensional ``.npy`` file.

    Raises
    ------
    FileError
        If it is missing, no ``.npy`` file, truncated, not two-dimensional, or not of numbers.
    """

    def __init__(self, path: str | os.PathLike[str] | Place) -> None:
        super().__init__(path)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        file = io.BytesIO(self.head(HEADER_BYTES))
        try:
            shape, self._by_columns, dtype = read_header(file)
        except (
            Exception
        ) as error:  # damage makes numpy raise anything, from TypeError to TokenError
            raise FileError(self.name, f"not a .npy file: {error}") from error
        if dtype.hasobject:
            raise FileError(
                self.name,
                "holds Python objects, which are never unpickled: save the array as numbers",
            )
        if dtype.kind not in "iuf":
            raise FileError(self.name, f"holds {dtype}; expected floats or integers")
        if len(shape) != 2 or min(shape) < 0:  # noqa: PLR2004 -- a matrix
            raise FileError(self.name, f"has shape {shape}; expected (rows, columns)")
        self._store(shape, dtype, file.tell())
