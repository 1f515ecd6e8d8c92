"""`semid health`: what the standard health service of a server says, as an exit status."""

from __future__ import annotations

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


@click.command()
@click.option(
    "--target",
    default="127.0.0.1:50051",
    show_default=True,
    envvar="SEMID_TARGET",
    show_envvar=True,
    help="HOST:PORT of the server.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    help="Seconds to wait for an answer.",
)
def health(target: str, timeout: float) -> None:
    """Exit with 0 if the server at TARGET is ready for requests, else with 1.

    It asks the standard gRPC health service, as an orchestrator would: the health check of the
    container image, and a way to wait for a server in a script.
    """
    with grpc.insecure_channel(target) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout
            )
        except grpc.RpcError as error:
            raise click.ClickException(
                f"{target}: {error.code().name}: {error.details()}"
            ) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise click.ClickException(f"{target}: {status}")
    click.echo(f"{target}: {status}")
