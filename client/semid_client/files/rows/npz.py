"""numpy's ``.npz``: arrays in a zip archive."""

from __future__ import annotations

import io
import zipfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from semid_client.files._errors import FileError
from semid_client.files._extras import need
from semid_client.files.npy import read_header
from semid_client.files.places import Place, place
from semid_client.files.rows.source import ID_COLUMNS, Block, Source, What, reading, the_one

if TYPE_CHECKING:
    from collections.abc import Iterator


class NpzRows(Source):
    """Rows of an array of a ``.npz`` file, read as a stream: it is compressed, or may be.

    Ids are those of an array of one dimension, of integers or strings, that is named as they are.
    """

    def __init__(self, path: str, what: What, column: str | None, id_column: str | None) -> None:
        super().__init__()
        self.path, self._place = path, place(path)
        shapes = {}
        with self._archive() as archive:
            for member in archive.namelist():
                if member.endswith(".npy"):
                    with archive.open(member) as file:
                        shapes[member.removesuffix(".npy")] = read_header(file)
        matrices = [
            name
            for name, (shape, _, dtype) in shapes.items()
            if len(shape) == 2 and not dtype.hasobject  # noqa: PLR2004 -- a matrix
        ]
        if not matrices and any(dtype.hasobject for _, _, dtype in shapes.values()):
            raise FileError(
                path, "holds Python objects, which are never unpickled: save the array as numbers"
            )
        if column is None and what in matrices:
            column = what
        self._name = the_one(path, "two-dimensional arrays", matrices, column)
        (self.n_rows, self.width), fortran, self.dtype = shapes[self._name]
        if fortran and self.n_rows > 1 and self.width > 1:
            raise FileError(
                path, f"array {self._name!r} is stored by columns: save a copy in C order"
            )
        self._take_ids(shapes, id_column)

    def _take_ids(self, shapes: dict[str, Any], asked: str | None) -> None:
        self.id_name = asked or next((name for name in ID_COLUMNS if name in shapes), None)
        if self.id_name is None:
            return
        if self.id_name not in shapes:
            raise FileError(
                self.path, f"has no array {self.id_name!r}; there are {', '.join(shapes)}"
            )
        shape, _, self._id_dtype = shapes[self.id_name]
        if shape != (self.n_rows,) or self._id_dtype.kind not in "iuUS":
            raise FileError(
                self.path,
                f"array {self.id_name!r} is {self._id_dtype} of shape {shape}; expected an "
                f"integer or a string for each of {self.n_rows} rows",
            )

    @property
    def id_type(self) -> Any:
        """As Arrow has the array's type."""
        if self.id_name is None:
            return None
        native = self._id_dtype.newbyteorder("=")
        return need("pyarrow", self.path).array(np.empty(0, native)).type

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        with (
            self._place.open() as file,
            reading(self.path, ".npz"),
            zipfile.ZipFile(file) as archive,
        ):
            yield archive

    def _pieces(self, name: str, start: int, n_rows: int, row_bytes: int) -> Iterator[Any]:
        """Index of the first row, and the bytes, of up to ``n_rows`` rows of an array."""
        assert self.n_rows is not None  # noqa: S101 -- an array has a shape
        with self._archive() as archive, archive.open(f"{name}.npy") as file:
            read_header(file)
            file.seek(start * row_bytes, io.SEEK_CUR)
            for at in range(start, self.n_rows, n_rows):
                n = min(n_rows, self.n_rows - at)
                data = file.read(n * row_bytes)
                if len(data) != n * row_bytes:
                    raise FileError(
                        self.path, f"array {name!r} ends within rows {at} to {at + n - 1}"
                    )
                yield at, data

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read on from the beginning, which costs time but no memory."""
        row_bytes = self.width * self.dtype.itemsize
        for at, data in self._pieces(self._name, start, n_rows, row_bytes):
            rows = np.frombuffer(data, self.dtype)
            yield Block(at, rows.reshape(len(data) // row_bytes, self.width))

    def reads_on(self, at: int, start: int) -> bool:
        """Forward."""
        return at <= start

    def ids(self, n_rows: int) -> Iterator[Any] | None:
        """Ids, where there is an array of them."""
        if self.id_name is None:
            return None
        pa, dtype = need("pyarrow", self.path), self._id_dtype
        native = dtype.newbyteorder("=")  # Arrow has no other
        found = self._pieces(self.id_name, 0, n_rows, dtype.itemsize)
        return (
            pa.array(np.frombuffer(data, dtype).astype(native, copy=False)) for _, data in found
        )

    def null_id(self) -> int | None:
        """None: an array has no null."""
        return None

    def places(self) -> list[Place]:
        """The one file."""
        return [self._place]
