"""Memory and utilisation of a GPU, with a stand-in for its driver.

tests/gpu/test_operate_gpu.py asks a real one.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from semid_server.serving.device_use import DeviceUse, DeviceWatch
from semid_server.serving.metrics import Metrics

UUID = "c0ffee00-0000-4000-8000-000000000001"


class NVMLError(Exception):
    """What the driver's library raises."""


class FakeNvml:
    """A driver that knows one device, by one kind of name."""

    NVMLError = NVMLError

    def __init__(self, *, prefix="GPU", loads=True, says_utilization=True):
        self.prefix, self.loads, self.says_utilization = prefix, loads, says_utilization

    def nvmlInit(self):  # noqa: N802 - the driver's name
        if not self.loads:
            raise NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802 - the driver's name
        if uuid != f"{self.prefix}-{UUID}":
            raise NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802 - the driver's name
        assert handle == "handle"
        return SimpleNamespace(total=80, used=30)

    def nvmlDeviceGetUtilizationRates(self, handle):  # noqa: N802 - the driver's name
        if not self.says_utilization:
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=75, memory=10)


CUDA = SimpleNamespace(
    get_device_properties=lambda device: SimpleNamespace(uuid=UUID),
    memory_reserved=lambda device: 20,
)


def watch(nvml):
    return DeviceWatch(torch.device("cuda:0"), "NVIDIA X", nvml=nvml, cuda=CUDA)


def samples(metrics):
    return {
        sample.name: (sample.labels, sample.value)
        for family in metrics.registry.collect()
        for sample in family.samples
        if family.name.startswith("semid_device_") and sample.name == family.name
    }


@pytest.mark.parametrize("prefix", ["GPU", "MIG"])
def test_a_device_is_found_by_its_uuid_whole_or_a_part(prefix):
    assert watch(FakeNvml(prefix=prefix)).read() == DeviceUse("NVIDIA X", 80, 30, 20, 0.75)


def test_what_the_driver_does_not_say_is_left_out():
    metrics = Metrics()
    metrics.watch_device(watch(FakeNvml(says_utilization=False)).read)
    labels = {"device": "NVIDIA X"}
    assert samples(metrics) == {
        "semid_device_memory_total_bytes": (labels, 80),
        "semid_device_memory_used_bytes": (labels, 30),
        "semid_device_memory_reserved_bytes": (labels, 20),
    }


@pytest.mark.parametrize("nvml", [FakeNvml(loads=False), FakeNvml(prefix="other")])
def test_without_the_drivers_library_there_are_no_figures_and_the_log_says_why(nvml, caplog):
    with caplog.at_level(logging.WARNING):
        silent = watch(nvml)
    assert silent.read() is None
    assert "NVIDIA_DRIVER_CAPABILITIES" in caplog.text


def test_a_cpu_has_no_such_samples_but_the_families_are_there():
    metrics = Metrics()
    assert samples(metrics) == {}
    names = {family.name for family in metrics.registry.collect()}
    assert "semid_device_utilization_ratio" in names
