"""The client of semid: embeddings in, semantic IDs out, and back; numpy arrays both ways.

>>> from semid_client import Client
>>> with Client("localhost:50051") as client:
...     codes = client.encode(embeddings)   # (n, D) -> (n, L)
...     vectors = client.decode(codes)      # (n, L) -> (n, D)

Everything public is here; modules whose names begin with an underscore may change.
"""

from semid_client._async_client import AsyncClient
from semid_client._channel import TLS
from semid_client._client import Client
from semid_client._errors import (
    AuthenticationError,
    CallError,
    CancelledError,
    ClientClosedError,
    ConfigurationError,
    DeadlineExceededError,
    FailedPreconditionError,
    FingerprintMismatchError,
    InvalidArgumentError,
    InvalidInputError,
    NotFoundError,
    ProtocolError,
    ResourceExhaustedError,
    SemidClientError,
    ServerError,
    UnavailableError,
    UnimplementedError,
)
from semid_client._fingerprints import FingerprintChangedWarning
from semid_client._model import Layer, Limits, ModelInfo, SharedMemoryLimits
from semid_client._transfer import RowSource

__all__ = [
    "TLS",
    "AsyncClient",
    "AuthenticationError",
    "CallError",
    "CancelledError",
    "Client",
    "ClientClosedError",
    "ConfigurationError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "FingerprintChangedWarning",
    "FingerprintMismatchError",
    "InvalidArgumentError",
    "InvalidInputError",
    "Layer",
    "Limits",
    "ModelInfo",
    "NotFoundError",
    "ProtocolError",
    "ResourceExhaustedError",
    "RowSource",
    "SemidClientError",
    "ServerError",
    "SharedMemoryLimits",
    "UnavailableError",
    "UnimplementedError",
]
