"""How full and how busy the device is, asked of its driver.

NVML answers, not CUDA: a scrape must not touch the context that the batches run in, least of all
while another thread records a graph there, which a call from outside would spoil.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pynvml
import torch

if TYPE_CHECKING:
    from types import ModuleType

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What a device was found to be doing.

    Attributes
    ----------
    device : str
        Its name, as in `ServedModel.device`.
    total_bytes, used_bytes : int
        Its memory, and what all processes together have of it.
    reserved_bytes : int
        What this process has reserved for its tensors.
    utilization : float or None
        Share of the driver's last sampling period, a second at most, in which a kernel ran; None
        where the driver does not say, as for a part of a partitioned GPU.
    """

    device: str
    total_bytes: int
    used_bytes: int
    reserved_bytes: int
    utilization: float | None


class DeviceWatch:
    """Reads the use of one CUDA device.

    Parameters
    ----------
    device : torch.device
        Which; memory is of the device as a whole.
    name : str
        See `DeviceUse.device`.
    nvml, cuda
        Stand-ins for `pynvml` and `torch.cuda`, for where there is neither driver nor device.
    """

    def __init__(
        self, device: torch.device, name: str, *, nvml: ModuleType | Any = pynvml, cuda: Any = None
    ) -> None:
        self._device, self._name = device, name
        self._nvml, self._cuda = nvml, cuda or torch.cuda
        self._handle: Any = None
        try:
            nvml.nvmlInit()
            self._handle = self._find()
        except nvml.NVMLError as error:
            logger.warning(
                "%s: the driver's NVML cannot be asked (%s), so there are no metrics of its memory "
                "and utilisation; in a container, NVIDIA_DRIVER_CAPABILITIES must include utility",
                name,
                error,
            )

    def read(self) -> DeviceUse | None:
        """Ask now; None if the driver cannot tell."""
        if self._handle is None:
            return None
        try:
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        except self._nvml.NVMLError as error:
            logger.warning("%s: the driver cannot tell its memory: %s", self._name, error)
            return None
        return DeviceUse(
            device=self._name,
            total_bytes=memory.total,
            used_bytes=memory.used,
            reserved_bytes=self._cuda.memory_reserved(self._device),
            utilization=self._utilization(),
        )

    def _find(self) -> Any:
        """Return NVML's handle of the device: it counts devices in an order of its own."""
        uuid = str(self._cuda.get_device_properties(self._device).uuid)
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except self._nvml.NVMLError:
            return self._nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")

    def _utilization(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100
        except self._nvml.NVMLError:
            return None
