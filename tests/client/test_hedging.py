"""A second attempt at calls that take long: where it goes, who wins, and how many there may be."""

import asyncio
import gc
import threading

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semid_client import (
    AsyncClient,
    Client,
    ClientClosedError,
    DeadlineExceededError,
    InvalidInputError,
    ResourceExhaustedError,
)
from semid_client._hedging import MOST_SAVED, SHARE, Hedging

SOON = 0.05
NEVER = 60.0


def rows(n):
    array = np.zeros((n, 4), np.float32)
    array[:, 0] = np.arange(n) % 200
    return array


class Fleet:
    """Servers behind one target, whose Encode calls do what is ordered, whoever gets them."""

    def __init__(self, servers):
        self.servers = servers
        self.target = "ipv4:" + ",".join(server.target for server in servers)
        self.release = threading.Event()
        self.held_came, self.held_gone = threading.Event(), threading.Event()
        self._orders, self._lock = [], threading.Lock()
        for server in servers:
            for method in ("Encode", "Decode"):
                server.script[method] += [self._next] * 1000

    def order(self, *what):
        self._orders += what

    def _next(self, request, context):
        with self._lock:
            what = self._orders.pop(0) if self._orders else None
        return what(request, context) if what else None

    def hold(self, _request, context):
        """Do not answer until the test is over."""
        context.add_callback(self.held_gone.set)
        self.held_came.set()
        self.release.wait()

    @property
    def calls(self):
        return [server.calls("Encode") for server in self.servers]


@pytest.fixture
def make_fleet(make_server):
    made = []

    def make(n=2, **settings):
        made.append(Fleet([make_server(**settings) for _ in range(n)]))
        return made[-1]

    yield make
    for fleet in made:
        fleet.release.set()


def refuse(code, details="no", pushback="-1"):
    def abort(_request, context):
        context.set_trailing_metadata((("grpc-retry-pushback-ms", pushback),))
        context.abort(code, details)

    return abort


def ready(connect, fleet, **settings):
    """Make a client that knows the model, and has a connection to each server."""
    client = connect(fleet.target, **settings)
    for _ in fleet.servers:
        client.wait_ready()
    while not all(server.calls("GetModel") for server in fleet.servers):
        client.model()
    return client


def saved(client):
    """How many second attempts the client may make."""
    return getattr(client, "client", client)._hedging._budget


def test_a_call_that_takes_long_is_answered_by_the_next_server(make_fleet, connect):
    fleet = make_fleet()
    client = ready(connect, fleet, hedge_after=SOON)
    fleet.order(fleet.hold)
    np.testing.assert_array_equal(client.encode(rows(5)), fleet.servers[0].expected_codes(rows(5)))
    assert fleet.calls == [1, 1]


def test_the_call_that_lost_is_cancelled(make_fleet, connect):
    fleet = make_fleet()
    client = ready(connect, fleet, hedge_after=SOON)
    fleet.order(fleet.hold)
    client.encode(rows(5))
    assert fleet.held_gone.wait(60)


def test_a_call_that_is_answered_in_time_is_made_once(make_fleet, connect):
    fleet = make_fleet()
    client = ready(connect, fleet, hedge_after=NEVER)
    for _ in range(6):
        client.encode(rows(5))
    assert sum(fleet.calls) == 6


def test_without_being_asked_to_no_call_is_made_twice(make_fleet, connect):
    fleet = make_fleet()
    client = ready(connect, fleet)
    fleet.order(fleet.hold)
    with pytest.raises(DeadlineExceededError):
        client.encode(rows(5), timeout=0.5)
    assert sum(fleet.calls) <= 1


def test_every_message_of_a_large_call_is_hedged(make_fleet, connect):
    fleet = make_fleet(max_rows=10)
    client = ready(connect, fleet, hedge_after=SOON)
    # A slow machine may have others take long too: there is a second attempt for each of them.
    while saved(client) < 7:
        client.encode(rows(1))
    before = sum(fleet.calls)
    fleet.order(None, fleet.hold)
    np.testing.assert_array_equal(
        client.encode(rows(60)), fleet.servers[0].expected_codes(rows(60))
    )
    assert 7 <= sum(fleet.calls) - before <= 12


def test_decode_is_hedged_too(make_fleet, connect):
    fleet = make_fleet()
    client = ready(connect, fleet, hedge_after=SOON)
    fleet.order(fleet.hold)
    assert client.decode([[1, 2, 3]]).shape == (1, 4)
    assert [server.calls("Decode") for server in fleet.servers] == [1, 1]


def test_a_refusal_that_every_server_would_give_ends_the_call_at_once(make_fleet, connect):
    fleet = make_fleet()
    client = ready(connect, fleet, hedge_after=SOON)
    fleet.order(fleet.hold, refuse(grpc.StatusCode.INVALID_ARGUMENT))
    with pytest.raises(InvalidInputError):
        client.encode(rows(5))
    assert fleet.held_gone.wait(60)


def test_a_server_that_has_no_room_does_not_end_a_call_that_another_works_on(make_fleet, connect):
    fleet = make_fleet()
    client = ready(connect, fleet, hedge_after=SOON)

    def work_until_the_other_refused(_request, _context):
        assert refused.wait(60)

    refused = threading.Event()

    def have_no_room(request, context):
        context.add_callback(refused.set)
        refuse(grpc.StatusCode.RESOURCE_EXHAUSTED)(request, context)

    fleet.order(work_until_the_other_refused, have_no_room)
    assert client.encode(rows(5)).shape == (5, 3)
    assert fleet.calls == [1, 1]


def test_a_call_that_no_server_has_room_for_fails(make_fleet, connect):
    fleet = make_fleet()
    client = ready(connect, fleet, hedge_after=SOON)

    def work_until_the_other_came(request, context):
        assert came.wait(60)
        refuse(grpc.StatusCode.RESOURCE_EXHAUSTED)(request, context)

    came = threading.Event()

    def refuse_too(request, context):
        came.set()
        refuse(grpc.StatusCode.RESOURCE_EXHAUSTED)(request, context)

    fleet.order(work_until_the_other_came, refuse_too)
    with pytest.raises(ResourceExhaustedError):
        client.encode(rows(5))


def test_both_attempts_have_one_deadline(make_fleet, connect):
    for seconds in (0.5, 5, 50):  # where the machine is so slow that no second one is made in time
        fleet = make_fleet()
        client = ready(connect, fleet, hedge_after=SOON)
        fleet.order(fleet.hold, fleet.hold)
        with pytest.raises(DeadlineExceededError):
            client.encode(rows(5), timeout=seconds)
        if fleet.calls == [1, 1]:
            return
    pytest.fail(f"calls to each server: {fleet.calls}; expected [1, 1]")


async def test_an_attempt_that_fails_after_the_call_has_is_no_lost_error(make_fleet):
    fleet = make_fleet()
    lost = []

    def hear(_, context):
        if {"future", "task"} & set(context):  # gRPC tells of the loops of earlier tests as well
            lost.append(context)

    asyncio.get_running_loop().set_exception_handler(hear)
    async with AsyncClient(fleet.target, hedge_after=SOON) as client:
        await client.model()
        hedged = client._hedging
        for n in range(5):
            hedged._budget = MOST_SAVED
            fleet.order(fleet.hold, fleet.hold)
            with pytest.raises(DeadlineExceededError):
                await client.encode(rows(1), timeout=2 * SOON)
            assert sum(fleet.calls) <= 2 * (n + 1)
    gc.collect()  # what was not looked at is told when it goes
    assert not lost


def test_when_all_servers_are_slow_few_calls_are_made_twice(make_fleet, connect):
    fleet = make_fleet()
    client = ready(connect, fleet, hedge_after=0.001)
    calls = 40

    def take_longer(_request, context):
        fleet.release.wait(0.01)

    fleet.order(fleet.hold, *[take_longer] * 100)
    for _ in range(calls):
        client.encode(rows(1))
    assert calls < sum(fleet.calls) <= calls + 1 + SHARE * calls


@given(st.lists(st.booleans(), max_size=600))
def test_no_more_than_a_twentieth_and_one_of_the_calls_is_made_twice(slow):
    hedging, twice = Hedging(after=1.0), 0
    for answered, is_slow in enumerate(slow):
        twice += is_slow and hedging.take()
        assert twice <= 1 + SHARE * answered + 1e-9
        hedging.earn()


def test_what_is_saved_up_is_bounded():
    hedging = Hedging(after=1.0)
    for _ in range(10_000):
        hedging.earn()
    assert sum(hedging.take() for _ in range(100)) == MOST_SAVED


async def test_a_task_that_is_cancelled_cancels_both_attempts(make_fleet):
    fleet = make_fleet()
    both, gone = threading.Semaphore(0), threading.Semaphore(0)

    def hold(_request, context):
        context.add_callback(gone.release)
        both.release()
        fleet.release.wait()

    fleet.order(hold, hold)
    async with AsyncClient(fleet.target, hedge_after=SOON) as client:
        task = asyncio.create_task(client.encode(rows(1)))
        for _ in range(2):
            assert await asyncio.to_thread(both.acquire, timeout=60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for _ in range(2):
            assert await asyncio.to_thread(gone.acquire, timeout=60)


async def test_an_async_client_that_is_closed_ends_a_hedged_call(make_fleet):
    fleet = make_fleet()
    fleet.order(fleet.hold, fleet.hold)
    client = AsyncClient(fleet.target, hedge_after=SOON)
    task = asyncio.create_task(client.encode(rows(1)))
    assert await asyncio.to_thread(fleet.held_came.wait, 60)
    await client.close()
    with pytest.raises(ClientClosedError):
        await task


def test_a_client_that_is_closed_ends_a_hedged_call(make_fleet):

    fleet = make_fleet()
    fleet.order(fleet.hold, fleet.hold)
    client = Client(fleet.target, hedge_after=SOON)
    closing = threading.Thread(target=lambda: fleet.held_came.wait() and client.close())
    closing.start()
    with pytest.raises(ClientClosedError):
        client.encode(rows(1))
    closing.join()
