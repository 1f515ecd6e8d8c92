"""The one table from semid's errors to gRPC statuses, with their `google.rpc` details."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from semid_server import errors

if TYPE_CHECKING:
    from google.protobuf.message import Message

CODES: dict[type[errors.SemidError], grpc.StatusCode] = {
    errors.InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.FingerprintMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnsupportedDecodeModeError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.SegmentNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.SharedMemoryRefusedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SharedMemoryFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.MessageTooLargeError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExpiredError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.NotServingError: grpc.StatusCode.UNAVAILABLE,
    errors.DeviceError: grpc.StatusCode.INTERNAL,
    # Another server can answer what this one no longer can.
    errors.DeviceLostError: grpc.StatusCode.UNAVAILABLE,
    # These end the command before a call can meet them; reached by a call, they are our bug.
    errors.ConfigurationError: grpc.StatusCode.INTERNAL,
    errors.CheckpointError: grpc.StatusCode.INTERNAL,
    errors.MalformedCheckpointError: grpc.StatusCode.INTERNAL,
    errors.UnsafeCheckpointError: grpc.StatusCode.INTERNAL,
    errors.DegenerateModelError: grpc.StatusCode.INTERNAL,
}

MAX_VIOLATIONS = 8
"""Violations sent: trailers hold 8 KB in all, with the text in them twice and encoded."""

MAX_TEXT = 512
"""Characters of a message sent, for the same reason."""

MAX_DESCRIPTION = 128
"""Characters of the description of a violation."""

ROUNDED_UP = 0.02
"""Share of its time that a call may have left at its deadline: gRPC's C core, on which most clients
are built, sends timeouts rounded up to three digits, by up to 0.01, and messages take a moment."""

DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"

NEVER_AGAIN = "-1"
"""A pushback below 0 tells gRPC not to retry (proposal A6), though the status is one of those that
are retried: the same message would be refused each time."""


@dataclass(frozen=True, slots=True)
class WireStatus:
    """A status as gRPC sends it: code, message, and trailing metadata with the details."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def status_of(error: errors.SemidError) -> WireStatus:
    """Return the status that tells a caller of ``error``."""
    code = CODES[type(error)]
    message = _shortened(str(error))
    if code is grpc.StatusCode.INTERNAL and not isinstance(error, errors.DeviceError):
        message = "an internal error; the server's log says more"
    details: list[Message] = []
    metadata: list[tuple[str, str | bytes]] = []
    if isinstance(error, errors.InvalidInputError) and error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field,
                        description=_shortened(violation.description, MAX_DESCRIPTION),
                    )
                    for violation in error.violations[:MAX_VIOLATIONS]
                ]
            )
        )
    if isinstance(error, errors.OverloadedError):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        # The same hint where gRPC's own retries look for it.
        metadata.append((PUSHBACK_KEY, str(round(error.retry_after * 1000))))
    if isinstance(error, errors.MessageTooLargeError):
        metadata.append((PUSHBACK_KEY, NEVER_AGAIN))
    if details:
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        metadata.append((DETAILS_KEY, status.SerializeToString()))
    return WireStatus(code, message, tuple(metadata))


def code_of_cancelled(seconds: float, remaining: float | None) -> grpc.StatusCode:
    """Return the status of a call that its caller's side ended: by choice, or at the deadline.

    A client whose deadline passes cancels its call, and is heard before the server's own clock
    comes to that end.

    Parameters
    ----------
    seconds : float
        How long the call has taken.
    remaining : float or None
        Seconds to its deadline as it was sent, never below 0; None without one.
    """
    if remaining is None or remaining > ROUNDED_UP * (seconds + remaining):
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.DEADLINE_EXCEEDED


def _shortened(text: str, limit: int = MAX_TEXT) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
