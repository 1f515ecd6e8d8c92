"""Plain files of `torch.save` with a ``model_state_dict``, or with nothing but a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from semid_server.checkpoint.contents import Contents
from semid_server.checkpoint.state_dict import (
    model_tensors,
    read_spec,
    residuals_said,
    shown,
)
from semid_server.errors import MalformedCheckpointError
from semid_server.model import ModelKind

if TYPE_CHECKING:
    from pathlib import Path

    from semid_server.checkpoint.contents import Overrides

FORMAT = "torch-state-dict"


def read_plain_torch(path: Path, file: Mapping[object, object], overrides: Overrides) -> Contents:
    """Read ``{"model_state_dict", "num_hierarchies", "codebook_width", "embedding_dim"}``.

    The three numbers are optional; those that are there must agree with the tensors. So is
    ``normalize_residuals``, which is believed.

    Raises
    ------
    MalformedCheckpointError
        Its parts disagree.
    """
    state_dict = file.get("model_state_dict", file)
    if not isinstance(state_dict, Mapping):
        raise MalformedCheckpointError(
            path,
            f"model_state_dict is a {type(state_dict).__name__}; expected a mapping of tensors",
        )
    state, notes, ignored = model_tensors(path, state_dict)
    has_encoder = any(name.startswith("encoder.") for name in state)
    kind = overrides.kind
    if kind is None:
        kind = ModelKind.RQ_VAE if has_encoder else ModelKind.RQ_KMEANS
        if not has_encoder:
            notes.append(
                f"kind: {kind}; the file does not record it, and R-VQ would give the same codes "
                "(--kind says otherwise)"
            )
    normalize_residuals = residuals_said(_recorded(file), overrides, notes)
    if normalize_residuals is None:
        normalize_residuals = not has_encoder
        notes.append(
            f"normalize_residuals: {normalize_residuals}, as GRID configures this kind; the file "
            "does not record it, and the codes depend on it (--normalize-residuals and "
            "--no-normalize-residuals say otherwise)"
        )
    if not isinstance(normalize_residuals, bool):
        raise MalformedCheckpointError(
            path, f"normalize_residuals is {shown(normalize_residuals)}; expected true or false"
        )
    spec = read_spec(
        path,
        state,
        kind=kind,
        normalize_residuals=normalize_residuals,
        overrides=overrides,
        notes=notes,
    )
    for key, actual in {
        "num_hierarchies": spec.n_layers,
        "codebook_width": spec.codebook_widths[0],
        "embedding_dim": spec.embedding_dim,
    }.items():
        said = file.get(key, actual)
        if not isinstance(said, int) or said != actual:
            raise MalformedCheckpointError(
                path, f"{key} is {shown(said)}, but the tensors say {actual}"
            )
    if "codebook_width" in file and len(set(spec.codebook_widths)) > 1:
        raise MalformedCheckpointError(
            path, f"codebook_width is one number, but the layers have {spec.codebook_widths}"
        )
    return Contents(
        format=FORMAT,
        name=overrides.name or path.stem,
        spec=spec,
        state=state,
        notes=tuple(notes),
        warnings=(f"left out: {', '.join(ignored)}",) if ignored else (),
    )


def _recorded(file: Mapping[object, object]) -> object:
    """What the file says of ``normalize_residuals``, beside the tensors or where Lightning does."""
    within = file.get("hyper_parameters")
    others = within if isinstance(within, Mapping) else {}
    return file.get("normalize_residuals", others.get("normalize_residuals"))
