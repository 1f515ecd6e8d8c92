"""Columns of lists of numbers, as Arrow has them; and an Arrow IPC stream of such."""

from __future__ import annotations

from collections import Counter
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np

from semid_client.files._errors import FileError
from semid_client.files._extras import need
from semid_client.files.rows.source import (
    ID_COLUMNS,
    Block,
    Source,
    What,
    listed,
    reading,
    the_one,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from semid_client.files.places import Place


FIRST_ROWS: Final = 64
"""Rows that are looked at for how many numbers a row has."""


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
                f"its columns are {listed(schema.names)}",
            )
        if column is not None:
            _check_once(path, schema, column)
        if column in schema.names and column not in lists:
            raise FileError(
                path,
                f"column {column!r} is {schema.field(column).type}; expected lists of numbers"
                + (f", as are {listed(lists)}" if lists else ""),
            )
        self._name = the_one(path, "columns of lists", list(dict.fromkeys(lists)), column)
        _check_once(path, schema, self._name)
        self._type = schema.field(self._name).type
        if id_column is None:
            id_column = next((name for name in ID_COLUMNS if name in schema.names), None)
        elif id_column not in schema.names:
            raise FileError(path, f"has no column {id_column!r}; there are {listed(schema.names)}")
        if id_column is not None:
            _check_once(path, schema, id_column)
        self.id_name = id_column
        self.id_type = None if id_column is None else self._plain(schema.field(id_column).type)
        self.names = [self._name] + ([id_column] if id_column else [])

    def _plain(self, kind: Any) -> Any:
        """Type of the values, where a column holds indices into a dictionary of them."""
        return kind.value_type if self._pa.types.is_dictionary(kind) else kind

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
            _check_once(file, schema, name)
            found = self._plain(schema.field(name).type) if name in schema.names else "missing"
            if found != kind:
                raise FileError(file, f"column {name!r} is {found}; expected {kind} as before it")

    def width_and_type(self, batches: Iterable[Any]) -> tuple[int, np.dtype[Any]]:
        """Numbers in a row, and their type; where lists vary, of most of the first not null."""
        dtype = np.dtype(self._type.value_type.to_pandas_dtype())
        if self._pa.types.is_fixed_size_list(self._type):
            return self._type.list_size, dtype
        lengths = (batch.column(self._name).value_lengths().drop_null() for batch in batches)
        first = next((some[:FIRST_ROWS].to_pylist() for some in lengths if len(some)), None)
        if first is None:
            raise FileError(
                self._path,
                f"column {self._name!r} holds no row of numbers, so that nothing tells how many a "
                "row has: write it as fixed-size lists",
            )
        return Counter(first).most_common(1)[0][0], dtype

    def has_width(self, batch: Any, width: int) -> bool:
        """Whether lists vary, and one of a batch has so many numbers."""
        if self._pa.types.is_fixed_size_list(self._type):
            return False
        lengths = batch.column(self._name).value_lengths().drop_null()
        return bool((lengths.to_numpy(zero_copy_only=False) == width).any())

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
        return None if self.id_name is None else self.plain(batch.column(self.id_name))

    def plain(self, ids: Any) -> Any:
        """Ids themselves, where they are indices into a dictionary.

        Each batch may have a dictionary of its own, and all together more values than the type of
        the indices can count.
        """
        return ids.dictionary_decode() if self._pa.types.is_dictionary(ids.type) else ids


class ArrowStreamRows(Source):
    """Rows of an Arrow IPC stream: standard input. Its record batches are the blocks."""

    def __init__(
        self, stream: IO[bytes], what: What, column: str | None, id_column: str | None
    ) -> None:
        super().__init__()
        self.path, self.n_rows = "standard input", None
        pa = need("pyarrow", self.path)
        with reading(self.path, "an Arrow IPC stream"):
            self._reader = pa.ipc.open_stream(stream)
        columns = ListColumns(self.path, self._reader.schema, what, column, id_column)
        self._columns, self.id_name = columns, columns.id_name
        self.metadata, self.extra_digit = recorded(self._reader.schema, what)
        # Those before the first row that is not null are held until the rows are read.
        self._begun: list[Any] = []
        self.width, self.dtype = columns.width_and_type(self._beginning())
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
        at = 0
        while (batch := self._begun.pop(0) if self._begun else self._next()) is not None:
            for offset in range(0, len(batch), n_rows):
                some = batch.slice(offset, n_rows)
                rows, bad = self._columns.rows(some, at, self.width, self.dtype)
                yield Block(at, rows, bad, self._columns.ids(some))
                at += len(some)

    def takes_width(self, width: int) -> bool:
        """Look through the lists that are held for one of that width."""
        if any(self._columns.has_width(batch, width) for batch in self._begun):
            self.width = width
        return self.width == width

    def _beginning(self) -> Iterator[Any]:
        while (batch := self._next()) is not None:
            self._begun.append(batch)
            yield batch

    def _next(self) -> Any:
        with reading(self.path, "an Arrow IPC stream"):
            return next(iter(self._reader), None)

    def places(self) -> list[Place]:
        """None that could be looked at again."""
        return []


def _check_once(path: str, schema: Any, name: str) -> None:
    """Refuse a name of several columns, which does not tell the one to read."""
    if (n := schema.names.count(name)) > 1:
        raise FileError(path, f"has {n} columns named {name!r}; give each a name of its own")


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


def recorded(schema: Any, what: What) -> tuple[dict[str, str], bool | None]:
    """What an Arrow schema records of the model, and whether there is an extra digit."""
    metadata = {
        key.decode(): value.decode()
        for key, value in (schema.metadata or {}).items()
        if key.startswith(b"semid.")
    }
    unique = metadata.get("semid.unique") if what == "codes" else None
    return metadata, None if unique is None else unique != "none"
