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
from semid_server.files import read_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

logger = logging.getLogger(__name__)

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
    """The tokens that are accepted: those of a file, as it was when it was looked at last.

    Each line is the SHA-256 of a token in hexadecimal, then, if the token is not good for every
    method, the methods that it is good for, separated by commas; ``#`` begins a comment. A newline
    ends each line, the last one too: a file without is taken for half-written::

        # the recommender
        5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8 Encode,EncodeStream

    Tokens are long and random, so that a plain hash keeps them; a password would not be safe here.

    Calls are checked against what is known. `look` is for a thread, in short intervals, since the
    disk may hang. It reads the file, which is small, rather than compare times: of two changes
    within a tick of the clock it misses none, nor that the file may be read again.

    Parameters
    ----------
    path : Path
        The file.
    methods : collection of str
        Names of the methods there are, to notice a name that is none.

    Raises
    ------
    ConfigurationError
        The file cannot be read, or a line is not of that form or has no end; the line is named, not
        shown.
    """

    def __init__(self, path: Path, methods: frozenset[str]) -> None:
        self._path, self._methods = path, methods
        self._content = self._read()
        self._accepted = self._parse(self._content)
        # The content that could not be used, None if there was none, and why: the last that the
        # log has.
        self._refused: tuple[bytes | None, str] | None = None

    def check(self, authorization: str | None, method: str) -> None:
        """Raise unless ``authorization``, ``Bearer TOKEN``, is good for ``method``.

        Raises
        ------
        UnauthenticatedError
            There is no token, or it is not known.
        PermissionDeniedError
            It is known, but not for this method.
        """
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

    def look(self) -> None:
        """Take up what the file holds now, if that is new and can be used. It reads the disk.

        A half-written file neither opens nor closes doors: the tokens read before stay good, and
        the log says why, once for each state of the file.
        """
        content = None
        try:
            content = self._read()
            if content == self._content:
                self._refused = None
                return
            accepted = self._parse(content)
        except ConfigurationError as error:
            refused = content, str(error)
            if refused != self._refused:
                logger.error("%s; the tokens read before stay good", error)  # noqa: TRY400 - no bug
            self._refused = refused
            return
        self._content, self._accepted, self._refused = content, accepted, None
        logger.info("%s: read again, %d tokens", self._path, len(accepted))

    def _read(self) -> bytes:
        try:
            return read_file(self._path)
        except OSError as error:
            raise ConfigurationError(f"{self._path}: {error.strerror}") from error

    def _parse(self, content: bytes) -> Mapping[str, frozenset[str]]:
        accepted: dict[str, frozenset[str]] = {}
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"{self._path}: is not text in UTF-8") from error
        lines = text.splitlines()
        # Cut within its last line, a file may well be of the right form: with all methods for a
        # token, say, that is good for some.
        if text and not text.endswith("\n"):
            raise ConfigurationError(
                f"{self._path}, line {len(lines)}: the file ends without a newline, as one does "
                "that is half-written; end each line with one"
            )
        for number, line in enumerate(lines, 1):
            entry = line.split("#")[0].strip()
            if not entry:
                continue
            match = _LINE.fullmatch(entry)
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
