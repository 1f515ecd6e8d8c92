"""Messages on their way: who waits for one, and who is given up. gRPC's part is played here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from types import SimpleNamespace

import grpc
import grpc.aio
import numpy as np
import pytest

from semid.v1 import semid_pb2 as pb
from semid.v1 import semid_pb2_grpc as pb_grpc
from semid_server.errors import InvalidInputError, OverloadedError
from semid_server.serving import incoming as module
from semid_server.serving.calls import Calls
from semid_server.serving.incoming import FEW, Guarded, Incoming
from semid_server.serving.metrics import Metrics

LIMIT = 1000


class FakeMemory:
    """Memory of which a test says what is in use."""

    limit = LIMIT

    def __init__(self):
        self.used = 0
        self.looks = 0

    def in_use(self):
        self.looks += 1
        return self.used


class Context:
    """A call whose message comes when the test says so."""

    def __init__(self, caller):
        self.caller = caller
        self.coming = asyncio.get_running_loop().create_future()
        self.aborted = None

    def peer(self):
        return f"ipv4:192.0.2.1:{id(self) % 60000}"

    async def read(self):
        return await self.coming

    async def abort(self, code, message, _metadata=()):
        self.aborted = code, message
        error = grpc.aio.AbortError("aborted")
        if not self.coming.done():
            self.coming.set_exception(error)
        raise error


@pytest.fixture
def memory():
    return FakeMemory()


@pytest.fixture
def incoming(memory):
    return Incoming(memory, caller=lambda context: context.caller)


@pytest.fixture
async def wait(incoming):
    """Return a function that has a call wait for its message."""
    tasks = []

    async def start(caller="somebody", waiting=None):
        context = Context(caller)

        async def give_up(error):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))

        waiting = incoming.calls if waiting is None else waiting
        context.task = asyncio.ensure_future(incoming.message(context, waiting, give_up))
        tasks.append(context.task)
        await asyncio.sleep(0)
        return context

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def looked(memory, times=1):
    """Wait until the memory has been looked at so often again, and what follows has been done."""
    until = memory.looks + times
    async with asyncio.timeout(10):
        while memory.looks < until:
            await asyncio.sleep(0.005)
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_a_message_that_comes_is_returned_and_its_call_waits_no_more(incoming, wait):
    context = await wait()
    assert len(incoming.calls) == incoming.calls.of("somebody") == 1
    context.coming.set_result(b"message")
    assert await context.task == b"message"
    assert len(incoming.calls) == incoming.calls.of("somebody") == 0


async def test_after_the_last_message_there_is_none(wait):
    context = await wait()
    context.coming.set_result(grpc.aio.EOF)
    assert await context.task is None


async def test_a_call_whose_caller_leaves_waits_no_more(incoming, wait):
    context = await wait()
    context.task.cancel()
    await asyncio.wait({context.task})
    assert len(incoming.calls) == 0


async def test_while_there_is_memory_nobody_is_given_up(incoming, memory, wait):
    memory.used = LIMIT
    contexts = [await wait() for _ in range(3 * FEW)]
    await looked(memory, 2)
    assert incoming.refusal() is None
    assert not any(context.aborted for context in contexts)


async def test_of_a_few_calls_nobody_looks_what_they_take(memory, wait):
    memory.used = LIMIT + 1
    for _ in range(FEW):
        await wait()
    await asyncio.sleep(5 * module.SOONEST)
    assert memory.looks == 0


async def test_when_memory_is_short_those_who_have_waited_longest_are_given_up(
    incoming, memory, wait, caplog
):
    contexts = [await wait() for _ in range(2 * FEW)]
    memory.used = LIMIT + 1
    with caplog.at_level(logging.WARNING):
        await looked(memory)
    gone = [context.aborted is not None for context in contexts]
    count = gone.count(True)
    assert module.LEAST_AT_ONCE <= count < FEW
    assert gone == [True] * count + [False] * (len(gone) - count)
    code, message = contexts[0].aborted
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "1001 bytes are in use" in message
    assert "no more than 1000 (--max-memory-bytes)" in message
    assert len(incoming.calls) == len(contexts) - count
    assert incoming.refusal() is not None
    (told,) = caplog.messages
    assert message in told
    with pytest.raises(grpc.aio.AbortError):
        await contexts[0].task


async def test_when_memory_is_there_again_nobody_more_is_given_up(incoming, memory, wait):
    contexts = [await wait() for _ in range(2 * FEW)]
    memory.used = LIMIT + 1
    await looked(memory)
    memory.used = LIMIT
    gone = [context.aborted for context in contexts]
    await looked(memory, 2)
    assert gone == [context.aborted for context in contexts]
    assert incoming.refusal() is None


async def test_as_long_as_memory_is_short_all_who_wait_are_given_up(incoming, memory, wait):
    contexts = [await wait() for _ in range(2 * FEW)]
    memory.used = LIMIT + 1
    async with asyncio.timeout(20):
        while len(incoming.calls):
            await looked(memory)
    await asyncio.wait([context.task for context in contexts])
    assert all(context.aborted for context in contexts)
    assert len(incoming.calls) == 0


async def test_the_caller_with_the_most_calls_goes_first(incoming, memory, wait):
    modest = [await wait("modest") for _ in range(3)]
    greedy = [await wait("greedy") for _ in range(2 * FEW)]
    memory.used = LIMIT + 1
    await looked(memory)
    assert greedy[0].aborted
    assert not any(context.aborted for context in modest)


async def test_streams_go_last_and_a_few_of_them_never(incoming, memory, wait):
    streams = [await wait("streams", incoming.streams) for _ in range(2 * FEW)]
    others = [await wait("others", incoming.others) for _ in range(2)]
    calls = [await wait("calls") for _ in range(module.LEAST_AT_ONCE)]
    memory.used = LIMIT + 1
    order = []
    async with asyncio.timeout(20):
        while len(incoming.streams) > FEW:
            await looked(memory)
            gone = [sum(1 for one in kind if one.aborted) for kind in (calls, others, streams)]
            order.append(gone)
    await asyncio.sleep(5 * module.SOONEST)
    assert order[0] == [len(calls), 1, 0]  # one in eight of all
    assert order[1] == [len(calls), 2, module.LEAST_AT_ONCE - 1]
    assert len(incoming.streams) == FEW
    assert not len(incoming.calls)
    assert not len(incoming.others)


async def test_a_message_that_has_come_meanwhile_is_not_given_up(incoming, memory, wait):
    contexts = [await wait() for _ in range(2 * FEW)]
    memory.used = LIMIT + 1
    # It comes at the very moment at which its call is chosen.
    chosen = incoming._give_up

    def give_up(waiting, awaited, error):
        if not contexts[0].coming.done():
            contexts[0].coming.set_result(b"message")
        chosen(waiting, awaited, error)

    incoming._give_up = give_up
    await looked(memory)
    assert await contexts[0].task == b"message"
    assert contexts[0].aborted is None


async def test_a_call_that_cannot_be_given_up_any_more_is_no_fault(incoming, memory, wait, caplog):
    contexts = [await wait() for _ in range(2 * FEW)]

    async def left(*_arguments):
        contexts[0].task.cancel()
        raise RuntimeError("its caller has left")

    contexts[0].abort = left
    memory.used = LIMIT + 1
    with caplog.at_level(logging.DEBUG, module.__name__):
        await looked(memory)
        memory.used = LIMIT
        async with asyncio.timeout(20):
            while not any("its caller has left" in message for message in caplog.messages):
                await asyncio.sleep(0.005)
    assert contexts[1].aborted


async def test_where_there_is_plenty_of_memory_it_is_looked_at_seldom(memory, wait):
    memory.limit = 1 << 40
    for _ in range(2 * FEW):
        await wait()
    await looked(memory)
    looks = memory.looks
    await asyncio.sleep(0.3)
    assert memory.looks - looks <= 1


async def test_when_few_are_left_nobody_looks_any_more_until_somebody_asks(incoming, memory, wait):
    contexts = [await wait() for _ in range(2 * FEW)]
    memory.used = LIMIT + 1
    await looked(memory)
    for context in contexts:
        context.task.cancel()
    await asyncio.wait([context.task for context in contexts])
    await asyncio.sleep(3 * module.SOONEST)
    looks = memory.looks
    await asyncio.sleep(5 * module.SOONEST)
    assert memory.looks == looks
    memory.used = LIMIT
    incoming.watch()
    await looked(memory)
    assert incoming.refusal() is None


async def test_those_with_most_go_in_turn():
    waiting, calls = module.Waiting(), {}
    for caller, count in (("one", 1), ("four", 4), ("two", 2)):
        calls[caller] = [module.Awaited(caller, "", None) for _ in range(count)]
        for call in calls[caller]:
            waiting.add(call)
    order = waiting.next_to_go(100)
    assert order[:2] == calls["four"][:2]
    assert {*order[2:4]} == {calls["four"][2], calls["two"][0]}
    assert {*order[4:]} == {calls["four"][3], calls["two"][1], calls["one"][0]}
    assert waiting.next_to_go(1) == calls["four"][:1]
    waiting.renew(calls["four"][0])
    assert waiting.next_to_go(1) == calls["four"][1:2]
    waiting.discard(calls["four"][1])
    waiting.discard(calls["four"][1])
    waiting.renew(calls["four"][1])  # it is out, and stays so
    assert len(waiting) == len(waiting.next_to_go(100)) == 6
    assert module.Waiting().next_to_go(1) == []


async def test_who_takes_not_even_the_status_loses_the_connection(
    incoming, memory, wait, monkeypatch
):
    cut = []
    contexts = [await wait() for _ in range(2 * FEW)]
    stuck = asyncio.get_running_loop().create_future()

    def cut_off(peer):
        cut.append(peer)
        stuck.set_exception(RuntimeError("the connection is gone"))
        return True

    async def abort(*_arguments):
        await stuck

    monkeypatch.setattr(module, "cut_off", cut_off)
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    contexts[0].abort = abort
    memory.used = LIMIT + 1
    await looked(memory)
    memory.used = LIMIT
    async with asyncio.timeout(20):
        await asyncio.wait({contexts[0].task})
    assert cut == [contexts[0].peer()]
    assert contexts[0].task.cancelled()


async def test_who_asks_for_it_has_memory_looked_at_whoever_waits(incoming, memory):
    memory.used = LIMIT + 1
    incoming.watch()
    await looked(memory)
    assert incoming.refusal() is not None


async def test_without_a_limit_nobody_is_given_up(wait, incoming):
    incoming._memory = None
    contexts = [await wait() for _ in range(3 * FEW)]
    incoming.watch()
    await asyncio.sleep(3 * module.SOONEST)
    assert incoming.refusal() is None
    assert not any(context.aborted for context in contexts)


# -- room ------------------------------------------------------------------------------------


async def test_who_has_fewer_calls_on_their_way_takes_the_place_of_who_has_more(incoming, wait):
    greedy = [await wait("greedy") for _ in range(3)]
    assert incoming.make_way(SimpleNamespace(caller="new"))
    await asyncio.wait({one.task for one in greedy}, return_when=asyncio.FIRST_COMPLETED)
    code, message = greedy[0].aborted
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "3. This had waited longest" in message
    assert not any(context.aborted for context in greedy[1:])


async def test_nobody_makes_way_for_who_has_as_many(incoming, wait):
    contexts = [await wait(caller) for caller in ("one", "one", "other", "other")]
    assert not incoming.make_way(SimpleNamespace(caller="one"))
    contexts.append(await wait("other"))
    assert not incoming.make_way(SimpleNamespace(caller="one"))  # it would be the one with three
    assert incoming.make_way(SimpleNamespace(caller="new"))
    await asyncio.wait({one.task for one in contexts}, return_when=asyncio.FIRST_COMPLETED)
    assert [context.aborted is not None for context in contexts] == [0, 0, 1, 0, 0]


async def test_where_no_message_is_on_its_way_nobody_makes_way(incoming, wait):
    await wait("somebody", incoming.streams)
    assert not incoming.make_way(SimpleNamespace(caller="new"))


# -- other services --------------------------------------------------------------------------


@pytest.fixture
async def other(memory):
    """Serve a service of another kind, and return a channel to it."""

    async def shout(request, context):
        return request.upper()

    async def spell(request, context):
        for letter in request:
            yield bytes([letter])

    async def shout_each(requests, context):
        async for request in requests:
            yield request.upper()

    def read(message):
        if message == b"broken":
            raise module.DecodeError
        return message

    service = grpc.method_handlers_generic_handler(
        "Other",
        {
            "Shout": grpc.unary_unary_rpc_method_handler(shout, read, bytes),
            "Spell": grpc.unary_stream_rpc_method_handler(spell, read, bytes),
            "ShoutEach": grpc.stream_stream_rpc_method_handler(shout_each, read, bytes),
        },
    )
    incoming = Incoming(memory)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Guarded(service, incoming),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield SimpleNamespace(channel=channel, incoming=incoming)
    await server.stop(None)


async def read_all(call):
    return [message async for message in call]


async def test_another_service_answers_as_it_would_by_itself(other):
    channel = other.channel
    assert await channel.unary_unary("/Other/Shout")(b"abc") == b"ABC"
    assert await read_all(channel.unary_stream("/Other/Spell")(b"abc")) == [b"a", b"b", b"c"]
    shouted = channel.stream_stream("/Other/ShoutEach")(iter([b"abc", b"", b"d"]))
    assert await read_all(shouted) == [b"ABC", b"", b"D"]
    assert len(other.incoming.others) == 0
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await channel.unary_unary("/Other/Whisper")(b"abc")
    assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("messages", "words"), [([b"broken"], module.UNREADABLE), ([], module.NO_MESSAGE)]
)
@pytest.mark.parametrize("method", ["Shout", "Spell"])
async def test_a_call_of_another_service_without_a_message_of_it_is_told_so(
    other, method, messages, words
):
    make = other.channel.stream_unary if method == "Shout" else other.channel.stream_stream
    call = make(f"/Other/{method}")(iter(messages))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await call.details() == words


async def test_calls_of_another_service_that_send_nothing_are_given_up(other, memory):
    begin = other.channel.stream_unary("/Other/Shout")
    never = asyncio.Event()

    async def nothing():
        await never.wait()
        yield b""

    memory.used = LIMIT + 1
    calls = [begin(nothing()) for _ in range(FEW + 1)]
    async with asyncio.timeout(20):
        codes = [await call.code() for call in calls]
    assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert len(other.incoming.others) == 0


# -- the service -----------------------------------------------------------------------------


ENCODE = "/semid.v1.SemanticIdService/Encode"


@pytest.fixture
def of_service(memory):
    """What waits for the messages of a service; each connection is a caller."""
    return Incoming(memory)


async def never():
    """Send no message."""
    await asyncio.Event().wait()
    yield b""


def encode_request(rows=1):
    tensor = pb.Tensor(
        dtype=pb.DATA_TYPE_FLOAT32, shape=(rows, 4), data=np.ones((rows, 4), "f4").tobytes()
    )
    return pb.EncodeRequest(tensor=tensor)


async def waiting_calls(service, incoming, count):
    """Begin calls that send no message, and wait until all of them are waited for."""
    begin = service.channel.stream_unary(ENCODE)
    calls = [begin(never()) for _ in range(FEW + count)]
    async with asyncio.timeout(20):
        while service.calls.in_all < FEW + count:
            await asyncio.sleep(0.005)
    return calls


def counted(service, name, method):
    """What a metric of calls says of a method, in all."""
    return sum(
        sample.value
        for family in service.metrics.registry.collect()
        for sample in family.samples
        if sample.name == name and sample.labels["grpc_method"] == method
    )


async def all_are_counted(service, method, count):
    """See that as many calls began and ended, each once."""
    async with asyncio.timeout(20):
        while counted(service, "grpc_server_handled_total", method) < count:
            await asyncio.sleep(0.005)
    assert counted(service, "grpc_server_handled_total", method) == count
    assert counted(service, "grpc_server_started_total", method) == count


async def test_calls_whose_messages_are_waited_for_here_are_answered_like_others(
    serve_runner, toy_runner, of_service
):
    incoming = of_service
    service = await serve_runner(toy_runner, incoming=incoming)
    calls = await waiting_calls(service, incoming, 1)
    again = [service.stub.Encode(encode_request(rows)) for rows in range(1, 40)]
    for rows, call in enumerate(again, start=1):
        assert list((await call).tensor.shape) == [rows, 3]
    model = await service.stub.GetModel(pb.GetModelRequest())
    assert model.model.name == "toy"
    requests = (pb.EncodeStreamRequest(request=encode_request(rows)) for rows in (1, 2, 3))
    answers = [answer async for answer in service.stub.EncodeStream(requests)]
    assert [list(answer.response.tensor.shape) for answer in answers] == [[1, 3], [2, 3], [3, 3]]
    with pytest.raises(grpc.aio.AioRpcError) as broken:
        await service.channel.unary_unary(ENCODE)(b"\xff")
    assert broken.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    none = service.channel.stream_unary(ENCODE)(iter([]))
    assert await none.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await none.details() == module.NO_MESSAGE
    assert len(incoming.calls) == 1
    await all_are_counted(service, "Encode", 41)
    for call in calls:
        call.cancel()
    async with asyncio.timeout(20):
        while len(incoming.calls):
            await asyncio.sleep(0.005)


async def test_calls_that_wait_are_given_up_with_a_hint_and_others_are_answered(
    serve_runner, toy_runner, of_service, memory
):
    incoming = of_service
    service = await serve_runner(toy_runner, incoming=incoming)
    calls = await waiting_calls(service, incoming, 40)
    memory.used = LIMIT + 1
    async with asyncio.timeout(30):
        while len(gone := [call for call in calls if call.done()]) < 40:
            await asyncio.sleep(0.005)
    assert not len(incoming.calls)
    assert {await call.code() for call in gone} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert "--max-memory-bytes" in await gone[0].details()
    assert dict(await gone[0].trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
    # One more than a few are refused while it lasts, and no longer.
    refused = service.stub.Encode(encode_request())
    async with asyncio.timeout(20):
        while await refused.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            refused = service.stub.Encode(encode_request())
    assert "more than 32 calls may be in progress" in await refused.details()
    memory.used = LIMIT
    await looked(memory)
    await service.stub.Encode(encode_request())
    for call in calls:
        call.cancel()


async def test_a_stream_is_given_up_whatever_it_waits_for(serve_runner, of_service, memory, device):
    incoming = of_service
    service = await serve_runner(device, incoming=incoming, max_queue_requests=1)

    async def requests():
        for _ in range(3):
            yield pb.EncodeStreamRequest(request=encode_request())
        await asyncio.Event().wait()

    # One computes, one is queued, and the third waits for room; the next for their turn.
    first = service.stub.EncodeStream(requests())
    others = [service.stub.EncodeStream(requests()) for _ in range(FEW)]
    async with asyncio.timeout(20):
        await asyncio.to_thread(device.began.get, timeout=20)
        while not service.batcher.queue.requests or len(incoming.streams) < FEW + 1:
            await asyncio.sleep(0.005)
    memory.used = LIMIT + 1
    codes = [asyncio.ensure_future(call.code()) for call in (first, *others)]
    async with asyncio.timeout(20):
        await asyncio.wait(codes, return_when=asyncio.FIRST_COMPLETED)
        while len(incoming.streams) > FEW:
            await asyncio.sleep(0.005)
    (ended,) = [call for call in (first, *others) if call.done()]
    assert await ended.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    memory.used = 0
    device.free()
    for call in (first, *others):
        call.cancel()
    await asyncio.wait(codes)
    await all_are_counted(service, "EncodeStream", FEW + 1)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("Encode", grpc.StatusCode.OK),
        ("EncodeStream", grpc.StatusCode.OK),
        # Nothing can be shared with this server, as it says when it is asked.
        ("ShareMemory", grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
async def test_calls_that_send_nothing_leave_room_for_other_callers(
    serve_runner, toy_runner, of_service, method, expected
):
    incoming = of_service
    service = await serve_runner(toy_runner, incoming=incoming, max_concurrent_rpcs=FEW + 4)
    calls = await waiting_calls(service, incoming, 4)
    count = len(incoming.calls)
    assert count == (FEW + 4) // 2  # half of so few places are never left to gRPC's patience
    code, message = await outcome(service.stub, method)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert message == f"{FEW + 4} calls are in progress; this server takes {FEW + 4}"
    # Connections are callers here. Each call takes a place and gives it back.
    async with grpc.aio.insecure_channel(service.address, (("other", 1),)) as channel:
        for _ in range(5):
            code, message = await outcome(pb_grpc.SemanticIdServiceStub(channel), method)
            assert code is expected, message
    (gone,) = [call for call in calls if call.done()]
    assert await gone.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"the most whose messages were still on their way: {count}" in await gone.details()
    for call in calls:
        call.cancel()


async def outcome(stub, method):
    """Call a method with a good message, and return the status."""
    if method == "Encode":
        call = stub.Encode(encode_request())
    elif method == "EncodeStream":
        call = stub.EncodeStream(iter([pb.EncodeStreamRequest(request=encode_request())]))
    else:
        call = stub.ShareMemory(pb.ShareMemoryRequest())
    with contextlib.suppress(grpc.aio.AioRpcError):  # it is in the status too
        if method != "Encode":
            await call.read()
    return await call.code(), await call.details()


async def test_callers_who_leave_before_their_message_has_come_did_nothing_wrong(
    serve_runner, toy_runner, of_service
):
    service = await serve_runner(toy_runner, incoming=of_service)
    calls = await waiting_calls(service, of_service, 8)
    for call in calls:
        call.cancel()
    async with asyncio.timeout(20):
        while len(of_service.calls):
            await asyncio.sleep(0.005)
    await asyncio.sleep(2 * module.GONE)
    await service.stub.Encode(encode_request())
    await all_are_counted(service, "Encode", 1)


async def test_a_stream_that_fails_while_it_is_given_up_ends_once():
    """gRPC is slow to say that the status is sent, and a message of the stream is wrong."""
    metrics = Metrics()
    calls = Calls("toy.Service", metrics, incoming=Incoming(caller=lambda _context: ""))
    failing, sending = asyncio.Event(), asyncio.Event()

    async def behaviour(requests, context):
        yield b"answer"
        failing.set()
        await sending.wait()
        raise InvalidInputError("no such row")

    handler = grpc.stream_stream_rpc_method_handler(behaviour, bytes, bytes)
    calls.serve({"EncodeStream": handler})

    class Stream(Context):
        aborts = 0

        def invocation_metadata(self):
            return ()

        def set_trailing_metadata(self, metadata): ...

        def time_remaining(self):
            return None

        async def abort(self, code, message, _metadata=()):
            self.aborts += 1
            self.aborted = code
            sending.set()
            await asyncio.sleep(0.05)
            raise grpc.aio.AbortError("aborted")

    context = Stream("")
    details = SimpleNamespace(method="/toy.Service/EncodeStream", invocation_metadata=())
    answers = calls.service(details).stream_stream(None, context)

    async def read():
        return [answer async for answer in answers]

    reading = asyncio.ensure_future(read())
    await failing.wait()
    (awaited,) = calls._incoming.streams.next_to_go(1)
    await awaited.give_up(OverloadedError("short", retry_after=1))
    with pytest.raises((grpc.aio.AbortError, asyncio.CancelledError)):
        await reading
    assert (context.aborts, context.aborted) == (1, grpc.StatusCode.RESOURCE_EXHAUSTED)
    service = SimpleNamespace(metrics=metrics)
    await all_are_counted(service, "EncodeStream", 1)
    # Whoever wants to give it up now is too late.
    await awaited.give_up(OverloadedError("short", retry_after=1))
    assert context.aborts == 1


async def test_while_the_server_ends_calls_are_given_up_at_once(
    serve_runner, toy_runner, of_service, memory
):
    service = await serve_runner(toy_runner, incoming=of_service)
    calls = await waiting_calls(service, of_service, 8)
    service.calls.drain()
    service.calls.hold()
    memory.used = LIMIT + 1
    of_service.watch()
    async with asyncio.timeout(20):
        while len([call for call in calls if call.done()]) < 8:
            await asyncio.sleep(0.005)
    gone = {await call.code() for call in calls if call.done()}
    assert gone == {grpc.StatusCode.UNAVAILABLE}
    await all_are_counted(service, "Encode", 8)
    for call in calls:
        call.cancel()
