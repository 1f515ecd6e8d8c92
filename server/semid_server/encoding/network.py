"""What comes before the first codebook, in float64: batch norm, L2 normalisation, MLP.

Two forms of one network. `Network.in_order` is part of the definition of a code: every sum runs
over features in index order and every operation is rounded once, so that its result is the same
bits on every device and for every batch. `Network.fast` gives the same numbers from library
matrix products, whose order of summation is unknown, with a bound on how far the two can differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from semid_server.model import NORM_EPS, Activation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from semid_server.model import ModelSpec

UNIT = 2.0**-53
"""``u``, unit roundoff of float64."""

LEAKY_SLOPE = 0.01
"""Slope of `torch.nn.LeakyReLU` below zero."""

_LONGEST = 1e150
"""Rows up to this length have squares that do not overflow, whatever computes them."""

_ELEMENTARY = 2.0**-47
"""How far, relative to ``1 + |x|``, an activation that needs `exp` or `erf` may be off."""

_LEAST = 2.0**-500
"""Lengths below this are taken for this: what underflows is far below the bounds then."""


@dataclass(frozen=True, eq=False)
class Network:
    """``encoder(normalization_layer(x))`` of a model, in float64.

    Attributes
    ----------
    mean, deviation, gain, shift : Tensor or None
        float64 ``(D,)``: batch norm is ``(x - mean) / deviation * gain + shift``.
    normalize : bool
        Whether rows are brought to length 1 then.
    weights, biases : tuple of Tensor
        float64 ``(out, in)`` and ``(out,)`` of each linear map; empty without an encoder.
    activation : Activation
        Between two linear maps.
    shift_length : float
        Length of ``shift``.
    spreads, offset_lengths : tuple of float
        Frobenius norm of each weight, and length of each bias.
    """

    mean: Tensor | None
    deviation: Tensor | None
    gain: Tensor | None
    shift: Tensor | None
    normalize: bool
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: Activation
    shift_length: float
    spreads: tuple[float, ...]
    offset_lengths: tuple[float, ...]

    @classmethod
    def of(
        cls, spec: ModelSpec, state: Mapping[str, Tensor], device: torch.device
    ) -> Network | None:
        """Take the network out of a state dict; None if it is the identity."""
        if not spec.has_network:
            return None

        def double(name: str) -> Tensor:
            return state[name].detach().to(device, torch.float64)

        mean = deviation = gain = shift = None
        if spec.batch_norm:
            norm = "normalization_layer.0."
            mean, gain, shift = (double(norm + name) for name in ("running_mean", "weight", "bias"))
            deviation = sqrt(double(norm + "running_var") + spec.batch_norm_eps)
        places: list[int] = []
        if spec.encoder_hidden_dims is not None:
            # linear, then (activation, linear, dropout) for every further width
            places = [0, *(2 + 3 * i for i in range(len(spec.encoder_hidden_dims)))]
        weights = tuple(double(f"encoder.model.{place}.weight") for place in places)
        biases = tuple(double(f"encoder.model.{place}.bias") for place in places)
        return cls(
            mean=mean,
            deviation=deviation,
            gain=gain,
            shift=shift,
            normalize=spec.normalize_input,
            weights=weights,
            biases=biases,
            activation=spec.activation,
            shift_length=0.0 if shift is None else float(torch.linalg.vector_norm(shift)),
            spreads=tuple(float(torch.linalg.matrix_norm(weight)) for weight in weights),
            offset_lengths=tuple(float(torch.linalg.vector_norm(bias)) for bias in biases),
        )

    def in_order(self, x: Tensor) -> Tensor:
        """Rows float64 ``(n, E)`` of float64 ``x`` (n, D), by the definition."""
        x = self._batch_norm(x)
        if self.normalize:
            x = x / norm_in_order(x).clamp(min=NORM_EPS)[:, None]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i:
                x = _IN_ORDER[self.activation](x)
            x = _linear_in_order(x, weight, bias)
        return x

    def fast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows float64 ``(n, E)`` of float64 ``x`` (n, D), and how far each may be off.

        The second, float64 ``(n,)``, bounds the distance of a row from the same row in exact
        arithmetic, both for this result and for that of `in_order` (BOUNDS.md, "The network").
        It is infinite where nothing is known.
        """
        error = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if self.mean is not None:
            x = self._batch_norm(x)
            # four roundings, each relative to a number of at most |x| + 2 |shift|
            error = 8 * UNIT * (_length(x) + self.shift_length)
        if self.normalize:
            dim = x.shape[1]
            norm = torch.linalg.vector_norm(x, dim=1)
            x = x / norm.clamp(min=NORM_EPS)[:, None]
            error = 2 * error / norm + (dim + 8) * UNIT
            # out of this range the clamp, or an overflow of squares, could act on one side only
            known = (norm > 1e3 * NORM_EPS) & (norm < _LONGEST)
            error = torch.where(known, error, torch.inf)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i:
                error = _LIPSCHITZ[self.activation] * error
                if self.activation not in _EXACT:
                    error += _ELEMENTARY * (math.sqrt(x.shape[1]) + _length(x))
                x = _FAST[self.activation](x)
            size = _length(x)
            spread, offset = self.spreads[i], self.offset_lengths[i]
            x = functional.linear(x, weight, bias)
            # the Frobenius norm bounds both the map itself and the map of absolute values
            rounding = 2 * (weight.shape[1] + 2) * UNIT
            error = spread * error * (1 + rounding) + rounding * (spread * size + offset)
        # what rounding does to the bound itself is far below a thousandth of it
        error = 1.001 * error
        return x, torch.where(torch.isfinite(error), error, torch.inf)

    def _batch_norm(self, x: Tensor) -> Tensor:
        if self.mean is None or self.deviation is None or self.gain is None or self.shift is None:
            return x
        return (x - self.mean) / self.deviation * self.gain + self.shift


def norm_in_order(x: Tensor) -> Tensor:
    """Length of each row of ``x`` (n, D): the root of the sum of squares in index order."""
    squares = x.T.contiguous()
    squares = squares * squares
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for feature in squares:
        total += feature
    return sqrt(total)


def _length(x: Tensor) -> Tensor:
    """Length of each row of ``x`` (n, D), in any order, and not less than `_LEAST`."""
    length: Tensor = torch.linalg.vector_norm(x, dim=1)
    return length.clamp(min=_LEAST)


def sqrt(x: Tensor) -> Tensor:
    """Square root of float64 numbers, rounded once.

    That of torch is off by one unit in the last place now and then on the CPU; numpy's is the
    processor's instruction.
    """
    if x.device.type == "cpu":
        return torch.from_numpy(np.sqrt(x.numpy()))
    return torch.sqrt(x)


def _linear_in_order(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x @ weight.T + bias``: products added in index order to zero, then the bias."""
    total = torch.zeros(len(x), len(weight), dtype=x.dtype, device=x.device)
    product = torch.empty_like(total)
    columns, rows = weight.T.contiguous(), x.T.contiguous()
    for feature, column in zip(rows, columns, strict=True):
        torch.mul(feature[:, None], column, out=product)
        total += product
    return total + bias


def _exp(x: Tensor) -> Tensor:
    """``e^x`` by basic operations only: a library's differs between devices in its last bit.

    ``x = k ln 2 + r`` with ``|r| <= ln 2 / 2``, then 14 terms of the series of ``e^r``.
    """
    x = x.clamp(min=-708.0, max=709.0)
    k = torch.round(x * math.log2(math.e))
    r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    result = torch.full_like(x, 1.0 / math.factorial(14))
    for i in range(13, -1, -1):
        result = result * r
        result = result + 1.0 / math.factorial(i)
    power = ((k.to(torch.int64) + 1023) << 52).view(torch.float64)
    return result * power


def _erf(x: Tensor) -> Tensor:
    """``erf(x)`` by its series of positive terms, ``2/sqrt(pi) e^-x^2 sum 2^n x^(2n+1)/(2n+1)!!``.

    Abramowitz and Stegun, 7.1.6. From ``|x| = 6`` on it is 1 in float64.
    """
    z = x.clamp(min=-6.0, max=6.0)
    square = z * z
    term, total = z, z
    for n in range(1, 180):
        term = term * square
        term = term * (2.0 / (2 * n + 1))
        total = total + term
    return _exp(-square) * (2 / math.sqrt(math.pi)) * total


def _sigmoid(x: Tensor) -> Tensor:
    small = _exp(-x.abs())
    return torch.where(x >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


def _tanh(x: Tensor) -> Tensor:
    small = _exp(-2.0 * x.abs())
    size = (1.0 - small) / (1.0 + small)
    return torch.where(x >= 0, size, -size)


def _relu(x: Tensor) -> Tensor:
    return x.clamp(min=0.0)


def _leaky_relu(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * LEAKY_SLOPE)


def _identity(x: Tensor) -> Tensor:
    return x


_IN_ORDER: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: _relu,
    Activation.GELU: lambda x: x * (0.5 * (1.0 + _erf(x * math.sqrt(0.5)))),
    Activation.SILU: lambda x: x * _sigmoid(x),
    Activation.TANH: _tanh,
    Activation.SIGMOID: _sigmoid,
    Activation.LEAKY_RELU: _leaky_relu,
    Activation.ELU: lambda x: torch.where(x > 0, x, _exp(x.clamp(max=0.0)) - 1.0),
    Activation.IDENTITY: _identity,
}

_FAST: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: _relu,
    Activation.GELU: functional.gelu,
    Activation.SILU: functional.silu,
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
    Activation.LEAKY_RELU: _leaky_relu,
    Activation.ELU: functional.elu,
    Activation.IDENTITY: _identity,
}

_EXACT = {Activation.RELU, Activation.IDENTITY}
"""Activations that round nothing."""

# max |f'|; that of gelu is 1.1290 (at sqrt 2), that of silu 1.0999 (at 2.3994).
_LIPSCHITZ: dict[Activation, float] = {
    Activation.RELU: 1.0,
    Activation.GELU: 1.13,
    Activation.SILU: 1.1,
    Activation.TANH: 1.0,
    Activation.SIGMOID: 0.25,
    Activation.LEAKY_RELU: 1.0,
    Activation.ELU: 1.0,
    Activation.IDENTITY: 1.0,
}
