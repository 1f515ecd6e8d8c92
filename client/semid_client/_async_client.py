"""The asyncio client."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import grpc

from semid.v1 import semid_pb2 as pb
from semid_client._base import BaseClient, Flow
from semid_client._errors import ClientClosedError, ConfigurationError, ProtocolError
from semid_client._hedging import METHODS, settles
from semid_client._transfer import Decoding, Encoding

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from concurrent.futures import Future

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from semid_client._channel import Settings
    from semid_client._hedging import Hedging
    from semid_client._model import ModelInfo
    from semid_client._transfer import RowSource

T = TypeVar("T")


class AsyncClient(BaseClient):
    """A semid server, as seen from asyncio: `Client`, to be awaited.

    It takes the same arguments, and its methods raise the same errors as those of `Client`. Make it
    and use it in one running event loop: in another one each method, `close` included, raises
    `ClientClosedError`. A task that is cancelled cancels its calls.

    Raises
    ------
    ConfigurationError
        If an argument cannot be used, or no event loop is running.

    Examples
    --------
    >>> async with AsyncClient("localhost:50051") as client:
    ...     codes = await client.encode(embeddings)
    """

    async def encode(self, embeddings: ArrayLike, *, timeout: float | None = None) -> NDArray[Any]:  # noqa: ASYNC109 -- it goes to the server as the call's deadline
        """Codes of each embedding; see `Client.encode`, also for errors."""
        return await self._drive(self._encode_flow(embeddings, timeout))

    async def decode(
        self,
        codes: ArrayLike,
        mode: Literal["sum", "calibrated"] = "sum",
        *,
        timeout: float | None = None,  # noqa: ASYNC109 -- it goes to the server
    ) -> NDArray[Any]:
        """Reconstruction behind each semantic ID; see `Client.decode`, also for errors."""
        return await self._drive(self._decode_flow(codes, mode, timeout))

    async def encode_into(
        self,
        source: RowSource,
        sink: Callable[[int, NDArray[Any]], None],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 -- it goes to the server
    ) -> str:
        """Encode rows that need not fit in memory; see `Client.encode_into`, also for errors."""
        return await self._drive(self._transfer(Encoding(source), sink, timeout, patient=True))

    async def decode_into(
        self,
        source: RowSource,
        sink: Callable[[int, NDArray[Any]], None],
        mode: Literal["sum", "calibrated"] = "sum",
        *,
        calibration: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 -- it goes to the server
    ) -> str:
        """Decode codes that need not fit in memory; see `Client.decode_into`, also for errors."""
        transfer = Decoding(source, mode, calibration)
        return await self._drive(self._transfer(transfer, sink, timeout, patient=True))

    async def allocate(
        self,
        rows: int,
        width: int,
        dtype: DTypeLike = "float32",
        *,
        timeout: float | None = None,  # noqa: ASYNC109 -- it goes to the server
    ) -> NDArray[Any]:
        """Allocate an array encoded without a copy; see `Client.allocate`, also for errors."""
        return await self._drive(self._allocate_flow(rows, width, dtype, timeout))

    async def model(self, *, timeout: float | None = None) -> ModelInfo:  # noqa: ASYNC109 -- it goes to the server
        """Ask what the model is; see `Client.model`, also for errors."""
        return await self._drive(self._model_flow(timeout))

    async def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:  # noqa: ASYNC109 -- it goes to the server
        """Ask for every model that is served; see `Client.models`, also for errors."""
        return await self._drive(self._models_flow(timeout))

    async def wait_ready(self, timeout: float = 60.0) -> ModelInfo:  # noqa: ASYNC109 -- the same signature as Client's
        """Wait until the server answers; see `Client.wait_ready`, also for errors."""
        return await self._drive(self._ready_flow(timeout))

    async def close(self) -> None:
        """Close the connection. Calls under way fail with `ClientClosedError`.

        Raises
        ------
        ClientClosedError
            If the client was made in another event loop.
        """
        if self._forked:
            self._closed = True
            return
        self._check_loop()
        self._closed = True
        self._sharing.close()
        await self._channel.close()
        await self._shared_channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _open_channel(self, settings: Settings) -> grpc.aio.Channel:
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError as error:
            raise ConfigurationError(
                "no event loop is running: make an AsyncClient within the coroutine that uses it"
            ) from error
        if settings.credentials is None:
            return grpc.aio.insecure_channel(settings.target, settings.options)
        return grpc.aio.secure_channel(settings.target, settings.credentials, settings.options)

    def _start(
        self,
        method: str,
        request: Any,
        timeout: float,
        *,
        alone: bool,  # noqa: ARG002 -- all calls wait alike here
        shared: bool = False,
    ) -> Any:
        stub = self._shared_stub if shared else self._stub
        call = partial(getattr(stub, method), request, metadata=self._settings.metadata)
        if self._hedging and method in METHODS and not shared:
            return _Hedged(call, timeout, self._hedging)
        return call(timeout=timeout)

    async def _open_lease(self, request: pb.ShareMemoryRequest, timeout: float) -> _Lease:  # noqa: ASYNC109 -- the call itself has none: it lasts as long as the memory is shared
        call = self._shared_stub.ShareMemory(
            request, metadata=self._settings.metadata, wait_for_ready=True
        )
        try:
            response = await asyncio.wait_for(call.read(), timeout)
        except BaseException:
            call.cancel()
            raise
        if not isinstance(response, pb.ShareMemoryResponse):  # but EOF
            raise ProtocolError("the server ended ShareMemory without an answer")
        return _Lease(call, response.segment, asyncio.get_running_loop())

    def _pause(self, seconds: float) -> Any:
        return asyncio.sleep(seconds)

    def _wait_for(self, future: Future[Any], seconds: float) -> Any:
        return asyncio.wait([asyncio.wrap_future(future)], timeout=seconds)

    async def _drive(self, flow: Flow[T]) -> T:
        """Run a flow, awaiting whatever it yields."""
        self._check_loop()
        try:
            waiting = next(flow)
            while True:
                try:
                    result = await waiting
                except asyncio.CancelledError as error:
                    waiting = flow.throw(self._closed_or(error))
                except BaseException as error:  # noqa: BLE001 -- the flow decides, and cleans up
                    waiting = flow.throw(error)
                else:
                    waiting = flow.send(result)
        except StopIteration as done:
            value: T = done.value
            return value

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop and not self._forked:
            raise ClientClosedError(
                f"this client of {self.target} was made in another event loop, whose connections "
                "it has: make a client in each loop"
            )

    def _closed_or(self, error: asyncio.CancelledError) -> BaseException:
        """Tell a call that ended because the client was closed from a task that is cancelled."""
        task = asyncio.current_task()
        if self._closed and not (task and task.cancelling()):
            return ClientClosedError(f"the client of {self.target} was closed")
        return error


@dataclass(eq=False, weakref_slot=True, slots=True)
class _Lease:
    """A call of ShareMemory."""

    call: Any
    handle: str
    loop: asyncio.AbstractEventLoop

    @property
    def active(self) -> bool:
        return not self.call.done()

    def end(self) -> None:
        """End it; an array may be dropped in any thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.call.cancel)


class _Hedged:
    """A call that is made a second time if its answer does not come soon; see `Hedging`."""

    def __init__(self, start: Callable[..., Any], timeout: float, hedging: Hedging) -> None:
        self._start, self._timeout, self._hedging = start, timeout, hedging
        self._began = time.monotonic()
        self._calls = [start(timeout=timeout)]

    def __await__(self) -> Generator[Any, None, Any]:
        return self._first_answer().__await__()

    async def _first_answer(self) -> Any:
        attempts = [asyncio.ensure_future(self._calls[0])]
        try:
            done, _ = await asyncio.wait(attempts, timeout=self._hedging.wait(self._began))
            left = self._timeout - (time.monotonic() - self._began)
            if not done and left > 0 and self._hedging.take():
                self._calls.append(self._start(timeout=left))
                attempts.append(asyncio.ensure_future(self._calls[1]))
            answer = await self._settled(attempts)
        finally:
            self.cancel()
            for attempt in attempts:
                attempt.add_done_callback(_look_at)
        self._hedging.earn()
        return answer

    @staticmethod
    async def _settled(attempts: list[asyncio.Future[Any]]) -> Any:
        """Return or raise the first outcome that settles the call, or else the last one."""
        for attempt in asyncio.as_completed(attempts):
            try:
                return await attempt
            except grpc.RpcError as error:
                failure = error
                if settles(error):
                    break
        raise failure

    def cancel(self) -> None:
        """Cancel what is under way."""
        for call in self._calls:
            call.cancel()


def _look_at(attempt: asyncio.Future[Any]) -> None:
    """Take note of an outcome that nobody waits for: asyncio would log an error as lost."""
    if not attempt.cancelled():
        attempt.exception()
