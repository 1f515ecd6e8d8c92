"""How the metrics of several processes become one page, and how the processes are kept."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import threading
import urllib.request
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import uvloop
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from semid_server.serving.config import ModelSource, ServeConfig
from semid_server.serving.metrics import Metrics
from semid_server.serving.processes import (
    LEAST,
    SUMMED,
    Processes,
    _call_when_readable,
    _Child,
    merge,
)


def families(make, *changes):
    """The family of one metric in as many processes, each changed in its own way."""
    found = []
    for change in changes:
        registry = CollectorRegistry()
        change(make(registry))
        found += registry.collect()
    return found


def together(make, *changes):
    into = {}
    merge(into, families(make, *changes))
    (family,) = into.values()
    return {(s.name, *s.labels.values()): s.value for s in family.samples}


def test_counters_are_added_up_label_by_label():
    found = together(
        lambda registry: Counter("calls_total", "Calls.", ["method"], registry=registry),
        lambda calls: calls.labels("a").inc(2),
        lambda calls: (calls.labels("a").inc(3), calls.labels("b").inc(1)),
    )
    assert found["calls_total", "a"] == 5
    assert found["calls_total", "b"] == 1


def test_histograms_are_added_up_bucket_by_bucket():
    found = together(
        lambda registry: Histogram("wait_seconds", "Wait.", buckets=(1, 2), registry=registry),
        lambda wait: (wait.observe(0.5), wait.observe(1.5)),
        lambda wait: wait.observe(1.5),
    )
    assert found["wait_seconds_bucket", "1.0"] == 1
    assert found["wait_seconds_bucket", "2.0"] == 3
    assert found["wait_seconds_bucket", "+Inf"] == 3
    assert found["wait_seconds_sum",] == 3.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("semid_queue_requests", 5), ("semid_serving", 2), ("semid_code_perplexity", 3)],
)
def test_gauges_are_added_up_or_the_least_or_greatest_counts(name, value):
    found = together(
        lambda registry: Gauge(name, "A gauge.", registry=registry),
        lambda gauge: gauge.set(2),
        lambda gauge: gauge.set(3),
    )
    assert found[name,] == value


def test_merging_changes_no_family_of_a_process():
    one, other = families(
        lambda registry: Counter("calls_total", "Calls.", registry=registry),
        lambda calls: calls.inc(2),
        lambda calls: calls.inc(3),
    )
    merge({}, [one, other])
    assert one.samples[0].value == 2


def test_the_gauges_with_rules_of_their_own_exist():
    gauges = {family.name for family in Metrics().registry.collect() if family.type == "gauge"}
    assert gauges >= SUMMED | LEAST


@pytest.mark.parametrize("run", [uvloop.run, asyncio.run])
def test_a_message_that_comes_in_pieces_is_heard_whole(run):
    ours, theirs = multiprocessing.Pipe()
    long = "x" * (8 << 20)  # many times what a pipe holds

    async def listen():
        loop = asyncio.get_running_loop()
        heard = loop.create_future()
        _call_when_readable(loop, ours, lambda: heard.set_result(ours.recv()))
        sender = threading.Thread(target=theirs.send, args=(long,))
        sender.start()
        try:
            return await asyncio.wait_for(heard, 60)
        finally:
            loop.remove_reader(ours.fileno())
            ours.close()
            sender.join()
            theirs.close()

    assert run(listen()) == long


CONFIG = ServeConfig(
    models=(ModelSource(Path("toy")),), host="127.0.0.1", port=0, metrics_port=0, processes=2
)


class FakeProcess:
    """A process that does nothing until a signal ends it; its end of the pipe is the test's."""

    def __init__(self, *, target, args, daemon):
        _config, _prepare, theirs = args
        self.pipe = Connection(os.dup(theirs.fileno()))

    def start(self):
        self._sleeps = subprocess.Popen(["/bin/sleep", "600"])
        self.pid = self._sleeps.pid

    @property
    def exitcode(self):
        return self._sleeps.returncode

    def is_alive(self):
        return self._sleeps.poll() is None

    def join(self):
        self._sleeps.wait(30)

    async def end(self):
        """Wait for the signal that ends it, and let the parent hear of it."""
        await asyncio.to_thread(self.join)
        self.pipe.close()

    async def asked(self):
        """Wait for a message of the parent."""
        while not self.pipe.poll():
            await asyncio.sleep(0)
        return self.pipe.recv()

    def answer(self, count):
        calls = Counter("calls_total", "Calls.", registry=(registry := CollectorRegistry()))
        calls.inc(count)
        Gauge("semid_serving", "Serving.", registry=registry).set(1)
        self.pipe.send(("metrics", list(registry.collect())))


class FakeContext:
    """Makes such processes, and real pipes."""

    def __init__(self):
        self.made = []

    Pipe = staticmethod(multiprocessing.Pipe)

    def Process(self, **given):  # noqa: N802 - as multiprocessing calls it
        self.made.append(FakeProcess(**given))
        return self.made[-1]


class Kept:
    """Two such processes that are kept by a task of the test's loop."""

    def __init__(self):
        self._context, self.lines = FakeContext(), []
        processes = Processes(
            CONFIG, announce=self.lines.append, prepare=lambda: None, context=self._context
        )
        self._run = asyncio.create_task(processes.run())

    async def children(self):
        while len(self._context.made) < 2:
            await asyncio.sleep(0)
        return self._context.made

    def scrape(self, name="calls_total"):
        """Begin to ask the metrics endpoint; return the task of its answer: all calls counted."""

        def ask():
            (address,) = [line for line in self.lines if line.startswith("metrics on ")]
            url = f"http://{address.removeprefix('metrics on ')}/metrics"
            text = urllib.request.urlopen(url).read().decode()
            (count,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
            return float(count.split()[1])

        return asyncio.create_task(asyncio.to_thread(ask))

    async def all_serve(self):
        """Have both serve, as a scrape finds."""
        for child in await self.children():
            child.pipe.send(("serving", "toy"))
        scrape = self.scrape("semid_serving")
        for child in await self.children():
            await child.asked()
            child.answer(1000)
        assert await scrape == 1

    async def end(self):
        os.kill(os.getpid(), signal.SIGTERM)
        while not self._run.done():
            for child in self._context.made:
                if not child.is_alive():
                    child.pipe.close()
            await asyncio.sleep(0)
        await self._run


@pytest.fixture
async def kept():
    made = Kept()
    yield made
    await made.end()


async def test_a_child_that_does_not_read_is_asked_for_its_metrics_once():
    context = FakeContext()
    child = _Child(CONFIG, lambda: None, context)
    (process,) = context.made
    asked = [child.ask_for_metrics() for _ in range(3)]
    await process.asked()
    assert not process.pipe.poll()
    process.answer(1)
    await asyncio.gather(*asked)
    again = child.ask_for_metrics()
    await process.asked()
    child.tell(signal.SIGTERM)
    await process.end()
    await again
    await child.ended


async def test_what_a_child_counted_that_ends_during_a_scrape_is_counted_once(kept):
    one, other = await kept.children()
    first = kept.scrape()
    for child in (one, other):
        child.pipe.send(("serving", "toy"))
        await child.asked()
        child.answer(1000)
    assert await first == 2000
    second = kept.scrape()
    await one.asked()
    os.kill(one.pid, signal.SIGKILL)
    await one.end()
    await other.asked()
    other.answer(1000)
    assert await second == 2000


async def test_while_no_process_is_there_none_is_said_to_serve(kept):
    await kept.all_serve()
    one, other = await kept.children()
    for child in (one, other):
        os.kill(child.pid, signal.SIGKILL)
        await child.end()
    assert await kept.scrape("semid_serving") == 0


async def test_while_one_process_is_not_there_not_all_are_said_to_serve(kept):
    await kept.all_serve()
    one, other = await kept.children()
    os.kill(one.pid, signal.SIGKILL)
    await one.end()
    scrape = kept.scrape("semid_serving")
    await other.asked()
    other.answer(1000)
    assert await scrape == 0


async def test_a_child_that_does_not_answer_is_waited_for_once_and_does_not_count_as_serving(
    kept, monkeypatch
):
    await kept.all_serve()
    hung, other = await kept.children()
    monkeypatch.setattr("semid_server.serving.processes.METRICS_PATIENCE", 0.1)
    first = kept.scrape("semid_serving")
    await other.asked()
    other.answer(1001)
    assert await first == 0
    # From now on a scrape would wait as long as this test may last, if it waited for that one.
    monkeypatch.setattr("semid_server.serving.processes.METRICS_PATIENCE", 3600)
    for count in (1002, 1003):
        scrape = kept.scrape()
        await other.asked()
        other.answer(count)
        assert await asyncio.wait_for(scrape, 60) == 1000 + count
    await hung.asked()
    hung.answer(1010)  # to the first question: there was no other
    assert not hung.pipe.poll()
    scrape = kept.scrape("semid_serving")
    for child in (hung, other):
        await child.asked()
        child.answer(1020)
    assert await scrape == 1


async def test_a_child_that_is_starting_hears_of_sighup_once_it_serves(kept):
    one, other = await kept.children()
    one.pipe.send(("serving", "toy"))
    os.kill(os.getpid(), signal.SIGHUP)
    await one.end()
    assert one.exitcode == -signal.SIGHUP
    assert other.is_alive()
    other.pipe.send(("serving", "toy"))
    await other.end()
    assert other.exitcode == -signal.SIGHUP


async def test_a_child_that_does_not_end_by_itself_is_killed(kept, monkeypatch):
    monkeypatch.setattr("semid_server.serving.processes.LAST_RESORT", 0.1 - CONFIG.grace)
    stopped, other = await kept.children()
    os.kill(stopped.pid, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.gather(stopped.end(), other.end())
    assert (stopped.exitcode, other.exitcode) == (-signal.SIGKILL, -signal.SIGTERM)
