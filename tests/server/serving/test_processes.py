"""How the metrics of several processes become one page, and how the processes are kept."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading

import pytest
import uvloop
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from semid_server.serving.metrics import Metrics
from semid_server.serving.processes import LEAST, SUMMED, _call_when_readable, merge


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
