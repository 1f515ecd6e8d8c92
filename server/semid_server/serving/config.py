"""What a server is told to be: frozen, built once by the command, passed whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from semid_server.checkpoint import Overrides
from semid_server.encoding.rows import default_threads
from semid_server.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

    from semid_server.serving.kept import Kept
    from semid_server.serving.tls import TlsFiles

MIB = 1 << 20

MESSAGE_OVERHEAD = 64 * 1024
"""Bytes of a message left for what is not the tensor: names, fingerprints, headers."""

_MOST_AT_ONCE = 8 * default_threads()
"""Processes, or threads: so many more than processors are a slip, and take the machine down."""

MOST_IN_GRPC = (1 << 31) - 1
"""gRPC holds its settings in 32 bits, with a sign."""

RANGES = {
    "port": (0, 65535, ""),
    "metrics_port": (0, 65535, ""),
    "processes": (1, _MOST_AT_ONCE, " (8 for each processor at most)"),
    "threads": (1, _MOST_AT_ONCE, " (8 for each processor at most)"),
    "verify_fraction": (0, 1, ""),
    "max_message_bytes": (1, MOST_IN_GRPC, ""),
    "max_batch_rows": (1, math.inf, ""),
    "max_batch_bytes": (1, math.inf, ""),
    "max_batch_seconds": (0.0001, math.inf, ""),
    "max_queue_requests": (1, math.inf, ""),
    "max_queue_bytes": (1, math.inf, ""),
    "max_concurrent_rpcs": (1, math.inf, ""),
    "max_memory_bytes": (0, math.inf, ""),
    "shared_memory_bytes": (0, math.inf, ""),
    "admin_port": (0, 65535, ""),
    "keepalive": (0, math.inf, " seconds"),
    "max_connection_age": (0, math.inf, " seconds"),
    "max_connection_age_grace": (0, math.inf, " seconds"),
    "max_connection_idle": (0, math.inf, " seconds"),
    "max_connection_streams": (1, MOST_IN_GRPC, ""),
    "max_peer_bytes": (1, math.inf, ""),
    "min_ping_interval": (0, math.inf, " seconds"),
    "grace": (0, math.inf, " seconds"),
    "max_stall": (0, math.inf, " seconds"),
    "watch": (0, math.inf, " seconds"),
}
"""Least and greatest value of each number, and its unit where the name has none."""

LONGEST = 365 * 24 * 3600
"""Seconds that a timer of this process may have: Python's own take no infinity, nor any number."""

TIMERS = ("max_batch_seconds", "grace", "max_stall", "watch")
"""What such a timer is set by. Times of connections are gRPC's: the server cuts them to its own."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to serve: where its checkpoint is, and its name if not the checkpoint's.

    Where a version of it is kept, that one is served, whatever is at its path by now.
    """

    path: Path
    name: str | None = None
    kept: Kept | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Every setting of `semid serve`; its help says what each does and when to change it.

    Sizes are in bytes, times in seconds.
    """

    models: tuple[ModelSource, ...]
    overrides: Overrides = field(default_factory=Overrides)
    host: str = "0.0.0.0"  # noqa: S104 - a service is there to be reached; --host narrows it
    port: int = 50051
    metrics_host: str | None = None
    metrics_port: int = 9464
    admin_host: str | None = None
    admin_port: int | None = None
    processes: int = 1
    device: str = "auto"
    threads: int | None = None
    reference: bool = False
    verify_fraction: float = 0.0
    max_message_bytes: int = 16 * MIB
    max_batch_rows: int = 16384
    max_batch_bytes: int = 64 * MIB
    max_batch_seconds: float = 0.005
    max_queue_requests: int = 4096
    max_queue_bytes: int = 256 * MIB
    max_peer_bytes: int = 128 * MIB
    max_concurrent_rpcs: int = 4096
    max_memory_bytes: int = 0
    shared_memory_bytes: int = 1024 * MIB
    keepalive: float = 60.0
    max_connection_age: float = 300.0
    max_connection_age_grace: float = 0.0
    max_connection_idle: float = 1800.0
    max_connection_streams: int = 1024
    min_ping_interval: float = 30.0
    grace: float = 30.0
    max_stall: float = 60.0
    watch: float = 0.0
    tls: TlsFiles | None = None
    token_file: Path | None = None
    reflection: bool = True
    metrics: bool = True
    tracing: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot work together; the message names both values."""
        if not self.models:
            raise ConfigurationError("no checkpoint to serve")
        if len(self.models) > 1 and self.overrides.name is not None:
            raise ConfigurationError(
                f"one name ({self.overrides.name!r}) for {len(self.models)} checkpoints; "
                "name each: NAME=PATH"
            )
        for name, (least, most, unit) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
                raise ConfigurationError(f"{name} is {value}; expected {expected}{unit}")
        for name in TIMERS:
            if (value := getattr(self, name)) > LONGEST:
                raise ConfigurationError(f"{name} is {value}; expected at most {LONGEST} seconds")
        if self.max_message_bytes <= MESSAGE_OVERHEAD:
            raise ConfigurationError(
                f"max_message_bytes is {self.max_message_bytes}; "
                f"expected more than {MESSAGE_OVERHEAD}"
            )
        if self.max_batch_bytes < self.max_message_bytes:
            raise ConfigurationError(
                f"max_batch_bytes is {self.max_batch_bytes}, less than max_message_bytes "
                f"({self.max_message_bytes}): the largest request would fit no batch"
            )

    @property
    def verifies_callers(self) -> bool:
        """Whether callers show certificates that are verified."""
        return self.tls is not None and self.tls.client_ca is not None

    def overrides_of(self, source: ModelSource) -> Overrides:
        """Return what the user says of one of the models."""
        if source.name is None:
            return self.overrides
        return replace(self.overrides, name=source.name)

    def max_rows(self, input_dim: int) -> int:
        """Rows that one request may have: a batch holds them, and one message their decoding.

        Raises
        ------
        ConfigurationError
            Not even one row of ``input_dim`` float32 numbers fits into a message.
        """
        fitting = (self.max_message_bytes - MESSAGE_OVERHEAD) // (4 * input_dim)
        if fitting < 1:
            raise ConfigurationError(
                f"max_message_bytes is {self.max_message_bytes}; one row of this model takes "
                f"{4 * input_dim} bytes, and {MESSAGE_OVERHEAD} are kept for the rest of a message"
            )
        return min(self.max_batch_rows, fitting)

    def max_shared_rows(self, code_bytes: int) -> int:
        """Rows that a request may have whose embeddings are in shared memory.

        A batch holds them, and one message their codes, of ``code_bytes`` a row.
        """
        return min(self.max_batch_rows, (self.max_message_bytes - MESSAGE_OVERHEAD) // code_bytes)
