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
from semid_server.model.layers import DEFAULT_INIT_BUFFER_SIZE
from semid_server.model.spec import NORM_EPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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


class TrainingStep(NamedTuple):
    """What one batch gave in training.

    Attributes
    ----------
    loss : Tensor
        The scalar to step on. It has no gradient where nothing is to be stepped on.
    codes : Tensor
        int64 ``(n, L)``, under the centroids as they were before the step.
    quantized : Tensor
        ``(n, E)``, the sum of the embeddings that the layers returned.
    quantization_loss : Tensor
        The layers' losses, summed, without their weight.
    reconstruction_loss : Tensor or None
        Without its weight; None while there is none.
    metrics : dict of str to float
        What `verbose` asks for; empty without it.
    """

    loss: Tensor
    codes: Tensor
    quantized: Tensor
    quantization_loss: Tensor
    reconstruction_loss: Tensor | None
    metrics: dict[str, float]


class LayerOutputs(NamedTuple):
    """A batch's way through the layers; ``residuals`` are kept with `track_residuals` only."""

    codes: Tensor
    quantized: Tensor
    losses: list[Tensor]
    residuals: list[Tensor]


class ResidualQuantization(nn.Module):
    """``L`` codebooks, each of the residual that the one before left.

    ::

        r = encoder(normalization_layer(x))
        for l in 0..L-1:
            if normalize_residuals: r = r / max(||r||, 1e-12)
            k_l = argmin_j ||r - C_l[j]||^2
            r = r - C_l[k_l]

    Trained layer by layer, only `current_layer` learns from a batch. Trained together, the layers
    are initialised one after the other (each buffers residuals of initialised layers only), each
    learns from the batch after its initial step, and then waits until all have.

    Parameters
    ----------
    n_layers : int
        ``L``.
    quantization_layer : QuantizationLayer or sequence of them
        Each layer is a deep copy of the one given; a sequence of ``n_layers`` is used as it is.
    init_buffer_size : int
        Rows that each layer buffers before its centroids are drawn. It may be given here or to
        the layer; where both are given they must agree.
    quantization_loss_weight, reconstruction_loss_weight : float
        ``loss = quantization_loss_weight * sum_l loss_l + reconstruction_loss_weight * rec``.
    normalize_residuals : bool
        Bring every residual, the first included, to length 1 before its layer.
    train_layer_wise : bool
        Train one layer after the other, or all together.
    track_residuals : bool
        Keep the residuals of a training step for its metrics.
    verbose : bool
        Report metrics with every training step.
    reconstruction_loss_function : nn.Module, optional
        Of the decoder's output and the normalised input, once the last layer is initialised.
    normalization_layer, encoder, decoder : nn.Module, optional
        Around the quantiser; the identity if None.
    optimizer : callable, optional
        Makes the optimizer of counted steps from the parameters; None is the first layer's.
    scheduler : callable, optional
        Makes a learning-rate scheduler from that optimizer; it steps with every counted step.

    Raises
    ------
    ValueError
        If a sequence of layers does not have ``n_layers`` of them, or sizes of buffers disagree.
    """

    def __init__(  # noqa: PLR0917 - the published signature
        self,
        n_layers: int,
        quantization_layer: QuantizationLayer | Sequence[QuantizationLayer],
        init_buffer_size: int = DEFAULT_INIT_BUFFER_SIZE,
        quantization_loss_weight: float = 1.0,
        reconstruction_loss_weight: float = 0.0,
        normalize_residuals: bool = True,  # noqa: FBT001, FBT002
        train_layer_wise: bool = True,  # noqa: FBT001, FBT002
        track_residuals: bool = True,  # noqa: FBT001, FBT002
        verbose: bool = True,  # noqa: FBT001, FBT002
        *,
        reconstruction_loss_function: nn.Module | None = None,
        normalization_layer: nn.Module | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(quantization_layer, nn.Module):
            layers = [copy.deepcopy(quantization_layer) for _ in range(n_layers)]
        else:
            layers = list(quantization_layer)
        if len(layers) != n_layers:
            raise ValueError(f"n_layers is {n_layers}, but {len(layers)} layers were given")
        for layer in layers:
            layer.init_buffer_size = _agreed(init_buffer_size, layer.init_buffer_size)
        self.n_layers = n_layers
        self.quantization_loss_weight = quantization_loss_weight
        self.reconstruction_loss_weight = reconstruction_loss_weight
        self.normalize_residuals = normalize_residuals
        self.train_layer_wise = train_layer_wise
        self.track_residuals = track_residuals
        self.verbose = verbose
        self.reconstruction_loss_function = reconstruction_loss_function
        self.normalization_layer = normalization_layer or nn.Identity()
        self.encoder = encoder or nn.Identity()
        self.decoder = decoder or nn.Identity()
        self.quantization_layer_list: nn.ModuleList = nn.ModuleList(layers)
        self.optimizer = optimizer or layers[0].optimizer
        self.scheduler = scheduler
        # With a reconstruction loss one stage comes before the first layer's.
        leading_stage = train_layer_wise and reconstruction_loss_function is not None
        self.current_layer = -1 if leading_stage else 0

    @property
    def layers(self) -> list[QuantizationLayer]:
        """The quantization layers, the first first."""
        return list(self.quantization_layer_list)  # type: ignore[arg-type] # ModuleList forgets

    def features(self, x: Tensor) -> Tensor:
        """Rows ``(n, E)`` that the first layer gets of embeddings ``x`` (n, D)."""
        features: Tensor = self.encoder(self.normalization_layer(x))
        return features

    @property
    def layers_initialized(self) -> list[bool]:
        """Whether training has drawn the first centroids of each layer."""
        return [layer.is_initialized for layer in self.layers]

    @property
    def takes_initial_step(self) -> bool:
        """Whether the next training step initialises: a step of plain SGD, which is not counted."""
        if self.train_layer_wise:
            return self.current_layer >= 0 and not self.layers[self.current_layer].is_initialized
        return not all(self.layers_initialized)

    def advance(self, counted_steps: int, max_steps: int) -> None:
        """Go to the next layer if its turn has come after ``counted_steps`` of ``max_steps``."""
        stages = self.n_layers + (self.reconstruction_loss_function is not None)
        steps_per_layer = max(max_steps // stages, 1)
        if (
            self.train_layer_wise
            and counted_steps % steps_per_layer == 0
            and not self.takes_initial_step
            and self.current_layer < self.n_layers - 1
        ):
            self.current_layer += 1

    def model_step(self, batch: Tensor) -> TrainingStep:
        """Take embeddings ``batch`` (n, D) through the model in training, and give the loss.

        The caller takes the optimizer's step: that of `DEFAULT_OPTIMIZER` where
        `takes_initial_step` said so beforehand, else that of `optimizer`.
        """
        reconstructs = (
            self.reconstruction_loss_function is not None and self.layers[-1].is_initialized
        )
        normalized = self.normalization_layer(batch)
        features = self.encoder(normalized)
        passed = self(features)
        quantization_loss = torch.stack([batch.new_zeros(()), *passed.losses]).sum()
        loss = self.quantization_loss_weight * quantization_loss
        reconstruction_loss = None
        if self.reconstruction_loss_function is not None and reconstructs:
            reconstruction_loss = self.reconstruction_loss_function(
                self.decoder(passed.quantized), normalized
            )
            loss = loss + self.reconstruction_loss_weight * reconstruction_loss
        metrics = {}
        if self.verbose:
            metrics = {"loss": loss.item(), **self._metrics(features, passed)}
        return TrainingStep(
            loss,
            passed.codes,
            passed.quantized,
            quantization_loss,
            reconstruction_loss,
            metrics,
        )

    def forward(self, features: Tensor) -> LayerOutputs:
        """Take rows ``features`` (n, E) through the layers; those whose turn it is learn."""
        all_have_trained = all(layer.has_trained for layer in self.layers)
        residual = features
        residuals = [residual]
        quantized = torch.zeros_like(residual)
        codes, losses = [], []
        initialized_so_far = True
        for index, layer in enumerate(self.layers):
            if self.train_layer_wise:
                learns = index == self.current_layer
            else:
                waits = layer.has_trained and not all_have_trained
                learns = initialized_so_far and not waits
            if self.normalize_residuals:
                residual = normalize(residual, dim=-1, eps=NORM_EPS)
            if learns:
                code, embedding, loss = layer.model_step(residual)
                if loss is not None:
                    losses.append(loss)
            else:
                code, embedding = layer.predict_step(residual)
            initialized_so_far = initialized_so_far and layer.is_initialized
            codes.append(code)
            quantized = quantized + embedding
            residual = residual - embedding
            residuals.append(residual)
        return LayerOutputs(
            torch.stack(codes, dim=1), quantized, losses, residuals if self.track_residuals else []
        )

    @torch.no_grad()
    def _metrics(self, features: Tensor, passed: LayerOutputs) -> dict[str, float]:
        codes = passed.codes
        metrics = {"distinct_ids": len(torch.unique(codes, dim=0)) / len(codes)}
        for index, layer in enumerate(self.layers):
            share = torch.bincount(codes[:, index], minlength=layer.n_clusters) / len(codes)
            metrics[f"coverage_{index}"] = (share > 0).float().mean().item()
            metrics[f"entropy_{index}"] = torch.special.entr(share).sum().item()
        if passed.residuals:
            # Before it is normalised, the residual that a layer leaves.
            length = features.norm(dim=1).clamp_min(NORM_EPS)
            for name, residual in (
                ("first", passed.residuals[1]),
                ("last", passed.residuals[-1]),
            ):
                ratio = residual.norm(dim=1) / length
                metrics[f"{name}_residual_norm_ratio"] = ratio.mean().item()
            metrics["residual_mse"] = passed.residuals[-1].square().mean().item()
        return metrics

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


def _agreed(of_model: int, of_layer: int) -> int:
    """The size of buffer that was asked for; a default asks for nothing."""
    asked = {of_model, of_layer} - {DEFAULT_INIT_BUFFER_SIZE}
    if len(asked) > 1:
        raise ValueError(
            f"init_buffer_size is {of_model} for the model and {of_layer} for its layer; "
            "give it to one of them"
        )
    return asked.pop() if asked else DEFAULT_INIT_BUFFER_SIZE


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
