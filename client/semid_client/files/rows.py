"""Rows of numbers, embeddings or codes, in every format that is read.

A source is read block by block, from any row on; how is its format's business.
"""

from __future__ import annotations

import glob
import io
import json
import sys
import zipfile
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal

import numpy as np

from semid_client.files._errors import FileError
from semid_client.files._extras import need
from semid_client.files.npy import NpyReader, read_header

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

STDIN: Final = "-"
What = Literal["embeddings", "codes"]
ID_COLUMNS: Final = ("id", "item_id")
"""Columns that are taken for the ids where none is named."""

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

    @abstractmethod
    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Blocks of at most ``n_rows`` rows, from row ``start`` to the end."""

    @abstractmethod
    def files(self) -> list[Path]:
        """All files that the rows come from."""

    def ids(self, n_rows: int) -> Iterator[Any] | None:
        """Ids of all rows, in arrow arrays of ``n_rows`` and a rest; None: the rows' indices."""
        del n_rows
        return None

    def identity(self) -> list[list[Any]]:
        """Name, size and time of each file: what changes when its content does."""
        found = []
        for path in self.files():
            status = path.stat()
            found.append([str(path), status.st_size, status.st_mtime_ns])
        return found

    def close(self) -> None:  # noqa: B027 -- most have nothing to close
        """Close what is open."""


class MatrixRows(Source):
    """Rows of a matrix that can be read by slices.

    Parameters
    ----------
    path : str
        Its file.
    matrix : object
        Has ``shape``, ``dtype`` and slices of rows.
    """

    def __init__(self, path: str, matrix: Any) -> None:
        super().__init__()
        self.path, self._matrix = path, matrix
        self.n_rows, self.width = matrix.shape
        self.dtype = matrix.dtype

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read slice by slice."""
        assert self.n_rows is not None  # noqa: S101 -- a matrix has a shape
        for at in range(start, self.n_rows, n_rows):
            yield Block(at, self._matrix[at : min(at + n_rows, self.n_rows)])

    def files(self) -> list[Path]:
        """The one file."""
        return [Path(self.path)]

    def close(self) -> None:
        """Close the matrix, where it can be."""
        close = getattr(self._matrix, "close", None)
        if close is not None:
            close()


class SafetensorsMatrix:
    """A tensor of a ``.safetensors`` file, opened anew for each slice: see `NpyReader`."""

    def __init__(self, path: str, column: str | None) -> None:
        self._path, self._open = path, need("safetensors", path).safe_open
        with _reading(path, "safetensors"), self._open(path, "numpy") as file:
            if "BF16" in {file.get_slice(name).get_dtype() for name in file.keys()}:  # noqa: SIM118 -- not a dict
                need("ml_dtypes", path)  # teaches numpy the type
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 -- not a dict
            matrices = [name for name, shape in shapes.items() if len(shape) == 2]  # noqa: PLR2004 -- a matrix
            self._name = _the_one(path, "two-dimensional tensors", matrices, column)
            self.shape = tuple(shapes[self._name])
        if min(self.shape):
            self.dtype = self[0:1].dtype
        else:
            raise FileError(path, f"tensor {self._name!r} has shape {self.shape}; it holds nothing")

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        with _reading(self._path, "safetensors"), self._open(self._path, "numpy") as file:
            found: NDArray[Any] = file.get_slice(self._name)[rows]
            return found


class NpzRows(Source):
    """Rows of an array of a ``.npz`` file, read as a stream: it is compressed, or may be."""

    def __init__(self, path: str, column: str | None) -> None:
        super().__init__()
        self.path = path
        with _reading(path, ".npz"), zipfile.ZipFile(path) as archive:
            shapes = {}
            for member in archive.namelist():
                with archive.open(member) as file:
                    shape, fortran, dtype = read_header(file)
                if len(shape) == 2 and not dtype.hasobject:  # noqa: PLR2004 -- a matrix
                    shapes[member.removesuffix(".npy")] = shape, fortran, dtype
        self._name = _the_one(path, "two-dimensional arrays", list(shapes), column)
        (self.n_rows, self.width), fortran, self.dtype = shapes[self._name]
        if fortran and self.n_rows > 1 and self.width > 1:
            raise FileError(
                path, f"array {self._name!r} is stored by columns: save a copy in C order"
            )

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read on from the beginning, which costs time but no memory."""
        assert self.n_rows is not None  # noqa: S101 -- an array has a shape
        row_bytes = self.width * self.dtype.itemsize
        with (
            _reading(self.path, ".npz"),
            zipfile.ZipFile(self.path) as archive,
            archive.open(f"{self._name}.npy") as file,
        ):
            read_header(file)
            file.seek(start * row_bytes, io.SEEK_CUR)
            for at in range(start, self.n_rows, n_rows):
                n = min(n_rows, self.n_rows - at)
                data = file.read(n * row_bytes)
                if len(data) != n * row_bytes:
                    raise FileError(
                        self.path, f"array {self._name!r} ends within rows {at} to {at + n - 1}"
                    )
                yield Block(at, np.frombuffer(data, self.dtype).reshape(n, self.width))

    def files(self) -> list[Path]:
        """The one file."""
        return [Path(self.path)]


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
        columns = _Columns(self.path, self._reader.schema, what, column, id_column)
        self._columns = columns
        with _reading(self.path, "an Arrow IPC stream"):
            self._first = next(iter(self._reader), None)
        self.width, self.dtype = columns.width_and_type(self._first)

        self.spooled_ids: Callable[[int], Iterator[Any]] | None = None

    @property
    def id_type(self) -> Any:
        """Arrow type of the ids; None if they are the rows' indices."""
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

    def files(self) -> list[Path]:
        """None that could be looked at again."""
        return []


class ParquetRows(Source):
    """Rows of a column of lists in one Parquet file, or in many, in order of their names."""

    def __init__(self, path: str, what: What, column: str | None, id_column: str | None) -> None:
        super().__init__()
        self.path = path
        self._pq = need("pyarrow.parquet", path)
        self._paths = _parquet_files(path)
        self._starts = [0]
        for file in self._paths:
            with _reading(file, "Parquet"), self._pq.ParquetFile(file) as parquet:
                if file == self._paths[0]:
                    schema = parquet.schema_arrow
                    self._columns = _Columns(path, schema, what, column, id_column)
                    self.metadata = {
                        key.decode(): value.decode()
                        for key, value in (schema.metadata or {}).items()
                        if key.startswith(b"semid.")
                    }
                else:
                    self._columns.check_same(file, parquet.schema_arrow)
                self._starts.append(self._starts[-1] + parquet.metadata.num_rows)
        self.n_rows = self._starts[-1]
        if what == "codes" and "semid.unique" in self.metadata:
            self.extra_digit = self.metadata["semid.unique"] != "none"
        first = next(self._batches(0, 1, self._columns.names), None)
        self.width, self.dtype = self._columns.width_and_type(first and first[1])

    def _batches(self, start: int, n_rows: int, columns: list[str]) -> Iterator[tuple[int, Any]]:
        """Record batches of at most ``n_rows`` rows, each with the index of its first row."""
        for file, begin, end in zip(self._paths, self._starts, self._starts[1:], strict=False):
            if end <= start:
                continue
            with _reading(file, "Parquet"), self._pq.ParquetFile(file) as parquet:
                at = begin
                for group in range(parquet.num_row_groups):
                    stop = at + parquet.metadata.row_group(group).num_rows
                    if stop <= start:
                        at = stop
                        continue
                    with _reading(file, "Parquet", f"row group {group}"):
                        for batch in parquet.iter_batches(n_rows, [group], columns):
                            skipped = min(max(0, start - at), len(batch))
                            if skipped < len(batch):
                                yield at + skipped, batch.slice(skipped)
                            at += len(batch)

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read row group by row group, a piece at a time."""
        for at, batch in self._batches(start, n_rows, self._columns.names[:1]):
            rows, bad = self._columns.rows(batch, at, self.width, self.dtype)
            yield Block(at, rows, bad)

    def ids(self, n_rows: int) -> Iterator[Any] | None:
        """Ids, where there is a column of them."""
        if self._columns.id_name is None:
            return None
        found = self._batches(0, n_rows, [self._columns.id_name])
        return rechunked((batch.column(0) for _, batch in found), n_rows)

    def files(self) -> list[Path]:
        """All files."""
        return self._paths


class _Columns:
    """The columns of a table that hold the rows and the ids."""

    def __init__(
        self, path: str, schema: Any, what: What, column: str | None, id_column: str | None
    ) -> None:
        self._path, self._pa = path, need("pyarrow", path)
        types = self._pa.types
        lists = [
            field.name
            for field in schema
            if types.is_list(field.type)
            or types.is_large_list(field.type)
            or types.is_fixed_size_list(field.type)
        ]
        if column is None and what in lists:
            column = what
        self._name = _the_one(path, "columns of lists", lists, column)
        self._type = schema.field(self._name).type
        if id_column is None:
            id_column = next((name for name in ID_COLUMNS if name in schema.names), None)
        elif id_column not in schema.names:
            raise FileError(
                path, f"has no column {id_column!r}; there are {', '.join(schema.names)}"
            )
        self.id_name = id_column
        self.id_type = None if id_column is None else schema.field(id_column).type
        self.names = [self._name] + ([id_column] if id_column else [])

    def check_same(self, file: Path, schema: Any) -> None:
        """Refuse a further file whose columns are of other types."""
        for name, kind in ((self._name, self._type), (self.id_name, self.id_type)):
            if name is None:
                continue
            found = schema.field(name).type if name in schema.names else "missing"
            if found != kind:
                raise FileError(file, f"column {name!r} is {found}; expected {kind} as before it")

    def width_and_type(self, batch: Any) -> tuple[int, np.dtype[Any]]:
        """Numbers in a row, and their type; judged by the first row where lists vary."""
        try:
            dtype = np.dtype(self._type.value_type.to_pandas_dtype())
        except (NotImplementedError, TypeError) as error:
            raise FileError(
                self._path, f"column {self._name!r} is {self._type}; expected lists of numbers"
            ) from error
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
        self.path, self._id = path, id_column or "id"
        self.dtype = np.dtype(np.int64)
        self.n_rows, self.width = 0, 0
        for _, codes in self._lines():
            self.n_rows += 1
            self.width = self.width or len(codes or ())
        if not self.width:
            raise FileError(path, "holds no codes")

    def _lines(self) -> Iterator[tuple[Any, list[int] | None]]:
        with _opened(self.path) as file:
            for number, line in enumerate(file, 1):
                try:
                    item = json.loads(line)
                    yield item.get(self._id), item["codes"]
                except (ValueError, KeyError, AttributeError) as error:
                    raise FileError(
                        self.path, f'line {number} is not an object with "codes": {error!r}'
                    ) from error

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read line by line."""
        held: list[list[int]] = []
        bad: dict[int, str] = {}
        at = 0
        for index, (_, codes) in enumerate(self._lines()):
            if index < start:
                at = index + 1
                continue
            if codes is None or len(codes) != self.width:
                bad[index] = "is null" if codes is None else f"has {len(codes)} codes"
            held.append(codes if index not in bad else [0] * self.width)  # type: ignore[arg-type]  # None is bad
            if len(held) == n_rows:
                yield Block(at, np.array(held, self.dtype), bad)
                at, held, bad = index + 1, [], {}
        if held:
            yield Block(at, np.array(held, self.dtype), bad)

    def ids(self, n_rows: int) -> Iterator[Any] | None:
        """Ids, if the first line has one."""
        first, _ = next(self._lines())
        if first is None:
            return None
        pa = need("pyarrow", self.path)
        return rechunked((pa.array([item]) for item, _ in self._lines()), n_rows)

    def files(self) -> list[Path]:
        """The one file."""
        return [Path(self.path)]


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
    suffix = Path(path).suffix
    if path == STDIN:
        return ArrowStreamRows(sys.stdin.buffer, what, column, id_column)
    if suffix == ".npz":
        return NpzRows(_found(path), column)
    if suffix == ".safetensors":
        return MatrixRows(path, SafetensorsMatrix(_found(path), column))
    if suffix == ".pt":
        source = MatrixRows(path, tensor_files(path).read(_found(path), what, column))
        source.extra_digit = what == "codes"
        return source
    if suffix == ".jsonl" and what == "codes":
        return JsonLinesCodes(_found(path), id_column)
    if suffix != ".npy" and (suffix == ".parquet" or Path(path).is_dir() or glob.has_magic(path)):
        return ParquetRows(path, what, column, id_column)
    return MatrixRows(path, NpyReader(path))


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


def _parquet_files(path: str) -> list[Path]:
    if Path(path).is_dir():
        found = sorted(
            p for p in Path(path).rglob("*.parquet") if not p.name.startswith((".", "_"))
        )
    elif glob.has_magic(path) and not Path(path).exists():
        found = sorted(map(Path, glob.glob(path, recursive=True)))  # noqa: PTH207 -- any pattern
    else:
        found = [Path(_found(path))]
    if not found:
        raise FileError(path, "there are no .parquet files")
    return found


def _found(path: str) -> str:
    """Refuse what is no file."""
    _opened(path).close()
    return path


def _opened(path: str) -> IO[bytes]:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise FileError.of(path, error) from error


def _the_one(path: str, what: str, names: list[str], asked: str | None) -> str:
    if asked is not None and asked in names:
        return asked
    listed = ", ".join(names) or "none"
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
