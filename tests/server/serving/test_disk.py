"""Files are touched by threads: what hangs there holds up neither the event loop nor the end."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from semid_server.serving.disk import Lookout, in_daemon, patiently

NAMES = {"where": "file", "meanwhile": "the old one stays"}


@pytest.fixture
def answers():
    """Set when the disk answers."""
    event = threading.Event()
    yield event
    event.set()


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def logged(caplog, text):
    await until(lambda: text in caplog.text)


async def test_a_disk_that_does_not_answer_is_told_of_and_waited_for(answers, caplog):
    waiting = asyncio.create_task(patiently(in_daemon(answers.wait, 60), slow=0.01, **NAMES))
    await logged(
        caplog, "file: the disk has not answered within 0.01 s; until it does, the old one stays"
    )
    answers.set()
    assert await waiting is True
    assert "file: the disk has answered" in caplog.text


async def test_a_disk_that_answers_is_not_told_of(caplog):
    assert await patiently(in_daemon(lambda: 7), **NAMES) == 7
    assert not caplog.records


async def test_an_error_of_the_disk_is_that_of_who_waits():
    with pytest.raises(FileNotFoundError):
        await patiently(in_daemon(os.stat, "/nowhere"), **NAMES)


def test_who_waits_for_a_disk_may_leave_and_the_event_loop_end_before_it_answers(answers, caplog):
    async def leave():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(patiently(in_daemon(answers.wait, 60), **NAMES), 0.01)

    asyncio.run(leave())
    answers.set()
    for thread in threading.enumerate():
        if thread.name == "semid-disk":
            thread.join(60)
    assert not caplog.records


async def test_a_look_that_hangs_is_told_of_and_not_begun_a_second_time(answers, caplog):
    looks = []

    def look():
        looks.append(threading.get_ident())
        answers.wait(60)

    with Lookout(look, 0.001, slow=0.01, **NAMES):
        await logged(
            caplog,
            "file: the disk has not answered within 0.01 s; until it does, the old one stays",
        )
        await asyncio.sleep(0.05)  # dozens would begin
        assert caplog.text.count("has not answered") == 1
        assert len(looks) == 1
        assert threading.get_ident() not in looks
        answers.set()
        await logged(caplog, "file: the disk has answered")
        await until(lambda: len(looks) > 2)


async def test_a_look_that_hangs_keeps_nobody_from_leaving(answers, caplog):
    with Lookout(lambda: answers.wait(60), 0.001, slow=0.01, **NAMES):
        await logged(caplog, "has not answered")
    assert not answers.is_set()


async def test_nobody_looks_once_the_lookout_is_left():
    looks = []
    with Lookout(lambda: looks.append(1), 0.001, **NAMES):
        await until(lambda: looks)
    await until(lambda: "semid-lookout" not in {thread.name for thread in threading.enumerate()})


async def test_looks_go_on_after_one_that_fails_which_is_told_of_once(caplog):
    looks = []

    def look():
        looks.append(1)
        raise ValueError("a bug")

    with Lookout(look, 0.001, **NAMES):
        await until(lambda: len(looks) > 4)
    assert caplog.text.count("file: could not be looked at; until it can, the old one stays") == 1
