"""How batches reach the model they were admitted for, and what a failing device does to them."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from semid_server.errors import DeviceError, DeviceLostError
from semid_server.serving.backend import Device
from semid_server.serving.types import EncodeKey


class SmallBackend:
    """A backend whose device has memory for so many rows at once, or is broken."""

    def __init__(self, served, *, memory=10**9, error=None, works=True):
        self.served = replace(served, backend=self)
        self.memory, self.error, self.works = memory, error, works
        self.runs, self.releases, self.afters = [], 0, 0
        self.refused_rows = None

    @property
    def key(self):
        return EncodeKey(self.served, "float32")

    def run(self, key, payloads):
        rows = [len(payload) for payload in payloads]
        self.runs.append(rows)
        if self.error:
            raise self.error
        if self.refused_rows in rows:
            raise ValueError("cannot, says secret")
        if sum(rows) > self.memory:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory at 0xsecret")
        return [("codes of", len(payload)) for payload in payloads]

    def release_memory(self):
        self.releases += 1

    def device_works(self):
        return self.works

    def after(self):
        self.afters += 1


def payloads(*rows):
    return [np.zeros((n, 4), np.float32) for n in rows]


def test_each_batch_is_run_by_the_version_of_its_key(toy_served):
    old, new = SmallBackend(toy_served), SmallBackend(toy_served)
    device = Device()
    device.run(old.key, payloads(1))
    device.after()
    device.run(new.key, payloads(2))
    assert (old.runs, new.runs) == ([[1]], [[2]])
    assert (old.afters, new.afters) == (1, 0)


def test_a_batch_too_large_for_the_memory_is_run_in_halves(toy_served):
    backend = SmallBackend(toy_served, memory=10)
    answers = Device().run(backend.key, payloads(6, 3, 4, 2, 5))
    assert answers == [("codes of", n) for n in (6, 3, 4, 2, 5)]
    assert backend.runs[0] == [6, 3, 4, 2, 5]
    assert backend.releases >= 1


def test_a_single_request_too_large_for_the_memory_fails_alone(toy_served):
    backend = SmallBackend(toy_served, memory=10)
    answers = Device().run(backend.key, payloads(6, 11, 4))
    assert answers[0] == ("codes of", 6)
    assert answers[2] == ("codes of", 4)
    assert isinstance(answers[1], DeviceError)
    assert "11 rows" in str(answers[1])
    assert "secret" not in str(answers[1])


def test_an_error_after_which_the_device_works_is_raised_as_it_is(toy_served):
    error = RuntimeError("a bug")
    backend = SmallBackend(toy_served, error=error)
    with pytest.raises(RuntimeError) as caught:
        Device().run(backend.key, payloads(1))
    assert caught.value is error


def test_a_request_that_makes_a_batch_fail_fails_alone(toy_served):
    backend = SmallBackend(toy_served)
    backend.refused_rows = 7
    answers = Device().run(backend.key, payloads(6, 7, 4, 7, 5))
    assert [answers[n] for n in (0, 2, 4)] == [("codes of", n) for n in (6, 4, 5)]
    for n in (1, 3):
        assert isinstance(answers[n], DeviceError)
        assert "secret" not in str(answers[n])


def test_nothing_of_a_failed_attempt_is_held_while_its_halves_run(toy_served):
    held = []

    class Allocating(SmallBackend):
        def run(self, key, payloads):
            gc.collect()
            assert all(reference() is None for reference in held)
            allocated = torch.zeros(1)
            held.append(weakref.ref(allocated))
            return super().run(key, payloads)

        def release_memory(self):
            assert all(reference() is None for reference in held)

    backend = Allocating(toy_served, memory=2)
    assert len(Device().run(backend.key, payloads(2, 2, 1))) == 3
    assert len(held) == 5


def test_an_error_after_which_it_does_not_means_that_it_is_lost(toy_served):
    backend = SmallBackend(toy_served, error=RuntimeError("illegal access"), works=False)
    with pytest.raises(DeviceLostError) as caught:
        Device().run(backend.key, payloads(1))
    assert "illegal" not in str(caught.value)
