"""Keeping a server open, with servers that end when the test says so."""

from __future__ import annotations

import asyncio

import pytest

from semid_server.errors import ConfigurationError
from semid_server.serving import listener
from semid_server.serving.listener import Listener

PORT = 7


class FakeServer:
    """A server that ends when it is stopped, or by itself."""

    def __init__(self):
        self.ended = asyncio.Event()
        self.error = None
        self.starts = 0
        self.graces = []

    async def start(self):
        self.starts += 1

    async def stop(self, grace):
        self.graces.append(grace)
        self.ended.set()

    async def wait_for_termination(self):
        await self.ended.wait()
        if self.error is not None:
            raise self.error

    def crash(self):
        self.error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        self.ended.set()


class Maker:
    """Makes servers; refuses to as often as it is told."""

    def __init__(self):
        self.made = []
        self.asked = []
        self.refusals = 0

    def __call__(self, port):
        self.asked.append(port)
        if self.refusals:
            self.refusals -= 1
            raise ConfigurationError(f"{port} is taken")
        self.made.append(FakeServer())
        return self.made[-1], PORT


async def started():
    maker = Maker()
    one = Listener(maker)
    await one.start()
    return one, maker


async def wait_until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def test_one_that_ends_unasked_is_opened_again_at_its_port_as_soon_as_that_is_free():
    one, maker = await started()
    maker.refusals = 3
    maker.made[0].crash()
    await wait_until(lambda: len(maker.made) == 2 and maker.made[1].starts)
    assert maker.asked == [None] + [PORT] * 4
    await one.stop(1.5)
    assert [server.graces for server in maker.made] == [[], [1.5]]


async def test_one_that_is_stopped_while_it_is_opened_again_is_closed(monkeypatch):
    one, maker = await started()
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def start(self):
        begun.set()
        await go_on.wait()

    monkeypatch.setattr(FakeServer, "start", start)
    maker.made[0].crash()
    await begun.wait()
    await one.stop(1.5)
    assert maker.made[1].graces == [1.5]


async def test_one_that_is_stopped_is_not_opened_again():
    one, maker = await started()
    await one.stop(None)
    await asyncio.sleep(0.01)
    assert len(maker.made) == 1


async def test_to_stop_waiting_for_its_loss_leaves_it_open():
    one, maker = await started()
    waiting = asyncio.ensure_future(one.lost())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    maker.made[0].crash()
    await wait_until(lambda: len(maker.made) == 2)
    await one.stop(None)


async def test_a_port_that_stays_taken_is_an_error(monkeypatch):
    monkeypatch.setattr(listener, "PATIENCE", 0.1)
    one, maker = await started()
    maker.refusals = 1000
    maker.made[0].crash()
    async with asyncio.timeout(20):
        with pytest.raises(ConfigurationError, match="7 is taken"):
            await one.lost()
