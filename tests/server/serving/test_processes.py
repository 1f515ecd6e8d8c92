"""How the metrics of several processes become one page, and how the processes are kept running."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
import urllib.request
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import uvloop
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from semid_server.checkpoint import Checkpoint, Overrides, load_checkpoint
from semid_server.errors import ConfigurationError, DeviceError
from semid_server.serving import reloading
from semid_server.serving.config import ModelSource, ServeConfig
from semid_server.serving.drift import LayerDrift
from semid_server.serving.kept import Kept, read
from semid_server.serving.metrics import Metrics
from semid_server.serving.processes import (
    LEAST,
    SUMMED,
    Processes,
    _call_when_readable,
    _Child,
    _Parent,
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
    [("semid_queue_requests", 5), ("semid_serving", 2), ("semid_device_utilization_ratio", 3)],
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


@dataclass
class Files:
    """Checkpoints, of which one is put where the processes' is."""

    reference_dir: Path
    path: Path

    def put(self, name):
        """Put one there; return its fingerprint."""
        new = self.path.with_name("new")
        shutil.copyfile(self.reference_dir / name / "model.ckpt", new)
        new.replace(self.path)
        return load_checkpoint(self.path).fingerprint


@pytest.fixture
def files(reference_dir, tmp_path):
    return Files(reference_dir, tmp_path / "toy.ckpt")


class FakeProcess:
    """A process that does nothing until a signal ends it; its end of the pipe is the test's."""

    def __init__(self, *, target, args, daemon):
        _config, _prepare, theirs = args
        self.pipe = Connection(os.dup(theirs.fileno()))
        self.given = None

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

    async def handed(self):
        """Wait for a version of the parent; return its fingerprint."""
        while not self.pipe.poll():
            await asyncio.sleep(0)
        return Kept.receive(self.pipe).load(Path("toy"), Overrides()).fingerprint

    def serve(self):
        self.pipe.send(("serving", "toy"))

    async def told_to_load(self, change=1):
        """Wait until the parent says so; return the fingerprint of what it hands over."""
        assert await self.asked() == ("load", (change, 0))
        return await self.handed()

    def has_loaded(self, change=1, error=None):
        self.pipe.send(("loaded", (change, error)))

    async def load(self, change=1, error=None):
        """Load what the parent says, or fail to; return the fingerprint of it."""
        fingerprint = await self.told_to_load(change)
        self.has_loaded(change, error)
        return fingerprint

    def answer(self, count, drift=()):
        calls = Counter("calls_total", "Calls.", registry=(registry := CollectorRegistry()))
        calls.inc(count)
        Gauge("semid_serving", "Serving.", registry=registry).set(1)
        self.pipe.send(("metrics", (list(registry.collect()), {"toy": drift})))


class FakeContext:
    """Makes such processes, and real pipes."""

    def __init__(self):
        self.made = []

    Pipe = staticmethod(multiprocessing.Pipe)

    def Process(self, **given):  # noqa: N802 - as multiprocessing calls it
        self.made.append(FakeProcess(**given))
        return self.made[-1]


class Running:
    """Two such processes that are kept by a task of the test's loop."""

    def __init__(self, path, **settings):
        context, self.lines = FakeContext(), []
        self.made = context.made
        config = replace(CONFIG, models=(ModelSource(path),), **settings)
        processes = Processes(
            config, announce=self.lines.append, prepare=lambda: None, context=context
        )
        self.processes = processes
        self._run = asyncio.create_task(processes.run())

    async def children(self, count=2):
        """Wait until so many have been made; return them all, each given what it asked for."""
        while len(self.made) < count:
            await asyncio.sleep(0)
        for child in self.made:
            if child.given is None:
                child.pipe.send(("versions", None))
                child.given = await child.handed()
        return self.made

    async def reloads(self, result):
        """Wait until an attempt to reload has ended so."""
        while True:
            value = self.processes._metrics.registry.get_sample_value
            if value("semid_model_reloads_total", {"model": "toy", "result": result}):
                return
            await asyncio.sleep(0)

    def scrape(self, name="calls_total"):
        """Begin to ask the metrics endpoint; return the task of its answer: all calls counted."""

        def ask():
            (address,) = [line for line in self.lines if line.startswith("metrics on ")]
            url = f"http://{address.removeprefix('metrics on ')}/metrics"
            text = urllib.request.urlopen(url).read().decode()
            (count,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
            return float(count.split()[1])

        return asyncio.create_task(asyncio.to_thread(ask))

    async def turns(self):
        """Let the parent do what it can."""
        await asyncio.sleep(0.2)

    async def all_serve(self):
        """Have both serve, as a scrape finds."""
        for child in await self.children():
            child.serve()
        scrape = self.scrape("semid_serving")
        for child in await self.children():
            await child.asked()
            child.answer(1000)
        assert await scrape == 1

    async def end(self):
        if not self._run.done():
            os.kill(os.getpid(), signal.SIGTERM)
        while not self._run.done():
            for child in self.made:
                if not child.is_alive():
                    child.pipe.close()
            await asyncio.sleep(0)
        await self._run


@pytest.fixture
async def running(request, files, monkeypatch):
    monkeypatch.setattr("semid_server.serving.processes.PAUSES", (0.01, 0.01))
    files.put("digits_rkmeans")
    made = Running(files.path, **getattr(request, "param", {}))
    yield made
    await made.end()


async def killed(child):
    os.kill(child.pid, signal.SIGKILL)
    await child.end()


async def test_a_child_that_does_not_read_is_asked_for_its_metrics_once():
    context = FakeContext()
    child = _Child(CONFIG, lambda: None, context, versions=lambda: (), news=lambda: None)
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


async def test_a_child_is_handed_more_versions_than_its_pipe_holds_once_it_asks(files):
    files.put("digits_rkmeans")
    kept, _ = read(files.path, Overrides())
    context = FakeContext()
    child = _Child(CONFIG, lambda: None, context, versions=lambda: [kept] * 400, news=lambda: None)
    (process,) = context.made
    process.pipe.send(("versions", None))
    got = await asyncio.to_thread(lambda: [Kept.receive(process.pipe) for _ in range(400)])
    assert len({each.load(files.path, Overrides()).fingerprint for each in got[::100]}) == 1
    child.tell(signal.SIGTERM)
    await process.end()
    await child.ended


async def test_what_a_child_counted_that_ends_during_a_scrape_is_counted_once(running):
    one, other = await running.children()
    first = running.scrape()
    for child in (one, other):
        child.pipe.send(("serving", "toy"))
        await child.asked()
        child.answer(1000)
    assert await first == 2000
    second = running.scrape()
    await one.asked()
    os.kill(one.pid, signal.SIGKILL)
    await one.end()
    await other.asked()
    other.answer(1000)
    assert await second == 2000


async def test_code_usage_is_that_of_the_rows_of_all_processes(running):
    one, other = await running.children()
    scrape = running.scrape('semid_dead_codes{layer="0",model="toy"}')
    for child, counts in ((one, [3, 0, 0, 0]), (other, [0, 1, 0, 1])):
        child.pipe.send(("serving", "toy"))
        await child.asked()
        child.answer(1000, [LayerDrift(np.array(counts), 1.0, 0.5)])
    assert await scrape == 1


async def test_while_no_process_is_there_none_is_said_to_serve(running):
    await running.all_serve()
    one, other = await running.children()
    for child in (one, other):
        os.kill(child.pid, signal.SIGKILL)
        await child.end()
    assert await running.scrape("semid_serving") == 0


async def test_while_one_process_is_not_there_not_all_are_said_to_serve(running):
    await running.all_serve()
    one, other = await running.children()
    os.kill(one.pid, signal.SIGKILL)
    await one.end()
    scrape = running.scrape("semid_serving")
    await other.asked()
    other.answer(1000)
    assert await scrape == 0


async def test_a_child_that_does_not_answer_is_waited_for_once_and_does_not_count_as_serving(
    running, monkeypatch
):
    await running.all_serve()
    hung, other = await running.children()
    monkeypatch.setattr("semid_server.serving.processes.METRICS_PATIENCE", 0.1)
    first = running.scrape("semid_serving")
    await other.asked()
    other.answer(1001)
    assert await first == 0
    # From now on a scrape would wait as long as this test may last, if it waited for that one.
    monkeypatch.setattr("semid_server.serving.processes.METRICS_PATIENCE", 3600)
    for count in (1002, 1003):
        scrape = running.scrape()
        await other.asked()
        other.answer(count)
        assert await asyncio.wait_for(scrape, 60) == 1000 + count
    await hung.asked()
    hung.answer(1010)  # to the first question: there was no other
    assert not hung.pipe.poll()
    scrape = running.scrape("semid_serving")
    for child in (hung, other):
        await child.asked()
        child.answer(1020)
    assert await scrape == 1


async def test_a_child_is_asked_for_nothing_before_it_has_what_it_is_to_serve(running):
    await running.all_serve()
    one, other = await running.children()
    await killed(one)
    while len(running.made) < 3:
        await asyncio.sleep(0)
    scrape = running.scrape()
    await other.asked()
    other.answer(1000)
    assert await scrape == 2000
    assert not running.made[2].pipe.poll()
    *_, third = await running.children(3)
    assert third.given == one.given


async def test_every_child_is_given_what_the_first_one_was_whatever_is_at_its_path(running, files):
    one, other = await running.children()
    for child in (one, other):
        child.serve()
    files.put("digits_rvq")
    await killed(one)
    files.path.unlink()
    await killed(other)
    assert len({child.given for child in await running.children(4)}) == 1


async def test_a_new_version_is_served_once_all_have_loaded_it_and_by_those_that_start_later(
    running, files
):
    await running.all_serve()
    one, other = await running.children()
    new = files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    assert await one.load() == new
    assert await other.told_to_load() == new
    await running.turns()
    assert not one.pipe.poll(), "one has loaded it, and the other has not"
    other.has_loaded()
    for child in (one, other):
        assert await child.asked() == ("put", 1)
    await running.reloads("ok")
    await killed(one)
    *_, third = await running.children(3)
    assert third.given == new != one.given


@pytest.mark.parametrize(
    "error", [ConfigurationError("takes other rows"), DeviceError("no memory"), None]
)
async def test_a_version_that_one_child_cannot_use_is_served_by_none(running, files, caplog, error):
    await running.all_serve()
    one, other = await running.children()
    files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    await one.load()
    if error is None:  # it is what ends it
        await other.told_to_load()
        await killed(other)
        error = f"server process {other.pid} ended before all had loaded it"
    else:
        await other.load(error=error)
        assert await other.asked() == ("drop", 1)
        await killed(other)
    assert await one.asked() == ("drop", 1)
    await running.reloads("failed")
    assert f"{error}; toy goes on as it was" in caplog.text
    *_, third = await running.children(3)
    assert third.given == one.given


async def test_a_version_of_another_width_is_offered_to_none(running, files, caplog):
    await running.all_serve()
    files.put("movies_rkmeans")
    os.kill(os.getpid(), signal.SIGHUP)
    await running.reloads("failed")
    assert "takes rows of 384 numbers, the one before takes 64" in caplog.text
    assert not any(child.pipe.poll() for child in await running.children())


async def test_a_refusal_does_not_wait_for_a_child_that_still_loads(running, files):
    await running.all_serve()
    hung, other = await running.children()
    files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    await hung.told_to_load()
    await other.load(error=DeviceError("no memory"))
    for child in (hung, other):
        assert await child.asked() == ("drop", 1)
    await running.reloads("failed")


async def test_what_a_child_says_of_a_version_that_was_refused_is_not_taken_for_the_next(
    running, files
):
    await running.all_serve()
    late, other = await running.children()
    files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    await late.told_to_load()
    await other.load(error=DeviceError("no memory"))
    for child in (late, other):
        assert await child.asked() == ("drop", 1)
    await running.reloads("failed")
    os.kill(os.getpid(), signal.SIGHUP)
    await other.load(2)
    await running.turns()
    assert not late.pipe.poll(), "it has not answered for the first one, nor perhaps read"
    late.has_loaded(1)
    await late.told_to_load(2)
    await running.turns()
    assert not other.pipe.poll(), "one has loaded the version before alone"
    late.has_loaded(2)
    for child in (late, other):
        assert await child.asked() == ("put", 2)
    await running.reloads("ok")


async def test_a_child_that_ends_after_it_has_loaded_a_version_is_started_again_while_others_load(
    running, files
):
    await running.all_serve()
    one, hung = await running.children()
    files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    await hung.told_to_load()
    await one.load()
    await killed(one)
    assert await hung.asked() == ("drop", 1)
    await running.reloads("failed")
    *_, third = await running.children(3)
    assert third.given == one.given


async def test_a_child_that_hangs_while_it_loads_keeps_none_from_being_started_again(
    running, files
):
    await running.all_serve()
    one, hung = await running.children()
    await killed(one)
    *_, third = await running.children(3)
    files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    await hung.told_to_load()
    await killed(third)
    *_, fourth = await running.children(4)
    assert fourth.given == one.given


async def test_a_child_that_begins_to_serve_while_others_load_is_waited_for_too(running, files):
    await running.all_serve()
    one, other = await running.children()
    await killed(one)
    *_, third = await running.children(3)
    new = files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    assert await other.told_to_load() == new
    third.serve()
    assert await third.told_to_load() == new
    other.has_loaded()
    await running.turns()
    assert not other.pipe.poll()
    third.has_loaded()
    for child in (other, third):
        assert await child.asked() == ("put", 1)
    await running.reloads("ok")


async def test_a_child_that_starts_with_what_the_others_have_left_is_ended_for_another(
    running, files, caplog
):
    await running.all_serve()
    one, other = await running.children()
    await killed(one)
    *_, third = await running.children(3)
    new = files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    await other.load()
    assert await other.asked() == ("put", 1)
    await third.end()
    *_, fourth = await running.children(4)
    assert third.given == one.given
    assert fourth.given == new
    assert f"process {third.pid} ended" not in caplog.text, "nothing is amiss"


async def test_a_child_that_has_only_been_started_is_handed_what_is_served_when_it_asks(
    running, files
):
    await running.all_serve()
    one, other = await running.children()
    await killed(one)
    while len(running.made) < 3:
        await asyncio.sleep(0)
    new = files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    await other.load()
    await running.reloads("ok")
    *_, third = await running.children(3)
    assert third.given == new
    assert third.is_alive()


@pytest.mark.parametrize("running", [{"watch": 0.05}], indirect=True)
async def test_with_watch_a_version_is_tried_again_after_a_child_ended_amid_it(running, files):
    await running.all_serve()
    one, other = await running.children()
    new = files.put("digits_rvq")
    await other.told_to_load()
    await one.load()
    await killed(one)
    assert await other.asked() == ("drop", 1)
    await running.reloads("failed")
    other.has_loaded(1)
    *_, third = await running.children(3)
    third.serve()
    for child in (other, third):
        assert await child.load(2) == new
    for child in (other, third):
        assert await child.asked() == ("put", 2)
    await running.reloads("ok")


async def test_on_sighup_while_the_first_ones_start_they_reload_once_all_serve(running, files):
    one, other = await running.children()
    new = files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    one.serve()
    await running.turns()
    assert not one.pipe.poll()
    other.serve()
    assert {await one.load(), await other.load()} == {new}


@pytest.mark.parametrize("running", [{"watch": 0.05}], indirect=True)
async def test_with_watch_all_load_a_changed_file_those_too_that_were_started_again(running, files):
    await running.all_serve()
    one, other = await running.children()
    await killed(one)
    *_, third = await running.children(3)
    third.serve()
    new = files.put("digits_rvq")
    assert {await other.load(), await third.load()} == {new}
    for child in (other, third):
        assert await child.asked() == ("put", 1)
    await running.reloads("ok")


async def test_a_version_that_mends_what_keeps_all_from_starting_is_taken(running, files):
    await running.all_serve()
    for child in await running.children():
        await killed(child)
    new = files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    given = set()
    while new not in given:  # none of the others gets as far as to serve
        for child in list(await running.children()):
            given.add(child.given)
            if not child.is_alive():
                child.pipe.close()  # it was told to end, for another one to start with the new one
            elif child.given != new:
                await killed(child)
        await asyncio.sleep(0)
    await running.reloads("ok")


async def test_the_log_names_the_child_that_a_new_version_waits_for(
    running, files, caplog, monkeypatch
):
    monkeypatch.setattr("semid_server.serving.processes.SLOW_TO_LOAD", 0.01)
    await running.all_serve()
    one, other = await running.children()
    files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    await one.load()
    while (found := f"of toy within 0.01 s: {other.pid};") not in caplog.text:
        await asyncio.sleep(0)
    await other.load()
    assert caplog.text.count(found) == 1


async def test_told_to_end_while_a_new_version_is_loaded_they_end_and_none_is_said_to_have_failed(
    running, files, caplog
):
    await running.all_serve()
    one, other = await running.children()
    files.put("digits_rvq")
    os.kill(os.getpid(), signal.SIGHUP)
    await one.load()
    await other.told_to_load()
    await running.end()
    assert [one.exitcode, other.exitcode] == [-signal.SIGTERM] * 2
    assert "goes on as it was" not in caplog.text
    assert not [task for task in asyncio.all_tasks() if "_reload" in repr(task.get_coro())]


def memory_files():
    """How many versions are open in this process, which is the parent."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the list itself
            found += link.readlink().name.startswith("memfd:semid-version")
    return found


def checkpoints():
    """How many checkpoints are in its memory."""
    # By its type alone: to ask some objects for their class is to use what is deprecated.
    return sum(type(each) is Checkpoint for each in gc.get_objects())


async def test_of_what_is_served_no_longer_or_was_refused_nothing_stays_with_the_parent(
    running, files, monkeypatch
):
    # Pytest keeps what is logged: the error, which has the version that was refused.
    monkeypatch.setattr(reloading.logger, "disabled", True)
    await running.all_serve()
    children = await running.children()
    before = memory_files(), checkpoints()
    for change, name in enumerate(("digits_rvq", "digits_rkmeans", "digits_rvq"), 1):
        files.put(name)
        os.kill(os.getpid(), signal.SIGHUP)
        for child in children:
            await child.load(change)
        for child in children:
            assert await child.asked() == ("put", change)
    await running.turns()
    assert (memory_files(), checkpoints()) == before
    files.put("digits_rkmeans")
    os.kill(os.getpid(), signal.SIGHUP)
    for child in children:
        await child.load(4, error=DeviceError("no memory"))
    await running.reloads("failed")
    await running.turns()
    assert (memory_files(), checkpoints()) == before


class FakeServer:
    """A server of a child, which has loaded a version when the test says so."""

    def __init__(self):
        self.loading, self.done = [], []

    async def prepare(self, source):
        self.loading.append(asyncio.get_running_loop().create_future())
        return await self.loading[-1]

    def put(self, backend):
        self.done.append(("put", backend))

    def drop(self, backend):
        self.done.append(("drop", backend))


async def test_a_child_that_still_loads_what_was_refused_lets_go_of_it_once_it_has_it(files):
    files.put("digits_rkmeans")
    kept, _ = read(files.path, Overrides())
    ours, theirs = multiprocessing.Pipe()
    server = FakeServer()
    parent = _Parent(theirs, CONFIG, server)

    async def load(change):
        kept.send(ours, ("load", (change, 0)))
        parent.listen()
        while len(server.loading) < change:
            await asyncio.sleep(0)

    async def has_loaded(change, backend):
        server.loading[change - 1].set_result(backend)
        while not ours.poll():
            await asyncio.sleep(0)
        assert ours.recv() == ("loaded", (change, None))

    with ours, theirs:
        await load(1)
        ours.send(("drop", 1))
        parent.listen()
        assert server.done == []
        await has_loaded(1, "refused")
        assert server.done == [("drop", "refused")]
        await load(2)
        await has_loaded(2, "taken")
        ours.send(("put", 2))
        parent.listen()
        assert server.done[1:] == [("put", "taken")]


async def test_a_child_that_does_not_end_by_itself_is_killed(running, monkeypatch):
    monkeypatch.setattr("semid_server.serving.processes.LAST_RESORT", 0.1 - CONFIG.grace)
    stopped, other = await running.children()
    os.kill(stopped.pid, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.gather(stopped.end(), other.end())
    assert (stopped.exitcode, other.exitcode) == (-signal.SIGKILL, -signal.SIGTERM)
