"""What passes between servicer, batcher and backend: plain data, without gRPC and torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

EmbeddingType = Literal["float32", "float16", "bfloat16", "float64"]
DecodeModeName = Literal["sum", "calibrated"]

HOST_TYPES: dict[EmbeddingType, np.dtype[np.generic]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    # numpy has no bfloat16: its bits travel as they are.
    "bfloat16": np.dtype("<u2"),
    "float64": np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class EncodeKey:
    """Encode requests share a batch when their numbers are of one type."""

    dtype: EmbeddingType
    operation: Literal["encode"] = "encode"


@dataclass(frozen=True, slots=True)
class DecodeKey:
    """Decode requests share a batch when they have as many codes a row and one mode."""

    depth: int
    mode: DecodeModeName
    operation: Literal["decode"] = "decode"


WorkKey = EncodeKey | DecodeKey


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What the wire side needs to know of the model.

    Attributes
    ----------
    name, fingerprint, kind : str
        As the contract shows them; ``kind`` is a value of `semid_server.model.ModelKind`.
    input_dim, embedding_dim : int
        ``D`` and ``E``.
    codebook_widths : tuple of int
        ``K_l`` of each layer.
    normalize_residuals : bool
        Whether residuals are brought to length 1.
    decode_modes : tuple of str
        The modes that can be asked for.
    code_dtype : numpy.dtype
        Of the codes: the smallest unsigned type that holds them.
    device : str
        Where it runs.
    """

    name: str
    fingerprint: str
    kind: str
    input_dim: int
    embedding_dim: int
    codebook_widths: tuple[int, ...]
    normalize_residuals: bool
    decode_modes: tuple[DecodeModeName, ...]
    code_dtype: np.dtype[np.unsignedinteger]
    device: str
