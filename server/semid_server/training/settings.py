"""What a training run is told to do: frozen, built once by the command, passed whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from semid_server.errors import ConfigurationError
from semid_server.model import (
    MLP,
    Activation,
    BetaQuantizationLoss,
    L2Normalize,
    MiniBatchKMeans,
    MiniBatchKMeansInitializer,
    ModelKind,
    ModelSpec,
    ResidualQuantization,
    VectorQuantization,
)

if TYPE_CHECKING:
    from semid_server.model.layers import QuantizationLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """Every setting of `semid train`; its help says what each does and when to change it."""

    kind: ModelKind = ModelKind.RQ_KMEANS
    layers: int = 3
    codebook_width: int = 256
    normalize_residuals: bool = True
    batch_size: int = 2048
    init_buffer_size: int = 3072
    steps: int = 30
    learning_rate: float = 0.001
    hidden_dims: tuple[int, ...] = (768, 256, 128)
    embedding_dim: int = 64
    activation: Activation = Activation.RELU
    dropout: float = 0.0
    reconstruction_weight: float = 1.0
    beta: float = 0.25
    distinct: bool = False
    refine: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        """Refuse settings that cannot work together; the message names both."""
        for name in (
            "layers",
            "codebook_width",
            "batch_size",
            "init_buffer_size",
            "steps",
            "embedding_dim",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.init_buffer_size < self.codebook_width:
            raise ConfigurationError(
                f"init_buffer_size is {self.init_buffer_size} and codebook_width "
                f"{self.codebook_width}: the buffer must hold a row for each centroid"
            )
        if self.distinct and self.kind is not ModelKind.RQ_KMEANS:
            raise ConfigurationError(f"distinct is for {ModelKind.RQ_KMEANS}; kind is {self.kind}")
        if self.refine and self.kind is ModelKind.RQ_VAE:
            raise ConfigurationError(
                f"refine is {self.refine}, but kind is {self.kind}: its codebooks were trained "
                "with its networks, and moving them alone would part them"
            )

    def spec(self, input_dim: int) -> ModelSpec:
        """Shape of the model for embeddings of ``input_dim`` numbers."""
        widths = (self.codebook_width,) * self.layers
        if self.kind is not ModelKind.RQ_VAE:
            return ModelSpec(
                kind=self.kind,
                input_dim=input_dim,
                codebook_widths=widths,
                embedding_dim=input_dim,
                normalize_residuals=self.normalize_residuals,
            )
        return ModelSpec(
            kind=self.kind,
            input_dim=input_dim,
            codebook_widths=widths,
            embedding_dim=self.embedding_dim,
            normalize_residuals=False,
            encoder_hidden_dims=self.hidden_dims,
            decoder_hidden_dims=self.hidden_dims[::-1],
            activation=self.activation,
            batch_norm=True,
            normalize_input=True,
        )

    def build(self, input_dim: int) -> ResidualQuantization:
        """Build the model in training, its networks drawn from torch's default generator.

        Its state dict is that of ``build_model(self.spec(input_dim))``.
        """
        common: dict[str, Any] = {
            "n_layers": self.layers,
            "init_buffer_size": self.init_buffer_size,
        }
        if self.kind is not ModelKind.RQ_VAE:
            return ResidualQuantization(
                quantization_layer=self._layer(input_dim),
                normalize_residuals=self.normalize_residuals,
                **common,
            )
        mlp = partial(MLP, activation=self.activation, dropout=self.dropout)
        return ResidualQuantization(
            quantization_layer=self._layer(self.embedding_dim),
            normalize_residuals=False,
            train_layer_wise=False,
            normalization_layer=nn.Sequential(nn.BatchNorm1d(input_dim), L2Normalize()),
            encoder=mlp(input_dim, self.embedding_dim, self.hidden_dims),
            decoder=mlp(self.embedding_dim, input_dim, self.hidden_dims[::-1]),
            reconstruction_loss_function=nn.MSELoss(),
            reconstruction_loss_weight=self.reconstruction_weight,
            **common,
        )

    def _layer(self, dim: int) -> QuantizationLayer:
        if self.kind is ModelKind.RQ_KMEANS:
            return MiniBatchKMeans(self.codebook_width, dim)
        adagrad = partial(torch.optim.Adagrad, lr=self.learning_rate)
        if self.kind is ModelKind.R_VQ:
            loss = BetaQuantizationLoss(self.beta, "sum")
            return VectorQuantization(
                self.codebook_width, dim, loss_function=loss, optimizer=adagrad
            )
        return VectorQuantization(
            self.codebook_width,
            dim,
            initializer=MiniBatchKMeansInitializer(),
            loss_function=BetaQuantizationLoss(self.beta, "mean"),
            optimizer=adagrad,
        )
