"""Distances between rows and centroids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Distance(Protocol):
    """How far rows are from centroids; the least decides the code."""

    def compute(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances ``(n, m)`` of the rows of ``x`` (n, D) to the rows of ``y`` (m, D)."""
        ...


class SquaredEuclideanDistance:
    """``d(x, y) = ||x - y||^2``.

    Computed from differences, never as ``||x||^2 - 2<x, y> + ||y||^2``: that form loses the
    digits which separate two centroids when a row lies close to both.
    """

    def compute(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared distances ``(n, m)`` of the rows of ``x`` (n, D) to the rows of ``y`` (m, D).

        Both are of one floating-point dtype, which is the dtype of the result.
        """
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
