"""`semid encode`: a file of embeddings to a file of semantic IDs, through a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from semid_client._errors import InvalidInputError
from semid_client.cli._convert import Work, convert, file_options

if TYPE_CHECKING:
    from pathlib import Path

    from semid_client._client import Client
    from semid_client._model import ModelInfo
    from semid_client.files import NpyReader


@click.command(short_help="Embeddings to semantic IDs.")
@file_options("SEMID_ENCODE")
def encode(source: Path, output: Path, *, force: bool, **connection: Any) -> None:
    """Write the semantic ID of each embedding of IN.npy to OUT.npy.

    IN.npy holds float32, float16 or float64 embeddings (n, D); OUT.npy will hold codes (n, L) in
    the smallest unsigned type. Files may be larger than memory.
    """
    convert(source, output, _plan, force=force, connection=connection)


def _plan(client: Client, info: ModelInfo, reader: NpyReader) -> Work:
    if reader.shape[1] != info.input_dim:
        raise InvalidInputError(
            f"has rows of {reader.shape[1]} numbers, but model {info.name!r} at {client.target} "
            f"takes embeddings of {info.input_dim}"
        )
    return Work(info.n_layers, info.code_dtype, client.encode_into)
