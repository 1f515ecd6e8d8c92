"""The methods of `semid.v1.SemanticIdService`: messages to batcher and back."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import grpc
import grpc.aio
import numpy as np

from semid.v1 import semid_pb2 as pb
from semid.v1 import semid_pb2_grpc as pb_grpc
from semid_server.errors import (
    NotServingError,
    OverloadedError,
    SemidError,
    UnsupportedDecodeModeError,
)
from semid_server.serving import wire
from semid_server.serving.catalogue import Catalogue, PinnedCatalogue
from semid_server.serving.peers import PeerBytes, Untaken, caller_of
from semid_server.serving.received import (
    ReceivedEncode,
    decode_reader,
    decode_stream_reader,
    encode_reader,
    encode_stream_reader,
)
from semid_server.serving.shared_memory import Bounds, SharedMemory, SharedRows
from semid_server.serving.types import DecodeKey, EncodeKey, Payload, ServedModel, WorkKey

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    import numpy.typing as npt

    from semid_server.serving.batcher import Batcher
    from semid_server.serving.calls import Calls
    from semid_server.serving.config import ServeConfig

    Context = grpc.aio.ServicerContext[Any, Any]

Request = TypeVar("Request")
Response = TypeVar("Response")

STREAM_WINDOW = 8
"""Messages of one stream that may be in work at once: enough to keep a batch filling behind the
one that runs; the rest stays with the sender."""

STREAMS_SHARE = 4
"""What answers of one stream that wait to be taken may be, as a part of all that their caller may
have in work: its reciprocal."""


class _Asked(NamedTuple):
    """A request that was checked.

    ``nbytes`` is what it holds while it is in work; ``form`` is the field that its numbers came in,
    and ``write`` writes the response.
    """

    key: WorkKey
    payload: Payload
    nbytes: int
    form: str | None
    write: Callable[[npt.NDArray[Any], ServedModel, str | None], bytes]


# ruff: noqa: N802 - the methods have the names of the contract
class SemanticIdServicer(pb_grpc.SemanticIdServiceServicer):
    """Speaks the contract.

    Errors leave as `SemidError`; `calls` turns them into statuses.

    Parameters
    ----------
    batcher : Batcher
        Runs the work.
    catalogue : Catalogue
        What is served.
    config : ServeConfig
        The limits to keep and to publish.
    shared_memory : SharedMemory, optional
        What callers share with this process; nothing can be shared without it.
    on_received : callable, optional
        Told, for each request to encode, how its embeddings came (a value of `TRANSPORTS`) and how
        many bytes they are.
    on_refused : callable, optional
        Told of a request whose caller has too much in work already.
    clock : callable
        The batcher's clock.
    """

    def __init__(
        self,
        batcher: Batcher[WorkKey, Payload, npt.NDArray[Any]],
        catalogue: Catalogue,
        *,
        config: ServeConfig,
        shared_memory: SharedMemory | None = None,
        on_received: Callable[[str, int], None] = lambda _transport, _nbytes: None,
        on_refused: Callable[[WorkKey], None] = lambda _key: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batcher, self._catalogue = batcher, catalogue
        self._config, self._clock = config, clock
        self._shared_memory = shared_memory or SharedMemory(Bounds(0))
        self._on_received, self._on_refused = on_received, on_refused
        self._peers = PeerBytes(config.max_peer_bytes)
        self._certificates = config.verifies_callers
        self._tokens = config.token_file is not None
        self._draining = asyncio.Event()
        self._max_rows_of: dict[int, int] = {}

    @property
    def max_batch_rows(self) -> int:
        """Rows that no request may exceed, whatever its model."""
        return self._config.max_batch_rows

    def drain(self) -> None:
        """Read no further messages from streams; those admitted are still answered."""
        self._draining.set()

    def refusal(self) -> SemidError | None:
        """Return what a request is refused with before its message is read, if it is."""
        return self._batcher.refusal()

    # -- methods -----------------------------------------------------------------------------

    async def Encode(self, request: ReceivedEncode, context: Context) -> bytes:
        """Codes of each embedding."""
        # Nothing is awaited that need not be: each coroutine more costs a short request its part.
        if request.head.form == "rows":
            asked = await self._read_any_encode(request, self._catalogue)
        else:
            asked = self._read_encode(request, self._catalogue)
        answer = self._begin(asked, context)
        array = await answer if isinstance(answer, asyncio.Future) else answer
        if asked.form == "rows":
            return await self._write(asked, array)
        return asked.write(array, asked.key.model, asked.form)

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> bytes:
        """Reconstruction behind each semantic ID."""
        asked = await self._read_decode(request, self._catalogue)
        answer = self._begin(asked, context)
        array = await answer if isinstance(answer, asyncio.Future) else answer
        return await self._write(asked, array)

    async def EncodeStream(
        self, request_iterator: AsyncIterator[ReceivedEncode], context: Context
    ) -> AsyncIterator[bytes]:
        """Encode, message by message, in order."""
        pinned = PinnedCatalogue(self._catalogue)
        # Asked once, while the call is known to be there: it may end while a message is read.
        caller, deadline = self._caller(context), self._deadline(context)

        async def admit(message: ReceivedEncode) -> asyncio.Future[bytes]:
            asked = await self._read_any_encode(message, pinned)
            return self._written(asked, await self._admit_when_room(asked, caller, deadline))

        async with aclosing(self._stream(request_iterator, admit)) as responses:
            async for response in responses:
                yield wire.in_stream(response)

    async def DecodeStream(
        self, request_iterator: AsyncIterator[pb.DecodeStreamRequest], context: Context
    ) -> AsyncIterator[bytes]:
        """Decode, message by message, in order."""
        pinned = PinnedCatalogue(self._catalogue)
        caller, deadline = self._caller(context), self._deadline(context)
        # A part of what its caller may have in work: one stream that nobody reads must not hold up
        # the others of its caller.
        untaken = Untaken(self._config.max_peer_bytes // STREAMS_SHARE)

        async def admit(message: pb.DecodeStreamRequest) -> asyncio.Future[bytes]:
            asked = await self._read_decode(message.request, pinned)
            await untaken.room(asked.nbytes)
            admitted = await self._admit_when_room(asked, caller, deadline, untaken)
            return self._written(asked, admitted)

        try:
            # Closed first: what is admitted no more cannot be left behind.
            async with aclosing(self._stream(request_iterator, admit)) as responses:
                async for response in responses:
                    yield wire.in_stream(response)
                    untaken.take()
        finally:
            untaken.take_all()

    async def ShareMemory(
        self, request: pb.ShareMemoryRequest, context: Context
    ) -> AsyncIterator[pb.ShareMemoryResponse]:
        """Share memory for as long as this call lasts."""
        with self._shared_memory.shared(
            request.name, request.size_bytes, request.proof, context.peer()
        ) as segment:
            yield pb.ShareMemoryResponse(segment=segment.handle)
            await self._draining.wait()

    async def GetModel(
        self,
        request: pb.GetModelRequest,
        context: Context,  # noqa: ARG002 - gRPC's signature
    ) -> pb.GetModelResponse:
        """What one model is."""
        return pb.GetModelResponse(model=self._describe(self._catalogue.find(request.model)))

    async def ListModels(
        self,
        request: pb.ListModelsRequest,  # noqa: ARG002 - gRPC's signature
        context: Context,  # noqa: ARG002 - gRPC's signature
    ) -> pb.ListModelsResponse:
        """Every model that is served here."""
        default = self._catalogue.find("")
        models = [self._describe(model) for model in self._catalogue.models]
        return pb.ListModelsResponse(models=models, default_model=default.name)

    # -- inside ------------------------------------------------------------------------------

    def _read_encode(self, received: ReceivedEncode, catalogue: Catalogue) -> _Asked:
        """Check a request to encode, whose embeddings are not written out as numbers."""
        head = received.head
        model, form = catalogue.expect(head.model, head.fingerprint), head.form
        rows: Payload
        if form == "shared":
            rows, dtype = wire.read_shared(
                head.request,
                model,
                self._shared_memory,
                max_rows=self._max_shared_rows(model),
                max_bytes=self._config.max_batch_bytes,
            )
            self._on_received("shared_memory", rows.nbytes)
        else:
            rows, dtype = wire.read_embeddings(received, model, self._max_rows(model))
            self._on_received("message", rows.nbytes)
        return _Asked(EncodeKey(model, dtype), rows, rows.nbytes, form, wire.encode_response)

    async def _read_any_encode(self, received: ReceivedEncode, catalogue: Catalogue) -> _Asked:
        """Check a request to encode; numbers that are written out are converted by a thread."""
        head = received.head
        if head.form != "rows":
            return self._read_encode(received, catalogue)
        model = catalogue.expect(head.model, head.fingerprint)
        rows, dtype = await asyncio.to_thread(
            wire.read_embeddings, received, model, self._max_rows(model)
        )
        self._on_received("message", rows.nbytes)
        return _Asked(EncodeKey(model, dtype), rows, rows.nbytes, "rows", wire.encode_response)

    async def _read_decode(self, request: pb.DecodeRequest, catalogue: Catalogue) -> _Asked:
        """Check a request to decode."""
        model = catalogue.expect(request.model, request.expected_fingerprint)
        mode = wire.read_mode(request)
        if mode not in model.decode_modes:
            raise UnsupportedDecodeModeError(
                f"model {model.name!r} has no residual norms recorded, which decode mode "
                f"{mode.upper()} needs; its modes: {', '.join(model.decode_modes).upper()}. "
                "`semid calibrate` records them"
            )
        form = request.WhichOneof("codes")
        read, max_rows = wire.read_codes, self._max_rows(model)
        if form == "rows":
            codes = await asyncio.to_thread(read, request, model, max_rows)
        else:
            codes = read(request, model, max_rows)
        # What it holds while it is in work is its answer, many times larger than the codes.
        nbytes = len(codes) * model.input_dim * np.dtype(np.float32).itemsize
        key = DecodeKey(model, codes.shape[1], mode)
        calibration = model.calibration if mode == "calibrated" else ""
        write = partial(wire.decode_response, calibration=calibration)
        return _Asked(key, codes, nbytes, form, write)

    def _written(
        self, asked: _Asked, answer: asyncio.Future[npt.NDArray[Any]]
    ) -> asyncio.Future[bytes]:
        """Have the answer to a request written, once it is there, in the form that was asked for.

        To cancel that withdraws the request.
        """

        async def write() -> bytes:
            return await self._write(asked, await answer)

        written = asyncio.ensure_future(write())
        # One that is cancelled before it has begun does not pass that on by itself. To cancel what
        # has failed already says that nobody wants to hear of it.
        written.add_done_callback(lambda done: answer.cancel() if done.cancelled() else None)
        return written

    async def _write(self, asked: _Asked, array: npt.NDArray[Any]) -> bytes:
        model, form = asked.key.model, asked.form
        if form == "rows":
            return await asyncio.to_thread(asked.write, array, model, form)
        return asked.write(array, model, form)

    def _begin(
        self, asked: _Asked, context: Context
    ) -> asyncio.Future[npt.NDArray[Any]] | npt.NDArray[Any]:
        """Have a request answered, at once if that is a short matter; or refuse it at once."""
        key, payload, nbytes = asked.key, asked.payload, asked.nbytes
        rows = len(payload)
        answer: asyncio.Future[npt.NDArray[Any]] | npt.NDArray[Any] | None = None
        # Who calls is no matter where nobody has anything in work, before or after.
        alone = asked.form == "tensor" and isinstance(key, EncodeKey) and self._peers.idle
        if alone:
            answer = self._batcher.answer_now(key, payload, rows=rows, nbytes=nbytes)
            if answer is not None:
                return answer
        caller = self._caller(context)
        self._take(key, caller, nbytes)
        if isinstance(payload, SharedRows):
            payload.need()
        let_go = self._let_go(payload, caller, nbytes)
        try:
            if not alone:
                answer = self._batcher.answer_now(key, payload, rows=rows, nbytes=nbytes)
            if answer is None:
                answer = self._batcher.admit(
                    key, payload, rows=rows, nbytes=nbytes, deadline=self._deadline(context)
                )
        except BaseException:
            let_go()
            raise
        # What Decode holds is its answer: until its caller has taken it, or it would be easy to
        # fill the memory with answers that nobody reads. gRPC tells when that is so.
        if isinstance(key, DecodeKey):
            context.add_done_callback(let_go)  # type: ignore[arg-type]  # the stubs know no function
        elif isinstance(answer, asyncio.Future):
            answer.add_done_callback(let_go)
        else:
            let_go()
        return answer

    async def _admit_when_room(
        self,
        asked: _Asked,
        caller: str,
        deadline: float | None,
        untaken: Untaken | None = None,
    ) -> asyncio.Future[npt.NDArray[Any]]:
        """Admit a request of a stream once there is room for it.

        If ``untaken`` is given, what lets go of it is put there, to be called when its answer has
        been taken.
        """
        key, payload, nbytes = asked.key, asked.payload, asked.nbytes
        if isinstance(payload, SharedRows):
            payload.need()
        try:
            await self._peers.take_when_room(caller, nbytes)
        except BaseException:
            if isinstance(payload, SharedRows):
                payload.release()
            raise
        let_go = self._let_go(payload, caller, nbytes)
        try:
            future = await self._batcher.admit_when_room(
                key, payload, rows=len(payload), nbytes=nbytes, deadline=deadline
            )
        except BaseException:
            let_go()
            raise
        if untaken is None:
            future.add_done_callback(let_go)
        else:
            untaken.add(nbytes, let_go)
        return future

    def _let_go(self, payload: Payload, caller: str, nbytes: int) -> Callable[..., None]:
        """Return what gives back all that is held for a request, however it ends."""

        def let_go(_future: object = None) -> None:
            self._peers.give_back(caller, nbytes)
            if isinstance(payload, SharedRows):
                payload.release()

        return let_go

    def _caller(self, context: Context) -> str:
        return caller_of(context, certificates=self._certificates, tokens=self._tokens)

    def _deadline(self, context: Context) -> float | None:
        remaining = context.time_remaining()
        return None if remaining is None else self._clock() + remaining

    def _take(self, key: WorkKey, caller: str, nbytes: int) -> None:
        try:
            self._peers.take(caller, nbytes)
        except OverloadedError:
            self._on_refused(key)
            raise

    async def _stream(
        self,
        messages: AsyncIterator[Request],
        admit: Callable[[Request], Awaitable[asyncio.Future[Response]]],
    ) -> AsyncGenerator[Response, None]:
        """Answer messages in order, with up to `STREAM_WINDOW` of them in work.

        A message is read only when the one before it was admitted, and admission waits for room:
        a sender faster than the device is slowed down by gRPC's flow control, not refused.
        """
        answers: asyncio.Queue[asyncio.Future[Response] | Exception | None] = asyncio.Queue(
            STREAM_WINDOW
        )
        reader = asyncio.create_task(self._read_stream(messages, admit, answers))
        index = 0
        try:
            while (answer := await answers.get()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                try:
                    response = await answer
                except SemidError as error:
                    raise _in_message(error, index) from error
                yield response
                index += 1
        finally:
            reader.cancel()
            while not answers.empty():
                if isinstance(answer := answers.get_nowait(), asyncio.Future):
                    answer.cancel()
            # It reads from the call, which ends with this.
            await asyncio.wait({reader})

    async def _read_stream(
        self,
        messages: AsyncIterator[Request],
        admit: Callable[[Request], Awaitable[asyncio.Future[Response]]],
        answers: asyncio.Queue[asyncio.Future[Response] | Exception | None],
    ) -> None:
        """Read, admit and queue messages until they end, one fails, or the server drains.

        Puts the future of each answer, and at last None or the error that ended the reading.
        """
        drained = asyncio.ensure_future(self._draining.wait())
        index = 0
        try:
            while True:
                message = asyncio.ensure_future(anext(messages))
                try:
                    await asyncio.wait({message, drained}, return_when=asyncio.FIRST_COMPLETED)
                    if not message.done():
                        raise NotServingError("the server is shutting down; it was not read")
                    answer = await admit(message.result())
                finally:
                    message.cancel()
                try:
                    await answers.put(answer)
                except asyncio.CancelledError:  # it is not among those that the stream cancels
                    answer.cancel()
                    raise
                index += 1
        except StopAsyncIteration:
            await answers.put(None)
        except SemidError as error:
            await answers.put(_in_message(error, index))
        except Exception as error:  # noqa: BLE001 - raised where the answers are awaited
            await answers.put(error)
        finally:
            drained.cancel()

    def _max_rows(self, model: ServedModel) -> int:
        rows = self._max_rows_of.get(model.input_dim)
        if rows is None:
            rows = self._max_rows_of[model.input_dim] = self._config.max_rows(model.input_dim)
        return rows

    def _max_shared_rows(self, model: ServedModel) -> int:
        return self._config.max_shared_rows(len(model.codebook_widths) * model.code_dtype.itemsize)

    def _describe(self, model: ServedModel) -> pb.Model:
        return wire.model_message(
            model,
            max_message_bytes=self._config.max_message_bytes,
            max_rows=self._max_rows(model),
            shared_memory=self._shared_memory_limits(model),
        )

    def _shared_memory_limits(self, model: ServedModel) -> pb.SharedMemoryLimits | None:
        if not self._shared_memory.offered:
            return None
        bounds = self._shared_memory.of_connection
        return pb.SharedMemoryLimits(
            max_bytes=bounds.nbytes,
            max_segments=bounds.segments,
            max_rows=self._max_shared_rows(model),
            max_request_bytes=self._config.max_batch_bytes,
        )


def add_to_server(servicer: SemanticIdServicer, server: grpc.aio.Server, calls: Calls) -> None:
    """Have a server answer with a servicer's methods, within what ``calls`` does around them.

    As the generated function does, but for large messages (see `received` and `wire`), and not as
    methods that gRPC waits for one by one, which would cost each call a little for every method.
    """
    methods = _Methods()
    add: Any = pb_grpc.add_SemanticIdServiceServicer_to_server  # generated, not annotated
    add(servicer, methods)
    rows = servicer.max_batch_rows
    # Their responses are written already.
    methods.handlers |= {
        "Encode": grpc.unary_unary_rpc_method_handler(servicer.Encode, encode_reader(rows), bytes),
        "Decode": grpc.unary_unary_rpc_method_handler(servicer.Decode, decode_reader(rows), bytes),
        "EncodeStream": grpc.stream_stream_rpc_method_handler(
            servicer.EncodeStream, encode_stream_reader(rows), bytes
        ),
        "DecodeStream": grpc.stream_stream_rpc_method_handler(
            servicer.DecodeStream, decode_stream_reader(rows), bytes
        ),
    }
    calls.serve(methods.handlers, {"Encode": servicer.refusal, "Decode": servicer.refusal})
    server.add_generic_rpc_handlers((calls,))


class _Methods:
    """Stands in for a server, to learn from the generated code what the methods are."""

    def __init__(self) -> None:
        self.handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Take what `add_registered_method_handlers` is about to be given by name."""

    def add_registered_method_handlers(
        self,
        service: str,  # noqa: ARG002 - there is but one
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]],
    ) -> None:
        """Keep the handlers of the methods."""
        self.handlers.update(handlers)


def _in_message(error: SemidError, index: int) -> SemidError:
    """Return what ``error`` is to a stream. It stays as it was: other callers may get the same."""
    # Not copy.copy: that calls constructors, whose arguments errors do not keep.
    told = type(error).__new__(type(error), f"message {index} of the stream: {error}")
    vars(told).update(vars(error))
    return told
