"""Who may call what: bearer tokens, known by their hashes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from typing import TYPE_CHECKING

from semid_server.errors import (
    ConfigurationError,
    PermissionDeniedError,
    UnauthenticatedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

Stamp = tuple[int, int, int]
"""What tells one state of a file from the next."""

_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})(?:\s+(?P<methods>\S+))?")


def bearer_token(authorization: str | bytes | None) -> str | None:
    """Return the token of ``authorization: Bearer TOKEN``; None if it is not of that form."""
    if not isinstance(authorization, str):
        return None
    scheme, _, token = authorization.partition(" ")
    return token if scheme.lower() == "bearer" and token else None


def hashed(token: str) -> str:
    """Return the SHA-256 of a token, in hexadecimal."""
    return hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()


class TokenFile:
    """The tokens that are accepted, read again whenever the file has changed.

    Each line is the SHA-256 of a token in hexadecimal, then, if the token is not good for every
    method, the methods that it is good for, separated by commas; ``#`` begins a comment::

        # the recommender
        5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8 Encode,EncodeStream

    Tokens are long and random, so that a plain hash keeps them; a password would not be safe here.

    Parameters
    ----------
    path : Path
        The file.
    methods : collection of str
        Names of the methods there are, to notice a name that is none.

    Raises
    ------
    ConfigurationError
        The file cannot be read, or a line is not of that form; the line is named, not shown.
    """

    def __init__(self, path: Path, methods: frozenset[str]) -> None:
        self._path, self._methods = path, methods
        self._version: Stamp | None = _stamp(path)
        self._accepted = self._read()

    def check(self, authorization: str | None, method: str) -> None:
        """Raise unless ``authorization``, ``Bearer TOKEN``, is good for ``method``.

        Raises
        ------
        UnauthenticatedError
            There is no token, or it is not known.
        PermissionDeniedError
            It is known, but not for this method.
        """
        self._refresh()
        token = bearer_token(authorization)
        if token is None:
            raise UnauthenticatedError(
                "this server wants a token: send metadata 'authorization: Bearer TOKEN'"
            )
        digest = hashed(token)
        allowed: frozenset[str] | None = None
        for known, methods in self._accepted.items():
            # All are compared, each in constant time: the time taken tells nothing.
            if hmac.compare_digest(known, digest):
                allowed = methods
        if allowed is None:
            raise UnauthenticatedError("the token is not one that this server knows")
        if method not in allowed:
            raise PermissionDeniedError(f"the token is not good for {method}")

    def _refresh(self) -> None:
        try:
            stamp = _stamp(self._path)
        except ConfigurationError as error:
            self._keep(None, error)
            return
        if stamp == self._version:
            return
        try:
            self._accepted = self._read()
        except ConfigurationError as error:
            self._keep(stamp, error)
            return
        self._version = stamp
        logger.info("%s: read again, %d tokens", self._path, len(self._accepted))

    def _keep(self, stamp: Stamp | None, error: ConfigurationError) -> None:
        """Go on with the tokens read before: a half-written file neither opens nor closes doors.

        Said once for each state of the file, not at each call.
        """
        if stamp != self._version:
            logger.error("%s; the tokens read before stay good", error)
        self._version = stamp

    def _read(self) -> Mapping[str, frozenset[str]]:
        accepted: dict[str, frozenset[str]] = {}
        try:
            lines = self._path.read_text("utf-8").splitlines()
        except OSError as error:
            raise ConfigurationError(f"{self._path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{self._path}: is not text in UTF-8") from error
        for number, line in enumerate(lines, 1):
            content = line.split("#")[0].strip()
            if not content:
                continue
            match = _LINE.fullmatch(content)
            if match is None:
                raise ConfigurationError(
                    f"{self._path}, line {number}: expected the SHA-256 of a token as 64 "
                    "hexadecimal digits in lower case and, if not all, methods separated by commas"
                )
            if match["digest"] in accepted:
                raise ConfigurationError(
                    f"{self._path}, line {number}: a token that a line before has already; give "
                    "each one line"
                )
            named = match["methods"]
            methods = frozenset(named.split(",")) if named else self._methods
            if unknown := methods - self._methods:
                raise ConfigurationError(
                    f"{self._path}, line {number}: no method is called "
                    f"{', '.join(sorted(unknown))}; there are {', '.join(sorted(self._methods))}"
                )
            accepted[match["digest"]] = methods
        if not accepted:
            raise ConfigurationError(f"{self._path}: holds no token, so that nobody could call")
        return accepted


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    return status.st_mtime_ns, status.st_size, status.st_ino
