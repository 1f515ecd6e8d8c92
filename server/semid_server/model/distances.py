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

    As ``||x||^2 - 2<x, y> + ||y||^2`` it is one matrix product, but loses the digits that separate
    two centroids when a row lies close to both: so for narrower types that is computed in
    float64, whose digits are enough, and for float64 the differences themselves are taken.
    """

    def compute(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared distances ``(n, m)`` of the rows of ``x`` (n, D) to the rows of ``y`` (m, D).

        Both are of one floating-point dtype, which is the dtype of the result.
        """
        if x.dtype == torch.float64:
            return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
        wide_x, wide_y = x.double(), y.double()
        squares = wide_x.square().sum(dim=1, keepdim=True) + wide_y.square().sum(dim=1)
        return torch.addmm(squares, wide_x, wide_y.T, alpha=-2).clamp_min(0).to(x.dtype)
