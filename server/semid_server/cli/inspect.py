"""`semid inspect`: what a checkpoint holds, and whether its codes can mean anything."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semid_server.checkpoint import inspect_checkpoint
from semid_server.cli import errors_as_sentences
from semid_server.cli.checkpoint_options import override_options

if TYPE_CHECKING:
    from semid_server.checkpoint import Inspection, Overrides
    from semid_server.model import ModelSpec


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    envvar="SEMID_INSPECT_JSON",
    show_envvar=True,
    help="Print one JSON object, for programs; its keys stay the same between versions.",
)
@override_options("inspect")
@errors_as_sentences()
def inspect(*, path: Path, as_json: bool, overrides: Overrides) -> None:
    """Describe PATH, a checkpoint folder, a GRID .ckpt or a plain file of torch.save.

    Shows shapes, normalisation, the fingerprint and each codebook's figures, with what was
    assumed and what is wrong. A model that a server would refuse is described too, with the
    reason under "problems".
    """
    inspection = inspect_checkpoint(path, overrides)
    click.echo(json.dumps(_as_json(inspection), indent=2) if as_json else _as_text(inspection))


def _as_json(inspection: Inspection) -> dict[str, Any]:
    return {
        "path": str(inspection.path),
        "format": inspection.format,
        "name": inspection.name,
        "fingerprint": inspection.fingerprint,
        **asdict(inspection.spec),
        "n_layers": inspection.spec.n_layers,
        "calibrated": inspection.calibrated,
        "layers": [
            # JSON has no NaN and no infinity
            {key: value if math.isfinite(value) else None for key, value in asdict(layer).items()}
            for layer in inspection.layers
        ],
        "notes": list(inspection.notes),
        "warnings": list(inspection.warnings),
        "problems": list(inspection.problems),
    }


def _as_text(inspection: Inspection) -> str:
    spec = inspection.spec
    facts = {
        "path": inspection.path,
        "format": inspection.format,
        "name": inspection.name,
        "kind": spec.kind,
        "fingerprint": inspection.fingerprint,
        "embedding": f"{spec.input_dim} numbers",
        "before encoding": _normalization(spec),
        "encoder": _network(spec, spec.encoder_hidden_dims, spec.input_dim, spec.embedding_dim),
        "codebooks": f"{spec.n_layers}, of centroids of {spec.embedding_dim} numbers",
        "residuals": "brought to length 1 before every layer"
        if spec.normalize_residuals
        else "as they are",
        "decoder": _network(spec, spec.decoder_hidden_dims, spec.embedding_dim, spec.input_dim),
        "calibration": "residual norms recorded" if inspection.calibrated else "none",
    }
    lines = [f"{key:<17}{value}" for key, value in facts.items()]
    lines += ["", "layer  centroids  duplicates     shortest       median      longest"]
    lines += [
        f"{index:>5}{layer.codebook_width:>11}{layer.duplicates:>12}"
        f"{layer.norm_min:>13.6g}{layer.norm_median:>13.6g}{layer.norm_max:>13.6g}"
        for index, layer in enumerate(inspection.layers)
    ]
    for title in ("notes", "warnings", "problems"):
        sentences = getattr(inspection, title)
        if sentences:
            lines += ["", title, *(f"  - {sentence}" for sentence in sentences)]
    return "\n".join(lines)


def _normalization(spec: ModelSpec) -> str:
    steps = [f"batch norm (eps {spec.batch_norm_eps:g})"] if spec.batch_norm else []
    steps += ["brought to length 1"] if spec.normalize_input else []
    return ", then ".join(steps) or "as it comes"


def _network(
    spec: ModelSpec, hidden_dims: tuple[int, ...] | None, input_dim: int, output_dim: int
) -> str:
    if hidden_dims is None:
        return "none"
    widths = "-".join(map(str, (input_dim, *hidden_dims, output_dim)))
    return f"{widths}, {spec.activation}" if hidden_dims else widths
