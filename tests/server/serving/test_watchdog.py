"""What hangs is told from what is slow, by looks in a row that see the same."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap

import pytest

from semid_server.serving.watchdog import AT_ONCE, LAST_LINES, LOOKS, Watchdog


class Watched:
    """A batcher that runs whatever the test says, and a process that notes its end."""

    def __init__(self):
        self.batch, self.hung, self.ends = None, 0, []
        self.watchdog = Watchdog(
            1e6,  # the test looks by itself
            batch=lambda: self.batch,
            hung=self.hang,
            patience=3.0,
            end=self.ends.append,
        )

    def hang(self):
        self.hung += 1

    async def look(self, times, *, loop_runs=True):
        for _ in range(times):
            self.watchdog.look()
            if loop_runs:
                await asyncio.sleep(0)


@pytest.fixture
async def watched():
    made = Watched()
    with made.watchdog:
        yield made


async def test_a_batch_that_every_look_sees_hangs_and_is_told_once(watched):
    watched.batch = 7
    await watched.look(LOOKS)
    assert (watched.hung, watched.ends) == (0, [])
    await watched.look(2 * LOOKS)
    assert (watched.hung, watched.ends) == (1, [3.0])


async def test_batches_that_follow_one_another_do_not_hang(watched):
    for watched.batch in range(5):
        await watched.look(LOOKS)
    assert watched.hung == 0


async def test_an_idle_server_does_not_hang(watched):
    await watched.look(3 * LOOKS)
    assert (watched.hung, watched.ends) == (0, [])


async def test_a_loop_that_runs_between_no_two_looks_ends_the_process(watched, capfd):
    await watched.look(LOOKS, loop_runs=False)
    assert watched.ends == []
    await watched.look(1, loop_runs=False)
    assert watched.ends == [LAST_LINES, AT_ONCE]
    assert "most recent call first" in capfd.readouterr().err


async def test_a_batch_that_hangs_the_loop_ends_the_process_at_once(watched):
    watched.batch = 7
    await watched.look(3 * LOOKS, loop_runs=False)
    await asyncio.sleep(0)
    assert watched.ends == [LAST_LINES, AT_ONCE]
    assert watched.hung == 0


async def test_a_loop_that_runs_at_times_goes_on(watched):
    for _ in range(3):
        await watched.look(LOOKS, loop_runs=False)
        await asyncio.sleep(0)
    assert watched.ends == []


def test_a_process_is_ended_though_something_keeps_the_interpreters_lock():
    program = """
        import ctypes
        from semid_server.serving.watchdog import end_within
        end_within(0.2)
        ctypes.PyDLL(None).pause()  # for ever, with the lock
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, check=False, timeout=100)
    assert ended.returncode == 1
