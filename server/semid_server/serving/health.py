"""`grpc.health.v1.Health`: whether the service serves, for who asks and for who watches.

As https://github.com/grpc/grpc/blob/master/doc/health-checking.md has it. Not gRPC's own servicer:
that one writes to each watcher under a lock that all others and every change of the status need, so
that a single peer that does not read keeps health from changing, and the drain from beginning.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    Context = grpc.aio.ServicerContext[Any, Any]


MOST_TOLD = 100
"""Characters of an unknown name that are told again."""


# ruff: noqa: N802 - the methods have the names of the contract
class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # generated, not annotated
    """Tells of the health of services, all of which are in the same.

    Not serving at first.

    Parameters
    ----------
    services : iterable of str
        Their names; "" stands for the server as a whole.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = tuple(services)
        self._status = health_pb2.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()

    def set(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        """Change the status, and have those who watch it told. Waits for nobody."""
        self._status = status
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """Tell the status of a service."""
        if request.service not in self._services:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"no service {request.service[:MOST_TOLD]!r} is known here",
            )
        return health_pb2.HealthCheckResponse(status=self._status)

    async def List(
        self,
        request: health_pb2.HealthListRequest,  # noqa: ARG002 - gRPC's signature
        context: Context,  # noqa: ARG002 - gRPC's signature
    ) -> health_pb2.HealthListResponse:
        """Tell the status of every service."""
        status = health_pb2.HealthCheckResponse(status=self._status)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, status))

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: Context,  # noqa: ARG002 - gRPC's signature
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Tell the status of a service, and again whenever it has changed.

        One that is slow to read is told of the last change, and not of those before.
        """
        if request.service not in self._services:
            # It may be there one day, says the protocol: here it never is.
            yield health_pb2.HealthCheckResponse(
                status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            )
            await asyncio.Event().wait()
        told = None
        while True:
            changed, status = self._changed, self._status
            if status != told:
                yield health_pb2.HealthCheckResponse(status=status)
                told = status
            await changed.wait()
