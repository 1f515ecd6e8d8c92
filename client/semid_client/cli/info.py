"""`semid info`: what the model behind a server is, and what the server accepts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from semid_client.cli._options import connect, connection_options, option


@click.command(short_help="Describe a served model.")
@connection_options
@option(
    "--json",
    "as_json",
    env="SEMID_INFO",
    is_flag=True,
    help="Print one JSON object, for programs.",
)
def info(*, as_json: bool, **connection: Any) -> None:
    """Print what the model behind a server is: fingerprint, shapes, decode modes, limits."""
    with connect(**connection) as client:
        model = client.model()
    if as_json:
        click.echo(json.dumps(asdict(model) | {"code_dtype": model.code_dtype.name}, indent=2))
        return
    widths = ", ".join(str(layer.codebook_width) for layer in model.layers)
    for name, value in (
        ("name", model.name),
        ("fingerprint", model.fingerprint),
        ("kind", model.kind),
        ("embeddings", f"{model.input_dim} numbers"),
        ("codes", f"{model.n_layers} of {model.code_dtype}, from codebooks of {widths}"),
        ("decode modes", ", ".join(model.decode_modes)),
        ("normalize residuals", "yes" if model.normalize_residuals else "no"),
        ("largest message", f"{model.limits.max_message_bytes:,} bytes"),
        ("most rows", f"{model.limits.max_rows:,} a request"),
    ):
        click.echo(f"{name:<20}{value}")
