"""Residual quantisation: a row becomes one code a layer, each of what the layers before left."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import normalize

from semid_server.errors import InvalidInputError, UnsupportedDecodeModeError
from semid_server.model.decoding import DecodeMode
from semid_server.model.spec import NORM_EPS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from semid_server.model.decoding import Calibration
    from semid_server.model.layers import QuantizationLayer


class Quantized(NamedTuple):
    """Rows after quantisation.

    Attributes
    ----------
    codes : Tensor
        int64 ``(n, L)``, the semantic IDs.
    quantized : Tensor
        ``(n, E)``, the sum of the centroids that the codes name.
    reconstruction : Tensor
        ``(n, D)``, that sum through the decoder.
    """

    codes: Tensor
    quantized: Tensor
    reconstruction: Tensor


class ResidualQuantization(nn.Module):
    """``L`` codebooks, each of the residual that the one before left.

    ::

        r = encoder(normalization_layer(x))
        for l in 0..L-1:
            if normalize_residuals: r = r / max(||r||, 1e-12)
            k_l = argmin_j ||r - C_l[j]||^2
            r = r - C_l[k_l]

    Parameters
    ----------
    n_layers : int
        ``L``.
    quantization_layer : QuantizationLayer or sequence of them
        Each layer is a deep copy of the one given; a sequence of ``n_layers`` is used as it is.
    normalize_residuals : bool
        Bring every residual, the first included, to length 1 before its layer.
    normalization_layer, encoder, decoder : nn.Module, optional
        Around the quantiser; the identity if None.

    Raises
    ------
    ValueError
        If a sequence of layers does not have ``n_layers`` of them.
    """

    def __init__(
        self,
        n_layers: int,
        quantization_layer: QuantizationLayer | Sequence[QuantizationLayer],
        *,
        normalize_residuals: bool = True,
        normalization_layer: nn.Module | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if isinstance(quantization_layer, nn.Module):
            layers = [copy.deepcopy(quantization_layer) for _ in range(n_layers)]
        else:
            layers = list(quantization_layer)
        if len(layers) != n_layers:
            raise ValueError(f"n_layers is {n_layers}, but {len(layers)} layers were given")
        self.n_layers = n_layers
        self.normalize_residuals = normalize_residuals
        self.normalization_layer = normalization_layer or nn.Identity()
        self.encoder = encoder or nn.Identity()
        self.decoder = decoder or nn.Identity()
        self.quantization_layer_list: nn.ModuleList = nn.ModuleList(layers)

    @property
    def layers(self) -> list[QuantizationLayer]:
        """The quantization layers, the first first."""
        return list(self.quantization_layer_list)  # type: ignore[arg-type] # ModuleList forgets

    def features(self, x: Tensor) -> Tensor:
        """Rows ``(n, E)`` that the first layer gets of embeddings ``x`` (n, D)."""
        features: Tensor = self.encoder(self.normalization_layer(x))
        return features

    def predict_step(self, x: Tensor) -> Quantized:
        """Quantise embeddings ``x`` (n, D) in the model's own precision.

        Changes nothing, in a model that is being trained and in a fresh one too: batch norm
        uses its running statistics, dropout does nothing.
        """
        with torch.inference_mode(), _evaluating(self):
            residual = self.features(x)
            codes = []
            quantized = torch.zeros_like(residual)
            for layer in self.layers:
                if self.normalize_residuals:
                    residual = normalize(residual, dim=-1, eps=NORM_EPS)
                code, embedding = layer.predict_step(residual)
                codes.append(code)
                quantized = quantized + embedding
                residual = residual - embedding
            return Quantized(torch.stack(codes, dim=1), quantized, self.decoder(quantized))

    def decode(
        self,
        codes: Tensor,
        *,
        mode: DecodeMode = DecodeMode.SUM,
        calibration: Calibration | None = None,
    ) -> Tensor:
        """Embeddings float32 ``(n, D)`` of codes ``(n, l)``, the first ``1 <= l <= L`` of each row.

        ``SUM`` adds the centroids in the order of the layers. ``CALIBRATED`` puts back the lengths
        that ``normalize_residuals`` divided out, ``m (c_0 + s_0 (c_1 + s_1 (c_2 ...)))``, with the
        means of `Calibration`; without ``normalize_residuals`` nothing was divided out, and it is
        the same as ``SUM``. A decoder runs in float64 and its output is rounded once, so
        that the order of its sums, which varies with the batch, does not show.

        Raises
        ------
        InvalidInputError
            If ``codes`` is not of such a shape, or a code is not in its codebook.
        UnsupportedDecodeModeError
            If ``CALIBRATED`` needs a calibration and there is none.
        """
        self._check_codes(codes)
        with torch.inference_mode():
            columns = codes.long().unbind(dim=1)
            chosen = [
                layer.centroids[column] for layer, column in zip(self.layers, columns, strict=False)
            ]
            if mode is DecodeMode.SUM or not self.normalize_residuals:
                quantized = sum(chosen[1:], start=chosen[0])
            elif calibration is None:
                raise UnsupportedDecodeModeError(
                    "decode mode CALIBRATED needs the lengths that residual normalisation divides "
                    "out, and this checkpoint records none: run `semid calibrate` on it with "
                    "the embeddings that it was trained on, or decode with mode SUM"
                )
            else:
                quantized = _calibrated(chosen, columns, calibration)
            return self._decoder_in_float64(quantized).float()

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dim() != 2 or not 1 <= codes.shape[1] <= self.n_layers:  # noqa: PLR2004 - a matrix
            raise InvalidInputError.at(
                "codes",
                f"shape {tuple(codes.shape)}; expected (n, l) with 1 <= l <= {self.n_layers}",
            )
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise InvalidInputError.at("codes", f"dtype {codes.dtype}; expected integers")
        values = codes.long()  # torch does not compare its wider unsigned types
        widths = torch.tensor([layer.n_clusters for layer in self.layers], device=codes.device)
        outside = (values < 0) | (values >= widths[: codes.shape[1]])
        if outside.any():
            row, layer = outside.nonzero()[0].tolist()
            raise InvalidInputError.at(
                f"codes[{row}, {layer}]",
                f"{values[row, layer].item()}; expected 0 to {widths[layer].item() - 1}",
            )

    def _decoder_in_float64(self, quantized: Tensor) -> Tensor:
        if isinstance(self.decoder, nn.Identity):
            return quantized
        state = {
            name: value.double() if value.is_floating_point() else value
            for name, value in self.decoder.state_dict().items()
        }
        with _evaluating(self.decoder):
            output: Tensor = functional_call(self.decoder, state, quantized.double())
        return output


def _calibrated(
    chosen: Sequence[Tensor], codes: Sequence[Tensor], calibration: Calibration
) -> Tensor:
    """``m (c_0 + s_0 (c_1 + s_1 (c_2 ...)))``, from the innermost bracket outwards."""
    result = chosen[-1]
    inner = zip(chosen[:-1], codes[:-1], calibration.residual_norms, strict=False)
    for centroids, code, norms in reversed(list(inner)):
        result = centroids + norms.to(result)[code, None] * result
    return calibration.input_norm * result


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` into evaluation mode for a while; each part gets its own mode back."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
