"""What fixes a model apart from its weights: a small, frozen description of its shape."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

BATCH_NORM_EPS = 1e-5
"""Added to the running variance: the default of `torch.nn.BatchNorm1d`."""

NORM_EPS = 1e-12
"""The least length by which a row is divided: the default of `torch.nn.functional.normalize`."""


class ModelKind(StrEnum):
    """How a model was trained. The arithmetic of inference follows from the rest of its spec."""

    RQ_KMEANS = "rq-kmeans"
    R_VQ = "r-vq"
    RQ_VAE = "rq-vae"


class Activation(StrEnum):
    """Activation between the linear maps of an MLP. It leaves no trace in a state dict."""

    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    TANH = "tanh"
    SIGMOID = "sigmoid"
    LEAKY_RELU = "leaky_relu"
    ELU = "elu"
    IDENTITY = "identity"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Everything about a `ResidualQuantization` that its weights do not say.

    Attributes
    ----------
    kind : ModelKind
        How it was trained.
    input_dim : int
        ``D``, numbers in an embedding.
    codebook_widths : tuple of int
        ``K_l``, centroids of each layer, the first layer first.
    embedding_dim : int
        ``E``, numbers in a centroid; equal to ``input_dim`` unless there is an encoder.
    normalize_residuals : bool
        Whether every residual, the first included, is brought to length 1 before its layer.
    encoder_hidden_dims, decoder_hidden_dims : tuple of int or None
        Widths between input and output of each MLP; None where there is no such network.
    activation : Activation
        Between the linear maps of both MLPs.
    batch_norm : bool
        Whether a `BatchNorm1d` with running statistics comes first.
    batch_norm_eps : float
        Added to its running variance.
    normalize_input : bool
        Whether rows are brought to length 1 before the encoder (after the batch norm).
    """

    kind: ModelKind
    input_dim: int
    codebook_widths: tuple[int, ...]
    embedding_dim: int
    normalize_residuals: bool
    encoder_hidden_dims: tuple[int, ...] | None = None
    decoder_hidden_dims: tuple[int, ...] | None = None
    activation: Activation = Activation.RELU
    batch_norm: bool = False
    batch_norm_eps: float = BATCH_NORM_EPS
    normalize_input: bool = False

    def __post_init__(self) -> None:
        """Refuse a spec that no model can have; the message names the field and both values."""
        if not self.codebook_widths:
            raise ValueError("codebook_widths is empty: a model has at least one layer")
        for layer, width in enumerate(self.codebook_widths):
            if width < 1:
                raise ValueError(f"codebook_widths[{layer}] is {width}; expected at least 1")
        for name in ("input_dim", "embedding_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.encoder_hidden_dims is None and self.embedding_dim != self.input_dim:
            raise ValueError(
                f"embedding_dim is {self.embedding_dim} and input_dim {self.input_dim}; "
                "without an encoder they must be equal"
            )
        if self.decoder_hidden_dims is None and self.encoder_hidden_dims is not None:
            raise ValueError("a model with an encoder needs decoder_hidden_dims too")

    @property
    def n_layers(self) -> int:
        """``L``, the number of codes in a semantic ID."""
        return len(self.codebook_widths)

    @property
    def has_network(self) -> bool:
        """Whether rows are changed before the first layer gets them."""
        return self.encoder_hidden_dims is not None or self.batch_norm or self.normalize_input

    @property
    def code_bits(self) -> int:
        """Bits of the smallest unsigned type that holds every code: 8, 16 or 32."""
        largest = max(self.codebook_widths) - 1
        return 8 if largest < 1 << 8 else 16 if largest < 1 << 16 else 32
