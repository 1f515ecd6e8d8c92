"""What a server is told to be: frozen, built once by the command, passed whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from semid_server.checkpoint import Overrides
from semid_server.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

    from semid_server.serving.tls import TlsFiles

MIB = 1 << 20

MESSAGE_OVERHEAD = 64 * 1024
"""Bytes of a message left for what is not the tensor: names, fingerprints, headers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Every setting of `semid serve`; its help says what each does and when to change it.

    Sizes are in bytes, times in seconds.
    """

    checkpoint: Path
    overrides: Overrides = field(default_factory=Overrides)
    host: str = "0.0.0.0"  # noqa: S104 - a service is there to be reached; --host narrows it
    port: int = 50051
    metrics_host: str | None = None
    metrics_port: int = 9464
    device: str = "auto"
    threads: int | None = None
    reference: bool = False
    verify_fraction: float = 0.0
    max_message_bytes: int = 16 * MIB
    max_batch_rows: int = 16384
    max_batch_bytes: int = 64 * MIB
    max_queue_requests: int = 4096
    max_queue_bytes: int = 256 * MIB
    max_concurrent_rpcs: int = 4096
    grace: float = 30.0
    tls: TlsFiles | None = None
    token_file: Path | None = None
    reflection: bool = True
    metrics: bool = True

    def __post_init__(self) -> None:
        """Refuse settings that cannot work together; the message names both values."""
        for name in ("port", "metrics_port"):
            value = getattr(self, name)
            if not 0 <= value <= 65535:  # noqa: PLR2004 - the range of ports
                raise ConfigurationError(f"{name} is {value}; expected 0 to 65535")
        for name in (
            "max_message_bytes",
            "max_batch_rows",
            "max_batch_bytes",
            "max_queue_requests",
            "max_queue_bytes",
            "max_concurrent_rpcs",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ConfigurationError(f"{name} is {value}; expected at least 1")
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
        if self.threads is not None and self.threads < 1:
            raise ConfigurationError(f"threads is {self.threads}; expected at least 1")
        if not 0.0 <= self.verify_fraction <= 1.0:
            raise ConfigurationError(f"verify_fraction is {self.verify_fraction}; expected 0 to 1")
        if self.grace < 0:
            raise ConfigurationError(f"grace is {self.grace}; expected at least 0 seconds")

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
