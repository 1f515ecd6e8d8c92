"""numpy's own format, ``.npy``: one array in a file.

Reading maps one piece of the file at a time, so that the memory of the process stays that of a
piece whatever the file's size. Nothing is ever unpickled. Writing goes piece by piece to a
temporary name beside the output, which becomes the output when all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
from numpy.lib import format as npy

from semid_client.files._errors import FileError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
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
            shape, fortran_order, dtype = _header(self._file)
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
        # Mapped anew each time: pages of a map count as the process's own while it exists.
        if not self.shape[0] * self.shape[1]:
            return np.empty(self.shape, self.dtype)[rows]
        mapped: NDArray[Any] = np.memmap(
            self._file, self.dtype, "r", self._offset, self.shape, self._order
        )
        return mapped[rows]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NpyWriter:
    """A ``.npy`` file that appears when it is complete, and not at all if anything fails.

    A context manager: leaving it without an error writes all to the disk and gives the file its
    name; leaving it with one removes what was written.

    Parameters
    ----------
    path : str or path
        The file to write, ending in ``.npy``.
    force : bool
        Replace a file that is there.

    Attributes
    ----------
    shape, dtype
        Of the array that was begun.

    Raises
    ------
    FileError
        At once, if the path cannot be written to or is taken.
    """

    def __init__(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        self.path = Path(path)
        self._force = force
        self._check_free()
        if self.path.suffix != ".npy":
            raise FileError(path, "the output is a .npy file: give it a name that ends in .npy")
        # In the same folder, so that renaming it cannot turn into copying it.
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.partial")
        try:
            self._file: BinaryIO = self._temporary.open("xb")
        except OSError as error:
            raise FileError.of(path, error) from error
        self.shape: tuple[int, int] = (0, 0)
        self.dtype: np.dtype[Any] = np.dtype(np.float32)
        self._rows = 0

    def _check_free(self) -> None:
        if self.path.is_dir():
            raise FileError(self.path, "is a folder; expected a file to write")
        if self.path.exists() and not self._force:
            raise FileError(self.path, "exists already; --force replaces it")

    def begin(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        """Write the header of an array of this shape and type."""
        self.shape, self.dtype = shape, dtype.newbyteorder("<")
        descr = npy.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        with _named(self.path):
            npy.write_array_header_1_0(self._file, header)

    def __call__(self, start: int, rows: NDArray[Any]) -> None:
        """Append the rows that begin at ``start``: a sink for `Client.encode_into`.

        Raises
        ------
        FileError
            If they cannot be written, such as to a full disk.
        ValueError
            If they are not the next ones, or not of the shape and type begun.
        """
        if start != self._rows or rows.shape[1] != self.shape[1] or rows.dtype != self.dtype:
            raise ValueError(
                f"rows at {start}, {rows.shape[1]} columns of {rows.dtype}; expected rows at "
                f"{self._rows}, {self.shape[1]} columns of {self.dtype}"
            )
        with _named(self.path):
            self._file.write(np.ascontiguousarray(rows).data)
        self._rows += len(rows)

    def _finish(self) -> None:
        if self._rows != self.shape[0]:
            raise ValueError(f"{self._rows} rows written of {self.shape[0]}")
        with _named(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._check_free()  # once more: the work may have taken hours
            self._temporary.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # or a power cut may take the name away again
            finally:
                os.close(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            # Closing flushes, and on a full disk raises again what has been raised already.
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let an error of the system name the output, not its temporary name."""
    try:
        yield
    except OSError as error:
        raise FileError.of(path, error) from error
