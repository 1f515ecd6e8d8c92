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
        Type of the numbers, in the file's byte order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __init__(self, path: str | os.PathLike[str] | Place) -> None:
        self.place = path if isinstance(path, Place) else place(path)
        self.name = self.place.name
        self._file: Ranges = self.place.ranges()
        self._offset = 0
        self._by_columns = False

    def _check_size(self) -> None:
        expected = self._offset + self.shape[0] * self.shape[1] * self.dtype.itemsize
        if self._file.size < expected:
            raise FileError(
                self.name,
                f"is truncated: {self._file.size} bytes where {self.shape[0]} x {self.shape[1]} "
                f"{self.dtype} takes {expected}",
            )

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """Read the rows of a slice."""
        if not self.shape[0] * self.shape[1]:
            return np.empty(self.shape, self.dtype)[rows]
        start, stop, step = rows.indices(self.shape[0])
        if not self._by_columns and step == 1:
            return self._read(start, max(start, stop))
        if not isinstance(self._file, LocalRanges):
            raise FileError(self.name, "is stored by columns: save a copy in C order")
        # Mapped anew each time: pages of a map count as the process's own while it exists.
        order: Any = "F" if self._by_columns else "C"
        mapped: NDArray[Any] = np.memmap(
            self._file.file, self.dtype, "r", self._offset, self.shape, order
        )
        return mapped[rows]

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        found: NDArray[Any] = np.empty((stop - start, self.shape[1]), self.dtype)
        at = self._offset + start * self.shape[1] * self.dtype.itemsize
        self._file.read_into(found.reshape(-1).view(np.uint8).data, at)
        return found

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
        self.shape, self.dtype, self._offset = shape, dtype, file.tell()
        self._check_size()
