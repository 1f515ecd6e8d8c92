"""What passes between servicer, batcher and backend: plain data, without gRPC and torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from semid_server.serving.shared_memory import SharedRows

EmbeddingType = Literal["float32", "float16", "bfloat16", "float64"]
DecodeModeName = Literal["sum", "calibrated"]

Payload: TypeAlias = npt.NDArray[Any] | SharedRows
"""Rows of a request, (n, m): here, or where the caller shares them."""

HOST_TYPES: dict[EmbeddingType, np.dtype[np.generic]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    # numpy has no bfloat16: its bits travel as they are.
    "bfloat16": np.dtype("<u2"),
    "float64": np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedModel:
    """One version of a model: what the wire side needs to know of it, and what runs it.

    Each is equal to itself alone: after a reload, requests of the old version and of the new one
    never share a batch. A version lives as long as anything refers to it.

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
    calibration : str
        Fingerprint of the norms that calibrated decoding works with; empty if there are none.
    backend : object
        What runs its batches: the device thread's business alone.
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
    calibration: str = ""
    backend: Any = field(default=None, repr=False)


# Tuples: every request makes a key and looks it up, which Python does for tuples by itself.


class EncodeKey(NamedTuple):
    """Encode requests share a batch when they ask one model and their numbers are of one type."""

    model: ServedModel
    dtype: EmbeddingType
    operation: Literal["encode"] = "encode"


class DecodeKey(NamedTuple):
    """Decode requests share a batch when model, codes a row and mode are the same."""

    model: ServedModel
    depth: int
    mode: DecodeModeName
    operation: Literal["decode"] = "decode"


WorkKey = EncodeKey | DecodeKey
