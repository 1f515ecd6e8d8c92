"""How a channel to a semid server is set up: options, retries, TLS and the token."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import grpc

from semid_client._errors import ConfigurationError
from semid_client._fingerprints import ON_FINGERPRINT_CHANGE

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from semid_client._fingerprints import OnFingerprintChange

OTHER_SCHEMES: Final = frozenset({"unix", "unix-abstract", "vsock", "xds", "google-c2p"})
"""Names of gRPC's that are not, or need not be, a host and a port."""

ADDRESS: Final = re.compile(r"(\[[^][\s]+\]|[^][:/@\s]+):(?P<port>[0-9]{1,5})")

FINGERPRINT: Final = re.compile("([0-9a-f]{64})?")

SERVICE: Final = "semid.v1.SemanticIdService"

MAX_MESSAGE_BYTES: Final = 64 << 20
"""Most bytes of an answer. gRPC's own 4 MiB would refuse the reconstructions of a large model."""

SERVICE_CONFIG: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            # All of them can be repeated without harm: none changes anything on the server.
            "name": [
                {"service": SERVICE, "method": method}
                for method in ("Encode", "Decode", "GetModel", "ListModels")
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                # A full queue is refused before anything is computed, and the server's
                # grpc-retry-pushback-ms then takes the place of the backoff.
                # A server that stops cancels calls which have reached its machine but not itself.
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
            },
        }
    ],
    # The budget: a failure costs 1, a success earns 0.1, and nothing is retried while less than
    # half is left. An outage so adds 50 retries, then a tenth of the traffic, not three times it.
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
}

HEALTH_CHECKS: Final = {"healthCheckConfig": {"serviceName": SERVICE}}
"""A server that says NOT_SERVING, as one does first thing when it stops, gets no more calls (gRPC
proposal A17). Retries alone would not do: several attempts may all meet the one that stops. A
server without the health service counts as healthy."""


@dataclass(frozen=True, slots=True)
class TLS:
    """Encryption, and optionally a certificate of the client's own.

    Attributes
    ----------
    root_certificates : bytes or None
        PEM of the authorities that the server's certificate is checked against; None for those
        that gRPC brings along.
    certificate_chain, private_key : bytes or None
        PEM of the client's own certificate and key, where the server asks for one. Both or none.
    """

    root_certificates: bytes | None = None
    certificate_chain: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse half of a client certificate."""
        if (self.certificate_chain is None) != (self.private_key is None):
            raise ConfigurationError(
                "a client certificate needs its private key, and a key its "
                "certificate: give both or none"
            )

    @classmethod
    def from_files(
        cls,
        root_certificates: str | os.PathLike[str] | None = None,
        certificate_chain: str | os.PathLike[str] | None = None,
        private_key: str | os.PathLike[str] | None = None,
    ) -> TLS:
        """Read the PEM files. `ConfigurationError` names one that cannot be read, or is none."""
        contents = []
        for path in (root_certificates, certificate_chain, private_key):
            try:
                contents.append(None if path is None else Path(path).read_bytes())
            except OSError as error:
                raise ConfigurationError(f"{path}: {error.strerror}") from error
            if contents[-1] is not None and b"-----BEGIN " not in contents[-1]:
                raise ConfigurationError(f"{path}: holds no PEM, which begins with -----BEGIN")
        return cls(*contents)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a client was made with, checked once.

    The attributes are the parameters of `Client`, and ``one_server``: one connection at a time.
    """

    target: str
    model: str
    expected_fingerprint: str
    on_fingerprint_change: OnFingerprintChange
    timeout: float
    max_in_flight: int
    hedge_after: float | None
    health_checks: bool
    tls: TLS | None
    token: str | None = field(repr=False)
    allow_plaintext_token: bool
    one_server: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work, with a `ConfigurationError`."""
        check_target(self.target)
        check_timeout(self.timeout)
        if not isinstance(self.model, str):
            raise ConfigurationError(f"model is {self.model!r}; expected a name, or '' for any")
        check_fingerprint(self.expected_fingerprint)
        if not (isinstance(self.max_in_flight, Integral) and self.max_in_flight >= 1):
            raise ConfigurationError(
                f"max_in_flight is {self.max_in_flight!r}; expected a whole number, at least 1"
            )
        if self.on_fingerprint_change not in ON_FINGERPRINT_CHANGE:
            raise ConfigurationError(
                f"on_fingerprint_change is {self.on_fingerprint_change!r}; "
                f"expected one of {', '.join(ON_FINGERPRINT_CHANGE)}"
            )
        if not (self.hedge_after is None or _is_time(self.hedge_after)):
            raise ConfigurationError(
                f"hedge_after is {self.hedge_after!r}; expected a positive number of seconds, "
                "or None"
            )
        if not (self.tls is None or isinstance(self.tls, TLS)):
            raise ConfigurationError(f"tls is {self.tls!r}; expected TLS(...), or None for none")
        if self.token is not None:
            self._check_token()

    def _check_token(self) -> None:
        if not isinstance(self.token, str):
            raise ConfigurationError(f"the token is of type {type(self.token).__name__}, not text")
        if not (self.token and self.token.isascii() and self.token.isprintable()):
            raise ConfigurationError("the token is empty, or holds other than printable ASCII")
        if not (self.tls or self.allow_plaintext_token or is_loopback(self.target)):
            raise ConfigurationError(
                f"the token would travel unencrypted to {self.target}: use TLS, or allow a "
                "plaintext token if the network between is trusted"
            )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes along with every call.

        The token is sent here and not as gRPC call credentials, which do nothing without TLS;
        whether it may go unencrypted was decided above.
        """
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    @property
    def options(self) -> Sequence[tuple[str, Any]]:
        """Options of the channel."""
        config = SERVICE_CONFIG | (HEALTH_CHECKS if self.health_checks else {})
        if self.one_server:
            # Calls that belong together stay on one connection, and so with one process.
            config = SERVICE_CONFIG | {"loadBalancingConfig": [{"pick_first": {}}]}
        return (
            ("grpc.service_config", json.dumps(config)),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            # A request larger than this buffer (256 KiB by default) is silently not retried.
            ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
            # A server that comes back is found within a second, not within gRPC's two minutes:
            # before the next one of a rolling restart goes.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # Connections of its own. gRPC would share those of all clients of a process, and with
            # them the wait after a refusal: a client made when the server is up would fail, since
            # another one had asked too early.
            ("grpc.use_local_subchannel_pool", 1),
            # How long an address may take to accept a connection; gRPC's own is 20 s.
            ("grpc.min_reconnect_backoff_ms", 5_000),
            # When a connection is lost the name is asked for again, but no more often than this.
            # In gRPC's own 30 s an orchestrator can replace every address that is known.
            ("grpc.dns_min_time_between_resolutions_ms", 1_000),
            # A machine that is gone is left after 10 s: gRPC has TCP wait no longer for it either.
            # A server that hangs is left after some 95 s: gRPC gives a ping a minute, which a slow
            # link may need while data is on the way. The server allows a ping every 30 s.
            ("grpc.keepalive_time_ms", 35_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.primary_user_agent", f"semid-client/{version('semid')}"),
            # gRPC goes through http_proxy to this very machine too, unless no_proxy names it: then
            # a token would leave the machine unencrypted.
            ("grpc.enable_http_proxy", int(not is_loopback(self.target))),
        )

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """Credentials of the channel; None for one without encryption."""
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(
            self.tls.root_certificates, self.tls.private_key, self.tls.certificate_chain
        )


def check_timeout(seconds: float) -> None:
    """Refuse a timeout that is not a finite, positive number of seconds."""
    if not _is_time(seconds):
        raise ConfigurationError(f"timeout is {seconds!r}; expected a positive number of seconds")


def _is_time(seconds: object) -> bool:
    return isinstance(seconds, Real) and 0 < float(seconds) < float("inf")


def check_fingerprint(fingerprint: str) -> None:
    """Refuse what is no fingerprint: of a part of one, no model has it."""
    if not (isinstance(fingerprint, str) and FINGERPRINT.fullmatch(fingerprint)):
        raise ConfigurationError(
            f"expected_fingerprint is {fingerprint!r}; expected 64 digits of 0 to 9 and a to f, "
            "as `semid info` prints them, or '' for any"
        )


def check_target(target: str) -> None:
    """Refuse an address that gRPC would misread, or say nothing clear about.

    It takes port 443 where none is given, and 34463 for 99999.
    """
    expected = "expected HOST:PORT, such as localhost:50051, or a name of gRPC's: dns:///HOST:PORT"
    if not isinstance(target, str):
        raise ConfigurationError(f"target is {target!r}; {expected}")
    if not target:
        raise ConfigurationError(f"target is empty; {expected}")
    scheme, _, rest = target.partition(":")
    if scheme in OTHER_SCHEMES:
        return
    addresses = [target]
    if scheme == "dns":
        addresses = [re.sub("^//[^/]*/", "", rest)]
    elif scheme in {"ipv4", "ipv6"}:
        addresses = unquote(rest.removeprefix("///")).split(",")
    for address in addresses:
        found = ADDRESS.fullmatch(address)
        if found is None or not 0 < int(found["port"]) < 1 << 16:
            raise ConfigurationError(f"target is {target!r}; {expected}")


def is_loopback(target: str) -> bool:
    """Tell whether ``target`` cannot leave this machine, by its text alone: no name is resolved."""
    scheme, colon, rest = target.partition(":")
    if colon and scheme in {"unix", "unix-abstract"}:
        return True
    if colon and scheme in {"dns", "ipv4", "ipv6"}:
        target = rest.rpartition("/")[2]
    host = target.rpartition(":")[0] if target.count(":") == 1 or "]:" in target else target
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
