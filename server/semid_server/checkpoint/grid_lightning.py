"""GRID's own checkpoints: Lightning `.ckpt` files of RQ-KMeans, R-VQ and RQ-VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

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

    from torch import Tensor

    from semid_server.checkpoint.contents import Overrides

FORMAT = "grid-lightning"


def read_grid_lightning(
    path: Path, file: Mapping[object, object], overrides: Overrides
) -> Contents:
    """Read a Lightning checkpoint whose ``state_dict`` is a ResidualQuantization's.

    Raises
    ------
    MalformedCheckpointError
        Its parts disagree, or only the user can say what it does not.
    """
    state_dict = file["state_dict"]
    if not isinstance(state_dict, Mapping):
        raise MalformedCheckpointError(
            path, f"state_dict is a {type(state_dict).__name__}; expected a mapping of tensors"
        )
    state, notes, ignored = model_tensors(path, state_dict)
    warnings = _of_ignored(ignored)
    recorded = file.get("hyper_parameters")
    hyper_parameters = recorded if isinstance(recorded, Mapping) else {}
    spec = read_spec(
        path,
        state,
        kind=_kind(file, state, overrides, notes),
        normalize_residuals=_normalize_residuals(path, hyper_parameters, overrides, notes),
        overrides=overrides,
        notes=notes,
    )
    n_layers = hyper_parameters.get("n_layers")
    if isinstance(n_layers, int) and n_layers != spec.n_layers:
        raise MalformedCheckpointError(
            path,
            f"hyper_parameters.n_layers is {n_layers}, but the state dict holds "
            f"{spec.n_layers} codebooks",
        )
    problems = _uninitialized(path, file.get("layers_initialized"), spec.n_layers, warnings)
    current = file.get("current_layer")
    layer_wise = hyper_parameters.get("train_layer_wise") is True
    if layer_wise and isinstance(current, int) and current < spec.n_layers - 1:
        warnings.append(
            f"training had not finished: it was at layer {current} of layers 0 to "
            f"{spec.n_layers - 1}, and later layers had not had their turn"
        )
    return Contents(
        format=FORMAT,
        name=overrides.name or path.stem,
        spec=spec,
        state=state,
        notes=tuple(notes),
        warnings=tuple(warnings),
        problems=tuple(problems),
    )


def _of_ignored(ignored: Sequence[str]) -> list[str]:
    if not ignored:
        return []
    first, others = ", ".join(ignored[:3]), len(ignored) - 3
    more = f" and {others} others" if others > 0 else ""
    return [f"left out, as no part of the quantiser: {first}{more}"]


def _normalize_residuals(
    path: Path, hyper_parameters: Mapping[object, object], overrides: Overrides, notes: list[str]
) -> bool:
    said = residuals_said(hyper_parameters.get("normalize_residuals"), overrides, notes)
    if not isinstance(said, bool):
        raise MalformedCheckpointError(
            path,
            f"hyper_parameters.normalize_residuals is {shown(said)}, where true or false is "
            "expected, and nothing else in the file says whether residuals were normalised: say "
            "--normalize-residuals or --no-normalize-residuals",
        )
    return said


def _kind(
    file: Mapping[object, object],
    state: Mapping[str, Tensor],
    overrides: Overrides,
    notes: list[str],
) -> ModelKind:
    if overrides.kind is not None:
        return overrides.kind
    if any(name.startswith("encoder.") for name in state):
        return ModelKind.RQ_VAE
    groups = _parameter_groups(file.get("optimizer_states"))
    # GRID trains k-means by SGD, whose groups alone have a choice of Nesterov momentum and of
    # dampening, and R-VQ by other optimizers.
    if not groups:
        kind, why = ModelKind.RQ_KMEANS, "the file does not say how it was trained"
    elif all("dampening" in group for group in groups):
        kind, why = ModelKind.RQ_KMEANS, "it was trained by SGD"
    else:
        kind, why = ModelKind.R_VQ, "it was not trained by SGD"
    notes.append(
        f"kind: {kind}, because {why}; RQ-KMeans and R-VQ save the same tensors, and give the "
        "same codes from them (--kind says otherwise)"
    )
    return kind


def _parameter_groups(optimizer_states: object) -> list[Mapping[object, object]]:
    return [
        group
        for state in (optimizer_states if isinstance(optimizer_states, list) else [])
        if isinstance(state, Mapping) and isinstance(state.get("param_groups"), list)
        for group in state["param_groups"]
        if isinstance(group, Mapping)
    ]


def _uninitialized(path: Path, recorded: object, n_layers: int, warnings: list[str]) -> list[str]:
    if recorded is None:
        warnings.append("the file does not record which layers were initialised")
        return []
    flags = recorded.tolist() if isinstance(recorded, torch.Tensor) else recorded
    if isinstance(flags, Sequence) and not isinstance(flags, str):
        flags = [
            flag.item() if isinstance(flag, torch.Tensor) and flag.numel() == 1 else flag
            for flag in flags
        ]
    if (
        not isinstance(flags, list)
        or len(flags) != n_layers
        or not all(isinstance(flag, int) for flag in flags)
    ):
        raise MalformedCheckpointError(
            path,
            f"layers_initialized is {shown(recorded)}; expected true or false for each of "
            f"{n_layers} layers",
        )
    return [
        f"layer {layer}: the file records that it was never initialised, so its codes mean "
        "nothing. Train on until every layer is initialised"
        for layer, initialized in enumerate(flags)
        if not initialized
    ]
