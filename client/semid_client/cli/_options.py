"""The flags that say which server to use and how, for every command that calls one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from semid_client._channel import TLS
from semid_client._client import Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from semid_client._fingerprints import OnFingerprintChange

F = TypeVar("F", bound="Callable[..., Any] | click.Command")

PEM = click.Path(exists=True, dir_okay=False)


def option(*names: str, env: str = "SEMID", **attributes: Any) -> Callable[[F], F]:
    """Return a `click.option` with its environment twin: ``env``, and the long flag's name."""
    flag = next(name[2:] for name in names if name.startswith("--"))
    envvar = f"{env}_{flag.replace('-', '_').upper()}"
    return click.option(*names, envvar=envvar, show_envvar=True, **attributes)


def _target(*, required: bool) -> Callable[[F], F]:
    return option(
        "--target",
        required=required,
        metavar="HOST:PORT",
        help="The server. A gRPC name such as dns:///HOST:PORT uses all its addresses in turn.",
    )


OPTIONS = (
    option(
        "--model",
        default="",
        help="Name of the model, where the server has several. Default: the server's.",
    ),
    option(
        "--fingerprint",
        default="",
        metavar="SHA256",
        help="Refuse to work with any other model than this one. Set it to add to codes that are "
        "stored, and to decode them.",
    ),
    option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        default=60.0,
        show_default=True,
        help="Seconds to wait for one message's answer, a busy or restarting server included. "
        "Raise it for a slow server.",
    ),
    option(
        "--in-flight",
        type=click.IntRange(1),
        default=4,
        show_default=True,
        help="Messages of 1 MiB under way at once. Raise it when the server is far away.",
    ),
    option(
        "--tls",
        is_flag=True,
        help="Encrypt, and check the server's certificate against the public authorities.",
    ),
    option(
        "--ca",
        type=PEM,
        help="PEM file of the authorities to check it against instead. Implies --tls.",
    ),
    option(
        "--cert",
        type=PEM,
        help="PEM file of a client certificate, if the server asks for one. Implies --tls.",
    ),
    option("--key", type=PEM, help="PEM file of its private key."),
    option(
        "--token",
        help="Sent as `authorization: Bearer`. Better set by the environment: other users of the "
        "machine can read a command line.",
    ),
    option(
        "--allow-plaintext-token",
        is_flag=True,
        help="Send the token to another machine unencrypted. Only across a network you trust.",
    ),
)


def connection_options(command: F, *, required: bool = True) -> F:
    """Add the flags to a command, which hands them to `connect`.

    Not ``required``, there may be no server: then the target is None.
    """
    for add in reversed(OPTIONS):
        command = add(command)
    return _target(required=required)(command)


def connect(
    *,
    target: str,
    model: str,
    fingerprint: str,
    timeout: float,
    in_flight: int,
    tls: bool,
    ca: str | None,
    cert: str | None,
    key: str | None,
    token: str | None,
    allow_plaintext_token: bool,
    on_fingerprint_change: OnFingerprintChange = "warn",
) -> Client:
    """Make a client of what the flags say."""
    return Client(
        target,
        model=model,
        expected_fingerprint=fingerprint,
        on_fingerprint_change=on_fingerprint_change,
        timeout=timeout,
        max_in_flight=in_flight,
        tls=TLS.from_files(ca, cert, key) if tls or ca or cert or key else None,
        token=token,
        allow_plaintext_token=allow_plaintext_token,
    )
