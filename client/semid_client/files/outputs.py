"""Complete outputs, made of rows that are on the disk already. The same rows give the same bytes.

By the end of its name an output is ``.npy``, ``.npz``, ``.parquet``, ``.safetensors``, ``.jsonl``
or ``.pt``; of codes the last is GRID's.
"""

from __future__ import annotations

import json
import os
import string
import zipfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final, Literal

import numpy as np

from semid_client.files._errors import FileError
from semid_client.files._extras import need, tensor_files
from semid_client.files.places import reserve, suffix_of
from semid_client.files.rows import STDIN, Source
from semid_client.files.unique import Convention, Digits, extra_digits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from semid_client.files.npy import NpyReader

Unique = Convention | Literal["none"]
OnBadRow = Literal["fail", "skip", "null"]

WRITE_ROWS: Final = 1 << 17
"""Rows that are written at a time, and of a Parquet row group."""

TOKENS: Final = "<{letter}_{code}>"
"""Token of a code, as recommenders that generate semantic IDs have in their vocabulary."""

SUFFIXES: Final = (".npy", ".npz", ".parquet", ".safetensors", ".jsonl", ".pt")

NULLS: Final = (".parquet", ".jsonl", "")
"""Outputs that have null; the one without a name is a stream."""

SAFETENSORS_TYPES: Final = {"u1": "U8", "u2": "U16", "u4": "U32", "f4": "F32"}


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of an output: codes or vectors (n, m), which of them there are, and their ids."""

    rows: NDArray[Any]
    valid: NDArray[np.bool_]
    ids: Any


@dataclass(frozen=True)
class Made:
    """Everything that an output is made of.

    Attributes
    ----------
    source : Source
        The input, for its ids.
    rows : NpyReader
        What was computed: codes (n, L) or vectors (n, D).
    n_in : int
        Rows of the input.
    bad : array
        Indices in the input of rows that gave nothing, ascending.
    null : bool
        Whether those are null in the output; otherwise they are left out.
    metadata : dict
        What to record of the model.
    digits : Digits, optional
        Extra digit of each row of ``rows``.
    tokens : str
        Template of tokens.
    column : str
        Name of the column of rows, ``codes`` or ``embedding``.
    report : callable, optional
        Called with a number of rows of the input whenever these have been gone through.
    """

    source: Source
    rows: NpyReader
    n_in: int
    bad: NDArray[np.int64]
    null: bool
    metadata: Mapping[str, str]
    digits: Digits | None = None
    tokens: str = TOKENS
    column: str = "codes"
    report: Callable[[int], None] | None = None

    @property
    def width(self) -> int:
        """Numbers in a row of the output."""
        return self.rows.shape[1] + (self.digits is not None)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the numbers: for codes the smallest that holds them and the digits."""
        if self.digits is None:
            return self.rows.dtype
        return np.promote_types(self.rows.dtype, np.min_scalar_type(self.digits.largest))

    @property
    def n_rows(self) -> int:
        """Rows of the output."""
        return self.rows.shape[0]

    def spans(self) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """`WRITE_ROWS` rows of the input at a time: the first one's index, and which are good."""
        for start in range(0, self.n_in, WRITE_ROWS):
            n = min(WRITE_ROWS, self.n_in - start)
            valid = np.ones(n, np.bool_)
            valid[self.bad[slice(*np.searchsorted(self.bad, [start, start + n]))] - start] = False
            yield start, valid

    def slices(self) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """Rows of the output, `WRITE_ROWS` of the input at a time, and which of the input's."""
        at = 0
        for _, valid in self.spans():
            n = len(valid) if self.null else int(valid.sum())
            rows = self.rows[at : at + n]
            if self.digits is not None:
                digits = self.digits[at : at + n]
                rows = np.column_stack([rows.astype(self.dtype), digits.astype(self.dtype)])
            at += n
            yield rows, valid
            if self.report is not None:
                self.report(len(valid))

    def ids(self) -> Iterator[Any]:
        """Ids of the rows of the output: arrow arrays, or the rows' indices in the input."""
        found = self.source.ids(WRITE_ROWS)
        for start, valid in self.spans():
            some: Any = np.arange(start, start + len(valid)) if found is None else next(found)
            yield some if self.null else kept(some, valid)

    def pieces(self) -> Iterator[Piece]:
        """Rows of the output with their ids."""
        for (rows, valid), ids in zip(self.slices(), self.ids(), strict=True):
            yield Piece(rows, valid if self.null else np.ones(len(rows), np.bool_), ids)


def kept(ids: Any, valid: NDArray[np.bool_]) -> Any:
    """Those of some ids whose rows are kept."""
    if valid.all():
        return ids
    return (
        ids[valid] if isinstance(ids, np.ndarray) else ids.filter(need("pyarrow", "").array(valid))
    )


def check_output(
    path: str | os.PathLike[str],
    *,
    what: Literal["codes", "rows"],
    unique: Unique | None,
    on_bad_row: OnBadRow,
) -> Unique:
    """Refuse what this kind of output cannot hold, before any work; tell the convention it has."""
    if os.fspath(path) == STDIN:
        need("pyarrow", "standard output")
        if unique not in {None, "none"}:
            raise FileError(
                "standard output", "the extra digit is known when all rows are: write to a file"
            )
        return "none"
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise FileError(
            path, f"give it a name that ends in {', '.join(SUFFIXES)}, or - for an Arrow stream"
        )
    if suffix == ".pt" and what == "codes":
        tensor_files(path)
        if on_bad_row != "fail":
            raise FileError(
                path, "the columns of a GRID file are the items: none can be left out or null"
            )
        if unique == "none":
            raise FileError(path, "a GRID file has the extra digit: --unique grid or tiger")
        return unique or "grid"
    if suffix not in NULLS and on_bad_row == "null":
        raise FileError(
            path, f"a {suffix} file has no null: use --on-bad-row skip, or .parquet or .jsonl"
        )
    if suffix == ".pt":
        tensor_files(path)
    if suffix == ".parquet":
        need("pyarrow.parquet", path)
    return unique or "none"


def check_ids(path: str | os.PathLike[str], source: Source, on_bad_row: OnBadRow) -> bool:
    """Refuse ids that this kind of output cannot hold, before any work.

    Returns
    -------
    bool
        Whether it is not known yet that there are none: each has to be looked at when its row is
        kept.
    """
    suffix = suffix_of(path)
    if suffix not in {".npz", ".jsonl"} or (kind := source.id_type) is None:
        return False
    pa = need("pyarrow", path)
    if suffix == ".jsonl":
        if _has_bytes(pa, kind):
            raise FileError(
                path,
                f"JSON has no bytes, which column {source.id_name!r} of {source.path} is made of "
                f"({kind}): use .parquet, or cast the ids to strings",
            )
        return False
    types = pa.types
    if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
        raise FileError(
            path, f"an .npz file has no ids of type {kind}, as {source.path} has: use .parquet"
        )
    if source.n_rows is None:
        return True
    null = source.null_id()
    if null is not None and on_bad_row != "skip":
        raise null_id_error(path, source, null)
    return null is not None  # perhaps of rows that are left out


def null_id_error(path: str | os.PathLike[str], source: Source, row: int) -> FileError:
    """Say that the id of a row is null, where an ``.npz`` has no such."""
    name, at = source.named(row)
    return FileError(
        path, f"an .npz file has no null, as the id of row {at} of {name} is: use .parquet"
    )


def _has_bytes(pa: Any, kind: Any) -> bool:
    """Whether values of a type are bytes, or made of such; those of UUIDs are text."""
    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name != "arrow.uuid" and _has_bytes(pa, kind.storage_type)
    types = pa.types
    if types.is_dictionary(kind):
        return _has_bytes(pa, kind.value_type)
    if types.is_nested(kind):
        return any(_has_bytes(pa, kind.field(i).type) for i in range(kind.num_fields))
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or str(kind) == "binary_view"  # which older versions of the library lack
    )


def check_tokens(path: str | os.PathLike[str], template: str, n_codes: int) -> None:
    """Refuse a template that does not give a token for each of ``n_codes`` codes."""
    try:
        for layer in range(n_codes):
            _token(template, layer, 0)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise FileError(
            path,
            f"{template!r} is no template of tokens ({error!r}): it may hold {{layer}}, {{code}} "
            "and, for up to 26 codes, {letter}",
        ) from error


def make_output(path: str | os.PathLike[str], made: Made, folder: Path) -> Path:
    """Write the whole output to a file in ``folder`` and return that; ``path`` says the format."""
    suffix = suffix_of(path)
    rows = made.rows.place.local
    assert rows is not None  # noqa: S101 -- work is on this machine
    if suffix == ".npy" and made.digits is None:
        return rows  # as it stands
    writer = {
        ".npy": _npy,
        ".npz": _npz,
        ".parquet": _parquet,
        ".safetensors": _safetensors,
        ".jsonl": _json_lines,
        ".pt": _grid if made.column == "codes" else _tensor,
    }[suffix]
    to = folder / f"output{suffix}"
    try:
        writer(to, os.fspath(path), made)
    except OSError as error:
        raise FileError.of(path, error) from error
    return to


def number(made: Callable[[Digits | None], Made], convention: Unique, folder: Path) -> Made:
    """Add the extra digit of a convention to an output; bad rows are nobody's namesakes."""
    plain = made(None)
    if convention == "none":
        return plain

    def blocks() -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        at = 0
        for rows, valid in plain.slices():
            kept = valid if plain.null else np.ones(len(rows), np.bool_)
            yield at + np.flatnonzero(kept), rows[kept]
            at += len(rows)

    try:
        return made(extra_digits(blocks(), plain.n_rows, convention, folder))
    except OSError as error:
        raise FileError.of(folder, error) from error


def _npy(to: Path, path: str, made: Made) -> None:  # noqa: ARG001 -- as its siblings
    with to.open("wb") as file:
        _write_npy(file, made)


def _write_npy(file: IO[bytes], made: Made) -> None:
    _write_header(file, made.dtype, (made.n_rows, made.width))
    for rows, _ in made.slices():
        file.write(np.ascontiguousarray(rows, made.dtype.newbyteorder("<")).data)


def _write_header(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype.newbyteorder("<"))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _npz(to: Path, path: str, made: Made) -> None:
    with zipfile.ZipFile(to, "w") as archive:
        with _member(archive, made.column) as file:
            _write_npy(file, made)
        with _member(archive, "id") as file:
            dtype = _id_dtype(path, made)
            _write_header(file, dtype, (made.n_rows,))
            for ids in made.ids():
                file.write(np.ascontiguousarray(np.asarray(ids, dtype)).data.cast("B"))


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    info = zipfile.ZipInfo(f"{name}.npy")  # of the year 1980: the same rows give the same bytes
    info.external_attr = 0o600 << 16
    return archive.open(info, "w", force_zip64=True)


def _id_dtype(path: str, made: Made) -> np.dtype[Any]:
    """Type of the ids of an ``.npz``: for strings, one that holds the longest."""
    if made.source.id_type is None:
        return np.dtype(np.int64)
    longest = 1
    text = not need("pyarrow", path).types.is_integer(made.source.id_type)
    for ids in made.ids():
        if ids.null_count:
            raise FileError(path, "an .npz file has no null, as some ids are: use .parquet")
        if text and len(ids):
            lengths = need("pyarrow.compute", path).utf8_length(ids)
            longest = max(longest, need("pyarrow.compute", path).max(lengths).as_py())
    if text:
        return np.dtype(f"<U{longest}")
    found: np.dtype[Any] = np.dtype(made.source.id_type.to_pandas_dtype())
    return found


def _safetensors(to: Path, path: str, made: Made) -> None:  # noqa: ARG001 -- as its siblings
    """Write a header and then the numbers, of which the library would want all at once."""
    dtype = made.dtype.newbyteorder("<")
    shape = [made.n_rows, made.width]
    tensor = {
        "dtype": SAFETENSORS_TYPES[dtype.str[1:]],
        "shape": shape,
        "data_offsets": [0, shape[0] * shape[1] * dtype.itemsize],
    }
    header = json.dumps({"__metadata__": dict(made.metadata), made.column: tensor}).encode()
    header += b" " * (-len(header) % 8)
    with to.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for rows, _ in made.slices():
            file.write(np.ascontiguousarray(rows, dtype).data)


def _tensor(to: Path, path: str, made: Made) -> None:
    tensor_files(path).write(to, made.rows.mapped())


def _parquet(to: Path, path: str, made: Made) -> None:
    pa, pq = need("pyarrow", path), need("pyarrow.parquet", path)
    schema = arrow_schema(
        made.column, made.source.id_type or pa.int64(), made.width, made.dtype, made.metadata
    )
    with pq.ParquetWriter(to, schema, compression="zstd", use_dictionary=["id"]) as writer:
        for piece in made.pieces():
            lists = arrow_lists(piece, schema.field(1).type)
            batch = pa.record_batch([pa.array(piece.ids), lists], schema=schema)
            writer.write_batch(batch, WRITE_ROWS)


def arrow_schema(
    column: str, id_type: Any, width: int, dtype: np.dtype[Any], metadata: Mapping[str, str]
) -> Any:
    """Columns ``id`` and that of rows, as lists of one length."""
    pa = need("pyarrow", "Arrow")
    lists = pa.list_(pa.from_numpy_dtype(dtype.newbyteorder("=")), width)
    return pa.schema({"id": id_type, column: lists}, metadata=dict(metadata))


def arrow_lists(piece: Piece, kind: Any) -> Any:
    """Rows of a piece as an array of lists, null where they are not valid."""
    pa = need("pyarrow", "Arrow")
    values = pa.array(np.ascontiguousarray(piece.rows).reshape(-1))
    mask = None if piece.valid.all() else pa.array(~piece.valid)
    return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=mask)


def _json_lines(to: Path, path: str, made: Made) -> None:  # noqa: ARG001 -- as its siblings
    known: dict[tuple[int, int], str] = {}

    def token(layer: int, code: int) -> str:
        if (layer, code) not in known:
            known[layer, code] = json.dumps(_token(made.tokens, layer, code))[1:-1]
        return known[layer, code]

    def told(row: list[Any] | None) -> str:
        if made.column != "codes":
            return f'"{made.column}": {"null" if row is None else row}'
        if row is None:
            return '"codes": null, "tokens": null'
        tokens = "".join(token(layer, code) for layer, code in enumerate(row))
        return f'"codes": {row}, "tokens": "{tokens}"'

    with to.open("w", encoding="utf-8") as file:
        for piece in made.pieces():
            ids = piece.ids.tolist() if isinstance(piece.ids, np.ndarray) else piece.ids.to_pylist()
            file.writelines(
                f'{{"id": {json_id(id_)}, {told(row if valid else None)}}}\n'
                for id_, row, valid in zip(
                    ids, piece.rows.tolist(), piece.valid.tolist(), strict=True
                )
            )


def json_id(id_: Any) -> str:
    """What a line of JSON has for an id: what JSON has not is written as text."""
    return str(id_) if type(id_) is int else json.dumps(id_, default=str)


def _token(template: str, layer: int, code: int) -> str:
    letters = (
        {"letter": string.ascii_lowercase[layer]} if layer < len(string.ascii_lowercase) else {}
    )
    return template.format(layer=layer, code=code, **letters)


def _grid(to: Path, path: str, made: Made) -> None:
    """Write int64 (L+1, n), a column an item; put together on the disk, for it may be large."""
    turned = to.with_name("turned")
    shape = (made.width, made.n_rows)
    reserve(turned, 8 * shape[0] * shape[1])
    at = 0
    for rows, _ in made.slices():
        for layer in range(made.width):
            mapped = np.memmap(turned, np.int64, "r+", 8 * (layer * made.n_rows + at), (len(rows),))
            mapped[:] = rows[:, layer]
        at += len(rows)
    matrix = np.memmap(turned, np.int64, "r+", 0, shape) if at else np.empty(shape, np.int64)
    tensor_files(path).write(to, matrix)
    turned.unlink()
