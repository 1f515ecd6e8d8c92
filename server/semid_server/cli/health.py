"""`semid health`: what the standard health service of a server says, as an exit status."""

from __future__ import annotations

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from semid_client import TLS
from semid_client._channel import check_target
from semid_client.cli._options import PEM, option


@click.command()
@option("--target", default="127.0.0.1:50051", show_default=True, help="HOST:PORT of the server.")
@option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    show_default=True,
    env="SEMID_HEALTH",
    help="Seconds to wait for an answer. Keep it under the interval of the check.",
)
@option("--tls", is_flag=True, help="Encrypt; for a server that was given --tls-cert.")
@option("--ca", type=PEM, help="PEM file of the server's authorities. Implies --tls.")
@option("--cert", type=PEM, help="PEM file of a client certificate. Implies --tls.")
@option("--key", type=PEM, help="PEM file of its private key.")
def health(
    target: str, timeout: float, *, tls: bool, ca: str | None, cert: str | None, key: str | None
) -> None:
    """Exit with 0 if the server at TARGET is ready for requests, else with 1.

    It asks the standard gRPC health service, as an orchestrator would: the health check of the
    container image, and a way to wait for a server in a script.
    """
    check_target(target)
    encrypted = TLS.from_files(ca, cert, key) if tls or ca or cert or key else None
    with open_channel(target, encrypted) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout
            )
        except grpc.RpcError as error:
            raise click.ClickException(
                f"{target}: {error.code().name}: {error.details()}"
            ) from error
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise click.ClickException(f"{target}: {status}")
    click.echo(f"{target}: {status}")


def open_channel(target: str, tls: TLS | None) -> grpc.Channel:
    """Open a channel of gRPC's own, without any of the client's settings."""
    if tls is None:
        return grpc.insecure_channel(target)
    return grpc.secure_channel(
        target,
        grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain),
    )
