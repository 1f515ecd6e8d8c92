"""`semid import`: a checkpoint of GRID or of plain torch into semid's own format."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from semid_server.checkpoint import load_checkpoint, save_checkpoint
from semid_server.cli import errors_as_sentences, writing
from semid_server.cli.checkpoint_options import override_options

if TYPE_CHECKING:
    from semid_server.checkpoint import Checkpoint, Overrides


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    envvar="SEMID_IMPORT_OUTPUT",
    show_envvar=True,
    help="Folder to make, with config.json and model.safetensors. Its name becomes the model's.",
)
@click.option(
    "--force",
    is_flag=True,
    envvar="SEMID_IMPORT_FORCE",
    show_envvar=True,
    help="Replace the checkpoint folder at OUTPUT and all that lies in it. The old one stays until "
    "the new one is whole.",
)
@click.option(
    "--allow-degenerate",
    is_flag=True,
    envvar="SEMID_IMPORT_ALLOW_DEGENERATE",
    show_envvar=True,
    help="Import a model whose codes mean nothing (uninitialised, collapsed or shared codebooks) "
    "with a warning, to study it. A server refuses it until it is told the same.",
)
@override_options("import")
@errors_as_sentences()
def import_(
    *, source: Path, output: Path, force: bool, allow_degenerate: bool, overrides: Overrides
) -> None:
    """Import SOURCE, a GRID .ckpt or a plain file of torch.save, as a checkpoint folder.

    Nothing that SOURCE's pickle names is run. What it does not record is taken from GRID's own
    configuration and said aloud; the options say otherwise.
    """
    name = overrides.name or output.resolve().name
    overrides = replace(overrides, name=name, allow_degenerate=allow_degenerate)
    checkpoint = load_checkpoint(source, overrides=overrides)
    with writing(output):
        fingerprint = save_checkpoint(
            output,
            model=checkpoint.model,
            spec=checkpoint.spec,
            name=checkpoint.name,
            calibration=checkpoint.calibration,
            provenance=_provenance(checkpoint),
            notes=checkpoint.notes,
            warnings=checkpoint.warnings,
            force=force,
        )
    for note in checkpoint.notes:
        click.echo(f"note: {note}", err=True)
    for warning in checkpoint.warnings:
        click.echo(f"warning: {warning}", err=True)
    widths = " x ".join(map(str, checkpoint.spec.codebook_widths))
    click.echo(f"{output}: {checkpoint.spec.kind}, {widths} centroids, fingerprint {fingerprint}")


def _provenance(checkpoint: Checkpoint) -> dict[str, str]:
    source = checkpoint.path
    provenance = {
        "source": source.name,
        "source_format": checkpoint.format,
        "written_by": f"semid {version('semid')}",
    }
    if source.is_file():
        with source.open("rb") as file:
            provenance["source_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return provenance
