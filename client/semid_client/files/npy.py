"""numpy's own format, ``.npy``: one array in a file.

Reading takes one piece of the file at a time, so that the memory of the process stays that of a
piece whatever the file's size. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from semid_client.files._errors import FileError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, whether columns come first, and type."""
    version = npy.read_magic(file)
    if version == (1, 0):
        return npy.read_array_header_1_0(file)
    if version in {(2, 0), (3, 0)}:  # 3 differs in names of fields, which a matrix has none of
        return npy.read_array_header_2_0(file)
    raise ValueError(f"version {version[0]}.{version[1]} of the format is unknown")


class NpyReader:
    """The rows of a two-dimensional ``.npy`` file, by slices, until it is closed.

    Attributes
    ----------
    path : Path
        The file.
    shape : tuple of int
        ``(n, m)``.
    dtype : numpy.dtype
        Type of the numbers, in the file's byte order.

    Raises
    ------
    FileError
        If it is missing, no ``.npy`` file, truncated, not two-dimensional, or not of numbers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file: BinaryIO = self.path.open("rb")
        except OSError as error:
            raise FileError.of(path, error) from error
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        try:
            shape, fortran_order, dtype = read_header(self._file)
        except OSError as error:
            raise FileError.of(self.path, error) from error
        except (
            Exception
        ) as error:  # damage makes numpy raise anything, from TypeError to TokenError
            raise FileError(self.path, f"not a .npy file: {error}") from error
        if dtype.hasobject:
            raise FileError(
                self.path,
                "holds Python objects, which are never unpickled: save the array as numbers",
            )
        if dtype.kind not in "iuf":
            raise FileError(self.path, f"holds {dtype}; expected floats or integers")
        if len(shape) != 2 or min(shape) < 0:  # noqa: PLR2004 -- a matrix
            raise FileError(self.path, f"has shape {shape}; expected (rows, columns)")
        self.shape: tuple[int, ...] = shape
        self.dtype: np.dtype[Any] = dtype
        self._order: Any = "F" if fortran_order else "C"
        self._offset = self._file.tell()
        expected = self._offset + shape[0] * shape[1] * dtype.itemsize
        actual = os.fstat(self._file.fileno()).st_size
        if actual < expected:
            raise FileError(
                self.path,
                f"is truncated: {actual} bytes where {shape[0]} x {shape[1]} {dtype} takes "
                f"{expected}",
            )

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """Read the rows of a slice."""
        if not self.shape[0] * self.shape[1]:
            return np.empty(self.shape, self.dtype)[rows]
        start, stop, step = rows.indices(self.shape[0])
        if self._order == "C" and step == 1:
            return self._read(start, max(start, stop))
        # Mapped anew each time: pages of a map count as the process's own while it exists.
        mapped: NDArray[Any] = np.memmap(
            self._file, self.dtype, "r", self._offset, self.shape, self._order
        )
        return mapped[rows]

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        # Read, not mapped: that is faster, and a file that shrinks is an error, not the end.
        found: NDArray[Any] = np.empty((stop - start, self.shape[1]), self.dtype)
        data, at = found.reshape(-1).view(np.uint8).data, self._offset
        at += start * self.shape[1] * self.dtype.itemsize
        while data:
            try:
                n = os.preadv(self._file.fileno(), [data], at)
            except OSError as error:
                raise FileError.of(self.path, error) from error
            if not n:
                raise FileError(self.path, f"ended at byte {at} while it was read")
            data, at = data[n:], at + n
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()
