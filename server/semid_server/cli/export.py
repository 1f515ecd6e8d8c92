"""`semid export`: a checkpoint as a ``.ckpt`` that GRID can load."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from torch import nn

from semid_server.checkpoint import load_checkpoint
from semid_server.cli import errors_as_sentences, write_whole
from semid_server.cli.checkpoint_options import override_options
from semid_server.cli.training_options import option, refuse_if_taken
from semid_server.model import ModelKind
from semid_server.model.layers import DEFAULT_INIT_BUFFER_SIZE

if TYPE_CHECKING:
    from semid_server.checkpoint import Checkpoint, Overrides

_option = partial(option, "export")

LIGHTNING_VERSION = "2.6.6"
"""Of the trainer whose layout of a checkpoint this follows."""


@click.command(short_help="Write a checkpoint as GRID's .ckpt.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@_option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write, by custom with the ending .ckpt.",
)
@_option("--force", is_flag=True, help="Replace the file at OUTPUT.")
@override_options("export")
@errors_as_sentences()
def export(*, checkpoint: Path, output: Path, force: bool, overrides: Overrides) -> None:
    """Write CHECKPOINT, a folder or file that semid reads, as a .ckpt with GRID's keys.

    It holds what inference needs and is marked as fully trained. A calibration has no place in
    that format and is left out.
    """
    refuse_if_taken(output, force=force)
    loaded = load_checkpoint(checkpoint, overrides=overrides)
    contents = io.BytesIO()  # torch tells of a full disk as of a bug
    torch.save(grid_contents(loaded), contents)
    write_whole(output, contents.getvalue())
    click.echo(f"{output}: {loaded.spec.kind}, fingerprint {loaded.fingerprint}")


def grid_contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a GRID checkpoint of this model holds, key for key."""
    spec = checkpoint.spec
    together = spec.kind is ModelKind.RQ_VAE
    return {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": LIGHTNING_VERSION,
        "state_dict": checkpoint.model.state_dict(),
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "n_layers": spec.n_layers,
            "init_buffer_size": DEFAULT_INIT_BUFFER_SIZE,
            "quantization_loss_weight": 1.0,
            "reconstruction_loss_function": nn.MSELoss() if together else None,
            "reconstruction_loss_weight": 1.0 if together else 0.0,
            "normalize_residuals": spec.normalize_residuals,
            "train_layer_wise": not together,
            "track_residuals": True,
            "verbose": True,
        },
        "current_layer": 0 if together else spec.n_layers - 1,
        "layers_initialized": [True] * spec.n_layers,
    }
