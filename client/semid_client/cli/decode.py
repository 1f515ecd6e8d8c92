"""`semid decode`: a file of semantic IDs to a file of reconstructions, through a server."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

from semid_client._errors import InvalidInputError
from semid_client.cli._convert import Work, convert, file_options
from semid_client.cli._options import option

if TYPE_CHECKING:
    from pathlib import Path

    from semid_client._client import Client
    from semid_client._model import ModelInfo
    from semid_client.files import NpyReader


@click.command(short_help="Semantic IDs to reconstructed embeddings.")
@file_options("SEMID_DECODE")
@option(
    "--mode",
    env="SEMID_DECODE",
    type=click.Choice(["sum", "calibrated"]),
    default="sum",
    show_default=True,
    help="sum: the sum of the chosen centroids, through the model's decoder if it has one. "
    "calibrated: on the scale of the embeddings, for models that were calibrated.",
)
def decode(
    source: Path,
    output: Path,
    mode: Literal["sum", "calibrated"],
    *,
    force: bool,
    **connection: Any,
) -> None:
    """Write the reconstruction behind each semantic ID of IN.npy to OUT.npy.

    IN.npy holds codes (n, l) of any integer type, the first l of the model's L; OUT.npy will hold
    float32 (n, D). Files may be larger than memory.
    """

    def plan(client: Client, info: ModelInfo, reader: NpyReader) -> Work:
        if not 1 <= reader.shape[1] <= info.n_layers:
            raise InvalidInputError(
                f"has rows of {reader.shape[1]} codes, but model {info.name!r} at "
                f"{client.target} has {info.n_layers} layers"
            )
        return Work(info.input_dim, np.dtype(np.float32), partial(client.decode_into, mode=mode))

    convert(source, output, plan, force=force, connection=connection)
