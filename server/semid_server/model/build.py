"""From a spec to a model of that shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from semid_server.model.layers import MiniBatchKMeans, VectorQuantization
from semid_server.model.networks import MLP, L2Normalize
from semid_server.model.residual_quantization import ResidualQuantization
from semid_server.model.spec import ModelKind

if TYPE_CHECKING:
    from semid_server.model.spec import ModelSpec


def build_model(spec: ModelSpec) -> ResidualQuantization:
    """Build the model that ``spec`` describes: untrained, float32, in evaluation mode.

    Its centroids are zero. Its state dict has the keys of the original's checkpoints.
    """
    layer_type = MiniBatchKMeans if spec.kind is ModelKind.RQ_KMEANS else VectorQuantization
    model = ResidualQuantization(
        spec.n_layers,
        [layer_type(width, spec.embedding_dim) for width in spec.codebook_widths],
        normalize_residuals=spec.normalize_residuals,
        normalization_layer=_normalization_layer(spec),
        encoder=_mlp(spec.input_dim, spec.embedding_dim, spec.encoder_hidden_dims, spec),
        decoder=_mlp(spec.embedding_dim, spec.input_dim, spec.decoder_hidden_dims, spec),
    )
    return model.eval()


def _normalization_layer(spec: ModelSpec) -> nn.Module | None:
    parts: list[nn.Module] = []
    if spec.batch_norm:
        parts.append(nn.BatchNorm1d(spec.input_dim, eps=spec.batch_norm_eps))
    if spec.normalize_input:
        parts.append(L2Normalize())
    return nn.Sequential(*parts) if parts else None


def _mlp(
    input_dim: int, output_dim: int, hidden_dims: tuple[int, ...] | None, spec: ModelSpec
) -> nn.Module | None:
    if hidden_dims is None:
        return None
    return MLP(input_dim, output_dim, hidden_dims, activation=spec.activation)
