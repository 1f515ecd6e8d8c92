"""TLS and mutual TLS, with certificates that are read again when their files change."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import grpc

from semid_server.errors import ConfigurationError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

Stamps = list[tuple[int, int, int]]
"""What tells one state of the files from the next."""

ATTEMPTS: Final = 3
"""How often files that change while they are read are read again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """Where the server's identity is kept.

    Attributes
    ----------
    certificate : Path
        PEM: the server's certificate, then any intermediate ones.
    key : Path
        PEM: its private key, without a passphrase.
    client_ca : Path or None
        PEM: authorities of client certificates; if given, a client without one is turned away.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file there is."""
        return tuple(path for path in (self.certificate, self.key, self.client_ca) if path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pems:
    """What `TlsFiles` hold, as it is handed to gRPC."""

    key: bytes = field(repr=False)
    certificate: bytes
    client_ca: bytes | None


class Certificates:
    """What gRPC asks for at every handshake: the files as they are now, or as they last were good.

    Parameters
    ----------
    files : TlsFiles
        Where they are.

    Raises
    ------
    ConfigurationError
        A file cannot be read, or key and certificate are not a pair.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamps = self._look()
        self._initial = self._load()
        # The state of files that could not be used, and why: the last that the log has.
        self._refused: tuple[Stamps | None, str] | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Server credentials that follow the files."""
        return grpc.dynamic_ssl_server_credentials(
            self._initial,
            self._changed,  # type: ignore[arg-type]  # None is documented: nothing has changed
            require_client_authentication=self._files.client_ca is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what the files hold if they have changed, else None.

        While they cannot be used (a renewal that has written one file of two, say) the last good
        ones stay, and the log says why: once for each state of the files, not at each handshake.
        They are tried at each all the same, since what is in their way (who may read them, say)
        need not show in their state.
        """
        stamps = None
        try:
            stamps = self._look()
            if stamps == self._stamps:
                self._refused = None
                return None
            loaded = self._load()
        except ConfigurationError as error:
            refused = stamps, str(error)
            if refused != self._refused:
                logger.error("%s; the certificates read before stay in use", error)  # noqa: TRY400 - no bug
            self._refused = refused
            return None
        self._stamps, self._refused = stamps, None
        logger.info("new certificates read from %s", self._files.certificate)
        return loaded

    def _look(self) -> Stamps:
        return [
            (status.st_mtime_ns, status.st_size, status.st_ino)
            for status in map(_stat, self._files.all)
        ]

    def _load(self) -> grpc.ServerCertificateConfiguration:
        pems = read_pems(self._files)
        return grpc.ssl_server_certificate_configuration(
            [(pems.key, pems.certificate)], pems.client_ca
        )


def read_pems(files: TlsFiles, *, read: Callable[[Path], bytes] | None = None) -> Pems:
    """Return what the files hold, once it is known to be of use together.

    OpenSSL checks files, and gRPC is handed bytes: they are read before and after the check, and
    are the ones that were checked if they are the same.

    Parameters
    ----------
    files : TlsFiles
        Where they are.
    read : callable, optional
        Reads one of them.

    Raises
    ------
    ConfigurationError
        A file cannot be read, they do not fit, or they change whenever they are read.
    """
    before = _read_all(files, read or _read)
    for _ in range(ATTEMPTS):
        _check(files)
        after = _read_all(files, read or _read)
        if before == after:
            return after
        before = after
    names = ", ".join(map(str, files.all))
    raise ConfigurationError(f"TLS: {names} changed each of {ATTEMPTS} times they were read")


def _read_all(files: TlsFiles, read: Callable[[Path], bytes]) -> Pems:
    return Pems(
        key=read(files.key),
        certificate=read(files.certificate),
        client_ca=None if files.client_ca is None else read(files.client_ca),
    )


def _check(files: TlsFiles) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # gRPC would find out only when a client connects, and tell nobody.
        context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
        if files.client_ca is not None:
            context.load_verify_locations(files.client_ca)
    except OSError as error:
        if isinstance(error, ssl.SSLError):
            raise _unusable(files, error) from error
        raise ConfigurationError(f"TLS: {error.strerror} while the files were checked") from error
    except ValueError as error:
        raise _unusable(files, error) from error


def _unusable(files: TlsFiles, error: Exception) -> ConfigurationError:
    names = ", ".join(map(str, files.all))
    return ConfigurationError(
        f"TLS: {names} cannot be used together ({error}); expected PEM files: a "
        "certificate chain, its private key without a passphrase, and authorities"
    )


def _no_passphrase() -> str:
    """Answer what OpenSSL would otherwise ask on the terminal."""
    raise ValueError("the private key has a passphrase")


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ConfigurationError(f"TLS: {path}: {error.strerror}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"TLS: {path}: {error.strerror}") from error
