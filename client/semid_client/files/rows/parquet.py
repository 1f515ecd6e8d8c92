"""Parquet: a column of lists in one file, or in many."""

from __future__ import annotations

from bisect import bisect_right
from contextlib import ExitStack, contextmanager
from glob import has_magic
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final

from semid_client.files._errors import FileError
from semid_client.files._extras import need
from semid_client.files.places import AHEAD_BYTES, Place, place
from semid_client.files.rows.arrow import FIRST_ROWS, ListColumns, rechunked, recorded
from semid_client.files.rows.source import Block, Source, What, reading

if TYPE_CHECKING:
    from collections.abc import Iterator

PARQUET_BYTES: Final = 1 << 20
"""Bytes of a Parquet column that are read at a time."""

SEARCHED_ROWS: Final = 1 << 16
"""Rows of which one at least is as wide as is asked for, or all are of another width."""

PATTERN: Final = "*.parquet"
"""Names of the files that are read of a folder."""


class ParquetRows(Source):
    """Rows of a column of lists in one Parquet file, or in many, in order of their names."""

    def __init__(self, path: str, what: What, column: str | None, id_column: str | None) -> None:
        super().__init__()
        self.path = path
        self._pq = need("pyarrow.parquet", path)
        self._places = _files_of(path)
        self._starts, self._groups = [0], [0]
        for found in self._places:
            with self._opened(found) as parquet:
                if found == self._places[0]:
                    schema = parquet.schema_arrow
                    self._columns = ListColumns(path, schema, what, column, id_column)
                    self.metadata, self.extra_digit = recorded(schema, what)
                else:
                    self._columns.check_same(found.name, parquet.schema_arrow)
                self._starts.append(self._starts[-1] + parquet.metadata.num_rows)
                for group in range(parquet.num_row_groups):
                    self._groups.append(
                        self._groups[-1] + parquet.metadata.row_group(group).num_rows
                    )
        self.n_rows, self.id_name = self._starts[-1], self._columns.id_name
        some = (batch for _, batch in self._batches(0, FIRST_ROWS, self._columns.names[:1]))
        self.width, self.dtype = self._columns.width_and_type(some)

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
            stack.enter_context(reading(found.name, "Parquet"))
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
                    with reading(found.name, "Parquet", f"row group {group}"):
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

    def takes_width(self, width: int) -> bool:
        """Look through the first lists for one of that width."""
        if self.width != width:
            batches = self._batches(0, FIRST_ROWS, self._columns.names[:1])
            first = takewhile(lambda found: found[0] < SEARCHED_ROWS, batches)
            if any(self._columns.has_width(batch, width) for _, batch in first):
                self.width = width
        return self.width == width

    def named(self, row: int) -> tuple[str, int]:
        """Its file, and its index there."""
        file = bisect_right(self._starts, row, hi=len(self._places)) - 1
        return self._places[file].name, row - self._starts[file]

    def ids(self, n_rows: int) -> Iterator[Any] | None:
        """Ids, where there is a column of them."""
        if self._columns.id_name is None:
            return None
        found = self._batches(0, n_rows, [self._columns.id_name])
        return rechunked((self._columns.plain(batch.column(0)) for _, batch in found), n_rows)

    def null_id(self) -> int | None:
        """Read the ids only where the files do not record how many are null."""
        return super().null_id() if any(map(self._may_have_null_ids, self._places)) else None

    def _may_have_null_ids(self, found: Place) -> bool:
        with self._opened(found) as parquet:
            leaves = map(parquet.schema.column, range(len(parquet.schema)))
            names = [leaf.path for leaf in leaves]
            if self.id_name not in names:  # its type is nested
                return True
            at = names.index(self.id_name)
            for group in range(parquet.num_row_groups):
                told = parquet.metadata.row_group(group).column(at).statistics
                if told is None or not told.has_null_count or told.null_count:
                    return True
        return False

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


def would_read(path: str, other: Place) -> bool:
    """Whether another place would be among the files of a folder or pattern, were a file there."""
    found = place(path)
    if _is_pattern(path, found):
        return found.would_match(other, PATTERN)
    return found.is_folder() and found.would_be_below(other, PATTERN)


def _is_pattern(path: str, found: Place) -> bool:
    return has_magic(path) and not (found.local and found.exists())


def _files_of(path: str) -> list[Place]:
    found = place(path)
    if _is_pattern(path, found):
        files = found.matching(PATTERN)
    elif found.is_folder():
        files = found.below(PATTERN)
    else:
        return [found]
    if not files:
        raise FileError(path, "there are no .parquet files")
    return files
