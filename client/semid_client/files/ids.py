"""Ids of the rows of a source: as many at a time as are asked for, or kept until they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from semid_client.files._extras import need
from semid_client.files.outputs import null_id_error
from semid_client.files.rows import ArrowStreamRows, rechunked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from semid_client.files.pipeline import Sink
    from semid_client.files.rows import Source
    from semid_client.files.work import Progress


READ_ROWS: Final = 1 << 17
"""Ids that are read at a time."""


class Ids:
    """Ids of a source in its order, as many at a time as are asked for.

    Attributes
    ----------
    given : arrow array, optional
        The ids to be asked for next, of a stream that brings them with its rows.
    """

    def __init__(self, source: Source) -> None:
        self.given: Any = None
        self._found, self._type = source.ids(READ_ROWS), source.id_type
        self._held: list[Any] = []

    def take(self, start: int, n: int) -> Any:
        """Ids of the next ``n`` rows: an arrow array, or the indices from ``start`` on."""
        if self.given is not None:
            return self.given
        if self._found is None:
            return np.arange(start, start + n)
        pa = need("pyarrow", "ids")
        if not n:  # perhaps before any are held
            return pa.nulls(0, self._type)
        while sum(map(len, self._held)) < n:
            self._held.append(next(self._found))
        whole = pa.concat_arrays(self._held)
        self._held = [whole[n:]]
        return whole[:n]


def in_order(source: Source) -> bool:
    """Whether the ids are 0, 1, 2, ..., as they are where a source has none."""
    found = source.ids(READ_ROWS)
    if found is None:
        return True
    pa = need("pyarrow", "ids")
    if not pa.types.is_integer(source.id_type):
        return False
    start = 0
    for ids in found:
        expected = np.arange(start, start + len(ids))
        if ids.null_count or not np.array_equal(ids.to_numpy(zero_copy_only=False), expected):
            return False
        start += len(ids)
    return True


class WholeIds:
    """Hands rows on to a sink, and refuses those that are kept while their ids are null.

    Parameters
    ----------
    sink : Sink
        Takes the rows.
    source : Source
        The input, which has ids.
    path : str
        The output, which has no null.
    """

    def __init__(self, sink: Sink, source: Source, path: str) -> None:
        self._sink, self._source, self._path = sink, source, path
        self.ids = Ids(source)
        self._at = 0

    @property
    def progress(self) -> Progress:
        """How far the sink is."""
        return self._sink.progress

    def append(self, n_in: int, rows: NDArray[Any], bad: Mapping[int, str]) -> None:
        """Add what the next ``n_in`` rows of the input gave, if all that are kept have ids."""
        start = self.progress.rows_in
        while self._at < start:  # what an earlier command has done
            n = min(READ_ROWS, start - self._at)
            self.ids.take(self._at, n)
            self._at += n
        null = self.ids.take(start, n_in).is_null().to_numpy(zero_copy_only=False)
        self._at += n_in
        kept = (start + int(i) for i in np.flatnonzero(null) if start + int(i) not in bad)
        if (row := next(kept, None)) is not None:
            raise null_id_error(self._path, self._source, row)
        self._sink.append(n_in, rows, bad)


class IdSpool:
    """A file of the ids that came with the rows of a stream, which then has them again."""

    def __init__(self, source: ArrowStreamRows, folder: Path) -> None:
        self._pa = need("pyarrow", source.path)
        self._path = folder / "ids.arrow"
        schema = self._pa.schema({"id": source.id_type})
        self._writer = self._pa.ipc.new_stream(self._path, schema)
        source.spooled_ids = self._read

    @classmethod
    def of(cls, source: Source, folder: Path) -> Self | None:
        """Make one, if the source is a stream with ids."""
        if not isinstance(source, ArrowStreamRows) or source.id_type is None:
            return None
        return cls(source, folder)

    def keep(self, ids: Any) -> None:
        """Add the ids of a block."""
        self._writer.write_batch(self._pa.record_batch([ids], ["id"]))

    def close(self) -> None:
        """Complete the file."""
        self._writer.close()

    def _read(self, n_rows: int) -> Iterator[Any]:
        with self._path.open("rb") as file, self._pa.ipc.open_stream(file) as reader:
            yield from rechunked((batch.column(0) for batch in reader), n_rows)
