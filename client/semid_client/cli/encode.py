"""`semid encode`: a file of embeddings to a file of semantic IDs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from semid_client._errors import InvalidInputError
from semid_client._tensor import check_embedding_type
from semid_client.cli._cluster import cluster_of, cluster_options
from semid_client.cli._convert import FileFlags, Plan, convert, file_options
from semid_client.cli._options import option
from semid_client.files import FileError, Unique, check_output
from semid_client.files.outputs import TOKENS, check_tokens
from semid_client.files.places import suffix_of
from semid_client.files.rows import STDIN

if TYPE_CHECKING:
    from semid_client.files import Engine, Source

ENV = "SEMID_ENCODE"


@click.command(short_help="Embeddings to semantic IDs.")
@file_options(ENV, "IN", ".npy, .npz, .parquet, .safetensors, .jsonl or GRID's .pt")
@cluster_options(ENV)
@option(
    "--tokens",
    env=ENV,
    default=TOKENS,
    show_default=True,
    help="In .jsonl, the token of each code: {letter} or {layer} of the layer, and {code}.",
)
@option(
    "--unique",
    env=ENV,
    type=click.Choice(["grid", "tiger", "none"]),
    help="Add an extra digit that tells items with the same codes apart, as one code more. tiger: "
    "0 to m-1 in a group of m; grid: 1 to m, and 0 for an item alone. Default: grid for .pt, "
    "else none.",
)
def encode(tokens: str, unique: Unique | None, **flags: Any) -> None:
    """Write the semantic ID of each embedding of IN to OUT.

    IN is a .npy, .npz, .safetensors or .pt file with a matrix (n, D) of float32, float16, bfloat16
    or float64; a .parquet file, a folder or a pattern of them, with a column of lists; or -, an
    Arrow stream on standard input. Files may be larger than memory, and URLs: s3://, gs:// or
    whatever fsspec knows.
    """
    files = {name: flags.pop(name) for name in FileFlags.__dataclass_fields__}
    given = FileFlags(**files)
    flags["cluster"] = cluster_of(flags)
    convention = check_output(
        given.output, what="codes", unique=unique, on_bad_row=given.on_bad_row
    )
    asked = click.get_current_context().get_parameter_source("tokens") != ParameterSource.DEFAULT
    if asked and suffix_of(given.output) != ".jsonl":
        name = "standard output" if given.output == STDIN else given.output
        raise FileError(name, f"has no tokens, as .jsonl has: --tokens {tokens} says nothing")

    def plan(engine: Engine, source: Source) -> Plan:
        info = engine.info
        try:
            check_embedding_type(source.dtype)
        except InvalidInputError as error:
            raise FileError(source.path, error.problem) from error
        if not source.takes_width(info.input_dim):
            raise FileError(
                source.path,
                f"has rows of {source.width} numbers, but model {info.name!r} {engine.where} "
                f"takes embeddings of {info.input_dim}"
                + ("; it is turned: transpose it" if source.n_rows == info.input_dim else ""),
            )
        n_codes = info.n_layers + (convention != "none")
        if suffix_of(given.output) == ".jsonl":
            check_tokens(given.output, tokens, n_codes)
        return Plan(
            width=info.n_layers,
            dtype=info.code_dtype,
            compute=engine.encode,
            options={"unique": convention, "tokens": tokens},
            unique=convention,
            tokens=tokens,
        )

    convert(given, "embeddings", plan, flags)
