"""What the metrics tell, of what happened."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from semid_server.errors import InvalidInputError
from semid_server.serving.backend import Device
from semid_server.serving.batcher import Batcher, BatchLimits
from semid_server.serving.metrics import Metrics
from semid_server.serving.types import EncodeKey

FINE, BAD, NO_MEMORY, FAILS = range(4)


class Failing:
    """A backend that does with a request what the request begins with."""

    quick = False

    def __init__(self, served):
        self.served = replace(served, backend=self)
        self.began, self.may_go_on = threading.Event(), threading.Event()

    def run(self, key, payloads):
        self.began.set()
        assert self.may_go_on.wait(30)
        wanted = [payload[0, 0] for payload in payloads]
        if NO_MEMORY in wanted:
            raise torch.cuda.OutOfMemoryError
        if FAILS in wanted:
            raise RuntimeError
        return [
            InvalidInputError("NaN") if number == BAD else payload
            for number, payload in zip(wanted, payloads, strict=True)
        ]

    def device_works(self):
        return True

    def release_memory(self): ...

    def after(self): ...


@pytest.mark.parametrize(
    ("requests", "answered", "failed"),
    [
        ([FINE, FINE], 20, 0),
        ([FINE, BAD], 10, 0),
        ([BAD], 0, 0),
        ([NO_MEMORY], 0, 1),
        ([FINE, NO_MEMORY, FINE], 20, 1),
        ([FAILS], 0, 1),
        ([FAILS, FAILS], 0, 1),
    ],
)
async def test_rows_that_were_answered_are_counted_and_batches_that_the_device_failed_with(
    toy_served, requests, answered, failed
):
    metrics = Metrics()
    limits = BatchLimits(
        max_batch_rows=100, max_batch_bytes=100, max_queue_requests=100, max_queue_bytes=100
    )
    batcher = Batcher(limits=limits, observer=metrics)
    await batcher.start(Device)
    backend = Failing(toy_served)
    key = EncodeKey(backend.served, "float32")

    def ask(number, rows):
        payload = np.full((rows, 4), number, np.float32)
        return batcher.admit(key, payload, rows=rows, nbytes=1, deadline=None)

    futures = [ask(FINE, 1)]
    await asyncio.to_thread(backend.began.wait)
    futures += [ask(number, 10) for number in requests]  # which share a batch
    backend.may_go_on.set()
    await asyncio.gather(*futures, return_exceptions=True)
    batcher.stop()

    def value(name):
        return metrics.registry.get_sample_value(name, {"operation": "encode"})

    assert value("semid_batch_rows_count") == 2
    assert value("semid_batch_rows_sum") == 1 + 10 * len(requests)
    assert value("semid_rows_total") == 1 + answered
    assert value("semid_failed_batches_total") == failed


class Counting:
    """Counts what it encodes."""

    def __init__(self, served):
        self.served, self.rows = served, 0

    def proved_rows(self):
        return {"fast": self.rows, "float64": 0}

    def drift(self):
        return []

    def show(self, metrics):
        metrics.show_model(self.served, proved_rows=self.proved_rows, drift=self.drift)


def test_rows_that_a_replaced_version_still_encodes_are_counted(toy_served):
    metrics = Metrics()

    def proved(level="fast"):
        labels = {"model": "toy", "level": level}
        return metrics.registry.get_sample_value("semid_proved_rows_total", labels)

    old, new = Counting(toy_served), Counting(toy_served)
    old.show(metrics)
    assert (proved(), proved("float64")) == (0, 0)
    old.rows = 3
    new.show(metrics)
    assert proved() == 3
    old.rows, new.rows = 8, 10
    assert proved() == 18
    del old  # the streams that began with it have ended
    gc.collect()
    assert proved() == 18
    new.rows = 11
    Counting(toy_served).show(metrics)
    assert proved() == 19


def test_a_version_that_was_replaced_is_not_kept(toy_served):
    metrics = Metrics()
    old, new = Counting(toy_served), Counting(toy_served)
    old.show(metrics)
    new.show(metrics)
    gone = weakref.ref(old)
    del old
    assert gone() is None
