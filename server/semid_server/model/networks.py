"""The networks around the quantiser of an RQ-VAE."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.functional import normalize

from semid_server.model.spec import NORM_EPS, Activation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    Activation.RELU: nn.ReLU,
    Activation.GELU: nn.GELU,
    Activation.SILU: nn.SiLU,
    Activation.TANH: nn.Tanh,
    Activation.SIGMOID: nn.Sigmoid,
    Activation.LEAKY_RELU: nn.LeakyReLU,
    Activation.ELU: nn.ELU,
    Activation.IDENTITY: nn.Identity,
}


class L2Normalize(nn.Module):
    """``x / max(||x||, 1e-12)`` for each row."""

    def forward(self, x: Tensor) -> Tensor:
        """Rows ``x`` (n, D) brought to length 1."""
        return normalize(x, dim=-1, eps=NORM_EPS)


class MLP(nn.Module):
    """Linear maps with an activation before, and dropout after, each but the first.

    The linears sit at ``model.0, model.2, model.5, model.8, ...`` of the state dict.

    Parameters
    ----------
    input_dim, output_dim : int
        Numbers in a row that goes in, and in one that comes out.
    hidden_dims : sequence of int
        Widths between them.
    activation : Activation
        Applied between two linear maps.
    dropout : float
        Share of numbers set to 0 in training; at inference it does nothing.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dims: Sequence[int] = (),
        *,
        activation: Activation = Activation.RELU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [*hidden_dims, output_dim]
        modules: list[nn.Module] = [nn.Linear(input_dim, widths[0])]
        for before, after in pairwise(widths):
            modules += [_ACTIVATIONS[activation](), nn.Linear(before, after), nn.Dropout(dropout)]
        self.model = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows ``(n, input_dim)`` to rows ``(n, output_dim)``."""
        output: Tensor = self.model(x)
        return output
