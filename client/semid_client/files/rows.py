"""Rows of numbers, embeddings or codes, in every format that is read.

A source is read block by block, from any row on; how is its format's business.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from abc import ABC, abstractmethod
from bisect import bisect_right
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from glob import has_magic
from importlib.metadata import entry_points
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, Final, Literal

import numpy as np

from semid_client.files._errors import FileError
from semid_client.files._extras import need
from semid_client.files.npy import Matrix, NpyReader, read_header
from semid_client.files.places import AHEAD_BYTES, Place, place

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

STDIN: Final = "-"
What = Literal["embeddings", "codes"]
ID_COLUMNS: Final = ("id", "item_id")
"""Columns that are taken for the ids where none is named."""

NAMES: Final = 12
"""Names of columns, arrays or tensors that a message has at most."""

PARQUET_BYTES: Final = 1 << 20
"""Bytes of a Parquet column that are read at a time."""

SAFETENSORS_HEADER: Final = 100_000_000
"""Bytes that the header of a ``.safetensors`` file may have."""

SAFETENSORS_TYPES: Final = {
    **{f"F{8 * n}": f"<f{n}" for n in (2, 4, 8)},
    **{f"I{8 * n}": f"<i{n}" for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": f"<u{n}" for n in (1, 2, 4, 8)},
}

NAMED_FORMATS: Final = (".npz", ".parquet", ".safetensors", ".pt")
"""What is not ``.npy``, by the ends of names."""

PLUGS: Final = "semid.tensor-files"
"""Entry points, by suffix, of what reads and writes files that only torch knows."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a source.

    Attributes
    ----------
    start : int
        Index of the first of them in the source.
    rows : array (n, m)
        The numbers; zeros in bad rows.
    bad : dict
        What is wrong with rows that hold no numbers, by index in the source.
    ids : arrow array, optional
        Of a stream, which cannot be read a second time for them.
    """

    start: int
    rows: NDArray[Any]
    bad: dict[int, str] = field(default_factory=dict)
    ids: Any = None


class Source(ABC):
    """Rows of numbers in a file.

    Attributes
    ----------
    path : str
        The file, folder or pattern, as given.
    n_rows : int or None
        How many there are; None for a stream, which does not tell.
    width : int
        Numbers in a row.
    dtype : numpy.dtype
        Their type.
    extra_digit : bool or None
        Whether the last code of a row is the extra digit, where the file records that.
    metadata : dict
        Fingerprint and name of the model, where the file records them.
    """

    path: str
    n_rows: int | None
    width: int
    dtype: np.dtype[Any]
    extra_digit: bool | None = None

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}

    @property
    def id_type(self) -> Any:
        """Arrow type of the ids; None if those are the rows' indices."""
        return None

    @abstractmethod
    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Blocks of at most ``n_rows`` rows, from row ``start`` to the end."""

    @abstractmethod
    def places(self) -> list[Place]:
        """All files that the rows come from."""

    def reads_on(self, at: int, start: int) -> bool:
        """Whether from row ``at`` to row ``start`` one reads on, or else begins anew there."""
        del at, start
        return False

    def ids(self, n_rows: int) -> Iterator[Any] | None:
        """Ids of all rows, in arrow arrays of ``n_rows`` and a rest; None: the rows' indices."""
        del n_rows
        return None

    def identity(self) -> list[list[Any]]:
        """Name, size and time of each file: what changes when its content does."""
        return [found.identity() for found in self.places()]

    def close(self) -> None:  # noqa: B027 -- most have nothing to close
        """Close what is open."""


class MatrixRows(Source):
    """Rows of a matrix that can be read by slices.

    Parameters
    ----------
    path : str
        Its file.
    what : "embeddings" or "codes"
        What the rows are.
    matrix : object
        Has ``shape``, ``dtype`` and slices of rows.
    """

    def __init__(self, path: str, what: What, matrix: Any) -> None:
        super().__init__()
        self.path, self._matrix, self._place = path, matrix, place(path)
        self.n_rows, self.width = matrix.shape
        self.dtype = matrix.dtype
        self.metadata = getattr(matrix, "metadata", {})
        if what == "codes" and "semid.unique" in self.metadata:
            self.extra_digit = self.metadata["semid.unique"] != "none"

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read slice by slice."""
        assert self.n_rows is not None  # noqa: S101 -- a matrix has a shape
        for at in range(start, self.n_rows, n_rows):
            yield Block(at, self._matrix[at : min(at + n_rows, self.n_rows)])

    def places(self) -> list[Place]:
        """The one file."""
        return [self._place]

    def close(self) -> None:
        """Close the matrix, where it can be."""
        close = getattr(self._matrix, "close", None)
        if close is not None:
            close()


class PtRows(MatrixRows):
    """Rows of a tensor in a file of `torch.save`; from a store, a copy of it is made first."""

    def __init__(self, path: str, what: What, column: str | None) -> None:
        files = tensor_files(path)
        with ExitStack() as stack:
            found = place(path)
            found.open().close()  # or torch says what is missing, and much more
            copy = stack.enter_context(found.on_disk())
            super().__init__(path, what, files.read(copy, what, column, name=path))
            self.extra_digit = what == "codes"
            self._copy = stack.pop_all()

    def close(self) -> None:
        """Remove the copy, if there is one."""
        self._copy.close()


class SafetensorsMatrix(Matrix):
    """A tensor of a ``.safetensors`` file, whose header tells where its numbers are.

    Read here, for the library takes a file of a store as a whole: eight bytes of the header's
    length, a JSON object, the numbers (https://github.com/huggingface/safetensors#format).
    """

    def __init__(self, path: str, column: str | None) -> None:
        super().__init__(path)
        try:
            with _reading(path, "safetensors"):
                self._read_header(column)
        except BaseException:
            self.close()
            raise

    def _read_header(self, column: str | None) -> None:
        length = int.from_bytes(self.head(8), "little")
        if not 0 < length <= min(SAFETENSORS_HEADER, self._file.size - 8):
            raise ValueError(f"its header of {length} bytes is not there")
        tensors = json.loads(self.head(length, 8))
        self.metadata = {
            key: str(value)
            for key, value in tensors.pop("__metadata__", {}).items()
            if key.startswith("semid.")
        }
        matrices = [name for name, tensor in tensors.items() if len(tensor["shape"]) == 2]  # noqa: PLR2004 -- a matrix
        name = _the_one(self.name, "two-dimensional tensors", matrices, column)
        tensor, (start, stop) = tensors[name], tensors[name]["data_offsets"]
        if tensor["dtype"] == "BF16":
            self.dtype = np.dtype(need("ml_dtypes", self.name).bfloat16)
        elif tensor["dtype"] in SAFETENSORS_TYPES:
            self.dtype = np.dtype(SAFETENSORS_TYPES[tensor["dtype"]])
        else:
            raise ValueError(f"tensor {name!r} is of {tensor['dtype']}; expected numbers")
        self.shape, self._offset = (*map(int, tensor["shape"]),), 8 + length + int(start)
        if min(self.shape) < 0 or stop - start != (
            self.shape[0] * self.shape[1] * self.dtype.itemsize
        ):
            raise ValueError(f"tensor {name!r} of shape {self.shape} does not take {stop - start}")
        self._check_size()


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
        if column is None and what in matrices:
            column = what
        self._name = _the_one(path, "two-dimensional arrays", matrices, column)
        (self.n_rows, self.width), fortran, self.dtype = shapes[self._name]
        if fortran and self.n_rows > 1 and self.width > 1:
            raise FileError(
                path, f"array {self._name!r} is stored by columns: save a copy in C order"
            )
        self._take_ids(shapes, id_column)

    def _take_ids(self, shapes: dict[str, Any], asked: str | None) -> None:
        self._id_name = asked or next((name for name in ID_COLUMNS if name in shapes), None)
        if self._id_name is None:
            return
        if self._id_name not in shapes:
            raise FileError(
                self.path, f"has no array {self._id_name!r}; there are {', '.join(shapes)}"
            )
        shape, _, self._id_dtype = shapes[self._id_name]
        if shape != (self.n_rows,) or self._id_dtype.kind not in "iuUS":
            raise FileError(
                self.path,
                f"array {self._id_name!r} is {self._id_dtype} of shape {shape}; expected an "
                f"integer or a string for each of {self.n_rows} rows",
            )

    @property
    def id_type(self) -> Any:
        """As Arrow has the array's type."""
        if self._id_name is None:
            return None
        return need("pyarrow", self.path).array(np.empty(0, self._id_dtype)).type

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        with (
            self._place.open() as file,
            _reading(self.path, ".npz"),
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
        if self._id_name is None:
            return None
        pa, dtype = need("pyarrow", self.path), self._id_dtype
        found = self._pieces(self._id_name, 0, n_rows, dtype.itemsize)
        return (pa.array(np.frombuffer(data, dtype)) for _, data in found)

    def places(self) -> list[Place]:
        """The one file."""
        return [self._place]


class ArrowStreamRows(Source):
    """Rows of an Arrow IPC stream: standard input. Its record batches are the blocks."""

    def __init__(
        self, stream: IO[bytes], what: What, column: str | None, id_column: str | None
    ) -> None:
        super().__init__()
        self.path, self.n_rows = "standard input", None
        pa = need("pyarrow", self.path)
        with _reading(self.path, "an Arrow IPC stream"):
            self._reader = pa.ipc.open_stream(stream)
        columns = ListColumns(self.path, self._reader.schema, what, column, id_column)
        self._columns = columns
        self.metadata, self.extra_digit = _recorded(self._reader.schema, what)
        with _reading(self.path, "an Arrow IPC stream"):
            self._first = next(iter(self._reader), None)
        self.width, self.dtype = columns.width_and_type(self._first)

        self.spooled_ids: Callable[[int], Iterator[Any]] | None = None

    @property
    def id_type(self) -> Any:
        """As the column's."""
        return self._columns.id_type

    def ids(self, n_rows: int) -> Iterator[Any] | None:
        """Ids that were kept while the rows were read; see `IdSpool`."""
        return None if self.spooled_ids is None else self.spooled_ids(n_rows)

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read on; a stream has one beginning."""
        assert start == 0  # noqa: S101 -- the caller knows that it is a stream
        batch, at = self._first, 0
        while batch is not None:
            for offset in range(0, len(batch), n_rows):
                some = batch.slice(offset, n_rows)
                rows, bad = self._columns.rows(some, at, self.width, self.dtype)
                yield Block(at, rows, bad, self._columns.ids(some))
                at += len(some)
            with _reading(self.path, "an Arrow IPC stream"):
                batch = next(iter(self._reader), None)

    def places(self) -> list[Place]:
        """None that could be looked at again."""
        return []


class ParquetRows(Source):
    """Rows of a column of lists in one Parquet file, or in many, in order of their names."""

    def __init__(self, path: str, what: What, column: str | None, id_column: str | None) -> None:
        super().__init__()
        self.path = path
        self._pq = need("pyarrow.parquet", path)
        self._places = _parquet_files(path)
        self._starts, self._groups = [0], [0]
        for found in self._places:
            with self._opened(found) as parquet:
                if found == self._places[0]:
                    schema = parquet.schema_arrow
                    self._columns = ListColumns(path, schema, what, column, id_column)
                    self.metadata, self.extra_digit = _recorded(schema, what)
                else:
                    self._columns.check_same(found.name, parquet.schema_arrow)
                self._starts.append(self._starts[-1] + parquet.metadata.num_rows)
                for group in range(parquet.num_row_groups):
                    self._groups.append(
                        self._groups[-1] + parquet.metadata.row_group(group).num_rows
                    )
        self.n_rows = self._starts[-1]
        first = next(self._batches(0, 1, self._columns.names), None)
        self.width, self.dtype = self._columns.width_and_type(first and first[1])

    @property
    def id_type(self) -> Any:
        """As the column's."""
        return self._columns.id_type

    @contextmanager
    def _opened(self, found: Place, ahead: int = PARQUET_BYTES) -> Iterator[Any]:
        # Without a buffer, or with what the library calls a pre-buffer, it would hold a whole
        # row group: of a file that has but one, everything.
        options = {"buffer_size": PARQUET_BYTES, "pre_buffer": False}
        with ExitStack() as stack:
            opened = stack.enter_context(found.open(ahead))
            stack.enter_context(_reading(found.name, "Parquet"))
            file = found.local or opened  # of a path the library reads without Python
            yield stack.enter_context(self._pq.ParquetFile(file, **options))

    def _batches(
        self, start: int, n_rows: int, columns: list[str], ahead: int = PARQUET_BYTES
    ) -> Iterator[tuple[int, Any]]:
        """Record batches of at most ``n_rows`` rows, each with the index of its first row."""
        for found, begin, end in zip(self._places, self._starts, self._starts[1:], strict=False):
            if end <= start:
                continue
            with self._opened(found, ahead) as parquet:
                at = begin
                for group in range(parquet.num_row_groups):
                    stop = at + parquet.metadata.row_group(group).num_rows
                    if stop <= start:
                        at = stop
                        continue
                    with _reading(found.name, "Parquet", f"row group {group}"):
                        for batch in parquet.iter_batches(n_rows, [group], columns):
                            skipped = min(max(0, start - at), len(batch))
                            if skipped < len(batch):
                                yield at + skipped, batch.slice(skipped)
                            at += len(batch)

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read row group by row group, a piece at a time."""
        columns = self._columns.names[:1]
        for at, batch in self._batches(start, n_rows, columns, AHEAD_BYTES):
            rows, bad = self._columns.rows(batch, at, self.width, self.dtype)
            yield Block(at, rows, bad)

    def ids(self, n_rows: int) -> Iterator[Any] | None:
        """Ids, where there is a column of them."""
        if self._columns.id_name is None:
            return None
        found = self._batches(0, n_rows, [self._columns.id_name])
        return rechunked((batch.column(0) for _, batch in found), n_rows)

    def places(self) -> list[Place]:
        """All files."""
        return self._places

    @property
    def column(self) -> str:
        """Name of the column of rows."""
        return self._columns.names[0]

    @property
    def starts(self) -> list[int]:
        """Index of the first row of each file, and the number of all rows."""
        return self._starts

    def reads_on(self, at: int, start: int) -> bool:
        """Within a row group, which is read from its beginning."""
        return at <= start and bisect_right(self._groups, at) == bisect_right(self._groups, start)


class ListColumns:
    """The columns of a table that hold the rows and the ids."""

    def __init__(
        self, path: str, schema: Any, what: What, column: str | None, id_column: str | None
    ) -> None:
        self._path, self._pa = path, need("pyarrow", path)
        lists = [field.name for field in schema if self._is_matrix(field.type)]
        if column is None and what in lists:
            column = what
        if column is None and not lists:
            raise FileError(
                path,
                "has no column of lists of numbers, an embedding or the codes of an item each; "
                f"its columns are {_listed(schema.names)}",
            )
        if column in schema.names and column not in lists:
            raise FileError(
                path,
                f"column {column!r} is {schema.field(column).type}; expected lists of numbers"
                + (f", as are {_listed(lists)}" if lists else ""),
            )
        self._name = _the_one(path, "columns of lists", lists, column)
        self._type = schema.field(self._name).type
        if id_column is None:
            id_column = next((name for name in ID_COLUMNS if name in schema.names), None)
        elif id_column not in schema.names:
            raise FileError(path, f"has no column {id_column!r}; there are {_listed(schema.names)}")
        self.id_name = id_column
        self.id_type = None if id_column is None else schema.field(id_column).type
        self.names = [self._name] + ([id_column] if id_column else [])

    def _is_matrix(self, kind: Any) -> bool:
        types = self._pa.types
        if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
            return False
        return bool(types.is_integer(kind.value_type) or types.is_floating(kind.value_type))

    def check_same(self, file: str, schema: Any) -> None:
        """Refuse a further file whose columns are of other types."""
        for name, kind in ((self._name, self._type), (self.id_name, self.id_type)):
            if name is None:
                continue
            found = schema.field(name).type if name in schema.names else "missing"
            if found != kind:
                raise FileError(file, f"column {name!r} is {found}; expected {kind} as before it")

    def width_and_type(self, batch: Any) -> tuple[int, np.dtype[Any]]:
        """Numbers in a row, and their type; judged by the first row where lists vary."""
        dtype = np.dtype(self._type.value_type.to_pandas_dtype())
        if self._pa.types.is_fixed_size_list(self._type):
            return self._type.list_size, dtype
        column = batch.column(self._name) if batch is not None else []
        first = next((len(row) for row in column if row.is_valid), None)
        if first is None:
            raise FileError(self._path, f"column {self._name!r} begins with no row of numbers")
        return first, dtype

    def rows(
        self, batch: Any, start: int, width: int, dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], dict[int, str]]:
        """Rows (n, width) of a batch; what is wrong with those that are no such rows."""
        column = batch.column(self._name)
        n = len(column)
        flat = column.flatten()
        if column.null_count == 0 and flat.null_count == 0 and len(flat) == n * width:
            lengths = None
            if not self._pa.types.is_fixed_size_list(column.type):
                lengths = column.value_lengths().to_numpy(zero_copy_only=False)
            if lengths is None or (lengths == width).all():
                return flat.to_numpy(zero_copy_only=False).reshape(n, width), {}
        rows, bad = np.zeros((n, width), dtype), {}
        for i, value in enumerate(column.to_pylist()):  # a batch with damage: seldom
            if value is None:
                bad[start + i] = "is null"
            elif len(value) != width:
                bad[start + i] = f"has {len(value)} numbers; expected {width}"
            elif None in value:
                bad[start + i] = f"number {value.index(None)} is null"
            else:
                rows[i] = value
        return rows, bad

    def ids(self, batch: Any) -> Any:
        """Ids of a batch; None if they are the rows' indices."""
        return None if self.id_name is None else batch.column(self.id_name)


class JsonLinesCodes(Source):
    """Codes in lines of JSON, as `semid encode` writes them; ``null`` is a bad row."""

    def __init__(self, path: str, id_column: str | None) -> None:
        super().__init__()
        self.path, self._place, self._id = path, place(path), id_column or "id"
        self.dtype = np.dtype(np.int64)
        self.n_rows, self.width = 0, 0
        self._first_id: Any = None
        for id_, codes in self._lines():
            if not self.n_rows:
                self._first_id = id_
            self.n_rows += 1
            self.width = self.width or len(codes or ())
        if self.n_rows and not self.width:
            raise FileError(path, "holds no codes")
        self.width = self.width or 1  # of no rows, any

    @property
    def id_type(self) -> Any:
        """As Arrow has that of the first line's."""
        if self._first_id is None:
            return None
        with _reading(self.path, "ids"):
            return need("pyarrow", self.path).array([self._first_id]).type

    def _lines(self) -> Iterator[tuple[Any, list[int] | None]]:
        with self._place.open() as file:
            for number, line in enumerate(file, 1):
                try:
                    item = json.loads(line)
                    id_, codes = item.get(self._id), item["codes"]
                except (ValueError, KeyError, AttributeError) as error:
                    raise FileError(
                        self.path, f'line {number} is not an object with "codes": {error!r}'
                    ) from error
                if codes is not None and not (
                    isinstance(codes, list) and all(type(code) is int for code in codes)
                ):
                    raise FileError(
                        self.path, f"line {number}: its codes are no list of whole numbers"
                    )
                yield id_, codes

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read line by line."""
        lines = islice(self._lines(), start, None)
        at = start
        while some := list(islice(lines, n_rows)):
            bad, held = {}, []
            for index, (_, codes) in enumerate(some, at):
                if codes is None or len(codes) != self.width:
                    bad[index] = "is null" if codes is None else f"has {len(codes)} codes"
                    codes = [0] * self.width  # noqa: PLW2901 -- of a bad row
                held.append(codes)
            with _reading(self.path, "codes", f"lines {at + 1} to {at + len(some)}"):
                yield Block(at, np.array(held, self.dtype).reshape(len(some), self.width), bad)
            at += len(some)

    def reads_on(self, at: int, start: int) -> bool:
        """Forward."""
        return at <= start

    def ids(self, n_rows: int) -> Iterator[Any] | None:
        """Ids, if the first line has one."""
        return None if self.id_type is None else self._ids(n_rows)

    def _ids(self, n_rows: int) -> Iterator[Any]:
        pa, lines = need("pyarrow", self.path), self._lines()
        while some := [id_ for id_, _ in islice(lines, n_rows)]:
            with _reading(self.path, "ids"):
                yield pa.array(some, self.id_type)

    def places(self) -> list[Place]:
        """The one file."""
        return [self._place]


def open_rows(  # noqa: PLR0911 -- one for each format
    path: str, what: What, *, column: str | None = None, id_column: str | None = None
) -> Source:
    """Open a source by what its name ends in; ``-`` is an Arrow stream on standard input.

    Parameters
    ----------
    path : str
        File; for Parquet also a folder or a pattern.
    what : "embeddings" or "codes"
        What its rows are.
    column : str, optional
        Name of the column, array or tensor, where there are several.
    id_column : str, optional
        Column of ids; `ID_COLUMNS` are looked for.

    Raises
    ------
    FileError
        If it cannot be read, or needs a library that is not installed.
    """
    if path == STDIN:
        return ArrowStreamRows(sys.stdin.buffer, what, column, id_column)
    found = place(path)
    suffix = found.suffix
    if suffix == ".npz":
        return NpzRows(path, what, column, id_column)
    if suffix == ".safetensors":
        _check_no_ids(path, id_column)
        return MatrixRows(path, what, SafetensorsMatrix(path, column))
    if suffix == ".pt":
        _check_no_ids(path, id_column)
        return PtRows(path, what, column)
    if suffix == ".jsonl" and what == "codes":
        return JsonLinesCodes(path, id_column)
    if suffix == ".parquet" or (suffix != ".npy" and (has_magic(path) or found.is_folder())):
        return ParquetRows(path, what, column, id_column)
    try:
        matrix = NpyReader(found)
    except FileError as error:
        if suffix == ".npy" or not found.exists() or not error.problem.startswith("not a .npy"):
            raise
        raise FileError(
            path,
            f"is {error.problem}; files of other formats have names that end in "
            f"{', '.join(NAMED_FORMATS)}" + (", .jsonl" if what == "codes" else ""),
        ) from error
    with ExitStack() as stack:
        stack.callback(matrix.close)
        if column is not None:
            raise FileError(path, f"has one array and no names: --column {column} says nothing")
        _check_no_ids(path, id_column)
        stack.pop_all()
    return MatrixRows(path, what, matrix)


def _check_no_ids(path: str, id_column: str | None) -> None:
    if id_column is not None:
        raise FileError(path, f"has no ids: --id-column {id_column} says nothing")


def tensor_files(path: str | os.PathLike[str]) -> Any:
    """Return what reads and writes ``.pt`` files: a part of the server, since it needs torch."""
    for entry in entry_points(group=PLUGS, name="pt"):
        try:
            return entry.load()
        except ModuleNotFoundError as error:
            raise FileError(
                path,
                f"a .pt file needs {error.name}, which is not installed: "
                "pip install 'semid[server]', or use .safetensors or .npy",
            ) from error
    raise FileError(path, "a .pt file needs semid's server part, which is not installed")


def rechunked(arrays: Iterator[Any], n_rows: int) -> Iterator[Any]:
    """Arrow arrays of ``n_rows`` each, and a rest, with the same content."""
    held: list[Any] = []
    n_held = 0
    for array in arrays:
        held.append(array)
        n_held += len(array)
        while n_held >= n_rows:
            whole = _joined(held)
            yield whole[:n_rows]
            held, n_held = [whole[n_rows:]], n_held - n_rows
    if n_held:
        yield _joined(held)


def _joined(arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else need("pyarrow", "ids").concat_arrays(arrays)


def _recorded(schema: Any, what: What) -> tuple[dict[str, str], bool | None]:
    """What an Arrow schema records of the model, and whether there is an extra digit."""
    metadata = {
        key.decode(): value.decode()
        for key, value in (schema.metadata or {}).items()
        if key.startswith(b"semid.")
    }
    unique = metadata.get("semid.unique") if what == "codes" else None
    return metadata, None if unique is None else unique != "none"


def _parquet_files(path: str) -> list[Place]:
    found = place(path)
    if has_magic(path) and not (found.local and found.exists()):
        files = found.matching()
    elif found.is_folder():
        files = found.below("*.parquet")
    else:
        return [found]
    if not files:
        raise FileError(path, "there are no .parquet files")
    return files


def _listed(names: list[str]) -> str:
    """Some names in a sentence."""
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more or "none"


def _the_one(path: str, what: str, names: list[str], asked: str | None) -> str:
    if asked is not None and asked in names:
        return asked
    listed = _listed(names)
    if asked is not None:
        raise FileError(path, f"{asked!r} is not one of its {what}: {listed}")
    if len(names) != 1:
        raise FileError(path, f"its {what} are {listed}; name the one to read by --column")
    return names[0]


class _reading:  # noqa: N801 -- used like a function
    """Let whatever a library says of a file be one sentence that begins with its path."""

    def __init__(self, path: str | os.PathLike[str], kind: str, place: str = "") -> None:
        self._path, self._kind, self._place = path, kind, place

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if error is None or isinstance(error, FileError | GeneratorExit | KeyboardInterrupt):
            return
        if isinstance(error, Exception):
            # Damage makes the libraries raise anything; the first line says what.
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            place = f"{self._place} " if self._place else ""
            raise FileError(self._path, f"{place}cannot be read as {self._kind}: {said}") from error
