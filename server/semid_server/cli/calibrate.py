"""`semid calibrate`: measure what decode mode CALIBRATED needs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from semid_server.checkpoint import load_checkpoint, save_checkpoint
from semid_server.cli import errors_as_sentences
from semid_server.cli.checkpoint_options import override_options
from semid_server.cli.training_options import (
    WatchedRows,
    column_option,
    option,
    provenance_of,
    refuse_if_taken,
    rows_for,
)
from semid_server.errors import ConfigurationError
from semid_server.training import calibrate as measure

if TYPE_CHECKING:
    from semid_server.checkpoint import Overrides

_option = partial(option, "calibrate")


@click.command(short_help="Record residual norms, for decoding on the scale of the input.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("embeddings", type=click.Path(path_type=Path))
@_option(
    "-o",
    "--output",
    default=None,
    type=click.Path(path_type=Path),
    help="Checkpoint folder to make. Without it CHECKPOINT itself, a folder of semid's own format, "
    "is replaced once the new one is whole.",
)
@column_option("calibrate")
@_option("--force", is_flag=True, help="Replace the checkpoint at OUTPUT.")
@override_options("calibrate")
@errors_as_sentences()
def calibrate(
    *,
    checkpoint: Path,
    embeddings: Path,
    output: Path | None,
    column: str | None,
    force: bool,
    overrides: Overrides,
) -> None:
    """Measure CHECKPOINT's residual norms on EMBEDDINGS, an .npy or .parquet file.

    They are what decode mode CALIBRATED needs; codes and the fingerprint stay as they are. Use
    the embeddings that the model was trained on, or a large sample of those it will encode.
    """
    loaded = load_checkpoint(checkpoint, overrides=overrides)
    if output is None and not checkpoint.is_dir():
        raise ConfigurationError(f"{checkpoint} is not a checkpoint folder: name one with --output")
    target = output or checkpoint
    refuse_if_taken(target, force=force or output is None)
    rows = rows_for(loaded, embeddings, column)
    watched = WatchedRows(rows, "calibrating")
    calibration = measure(loaded.model, watched)
    watched.close()
    name = loaded.name if output is None or overrides.name else output.resolve().name
    beside = checkpoint if checkpoint.is_dir() else None
    fingerprint = save_checkpoint(
        target,
        model=loaded.model,
        spec=loaded.spec,
        name=name,
        calibration=calibration,
        provenance={
            **_provenance(beside),
            **{
                f"calibration_{key}": value
                for key, value in provenance_of(embeddings, rows).items()
            },
        },
        notes=loaded.notes,
        warnings=loaded.warnings,
        beside=beside,
        force=True,
    )
    click.echo(f"{target}: mean input norm {calibration.input_norm:.6g}, {fingerprint}")


def _provenance(folder: Path | None) -> dict[str, str]:
    """What a checkpoint folder says of its origin."""
    if folder is None:
        return {}
    said: dict[str, str] = json.loads((folder / "config.json").read_text("utf-8"))["provenance"]
    return said
