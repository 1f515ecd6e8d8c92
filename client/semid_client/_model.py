"""What a server tells of a model, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from semid.v1 import semid_pb2 as pb
from semid_client._errors import ProtocolError
from semid_client._tensor import CODE_TYPES

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a model.

    Attributes
    ----------
    codebook_width : int
        Centroids; codes of this layer run from 0 to ``codebook_width - 1``.
    embedding_dim : int
        Numbers in a centroid.
    """

    codebook_width: int
    embedding_dim: int


@dataclass(frozen=True, slots=True)
class SharedMemoryLimits:
    """How much memory the server lets one connection share with it.

    Attributes
    ----------
    max_bytes, max_segments : int
        Bytes, and pieces.
    max_rows, max_request_bytes : int
        Rows, and bytes of embeddings, of one request.
    """

    max_bytes: int
    max_segments: int
    max_rows: int
    max_request_bytes: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server accepts in one message. The client splits larger work by itself.

    Attributes
    ----------
    max_message_bytes : int
        Bytes of one message, in either direction.
    max_rows : int
        Rows of one request.
    shared_memory : SharedMemoryLimits or None
        Of memory shared by callers on its machine; None if it takes none.
    """

    max_message_bytes: int
    max_rows: int
    shared_memory: SharedMemoryLimits | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One served model.

    Attributes
    ----------
    name : str
        The name by which requests ask for it.
    fingerprint : str
        SHA-256, in hexadecimal, of its codebooks and of all that changes their meaning. Store
        it with the codes: codes of different fingerprints must never be mixed.
    kind : str
        ``"rq-kmeans"``, ``"r-vq"`` or ``"rq-vae"``.
    input_dim : int
        ``D``, numbers in an embedding.
    layers : tuple of Layer
        In the order of the codes.
    normalize_residuals : bool
        Whether residuals are brought to length 1 before every layer.
    code_dtype : numpy.dtype
        Type of the codes that `Client.encode` returns.
    decode_modes : tuple of str
        The modes that `Client.decode` accepts for this model.
    limits : Limits
        What this server accepts in one message.
    calibration : str
        SHA-256, in hexadecimal, of the recorded norms that mode ``"calibrated"`` works with; empty
        if there are none. Vectors decoded with different ones must not be mixed either.
    """

    name: str
    fingerprint: str
    kind: str
    input_dim: int
    layers: tuple[Layer, ...]
    normalize_residuals: bool
    code_dtype: np.dtype[Any]
    decode_modes: tuple[str, ...]
    limits: Limits
    calibration: str = ""

    @property
    def n_layers(self) -> int:
        """``L``, the number of codes in a semantic ID."""
        return len(self.layers)

    @classmethod
    def from_message(cls, message: pb.Model) -> ModelInfo:
        """Read the message; a `ProtocolError` names a field that cannot be right."""
        for name, value in (
            ("input_dim", message.input_dim),
            ("layers", len(message.layers)),
            ("limits.max_message_bytes", message.limits.max_message_bytes),
            ("limits.max_rows", message.limits.max_rows),
        ):
            if value < 1:
                raise ProtocolError(f"the server describes a model with {name} = {value}")
        if not message.fingerprint:
            raise ProtocolError("the server describes a model without a fingerprint")
        if message.code_dtype not in CODE_TYPES:
            raise ProtocolError(
                f"the server describes a model with code_dtype {message.code_dtype}, "
                "which is no unsigned integer type"
            )
        return cls(
            name=message.name,
            fingerprint=message.fingerprint,
            kind=_enum_name(pb.ModelKind, "MODEL_KIND_", message.kind),
            input_dim=message.input_dim,
            layers=tuple(Layer(x.codebook_width, x.embedding_dim) for x in message.layers),
            normalize_residuals=message.normalize_residuals,
            code_dtype=CODE_TYPES[message.code_dtype].newbyteorder("="),
            decode_modes=tuple(
                _enum_name(pb.DecodeMode, "DECODE_MODE_", mode) for mode in message.decode_modes
            ),
            limits=Limits(
                message.limits.max_message_bytes,
                message.limits.max_rows,
                _shared_memory(message.limits),
            ),
            calibration=message.calibration,
        )


def _shared_memory(limits: pb.Limits) -> SharedMemoryLimits | None:
    if not limits.HasField("shared_memory"):
        return None
    shared = limits.shared_memory
    for name, value in (
        ("max_rows", shared.max_rows),
        ("max_request_bytes", shared.max_request_bytes),
    ):
        if value < 1:
            raise ProtocolError(f"the server describes limits with shared_memory.{name} = {value}")
    return SharedMemoryLimits(
        shared.max_bytes, shared.max_segments, shared.max_rows, shared.max_request_bytes
    )


def _enum_name(enum: Any, prefix: str, value: int) -> str:
    """``MODEL_KIND_RQ_KMEANS`` as ``rq-kmeans``; a newer server's value as its number."""
    if value not in enum.values():
        return f"unknown-{value}"
    name: str = enum.Name(value)
    return name.removeprefix(prefix).lower().replace("_", "-")
