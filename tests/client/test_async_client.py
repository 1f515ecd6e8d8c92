"""What only asyncio can do: cancel a task, and do other things meanwhile."""

import asyncio
import threading

import numpy as np
import pytest

from semid_client import AsyncClient, ClientClosedError, ConfigurationError


class Held:
    """Calls that come, and stay, until they are let go or cancelled."""

    def __init__(self, loop):
        self.came, self.cancelled = asyncio.Event(), asyncio.Event()
        self.loop = loop

    def __call__(self, _request, context):
        gone = threading.Event()
        context.add_callback(gone.set)
        self.loop.call_soon_threadsafe(self.came.set)
        gone.wait()
        self.loop.call_soon_threadsafe(self.cancelled.set)


@pytest.fixture
def rows():
    return np.zeros((100, 4), np.float32)


@pytest.mark.parametrize("n", [1, 100])
async def test_a_task_that_is_cancelled_cancels_its_calls(make_server, rows, n):
    server, held = make_server(max_rows=10), Held(asyncio.get_running_loop())
    server.script["Encode"].append(held)
    async with AsyncClient(server.target) as client:
        task = asyncio.create_task(client.encode(rows[:n]))
        await held.came.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await held.cancelled.wait()
        assert (await client.encode(rows)).shape == (100, 3)


@pytest.mark.parametrize("n", [1, 100])
async def test_a_client_that_is_closed_ends_its_calls_with_its_own_error(make_server, rows, n):
    server, held = make_server(max_rows=10), Held(asyncio.get_running_loop())
    server.script["Encode"].append(held)
    client = AsyncClient(server.target)
    task = asyncio.create_task(client.encode(rows[:n]))
    await held.came.wait()
    await client.close()
    with pytest.raises(ClientClosedError, match="was closed"):
        await task


async def test_many_calls_go_on_at_once(make_server):
    server = make_server(max_rows=10)
    async with AsyncClient(server.target) as client:
        arrays = [np.full((n, 4), n, np.float32) for n in range(30)]
        answers = await asyncio.gather(*(client.encode(array) for array in arrays))
    for array, codes in zip(arrays, answers, strict=True):
        np.testing.assert_array_equal(codes, server.expected_codes(array))


def test_a_client_that_is_made_outside_of_an_event_loop_says_so():
    with pytest.raises(ConfigurationError, match="no event loop is running: make an AsyncClient"):
        AsyncClient("localhost:1")


def test_a_client_of_another_event_loop_says_so(server, rows):
    async def make():
        client = AsyncClient(server.target)
        await client.model()
        return client

    async def use(client):
        for call in (client.encode(rows), client.model(), client.close()):
            with pytest.raises(ClientClosedError, match="another event loop"):
                await call

    with asyncio.Runner() as loop, asyncio.Runner() as other_loop:
        client = loop.run(make())
        other_loop.run(use(client))
        assert loop.run(client.encode(rows)).shape == (100, 3)
        loop.run(client.close())
