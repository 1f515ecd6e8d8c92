"""What the training of a quantization layer minimises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn
from torch.nn.functional import mse_loss

if TYPE_CHECKING:
    from torch import Tensor


class WeightedSquaredError(nn.Module):
    """``sum_i w_i ||x_i - y_i||^2``: a sum over rows and features, not a mean."""

    def forward(self, x: Tensor, y: Tensor, w: Tensor | None = None) -> Tensor:
        """Loss of rows ``x`` (n, D) against ``y`` (n, D) with weights ``w`` (n,), all 1 if None."""
        squared = (x - y).square()
        return squared.sum() if w is None else (w * squared.sum(dim=-1)).sum()


class BetaQuantizationLoss(nn.Module):
    """``||sg(x) - q||^2 + beta ||x - sg(q)||^2`` of VQ-VAE (https://arxiv.org/abs/1711.00937).

    The first term draws centroids ``q`` to the rows ``x``, the second (the commitment) the encoder
    to the centroids; ``sg`` stops the gradient.

    Parameters
    ----------
    beta : float
        Weight of the commitment.
    reduction : "sum" or "mean"
        Over all rows and features.
    """

    def __init__(self, beta: float = 0.25, reduction: Literal["sum", "mean"] = "sum") -> None:
        super().__init__()
        self.beta = beta
        self.reduction = reduction

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        """Loss of rows ``x`` (n, E) that were quantised to ``q`` (n, E)."""
        loss = mse_loss(q, x.detach(), reduction=self.reduction)
        return loss + self.beta * mse_loss(x, q.detach(), reduction=self.reduction)
