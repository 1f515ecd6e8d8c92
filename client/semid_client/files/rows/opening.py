"""A source by what its name ends in."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from glob import has_magic
from typing import TYPE_CHECKING, Final

from semid_client.files._errors import FileError
from semid_client.files.npy import NpyReader
from semid_client.files.places import Place, place
from semid_client.files.rows.arrow import ArrowStreamRows
from semid_client.files.rows.json_lines import JsonLinesCodes
from semid_client.files.rows.matrices import MatrixRows, PtRows, SafetensorsMatrix
from semid_client.files.rows.npz import NpzRows
from semid_client.files.rows.parquet import ParquetRows, would_read

if TYPE_CHECKING:
    from collections.abc import Iterable

    from semid_client.files.rows.source import Source, What

STDIN: Final = "-"

OF_ONE_FILE: Final = (".npy", ".npz", ".safetensors", ".pt", ".jsonl")
"""Ends of names that are never those of a folder."""

NAMED_FORMATS: Final = (".npz", ".parquet", ".safetensors", ".pt")
"""What is not ``.npy``, by the ends of names."""


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
    if path == STDIN:
        return ArrowStreamRows(sys.stdin.buffer, what, column, id_column)
    found = place(path)
    suffix = found.suffix
    if suffix == ".npz":
        return NpzRows(path, what, column, id_column)
    if suffix == ".safetensors":
        _check_no_ids(path, id_column)
        return MatrixRows(path, what, SafetensorsMatrix(path, column))
    if suffix == ".pt":
        _check_no_ids(path, id_column)
        return PtRows(path, what, column)
    if suffix == ".jsonl" and what == "codes":
        return JsonLinesCodes(path, column, id_column)
    if _is_parquet(path, found):
        return ParquetRows(path, what, column, id_column)
    try:
        matrix = NpyReader(found)
    except FileError as error:
        if suffix == ".npy" or not found.exists() or not error.problem.startswith("not a .npy"):
            raise
        raise FileError(
            path,
            f"is {error.problem}; files of other formats have names that end in "
            f"{', '.join(NAMED_FORMATS)}" + (", .jsonl" if what == "codes" else ""),
        ) from error
    with ExitStack() as stack:
        stack.callback(matrix.close)
        if column is not None:
            raise FileError(path, f"has one array and no names: --column {column} says nothing")
        _check_no_ids(path, id_column)
        stack.pop_all()
    return MatrixRows(path, what, matrix)


def check_apart(path: str, written: Iterable[Place]) -> None:
    """Refuse to write where a folder or pattern would be read, now or by a later command.

    Raises
    ------
    FileError
        If one of the places would be among the files of the source.
    """
    if path == STDIN or place(path).suffix in OF_ONE_FILE or not _is_parquet(path, place(path)):
        return
    for other in written:
        if would_read(path, other):
            raise FileError(
                other.name, f"would be read as a part of {path}: write to where that does not look"
            )


def _is_parquet(path: str, found: Place) -> bool:
    return found.suffix == ".parquet" or (
        found.suffix != ".npy" and (has_magic(path) or found.is_folder())
    )


def _check_no_ids(path: str, id_column: str | None) -> None:
    if id_column is not None:
        raise FileError(path, f"has no ids: --id-column {id_column} says nothing")
