"""Hedging: a second attempt at a call that takes long, and the budget that bounds them.

gRPC describes it (proposal A6), but its core, on which Python stands, does not carry it out.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Final

import grpc

SHARE: Final = 0.05
"""Second attempts for each call that was answered."""

MOST_SAVED: Final = 10.0
"""Second attempts that can be saved up for a moment when many calls are slow."""

METHODS: Final = frozenset({"Encode", "Decode"})
"""The calls that are hedged: they change nothing on the server, and are the work."""

ANOTHER_MAY_DO_BETTER: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
    }
)
"""Failures of one server. All others are about the call, and any server would say the same."""


@dataclass(slots=True)
class Hedging:
    """When to send a second attempt, and how many there may be.

    Of n calls that were answered at most ``1 + n / 20`` were sent twice, however slow the servers
    are: a fleet that is slow because it is overloaded is not given twice the work. Calls that
    fail earn nothing.

    Attributes
    ----------
    after : float
        Seconds to wait for the first attempt.
    """

    after: float
    _budget: float = 1.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def wait(self, began: float) -> float:
        """Seconds left until the second attempt at a call that began then (monotonic clock)."""
        return max(0.0, began + self.after - time.monotonic())

    def take(self) -> bool:
        """Whether a second attempt may be sent now; it is taken from the budget."""
        with self._lock:
            if self._budget < 1:
                return False
            self._budget -= 1
            return True

    def earn(self) -> None:
        """Count a call that was answered."""
        with self._lock:
            self._budget = min(MOST_SAVED, self._budget + SHARE)


def settles(error: BaseException | None) -> bool:
    """Whether the outcome of one attempt, an error or an answer, is that of the call."""
    if not isinstance(error, grpc.RpcError):
        return True
    status: grpc.StatusCode = error.code()
    return status not in ANOTHER_MAY_DO_BETTER
