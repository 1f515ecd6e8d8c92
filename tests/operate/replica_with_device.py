"""`semid serve` with a stand-in for a GPU's driver, for machines that have none.

    python tests/operate/replica_with_device.py CHECKPOINT

Codes, batches and all other figures are real, and made on the CPU. Only what a driver would say is
made up, from this process: its memory, and how busy it is.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import uvloop

from semid_server.serving.backend import Backend
from semid_server.serving.config import ModelSource, ServeConfig
from semid_server.serving.device_use import DeviceUse
from semid_server.serving.server import Server

TOTAL = 8 << 30


class BackendWithDevice(Backend):
    """A backend whose device has memory to show, and is as busy as this process is."""

    _seen = (0.0, 0.0)

    def device_use(self) -> DeviceUse:
        before, self._seen = self._seen, (time.process_time(), time.monotonic())
        spent, passed = (now - then for now, then in zip(self._seen, before, strict=True))
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        page = os.sysconf("SC_PAGE_SIZE")
        return DeviceUse(
            device="stand-in",
            total_bytes=TOTAL,
            used_bytes=resident * page,
            reserved_bytes=(resident - shared) * page,
            utilization=min(1.0, spent / passed) if before[1] else 0.0,
        )


def main() -> None:
    config = ServeConfig(
        models=(ModelSource(Path(sys.argv[1])),),
        host="127.0.0.1",
        port=0,
        metrics_port=0,
        device="cpu",
        threads=1,
        verify_fraction=0.05,
    )

    def announce(line: str) -> None:
        print(f"semid: {line}", flush=True)

    uvloop.run(Server(config, announce=announce, make_backend=BackendWithDevice).run())


if __name__ == "__main__":
    main()
