"""Which models a client has met: replicas of one fleet should all serve the same."""

from __future__ import annotations

import sys
import threading
import warnings
from typing import Final, Literal

from semid_client._errors import FingerprintMismatchError

OnFingerprintChange = Literal["warn", "error"]
ON_FINGERPRINT_CHANGE: Final = ("warn", "error")


class FingerprintChangedWarning(UserWarning):
    """One client has been answered by two models: the codes before and after must not be mixed."""


class Fingerprints:
    """The fingerprints that a client has met over its life, in order of appearance.

    Parameters
    ----------
    target : str
        Where the servers are, for messages.
    expected : str
        The one that was asked for; if empty, and ``on_change`` is ``"error"``, the first one met.
    on_change : "warn" or "error"
        What to do about a second one.
    """

    def __init__(self, target: str, expected: str, on_change: OnFingerprintChange) -> None:
        self._target, self._expected, self._on_change = target, expected, on_change
        self._seen: tuple[str, ...] = ()
        self._lock = threading.Lock()

    @property
    def seen(self) -> tuple[str, ...]:
        """All of them, the first met first."""
        return self._seen

    @property
    def expected(self) -> str:
        """The one that every answer must have; empty if any will do."""
        if self._expected or self._on_change == "warn":
            return self._expected
        return self._seen[0] if self._seen else ""

    def met(self, fingerprint: str) -> None:
        """Take note of the fingerprint of an answer.

        Raises
        ------
        FingerprintMismatchError
            If it is not the expected one.
        """
        if fingerprint in self._seen:  # by far the most: no lock
            if self.expected in ("", fingerprint):
                return
            raise self._mismatch(fingerprint)
        with self._lock:
            if fingerprint in self._seen:
                return
            if self.expected not in ("", fingerprint):
                raise self._mismatch(fingerprint)
            self._seen += (fingerprint,)
            if len(self._seen) == 1:
                return
            first, *_, last = self._seen
        warnings.warn(
            f"the servers at {self._target} have answered with two fingerprints, first {first} and "
            f"now {last}: either the model was replaced, or replicas serve different codebooks. "
            "Codes of the two must not be mixed: set expected_fingerprint, or "
            "on_fingerprint_change='error'",
            FingerprintChangedWarning,
            stacklevel=_outside(),
        )

    def _mismatch(self, fingerprint: str) -> FingerprintMismatchError:
        since = "is expected" if self._expected else "answered this client before"
        return FingerprintMismatchError(
            f"the model that answered at {self._target} has fingerprint {fingerprint}, but "
            f"{self.expected} {since}: its codes belong to another codebook"
        )


def _outside() -> int:
    """Stack level, as `warnings.warn` counts it, of whoever called this package."""
    level, frame = 1, sys._getframe(1)  # noqa: SLF001 -- what warnings does itself
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        level, frame = level + 1, frame.f_back
    return level
