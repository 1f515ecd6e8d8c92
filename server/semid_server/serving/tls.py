"""TLS and mutual TLS, with certificates that are read again when their files change."""

from __future__ import annotations

import base64
import logging
import re
import ssl
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import grpc

from semid_server.errors import ConfigurationError
from semid_server.files import read_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

logger = logging.getLogger(__name__)

ATTEMPTS: Final = 3
"""How often files that change while they are read are read again."""

TAKES: Final = "RSA (not RSA-PSS), and ECDSA on P-256 or P-384"
"""Keys that a handshake between gRPC and gRPC can be made with."""

REFUSED_BY_CLIENTS: Final = {
    "Ed25519": bytes.fromhex("300506032b6570032100"),
    "ECDSA P-521": bytes.fromhex("301006072a8648ce3d020106052b81040023"),
}
"""Keys that gRPC serves with, though no client built on its C core offers such signatures; and how
they are told in a certificate (RFC 8410, RFC 5480). Nothing else of one reads so: what it is signed
with does not."""

_FIRST = re.compile(rb"-----BEGIN [A-Z0-9 ]*CERTIFICATE-----(.*?)-----END", re.DOTALL)


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
    """What gRPC is given at every handshake: the files as they last were seen, and good.

    Handshakes wait for no disk, which may hang: `look` is for a thread, in short intervals. It
    reads the files, which are small, rather than compare times: of two changes within a tick of the
    clock it misses none, nor that a file may be read again.

    Parameters
    ----------
    files : TlsFiles
        Where they are.

    Raises
    ------
    ConfigurationError
        A file cannot be read, key and certificate are not a pair, or gRPC or its clients do not
        take them.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._pems = _usable(files)
        # What could not be used, None if it could not be read, and why: the last that the log has.
        self._refused: tuple[Pems | None, str] | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Server credentials that follow the files."""
        given = self._pems

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            new = self._pems
            if new is given:
                return None
            given = new
            return _configuration(new)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(given),
            changed,  # type: ignore[arg-type]  # None is documented: nothing has changed
            require_client_authentication=self._files.client_ca is not None,
        )

    def look(self) -> None:
        """Take up what the files hold now, if that is new and can be used. It reads the disk.

        While they cannot be used (a renewal that has written one file of two, say) the last good
        ones stay, and the log says why, once for each state of the files.
        """
        found = None
        try:
            found = _read_all(self._files, _read)
            if found == self._pems:
                self._refused = None
                return
            pems = _usable(self._files)
        except ConfigurationError as error:
            refused = found, str(error)
            if refused != self._refused:
                logger.error("%s; the certificates read before stay in use", error)  # noqa: TRY400 - no bug
            self._refused = refused
            return
        self._pems, self._refused = pems, None
        logger.info("new certificates read from %s", self._files.certificate)


def _configuration(pems: Pems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.key, pems.certificate)], pems.client_ca)


def _usable(files: TlsFiles) -> Pems:
    pems = read_pems(files)
    if (kind := refused_by_clients(pems.certificate)) is not None:
        raise ConfigurationError(
            f"TLS: the key of {files.certificate} is of type {kind}, which gRPC's clients refuse "
            f"in every handshake; they take {TAKES}"
        )
    if not grpc_takes(pems):
        raise ConfigurationError(
            f"TLS: gRPC takes no certificate and key such as {files.certificate} and {files.key}, "
            f"though they are a pair; it takes {TAKES}"
        )
    return pems


def refused_by_clients(certificate: bytes) -> str | None:
    """Return the type of the key in the first certificate if it is one of `REFUSED_BY_CLIENTS`."""
    first = _FIRST.search(certificate)
    if first is None:  # of no form that OpenSSL, or gRPC, would know
        return None
    der = base64.b64decode(first[1])
    return next((kind for kind, told in REFUSED_BY_CLIENTS.items() if told in der), None)


def grpc_takes(pems: Pems) -> bool:
    """Whether gRPC serves with a certificate and key.

    It has a TLS of its own, which knows fewer algorithms than Python's, and says that it cannot
    only to its log: at the start as if the port could not be bound, later by going on with the
    certificate before. So a server of no services is opened for it, in the machine alone.
    """
    credentials = grpc.dynamic_ssl_server_credentials(
        _configuration(pems),
        _same,  # type: ignore[arg-type]  # None is documented: nothing has changed
    )
    if _opens(lambda server, address: server.add_secure_port(address, credentials)):
        return True
    if not _opens(lambda server, address: server.add_insecure_port(address)):
        logger.warning("TLS: no abstract socket can be had to see whether gRPC takes a certificate")
        return True
    return False


def _same() -> None:
    """Keep to the certificate that a server began with."""


def _opens(add: Callable[[grpc.Server, str], int]) -> bool:
    server = grpc.server(ThreadPoolExecutor(1))
    try:
        add(server, f"unix-abstract:semid-{uuid.uuid4()}")
    except RuntimeError:
        return False
    finally:
        server.start()  # without which its socket would not be closed
        server.stop(None).wait()
    return True


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


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise ConfigurationError(f"TLS: {path}: {error.strerror}") from error
