"""Complete outputs, made of rows that are on the disk already. The same rows give the same bytes.

By the end of its name an output is ``.npy``, ``.parquet``, ``.jsonl`` or GRID's ``.pt``.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from semid_client.files._errors import FileError
from semid_client.files._extras import need
from semid_client.files.rows import Source, tensor_files
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

SUFFIXES: Final = {"codes": (".npy", ".parquet", ".jsonl", ".pt"), "rows": (".npy", ".parquet")}


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

    def slices(self) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """Rows of the output, `WRITE_ROWS` of the input at a time, and which of the input's."""
        at = 0
        for start in range(0, self.n_in, WRITE_ROWS):
            n = min(WRITE_ROWS, self.n_in - start)
            valid = np.ones(n, np.bool_)
            valid[self.bad[slice(*np.searchsorted(self.bad, [start, start + n]))] - start] = False
            kept = n if self.null else int(valid.sum())
            rows = self.rows[at : at + kept]
            if self.digits is not None:
                digits = self.digits[at : at + kept]
                rows = np.column_stack([rows.astype(self.dtype), digits.astype(self.dtype)])
            at += kept
            yield rows, valid

    def pieces(self) -> Iterator[Piece]:
        """Rows of the output with their ids."""
        ids = self.source.ids(WRITE_ROWS)
        start = 0
        for rows, valid in self.slices():
            some: Any = np.arange(start, start + len(valid)) if ids is None else next(ids)
            start += len(valid)
            if self.null:
                yield Piece(rows, valid, some)
            else:
                if not valid.all():
                    some = (
                        some[valid]
                        if ids is None
                        else some.filter(need("pyarrow", "").array(valid))
                    )
                yield Piece(rows, np.ones(len(rows), np.bool_), some)


def check_output(
    path: Path, *, what: Literal["codes", "rows"], unique: Unique | None, on_bad_row: OnBadRow
) -> Unique:
    """Refuse what this kind of output cannot hold, before any work; tell the convention it has."""
    suffix = path.suffix
    if suffix not in SUFFIXES[what]:
        raise FileError(path, f"give it a name that ends in {', '.join(SUFFIXES[what])}")
    if suffix == ".npy" and on_bad_row == "null":
        raise FileError(path, "a .npy file has no null: use --on-bad-row skip, or .parquet")
    if suffix == ".pt":
        tensor_files(path)
        if on_bad_row != "fail":
            raise FileError(
                path, "the columns of a GRID file are the items: none can be left out or null"
            )
        if unique == "none":
            raise FileError(path, "a GRID file has the extra digit: --unique grid or tiger")
        return unique or "grid"
    if suffix == ".parquet":
        need("pyarrow.parquet", path)
    return unique or "none"


def check_tokens(path: Path, template: str, n_codes: int) -> None:
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


def make_output(path: Path, made: Made, folder: Path) -> Path:
    """Write the whole output to a file in ``folder`` and return that; ``path`` says the format."""
    if path.suffix == ".npy" and made.digits is None:
        return folder / made.rows.path.name  # as it stands
    writer = {".npy": _npy, ".parquet": _parquet, ".jsonl": _json_lines, ".pt": _grid}[path.suffix]
    to = folder / f"output{path.suffix}"
    try:
        writer(to, path, made)
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


def _npy(to: Path, path: Path, made: Made) -> None:  # noqa: ARG001 -- as its siblings
    header = {
        "descr": np.lib.format.dtype_to_descr(made.dtype.newbyteorder("<")),
        "fortran_order": False,
        "shape": (made.n_rows, made.width),
    }
    with to.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows, _ in made.slices():
            file.write(np.ascontiguousarray(rows, made.dtype.newbyteorder("<")).data)


def _parquet(to: Path, path: Path, made: Made) -> None:
    pa, pq = need("pyarrow", path), need("pyarrow.parquet", path)
    writer = None
    lists = pa.list_(pa.from_numpy_dtype(made.dtype.newbyteorder("=")), made.width)
    for piece in made.pieces():
        ids = pa.array(piece.ids) if isinstance(piece.ids, np.ndarray) else piece.ids
        if writer is None:
            writer = _parquet_writer(to, pq, _schema(pa, made, ids.type, lists))
        writer.write_batch(
            pa.record_batch([ids, _lists(pa, piece, lists)], schema=writer.schema), WRITE_ROWS
        )
    if writer is None:
        writer = _parquet_writer(to, pq, _schema(pa, made, pa.int64(), lists))
    writer.close()


def _schema(pa: Any, made: Made, id_type: Any, lists: Any) -> Any:
    return pa.schema({"id": id_type, made.column: lists}, metadata=dict(made.metadata))


def _parquet_writer(to: Path, pq: Any, schema: Any) -> Any:
    return pq.ParquetWriter(to, schema, compression="zstd", use_dictionary=["id"])


def _lists(pa: Any, piece: Piece, lists: Any) -> Any:
    values = pa.array(np.ascontiguousarray(piece.rows).reshape(-1))
    mask = None if piece.valid.all() else pa.array(~piece.valid)
    return pa.FixedSizeListArray.from_arrays(values, type=lists, mask=mask)


def _json_lines(to: Path, path: Path, made: Made) -> None:  # noqa: ARG001 -- as its siblings
    known: dict[tuple[int, int], str] = {}

    def token(layer: int, code: int) -> str:
        if (layer, code) not in known:
            known[layer, code] = json.dumps(_token(made.tokens, layer, code))[1:-1]
        return known[layer, code]

    with to.open("w", encoding="utf-8") as file:
        for piece in made.pieces():
            ids = piece.ids.tolist() if isinstance(piece.ids, np.ndarray) else piece.ids.to_pylist()
            lines = []
            for id_, codes, valid in zip(
                ids, piece.rows.tolist(), piece.valid.tolist(), strict=True
            ):
                name = id_ if type(id_) is int else json.dumps(id_, default=str)
                if valid:
                    tokens = "".join(token(layer, code) for layer, code in enumerate(codes))
                    lines.append(f'{{"id": {name}, "codes": {codes}, "tokens": "{tokens}"}}\n')
                else:
                    lines.append(f'{{"id": {name}, "codes": null, "tokens": null}}\n')
            file.writelines(lines)


def _token(template: str, layer: int, code: int) -> str:
    letters = (
        {"letter": string.ascii_lowercase[layer]} if layer < len(string.ascii_lowercase) else {}
    )
    return template.format(layer=layer, code=code, **letters)


def _grid(to: Path, path: Path, made: Made) -> None:
    """Write int64 (L+1, n), a column an item; put together on the disk, for it may be large."""
    turned = to.with_name("turned")
    shape = (made.width, made.n_rows)
    with turned.open("wb") as file:
        file.truncate(8 * shape[0] * shape[1])
    at = 0
    for rows, _ in made.slices():
        for layer in range(made.width):
            mapped = np.memmap(turned, np.int64, "r+", 8 * (layer * made.n_rows + at), (len(rows),))
            mapped[:] = rows[:, layer]
        at += len(rows)
    tensor_files(path).write(to, turned, shape)
    turned.unlink()
