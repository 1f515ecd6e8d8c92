"""Whether the codes of a model can mean anything, in words for those who trained it."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from semid_server.model import ModelSpec

NEGLIGIBLE = 1e-6
"""A few units in the last place of float32, which hold no structure.

The longest centroid of a layer is compared with this share of the scale of the residuals: 1 where
they are normalised, else the longest centroid of the model; how far the centroids of a layer
differ, with this share of the longest of them.
"""

SHORT = 0.1
"""A centroid shorter than this part of its layer's median is named as an attractor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """Figures of one codebook.

    Attributes
    ----------
    codebook_width, embedding_dim : int
        ``K`` centroids of ``E`` numbers.
    norm_min, norm_median, norm_max : float
        Euclidean lengths of the centroids, on the scale of the layer's residuals.
    duplicates : int
        Centroids equal to one before them: codes that are never given.
    """

    codebook_width: int
    embedding_dim: int
    norm_min: float
    norm_median: float
    norm_max: float
    duplicates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What an examination found.

    Attributes
    ----------
    layers : tuple of LayerReport
        One for each layer.
    damage : tuple of str
        Numbers with which no arithmetic is possible.
    problems : tuple of str
        What makes codes meaningless.
    warnings : tuple of str
        What makes codes worse than they could be.
    """

    layers: tuple[LayerReport, ...]
    damage: tuple[str, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def examine(spec: ModelSpec, state: Mapping[str, Tensor]) -> Health:
    """Look at every number of a model, and at each of its codebooks."""
    codebooks = [
        state[f"quantization_layer_list.{layer}.centroids"].double()
        for layer in range(spec.n_layers)
    ]
    reports = tuple(_report(codebook) for codebook in codebooks)
    damage = _damage(state)
    problems: list[str] = []
    warnings: list[str] = []
    if not damage:
        scale = 1.0 if spec.normalize_residuals else max(report.norm_max for report in reports)
        for layer, (codebook, report) in enumerate(zip(codebooks, reports, strict=True)):
            problem = _collapse(codebook, report, scale)
            if problem is not None:
                problems.append(f"layer {layer}: {problem}")
                continue
            if report.duplicates:
                warnings.append(
                    f"layer {layer}: {report.duplicates} of {report.codebook_width} centroids "
                    "repeat another; only the lowest code of each group is ever given"
                )
            if spec.normalize_residuals and report.norm_min < SHORT * report.norm_median:
                shortest = int(torch.linalg.vector_norm(codebook, dim=1).argmin())
                warnings.append(
                    f"layer {layer}: centroid {shortest} has length {report.norm_min:.3g} where "
                    f"the median is {report.norm_median:.3g}; residuals of length 1 that are near "
                    "no other centroid all fall to it, so few codes of this layer may be in use"
                )
        problems += _shared(codebooks)
    return Health(layers=reports, damage=damage, problems=tuple(problems), warnings=tuple(warnings))


def _report(codebook: Tensor) -> LayerReport:
    norms = torch.linalg.vector_norm(codebook, dim=1)
    rows = (codebook + 0.0).numpy()  # -0.0 equals 0.0, but its bytes do not
    return LayerReport(
        codebook_width=codebook.shape[0],
        embedding_dim=codebook.shape[1],
        norm_min=float(norms.min()),
        norm_median=float(norms.median()),
        norm_max=float(norms.max()),
        duplicates=len(rows) - len({sha256(row.tobytes()).digest() for row in rows}),
    )


def _damage(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    found = []
    for name, tensor in state.items():
        finite = torch.isfinite(tensor)
        if not finite.all():
            place = (~finite).nonzero()[0].tolist()
            found.append(
                f"{name} holds {int((~finite).sum())} NaN or infinite numbers out of "
                f"{tensor.numel()}, the first at {place}"
            )
        elif name.endswith("running_var") and bool((tensor < 0).any()):
            found.append(f"{name} is {float(tensor.min()):.3g} at its least; expected 0 or more")
    return tuple(found)


def _collapse(codebook: Tensor, report: LayerReport, scale: float) -> str | None:
    width = report.codebook_width
    if report.norm_max == 0:
        return (
            f"all {width} centroids are zero: this layer was never initialised, its codes mean "
            "nothing. Train on until every layer is initialised"
        )
    if report.norm_max <= NEGLIGIBLE * scale:
        return (
            f"all {width} centroids are about zero (the longest has length "
            f"{report.norm_max:.3g} where residuals are on the scale of {scale:.3g}): the codebook "
            "has collapsed, its codes are rounding noise"
        )
    spread = float((codebook - codebook[0]).abs().max())
    if width > 1 and spread <= NEGLIGIBLE * report.norm_max:
        return (
            f"all {width} centroids are equal (they differ by at most {spread:.3g}): the codebook "
            "has collapsed, its code says nothing about an item"
        )
    return None


def _shared(codebooks: list[Tensor]) -> list[str]:
    found = []
    for later in range(1, len(codebooks)):
        for earlier in range(later):
            if torch.equal(codebooks[later], codebooks[earlier]) and codebooks[later].any():
                found.append(
                    f"layers {earlier} and {later} share one codebook: every centroid is equal. A "
                    "residual quantiser needs a codebook of its own for each layer (a deep copy of "
                    "the layer, not the same module listed again)"
                )
                break
    return found
