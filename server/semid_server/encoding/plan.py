"""What is computed once a checkpoint, so that a batch needs one matrix product.

Symbols as in BOUNDS.md, which derives what the numbers here must satisfy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from semid_server.model import ModelSpec

UNIT32 = 2.0**-24
"""``U``, unit roundoff of float32."""

UNIT64 = 2.0**-53
"""``u``, unit roundoff of float64."""

TENSOR_CORE_UNIT = 2.0**-24
"""What adding one product in a tensor core may lose, relative to the sum of absolute values."""

LOOSEST = 0.1
"""Relative error up to which the square of a residual's length is taken from the products."""

SHORTEST_RESIDUAL = 1e-9
"""A residual shorter than this is left to the reference: it may be clamped at 1e-12."""

LEAST_LENGTH = 2.0**-24
GREATEST_LENGTH = 2.0**40
"""Rows and codebooks of lengths outside these are left to the reference arithmetic, so that no
intermediate of the fast paths overflows, underflow is far below their bounds, and the clamp of
`NORM_EPS` never acts on a row that they decide."""

_GRAM_BLOCK = 1 << 22
"""Entries of a Gram table made at once in float64: 32 MiB."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Centroids of all layers, stacked, and what follows from them alone.

    A centroid that equals one of lower index in its layer can never win: it is left out. ``N`` is
    the number that remain, in the order of their indices; column ``j`` of layer ``l`` is at
    ``offsets[l] + j``.

    Attributes
    ----------
    normalize : bool
        Whether residuals are brought to length 1 before each layer.
    offsets : tuple of int
        ``L + 1`` of them; layer ``l`` has columns ``offsets[l]`` to ``offsets[l + 1]``.
    centroids : Tensor
        float32 ``(N, E)``.
    codes : Tensor
        int64 ``(N,)``, the index of each centroid in its codebook.
    square_norms : Tensor
        float64 ``(N,)``, ``||c||^2``.
    lengths : Tensor
        float32 ``(N,)``, ``||c||`` rounded up.
    longest : Tensor
        float64 ``(L,)``: ``M_l``, the greatest length of a centroid of the layer, rounded up.
    grams : tuple of Tensor
        float32 ``(offsets[l], K_l)`` each: inner products of the centroids of all earlier layers
        with those of layer ``l``.
    """

    normalize: bool
    offsets: tuple[int, ...]
    centroids: Tensor
    codes: Tensor
    square_norms: Tensor
    lengths: Tensor
    longest: Tensor
    grams: tuple[Tensor, ...]

    @property
    def n_layers(self) -> int:
        """``L``."""
        return len(self.offsets) - 1

    @property
    def dim(self) -> int:
        """``E``, numbers in a centroid."""
        return self.centroids.shape[1]

    @classmethod
    def of(cls, spec: ModelSpec, state: Mapping[str, Tensor], device: torch.device) -> Plan:
        """Make the plan of a model's state dict on ``device``."""
        kept, codes, offsets = [], [], [0]
        for index in range(spec.n_layers):
            centroids = state[f"quantization_layer_list.{index}.centroids"].detach().cpu().float()
            first = _first_of_equals(centroids)
            kept.append(centroids[first].to(device))
            codes.append(first.to(device))
            offsets.append(offsets[-1] + len(first))
        stacked = torch.cat(kept)
        square_norms = torch.cat([(part := layer.double()).mul_(part).sum(dim=1) for layer in kept])
        lengths = (square_norms.sqrt() * (1 + 2.0**-22)).float()
        longest = torch.stack([lengths[start:stop].max() for start, stop in pairwise(offsets)])
        return cls(
            normalize=spec.normalize_residuals,
            offsets=tuple(offsets),
            centroids=stacked,
            codes=torch.cat(codes),
            square_norms=square_norms,
            lengths=lengths,
            longest=longest.double(),
            grams=tuple(
                _gram(stacked[: offsets[layer]], kept[layer]) for layer in range(spec.n_layers)
            ),
        )

    @property
    def within_range(self) -> bool:
        """Whether the fast paths may serve this checkpoint: see `LEAST_LENGTH`."""
        longest = self.longest
        fits = (longest <= GREATEST_LENGTH) & ((longest >= LEAST_LENGTH) | (longest == 0))
        return bool(fits.all())


def gram_bytes(widths: Sequence[int]) -> int:
    """Bytes that the Gram tables of codebooks of these ``widths`` need."""
    total, earlier = 0, 0
    for width in widths:
        total += 4 * earlier * width
        earlier += width
    return total


def _first_of_equals(centroids: Tensor) -> Tensor:
    """Indices, rising, of the centroids that equal none of lower index."""
    # adding zero makes a negative zero positive: both are the same number
    _, group = torch.unique(centroids + 0.0, dim=0, return_inverse=True)
    first = torch.full((int(group.max()) + 1,), len(centroids))
    first.scatter_reduce_(0, group, torch.arange(len(centroids)), reduce="amin")
    return first.sort().values


def _gram(earlier: Tensor, layer: Tensor) -> Tensor:
    """Inner products float32 of all rows of ``earlier`` and ``layer``, each rounded once."""
    gram = torch.empty(len(earlier), len(layer), device=layer.device)
    columns = layer.double().T
    step = max(1, _GRAM_BLOCK // len(layer))
    for start in range(0, len(earlier), step):
        gram[start : start + step] = earlier[start : start + step].double() @ columns
    return gram
