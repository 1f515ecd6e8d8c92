"""Embeddings in files, larger than memory or not, and the batches of a training run."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from semid_server.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

NPY_BLOCK_ROWS = 4096
"""Rows that are read at a time from an ``.npy`` file."""

SHUFFLE_BYTES = 1 << 28
"""Rows held in memory to be shuffled, in bytes: a set no larger is shuffled whole."""


LONGEST = 1e15
"""Length of a row up to which float32 holds the squares of distances, and sums of many of them."""


class Rows(Protocol):
    """Embeddings that are read in blocks."""

    @property
    def name(self) -> str:
        """What messages call them: the path of their file."""
        ...

    @property
    def origin(self) -> Mapping[str, Any] | None:
        """``path``, ``bytes`` and ``changed_ns`` of their file, and ``column`` where it has such.

        They change when the content does. None for an array in memory, which has no file.
        """
        ...

    @property
    def n_rows(self) -> int:
        """How many there are."""
        ...

    @property
    def dim(self) -> int:
        """Numbers in each."""
        ...

    @property
    def blocks(self) -> Sequence[tuple[int, int]]:
        """Where each block starts and stops; together they are all rows, in order."""
        ...

    def read(self, block: int) -> Floats:
        """Rows float32 ``(stop - start, dim)`` of a block, all finite."""
        ...


class ArrayRows:
    """Rows of an array in memory or a memory map, ``(n, dim)`` of any floating-point type.

    Parameters
    ----------
    array : array (n, dim)
        The rows.
    name : str
        Its name in messages.
    origin : mapping, optional
        What tells its file from another, as in `Rows`.

    Raises
    ------
    ConfigurationError
        If it is not such an array.
    """

    def __init__(
        self,
        array: NDArray[Any],
        name: str = "embeddings",
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        if array.ndim != 2 or 0 in array.shape:  # noqa: PLR2004 - a matrix
            raise ConfigurationError(
                f"{name}: shape {array.shape}; expected (n, dim) with at least one row and column"
            )
        if array.dtype.kind != "f":
            raise ConfigurationError(f"{name}: dtype {array.dtype}; expected a floating-point type")
        self.n_rows, self.dim = array.shape
        self.blocks = [
            (start, min(start + NPY_BLOCK_ROWS, self.n_rows))
            for start in range(0, self.n_rows, NPY_BLOCK_ROWS)
        ]
        self._array = array
        self.name, self.origin = name, origin

    def read(self, block: int) -> Floats:
        """Rows float32 ``(stop - start, dim)`` of a block.

        Raises
        ------
        ConfigurationError
            If one of them holds NaN, infinity or a number beyond float32; the message names the
            row.
        """
        start, stop = self.blocks[block]
        return _float32(self._array[start:stop], start, self.name)


class ParquetRows:
    """Rows of a Parquet column of lists of numbers; each row group that has rows is a block.

    Parameters
    ----------
    path : Path
        The file.
    column : str, optional
        Name of the column; None takes the only one that holds lists.

    Raises
    ------
    ConfigurationError
        If pyarrow is not installed, the file has no such column, or its first rows are at fault.
    """

    def __init__(self, path: Path, column: str | None = None) -> None:
        try:
            import pyarrow as pa  # noqa: PLC0415 - needed for such files alone
            import pyarrow.parquet as pq  # noqa: PLC0415 - the same
        except ImportError as error:
            raise ConfigurationError(
                f"{path}: reading Parquet needs pyarrow: pip install pyarrow, or convert to .npy"
            ) from error
        origin = _origin(path)
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ConfigurationError(f"{path}: cannot be read as Parquet: {error}") from error
        schema = self._file.schema_arrow
        lists = [field.name for field in schema if _is_list_of_numbers(pa, field.type)]
        if column is None and len(lists) != 1:
            raise ConfigurationError(
                f"{path}: columns that hold lists of numbers: {', '.join(lists) or 'none'}; "
                + ("name the one with the embeddings" if lists else f"there are: {_named(schema)}")
            )
        self._column = lists[0] if column is None else column
        if (n_named := schema.names.count(self._column)) != 1:
            raise ConfigurationError(
                f"{path}: {n_named or 'no'} column{'s' * (n_named > 1)} {self._column!r}; expected "
                f"one; there are: {_named(schema)}"
            )
        if self._column not in lists:
            raise ConfigurationError(
                f"{path}: column {column!r} is {schema.field(column).type}; expected lists of "
                "numbers"
            )
        self.name, self.origin = str(path), {**origin, "column": self._column}
        metadata = self._file.metadata
        self.blocks: list[tuple[int, int]] = []
        self._groups: list[int] = []  # of each block
        start = 0
        for group in range(metadata.num_row_groups):
            stop = start + metadata.row_group(group).num_rows
            if stop > start:
                self.blocks.append((start, stop))
                self._groups.append(group)
            start = stop
        self.n_rows = metadata.num_rows
        if self.n_rows == 0:
            raise ConfigurationError(f"{path}: holds no rows")
        self.dim = 0
        self.dim = self.read(0).shape[1]

    def read(self, block: int) -> Floats:
        """Rows float32 ``(stop - start, dim)`` of a row group.

        Raises
        ------
        ConfigurationError
            If rows differ in length, or one holds NaN, infinity, a number beyond float32 or
            nothing; the message names it.
        """
        start, stop = self.blocks[block]
        group = self._file.read_row_group(self._groups[block], columns=[self._column])
        lists = group.column(0).combine_chunks()
        if lists.null_count:
            row = start + int(np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False))[0])
            raise ConfigurationError(
                f"{self.name}: row {row} of column {self._column!r} is null; "
                "expected a list of numbers"
            )
        lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
        dim = self.dim or int(lengths[0])
        wrong = np.flatnonzero(lengths != dim)
        if wrong.size or dim == 0:
            row = int(wrong[0]) if wrong.size else 0
            raise ConfigurationError(
                f"{self.name}: row {start + row} of column {self._column!r} has "
                f"{lengths[row]} numbers; expected {dim or 'at least 1'} as in row 0"
            )
        numbers = lists.flatten()
        if numbers.null_count:
            place = int(np.flatnonzero(numbers.is_null().to_numpy(zero_copy_only=False))[0])
            raise ConfigurationError(
                f"{self.name}: row {start + place // dim} of column {self._column!r} holds a null "
                f"as number {place % dim}; remove or replace it"
            )
        values = numbers.to_numpy(zero_copy_only=False)
        return _float32(values.reshape(stop - start, dim), start, self.name)


class TrainableRows:
    """Rows that a quantiser can be trained on in float32.

    Parameters
    ----------
    rows : Rows
        All of them.

    Raises
    ------
    ConfigurationError
        If there are several, and all are equal.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.name, self.origin = rows.name, rows.origin
        self.n_rows, self.dim, self.blocks = rows.n_rows, rows.dim, rows.blocks
        if self.n_rows > 1 and self._are_equal():
            raise ConfigurationError(
                f"{self.name}: all {self.n_rows} rows are equal; expected at least two that "
                "differ, for codes to tell them apart"
            )

    def _are_equal(self) -> bool:
        first = self.read(0)[0]
        return all((self.read(block) == first).all() for block in range(len(self.blocks)))

    def read(self, block: int) -> Floats:
        """Rows float32 ``(stop - start, dim)`` of a block.

        Raises
        ------
        ConfigurationError
            If one of them is longer than `LONGEST`; the message names the row.
        """
        rows = self._rows.read(block)
        if max(float(rows.max()), -float(rows.min())) * math.sqrt(self.dim) > LONGEST:  # perhaps
            lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
            if (lengths > LONGEST).any():
                index = int((lengths > LONGEST).argmax())
                raise ConfigurationError(
                    f"{self.name}: row {self.blocks[block][0] + index} has length "
                    f"{lengths[index]:.6g}; expected at most {LONGEST:.6g}, or squares of "
                    "distances are beyond float32: bring the embeddings to a smaller scale"
                )
        return rows


def _is_list_of_numbers(pa: Any, kind: Any) -> bool:
    types = pa.types
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return False
    return bool(types.is_floating(kind.value_type) or types.is_integer(kind.value_type))


def _named(schema: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"


def open_rows(path: Path, column: str | None = None) -> Rows:
    """Open ``path``, an ``.npy`` or ``.parquet`` file, without reading it whole.

    Raises
    ------
    ConfigurationError
        If there is no such file, or it does not hold a matrix of floating-point numbers.
    """
    if not path.is_file():
        raise ConfigurationError(f"{path}: there is no such file")
    if path.suffix == ".parquet":
        return ParquetRows(path, column)
    if path.suffix != ".npy":
        raise ConfigurationError(f"{path}: expected a file that ends in .npy or .parquet")
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":  # numpy would take it for a pickle
            raise ConfigurationError(f"{path}: is no .npy file: it does not begin as one")
    origin = _origin(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: cannot be read as .npy: {error}") from error
    return ArrayRows(array, str(path), origin)


def _origin(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"path": str(path), "bytes": status.st_size, "changed_ns": status.st_mtime_ns}


def batches(
    rows: Rows,
    *,
    batch_size: int,
    seed: int,
    first: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle_bytes: int = SHUFFLE_BYTES,
) -> Iterator[Floats]:
    """Shuffled batches without end, from batch number ``first`` on; the same ones for a ``seed``.

    An epoch goes through all rows once. Its last batch may be short, and is left out where a rank
    would get a single row of it, of which batch norm can make no statistics. Blocks are shuffled,
    and rows within groups of blocks of ``shuffle_bytes`` in all, so memory stays bounded.
    Of several ranks each gets every ``world_size``-th row of a batch, all equally many.

    Raises
    ------
    ConfigurationError
        If a batch has fewer rows than there are ranks.
    """
    if min(batch_size, rows.n_rows) < world_size:
        raise ConfigurationError(
            f"a batch has {min(batch_size, rows.n_rows)} rows for {world_size} processes; "
            "expected at least one for each: start fewer, or make batches larger"
        )
    shuffle_rows = shuffle_bytes // (4 * rows.dim)
    whole, rest = divmod(rows.n_rows, batch_size)
    per_epoch = whole + (rest // world_size >= 2 or whole == 0)  # noqa: PLR2004 - no single row
    epoch, skipped = divmod(first, per_epoch)
    while True:
        of_epoch = _epoch(rows, batch_size, (seed, epoch), skipped, shuffle_rows)
        for batch in islice(of_epoch, per_epoch - skipped):
            share = len(batch) // world_size
            yield batch[rank : share * world_size : world_size]
        epoch, skipped = epoch + 1, 0


def _epoch(
    rows: Rows, batch_size: int, seed: tuple[int, int], skipped: int, shuffle_rows: int
) -> Iterator[Floats]:
    order = np.random.default_rng(seed).permutation(len(rows.blocks)).tolist()
    to_skip = skipped * batch_size
    pending = np.empty((0, rows.dim), np.float32)
    for number, group in enumerate(_groups(rows, order, shuffle_rows)):
        size = sum(rows.blocks[block][1] - rows.blocks[block][0] for block in group)
        if to_skip >= size:
            to_skip -= size
            continue
        read = np.concatenate([rows.read(block) for block in group])
        shuffled = np.random.default_rng((*seed, number)).permutation(size)[to_skip:]
        to_skip = 0
        pending = np.concatenate([pending, read[shuffled]])
        while len(pending) >= batch_size:
            yield pending[:batch_size]
            pending = pending[batch_size:]
    if len(pending):
        yield pending


def _groups(rows: Rows, order: list[int], shuffle_rows: int) -> Iterator[list[int]]:
    group: list[int] = []
    size = 0
    for block in order:
        start, stop = rows.blocks[block]
        if group and size + stop - start > shuffle_rows:
            yield group
            group, size = [], 0
        group.append(block)
        size += stop - start
    yield group


def _float32(rows: NDArray[Any], start: int, name: str) -> Floats:
    """Rows float32 of rows of any type of numbers, a copy; the first has index ``start``.

    Raises
    ------
    ConfigurationError
        If one holds NaN, infinity, or a finite number that float32 has not; the message names it.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what became of it is looked at below
        converted = np.array(rows, dtype=np.float32, order="C")
    finite = np.isfinite(converted).all(axis=1)
    if finite.all():
        return converted
    index = int(np.flatnonzero(~finite)[0])
    lost = rows[index][~np.isfinite(converted[index])]
    if not np.isfinite(lost).all():
        raise ConfigurationError(
            f"{name}: row {start + index} holds NaN or infinity; remove or replace it"
        )
    raise ConfigurationError(
        f"{name}: row {start + index} holds {lost[0]:.6g}, which is beyond float32 (up to "
        f"{np.finfo(np.float32).max:.6g}); bring the embeddings to a smaller scale"
    )
