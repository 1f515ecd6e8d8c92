"""Ids of the rows of a source: as many at a time as are asked for, or kept until they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from semid_client.files._extras import need
from semid_client.files.rows import ArrowStreamRows, rechunked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from semid_client.files.rows import Source


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
        self._found = source.ids(READ_ROWS)
        self._held: list[Any] = []

    def take(self, start: int, n: int) -> Any:
        """Ids of the next ``n`` rows: an arrow array, or the indices from ``start`` on."""
        if self.given is not None:
            return self.given
        if self._found is None:
            return np.arange(start, start + n)
        while sum(map(len, self._held)) < n:
            self._held.append(next(self._found))
        whole = need("pyarrow", "ids").concat_arrays(self._held)
        self._held = [whole[n:]]
        return whole[:n]


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
