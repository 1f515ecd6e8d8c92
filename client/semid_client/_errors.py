"""What can go wrong for a caller of semid, and the one table from gRPC's statuses to it.

    SemidClientError
    ├── ConfigurationError             an argument of the client that cannot be used
    ├── ClientClosedError              used after close(), in a forked process or another event loop
    ├── InvalidInputError              an array that cannot be encoded or decoded as it stands
    │   └── InvalidArgumentError       ... found so by the server
    ├── FingerprintMismatchError       the codes would belong to another codebook
    ├── ProtocolError                  an answer that breaks the contract semid.v1
    └── CallError                      a call that the server or the network ended
        ├── InvalidArgumentError       INVALID_ARGUMENT, OUT_OF_RANGE
        ├── FailedPreconditionError    FAILED_PRECONDITION
        ├── NotFoundError              NOT_FOUND
        ├── ResourceExhaustedError     RESOURCE_EXHAUSTED
        ├── DeadlineExceededError      DEADLINE_EXCEEDED
        ├── UnavailableError           UNAVAILABLE
        │   └── CancelledError         CANCELLED
        ├── AuthenticationError        UNAUTHENTICATED, PERMISSION_DENIED
        ├── UnimplementedError         UNIMPLEMENTED
        └── ServerError                INTERNAL, UNKNOWN, DATA_LOSS, ABORTED, ALREADY_EXISTS

Every error takes its message alone, so that all of them survive pickling between processes.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class SemidClientError(Exception):
    """Base of every error that semid_client raises on purpose."""


class ConfigurationError(SemidClientError, ValueError):
    """An argument of the client that cannot be used."""


class ClientClosedError(SemidClientError):
    """The client was closed, or carried over a fork or to another event loop: make one there."""


class InvalidInputError(SemidClientError, ValueError):
    """An array that cannot be encoded or decoded as it stands.

    Attributes
    ----------
    row : int or None
        Index of the first row at fault within the array given, where one row is.
    problem : str
        What is wrong there, without the place.
    """

    def __init__(self, message: str, *, row: int | None = None, problem: str | None = None) -> None:
        super().__init__(message)
        self.row = row
        self.problem = message if problem is None else problem

    @classmethod
    def at(cls, row: int, problem: str) -> InvalidInputError:
        """Build the error of one row: ``row 7: problem``."""
        return cls(f"row {row}: {problem}", row=row, problem=problem)


class FingerprintMismatchError(SemidClientError):
    """The model that is served is not the one that is expected.

    Nothing is returned of a call that meets two models: an item never gets two IDs. Where several
    servers share the target, a few of them were asked.
    """


class ProtocolError(SemidClientError):
    """The server answered with something that the contract semid.v1 does not allow."""


class CallError(SemidClientError):
    """A call that ended with a gRPC status other than OK.

    Attributes
    ----------
    target : str
        The server, as it was given to the client.
    method : str
        The method called, such as ``Encode``.
    code : grpc.StatusCode or None
        The status.
    details : str
        What the server (or gRPC itself) said.
    retry_after : float or None
        Seconds after which the server asks to try again, where it said so.
    """

    advice: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        target: str = "",
        method: str = "",
        code: grpc.StatusCode | None = None,
        details: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.target = target
        self.method = method
        self.code = code
        self.details = details
        self.retry_after = retry_after


class InvalidArgumentError(CallError, InvalidInputError):
    """The server refused the request: it cannot succeed as it stands."""


class FailedPreconditionError(CallError):
    """The model served lacks what the call needs, such as norms for the calibrated mode."""


class NotFoundError(CallError):
    """No model of that name is served."""


class ResourceExhaustedError(CallError):
    """The server's queue is full, or a message was too large. ``retry_after`` tells them apart."""

    advice = "send less at once, or try again later"


class DeadlineExceededError(CallError, TimeoutError):
    """The answer did not come in time."""

    advice = "give a longer timeout, or send fewer rows"


class UnavailableError(CallError, ConnectionError):
    """No server could be reached, or it is loading or draining. Several attempts were made."""

    advice = (
        "check that a semid server runs at that address, and whether it is still loading: "
        "`semid health` tells, and wait_ready() waits for it"
    )


class CancelledError(UnavailableError):
    """The call was cancelled, and not by its caller: its server ended, or something between did."""


class AuthenticationError(CallError):
    """The credentials are missing or wrong."""

    advice = "check the token and the certificates"


class UnimplementedError(CallError):
    """The server does not know this method: it is not semid, or of another version."""

    advice = "check that the target is a semid server of this version"


class ServerError(CallError):
    """A bug in semid, or a device that failed; the server's log says more."""


ERROR_OF_STATUS: Mapping[grpc.StatusCode, type[CallError]] = MappingProxyType(
    {
        grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
        grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
        grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
        grpc.StatusCode.NOT_FOUND: NotFoundError,
        grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
        grpc.StatusCode.UNAVAILABLE: UnavailableError,
        grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
        grpc.StatusCode.PERMISSION_DENIED: AuthenticationError,
        grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
        grpc.StatusCode.CANCELLED: CancelledError,
        grpc.StatusCode.INTERNAL: ServerError,
        grpc.StatusCode.UNKNOWN: ServerError,
        grpc.StatusCode.DATA_LOSS: ServerError,
        grpc.StatusCode.ABORTED: ServerError,
        grpc.StatusCode.ALREADY_EXISTS: ServerError,
    }
)
"""Every status but OK. A test proves it complete."""


ADVICE_BY_CAUSE: Final = (
    ("errors resolving", "check the name, and that this machine can resolve it"),
    ("Hostname Verification", "the certificate there is of another name than the target's"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the certificate there is not of the authorities given (the public ones by default)",
    ),
    ("security handshaker", "the certificates or the key given to TLS are not valid PEM"),
    ("WRONG_VERSION_NUMBER", "whoever listens there speaks no TLS, while this client does"),
    ("before receiving SETTINGS", "whoever listens there is no gRPC server, or hangs"),
    (
        "Failed parsing HTTP/2",
        "whoever listens there is no gRPC server: is it the port of the metrics?",
    ),
    ("HTTP proxy", "no_proxy in the environment names the hosts to be called without the proxy"),
    (
        "Socket closed",
        "if the server speaks TLS, so must the client; it may ask for a client certificate too",
    ),
    (
        "backend unhealthy",
        "every server there is loading, draining, or has no room to be asked how it is",
    ),
)
"""What to look at first when no server can be reached, by words of what gRPC says of it."""

NEVER_HEARD: Final = (
    "no answer has ever come from there: check the address, and that nothing between drops packets"
)


def call_error(error: grpc.RpcError, *, target: str, method: str, heard: bool = True) -> CallError:
    """Translate what gRPC raised; the caller raises the result ``from`` it.

    ``heard`` tells whether any answer ever came from the target.

    Every RpcError that reaches a caller of grpc or of grpc.aio has a status, details and trailing
    metadata, though its class does not say so.
    """
    call: Any = error
    code, details = call.code(), call.details() or "no details"
    kind = ERROR_OF_STATUS[code]
    advice = kind.advice
    if kind is DeadlineExceededError and not heard:
        advice = NEVER_HEARD
    elif kind is UnavailableError:
        advice = next((then for cause, then in ADVICE_BY_CAUSE if cause in details), advice)
    return kind(
        f"{method} at {target} failed with {code.name}: {details}{advice and '; '}{advice}",
        target=target,
        method=method,
        code=code,
        details=details,
        retry_after=_pushback(call.trailing_metadata() or ()),
    )


def _pushback(metadata: Iterable[tuple[str, str | bytes]]) -> float | None:
    """Seconds in ``grpc-retry-pushback-ms``: the gRPC retry design (proposal A6)."""
    for key, value in metadata:
        if key == "grpc-retry-pushback-ms" and str(value).isdigit():
            return int(value) / 1000
    return None
