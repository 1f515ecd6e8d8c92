"""Ids of a stream, kept on the disk until the output is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from semid_client.files._extras import need
from semid_client.files.rows import ArrowStreamRows, rechunked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from semid_client.files.rows import Source


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
