"""An Arrow IPC stream of what is computed, while it is computed: standard output."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import numpy as np

from semid_client.files._extras import need
from semid_client.files.ids import Ids
from semid_client.files.outputs import Piece, arrow_lists, arrow_schema, kept
from semid_client.files.work import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from semid_client.files.rows import Source

NAME = "standard output"


class ArrowOut:
    """Takes rows as `Work` does, and writes them at once: nothing is kept to go on with.

    Parameters
    ----------
    file : binary file
        Where the stream goes.
    source : Source
        The input, for its ids.
    width, dtype
        Of the rows.
    column : str
        Name of the column of rows, ``codes`` or ``embedding``.
    null : bool
        Whether bad rows are null; otherwise they are left out.
    metadata : dict
        What to record of the model.
    """

    def __init__(
        self,
        file: IO[bytes],
        source: Source,
        *,
        width: int,
        dtype: np.dtype[Any],
        column: str,
        null: bool,
        metadata: Mapping[str, str],
    ) -> None:
        self.progress = Progress({})
        self._pa, self._null = need("pyarrow", NAME), null
        self._ids = Ids(source)
        id_type = source.id_type or self._pa.int64()
        self._schema = arrow_schema(column, id_type, width, dtype, metadata)
        self._file = file
        self._writer = self._pa.ipc.new_stream(file, self._schema)

    def keep_ids(self, ids: Any) -> None:
        """Take the ids of the rows that are appended next, where the source is a stream."""
        self._ids.given = ids

    def append(self, n_in: int, rows: NDArray[Any], bad: Mapping[int, str]) -> None:
        """Write what the next ``n_in`` rows of the input gave."""
        start = self.progress.rows_in
        valid = np.ones(n_in, np.bool_)
        valid[[row - start for row in bad]] = False
        ids = self._ids.take(start, n_in)
        if not self._null:
            ids, valid = kept(ids, valid), np.ones(len(rows), np.bool_)
        lists = arrow_lists(Piece(rows, valid, ids), self._schema.field(1).type)
        self._writer.write_batch(
            self._pa.record_batch([self._pa.array(ids), lists], schema=self._schema)
        )
        self._file.flush()
        self.progress.rows_in += n_in
        self.progress.rows_out += len(rows)
        self.progress.bad_rows += len(bad)

    def close(self) -> None:
        """Write the end of the stream."""
        self._writer.close()
        self._file.flush()
