"""Launch a kernel of one line and all of semid's, on the stand-in for a driver of libcuda.c.

    python launches.py EXPECTED.jsonl

Tensors are the CPU's; the stand-in takes their addresses for its own. semid's kernels are launched
by the functions that serve, those of `semid_server.encoding.gpu`. What each launch should be is
written as a line: name, grid, threads, and the arguments as Python has them.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import encode_cases as cases
import torch
import triton
import triton.language as tl
from triton.backends.nvidia.driver import CudaDriver

from semid_server.cli import doctor_kernel
from semid_server.encoding import gpu
from semid_server.encoding.plan import Plan
from semid_server.encoding.protocol import ROW_DTYPES

CPU = torch.device("cpu")
STREAM = 0x5EED


class Driver(CudaDriver):
    """Triton's own; what it asks of torch, which has no CUDA here, is asked of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device: STREAM
        self.get_device_capability = _capability


def _capability(device: int) -> tuple[int, int]:
    library, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    found = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        assert library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == 0
        found.append(value.value)
    return found[0], found[1]


class Noted:
    """A kernel that notes what it is launched with before it is."""

    def __init__(self, kernel: triton.JITFunction, expected: list[dict[str, Any]]) -> None:
        self._kernel, self._expected = kernel, expected

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, num_warps: int = 4, **options: Any) -> None:
            self._expected.append(
                {
                    "name": self._kernel.__name__,
                    "grid": [*grid, 1, 1][:3],
                    "block": [32 * num_warps, 1, 1],
                    "arguments": [
                        {"pointer": argument.data_ptr()}
                        if isinstance(argument, torch.Tensor)
                        else argument
                        for argument in arguments
                    ],
                }
            )
            self._kernel[grid](*arguments, num_warps=num_warps, **options)

        return launch


def note_launches(module: Any, expected: list[dict[str, Any]]) -> set[str]:
    """Have every kernel of a module noted; return their names. Those with _ are parts of others."""
    kernels = {
        name: kernel
        for name, kernel in vars(module).items()
        if isinstance(kernel, triton.JITFunction) and not name.startswith("_")
    }
    for name, kernel in kernels.items():
        setattr(module, name, Noted(kernel, expected))
    return set(kernels)


@triton.jit
def add(left, right, total, factor, WIDTH: tl.constexpr):  # noqa: N803 - Triton's capitals
    """``total = factor * (left + right)``."""
    place = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    numbers = tl.load(left + place) + tl.load(right + place)
    tl.store(total + place, factor * numbers)


def encode(tables: gpu.Tables, given: torch.Tensor, *, network: bool) -> None:
    """Launch what `GpuEncoder.queue` does for a batch; ``network``: as for a model with one."""
    n, layers = len(given), tables.plan.n_layers
    rows = gpu.Rows.of(given)
    if network:
        wide = torch.zeros(n, rows.dim, dtype=torch.float64)
        gpu.widen(rows, wide)
        rows = gpu.Rows.of(wide)  # what the network makes of them is as wide
    rounded = torch.empty(n, tables.columns.shape[1], dtype=torch.float16)
    facts = torch.zeros(n, 4, dtype=torch.float64)
    levels = torch.zeros(n, dtype=torch.int32)
    codes = torch.zeros(n, layers, dtype=torch.uint8)
    work = gpu.Work.of(n, CPU)
    gpu.round_rows(rows, rounded, facts)
    products = torch.zeros(n, tables.plan.offsets[-1])
    for step in (gpu.prove, gpu.decide):
        step(
            rows,
            products,
            facts,
            tables,
            codes=codes,
            levels=levels,
            work=work,
            has_offset=network,
        )
    counts = torch.zeros(3, dtype=torch.int64)
    gpu.finish(rows, tables, codes=codes, counts=counts, work=work, resolve=not network)


def main() -> None:
    triton.runtime.driver.set_active(Driver())  # type: ignore[no-untyped-call] # Triton's own
    expected: list[dict[str, Any]] = []
    Noted(add, expected)[4,](*(torch.ones(128) for _ in range(3)), 0.5, WIDTH=32)

    names = note_launches(doctor_kernel, expected)
    assert not doctor_kernel.run(CPU), "the stand-in computes nothing"

    names |= note_launches(gpu.kernels, expected)
    for normalize in (True, False):
        network = not normalize
        model, spec = cases.random_model(20, [33, 5], normalize=normalize)
        tables = gpu.Tables.of(Plan.of(spec, model.state_dict(), CPU))
        for dtype in ROW_DTYPES:
            for n in (1, 50):
                encode(tables, torch.ones(n, spec.input_dim, dtype=dtype), network=network)
    assert {"add", *names} == {launch["name"] for launch in expected}, "one is not launched above"

    Path(sys.argv[1]).write_text("".join(f"{json.dumps(launch)}\n" for launch in expected))


if __name__ == "__main__":
    main()
