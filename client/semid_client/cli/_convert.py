"""From one file through a server to another file: what `semid encode` and `semid decode` do."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from tqdm import tqdm

from semid_client._errors import InvalidInputError
from semid_client.cli._options import connect, connection_options, option
from semid_client.files import FileError, NpyReader, NpyWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from semid_client._client import Client
    from semid_client._model import ModelInfo

F = TypeVar("F", bound="Callable[..., Any] | click.Command")

PATH = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class Work:
    """What a command does with the rows of a file.

    Attributes
    ----------
    columns : int
        Of the output.
    dtype : numpy.dtype
        Of the output.
    run : callable
        ``run(source, sink)`` sends the rows through the server; returns the fingerprint.
    """

    columns: int
    dtype: np.dtype[Any]
    run: Callable[[NpyReader, Callable[[int, NDArray[Any]], None]], str]


def file_options(env: str) -> Callable[[F], F]:
    """Add the files, and all flags of the connection, to a command."""

    def add(command: F) -> F:
        command = connection_options(command)
        command = option(
            "--force", env=env, is_flag=True, help="Replace OUT.npy if it exists already."
        )(command)
        command = option(
            *("-o", "--output"),
            env=env,
            required=True,
            type=PATH,
            metavar="OUT.npy",
            help="File to write. It appears when it is complete.",
        )(command)
        return click.argument("source", metavar="IN.npy", type=PATH)(command)

    return add


def convert(
    source: Path,
    output: Path,
    plan: Callable[[Client, ModelInfo, NpyReader], Work],
    *,
    force: bool,
    connection: dict[str, Any],
) -> None:
    """Write to ``output`` what a server makes of the rows of ``source``, in constant memory.

    Raises
    ------
    FileError
        If a file cannot be used. Rows are counted as in the file, from 0.
    SemidClientError
        If the server cannot be used.
    """
    began = time.monotonic()
    with closing(NpyReader(source)) as reader:
        if output.exists() and output.samefile(source):
            raise FileError(output, "is the input too; give the output another name")
        with (
            NpyWriter(output, force=force) as writer,
            connect(**connection) as client,
            tqdm(total=reader.shape[0], unit="row", unit_scale=True, disable=None) as progress,
        ):

            def sink(start: int, rows: NDArray[Any]) -> None:
                writer(start, rows)
                progress.update(len(rows))

            try:
                work = plan(client, client.model(), reader)
                writer.begin((reader.shape[0], work.columns), work.dtype)
                fingerprint = work.run(reader, sink)
            except InvalidInputError as error:
                place = "" if error.row is None else f"row {error.row}: "
                raise FileError(source, place + error.problem) from error
    seconds = time.monotonic() - began
    click.echo(
        f"{output}: {reader.shape[0]:,} rows in {seconds:.2f} s "
        f"({reader.shape[0] / seconds:,.0f} rows/s), fingerprint {fingerprint}"
    )
