"""TLS and mutual TLS, with certificates that are read again when their files change."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from semid_server.errors import ConfigurationError

if TYPE_CHECKING:
    import os
    from pathlib import Path

logger = logging.getLogger(__name__)


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
        ones stay, and the log says why.
        """
        try:
            stamps = self._look()
            if stamps == self._stamps:
                return None
            loaded = self._load()
        except ConfigurationError as error:
            logger.error("%s; the certificates read before stay in use", error)  # noqa: TRY400 - no bug
            return None
        self._stamps = stamps
        logger.info("new certificates read from %s", self._files.certificate)
        return loaded

    def _look(self) -> list[tuple[int, int, int]]:
        return [
            (status.st_mtime_ns, status.st_size, status.st_ino)
            for status in map(_stat, self._files.all)
        ]

    def _load(self) -> grpc.ServerCertificateConfiguration:
        files = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # gRPC would find out only when a client connects, and tell nobody.
            context.load_cert_chain(files.certificate, files.key, password=_no_passphrase)
            if files.client_ca is not None:
                context.load_verify_locations(files.client_ca)
        except (ssl.SSLError, ValueError) as error:
            names = ", ".join(map(str, files.all))
            raise ConfigurationError(
                f"TLS: {names} cannot be used together ({error}); expected PEM files: a "
                "certificate chain, its private key without a passphrase, and authorities"
            ) from error
        chain = (_read(files.key), _read(files.certificate))
        roots = None if files.client_ca is None else _read(files.client_ca)
        return grpc.ssl_server_certificate_configuration([chain], roots)


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
