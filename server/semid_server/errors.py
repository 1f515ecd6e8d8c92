"""What can go wrong in semid, in semid's own words.

These errors know no wire: `semid_server.serving.status` holds the one table that maps
them to gRPC status codes, and the commands print their message as it is.

    SemidError
    ├── InvalidInputError          a request that can never succeed as it stands
    ├── FingerprintMismatchError   the caller expects another model
    ├── UnsupportedDecodeModeError the checkpoint lacks what the mode needs
    ├── ModelNotFoundError         no model of that name is served
    ├── SegmentNotFoundError       no memory is shared under that handle, or not any more
    ├── SharedMemoryRefusedError   memory that cannot be shared with this process
    ├── SharedMemoryFullError      more shared memory than there may be
    ├── UnauthenticatedError       no token, or not a known one
    ├── PermissionDeniedError      a known token, but not for this method
    ├── OverloadedError            no room now; come back later
    ├── MessageTooLargeError       more than one message may hold
    ├── DeadlineExpiredError       dropped before it was computed
    ├── NotServingError            loading or draining
    ├── DeviceError                the device failed while it worked
    │   └── DeviceLostError            and will not work again in this process
    ├── ConfigurationError         a setting, flag or file that cannot be used
    └── CheckpointError            a checkpoint that cannot be used
        ├── MalformedCheckpointError   damaged, truncated, or not what it says
        ├── UnsafeCheckpointError      a pickle that would run something
        └── DegenerateModelError       loads, but its codes would mean nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class SemidError(Exception):
    """Base of every error that semid raises on purpose."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One thing wrong with a request: the field's path, and what is wrong there.

    Attributes
    ----------
    field : str
        Path within the request, such as ``embeddings.rows[3]``.
    description : str
        What was found and what was expected, with both values.
    """

    field: str
    description: str


class InvalidInputError(SemidError):
    """A request that can never succeed as it stands; each violation names its place."""

    def __init__(self, message: str, violations: Sequence[FieldViolation] = ()) -> None:
        super().__init__(message)
        self.violations = tuple(violations)

    @classmethod
    def at(cls, field: str, description: str) -> InvalidInputError:
        """Build the error of a single violation, whose message is ``field: description``."""
        return cls(f"{field}: {description}", [FieldViolation(field, description)])


class FingerprintMismatchError(SemidError):
    """The caller expects codes of another model than the one that is served."""

    def __init__(self, *, model: str, expected: str, actual: str) -> None:
        super().__init__(
            f"model {model!r} has fingerprint {actual}, but the request expects {expected}: "
            "its codes belong to another codebook"
        )
        self.model, self.expected, self.actual = model, expected, actual


class UnsupportedDecodeModeError(SemidError):
    """The checkpoint lacks what a decode mode needs."""


class ModelNotFoundError(SemidError):
    """No model of that name is served."""

    def __init__(self, *, name: str, available: Sequence[str]) -> None:
        served = ", ".join(repr(other) for other in available) or "none"
        super().__init__(f"no model named {name!r} is served here; served: {served}")
        self.name, self.available = name, tuple(available)


class SegmentNotFoundError(SemidError):
    """No memory is shared under that handle with this process, or not any more."""


class SharedMemoryRefusedError(SemidError):
    """Memory that cannot be shared: not here, not the caller's, or not at all."""


class SharedMemoryFullError(SemidError):
    """More memory than may be shared."""


class UnauthenticatedError(SemidError):
    """The caller has no token, or none that is known."""


class PermissionDeniedError(SemidError):
    """The caller's token is known, but not good for this method."""


class OverloadedError(SemidError):
    """No room in the queue now. ``retry_after`` is a hint in seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class MessageTooLargeError(SemidError):
    """More rows or bytes than one message may hold; split it by the published limits."""


class DeadlineExpiredError(SemidError):
    """The deadline passed while the request waited, or could no longer be met; it was dropped."""


class NotServingError(SemidError):
    """The server is loading its model or draining; another attempt may succeed elsewhere."""


class DeviceError(SemidError):
    """The device failed while it computed a batch."""


class DeviceLostError(DeviceError):
    """The device failed in a way that this process cannot recover from."""


class ConfigurationError(SemidError):
    """A setting, a flag or a configuration file that cannot be used."""


class CheckpointError(SemidError):
    """A checkpoint that cannot be used. The message begins with its path."""

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem


class MalformedCheckpointError(CheckpointError):
    """Damaged, truncated, of an unknown format, or at odds with its own description."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle that would run something other than rebuild tensors. Nothing of it ran."""


class DegenerateModelError(CheckpointError):
    """The file is sound, but the codes of its model would mean nothing."""
