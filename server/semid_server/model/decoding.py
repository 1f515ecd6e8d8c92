"""How codes become embeddings again."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class DecodeMode(StrEnum):
    """What `ResidualQuantization.decode` returns."""

    SUM = "sum"
    """The sum of the centroids, through the decoder if there is one."""

    CALIBRATED = "calibrated"
    """The same on the scale of the input, from norms recorded when the model was calibrated."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The lengths that normalising residuals divides out, averaged over a set of embeddings.

    Attributes
    ----------
    input_norm : float
        ``m``, the mean length of the rows that enter the first layer, before it normalises them.
    residual_norms : tuple of Tensor
        ``s_l``, float32 ``(K_l,)`` for each layer: the mean length of what layer ``l`` leaves,
        before it is normalised, over the rows that have code ``k`` there.
    """

    input_norm: float
    residual_norms: tuple[Tensor, ...]
