"""Benchmark of shared memory: embeddings handed over, beside the same sent as bytes, in one run.

    python tests/bench/shared_memory.py           # about a minute
    python tests/bench/shared_memory.py --quick   # seconds: does it all still run?

semid serves with a device that takes no time (every code is 0; the rows are copied into the batch
and checked as ever), so what is measured is the way there and back. One client process encodes
arrays of each size, one at a time, over loopback TCP: sent as bytes, copied into shared memory, and
from an array that `Client.allocate` made. The ways take turns, so that what else the machine does
falls on all of them alike. The limit is two bare copies (the array into a buffer, that buffer into
another), what handing over costs at least when the array was not allocated for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from serving import ALLOCATOR, DIM, KIB, MIB, PLAIN, beside, machine, make_checkpoint, title

from semid_client import Client

SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
WAYS = ("bytes", "shared", "in place")


def measure(target: str, sizes: list[int], seconds: float) -> dict[str, dict[str, float]]:
    """Median seconds of a call, by size and way."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((max(sizes) // (4 * DIM), DIM), dtype=np.float32)
    found = {}
    with (
        Client(target, shared_memory=False) as sending,
        Client(target, shared_memory=True) as sharing,
    ):
        allocated = sharing.allocate(*rows.shape)
        allocated[:] = rows
        once, twice = np.empty_like(rows), np.empty_like(rows)

        def copy(array: np.ndarray) -> None:
            once[: len(array)] = array
            twice[: len(array)] = once[: len(array)]

        for size in sizes:
            n = size // (4 * DIM)
            ways = {
                "bytes": (sending.encode, rows[:n]),
                "shared": (sharing.encode, rows[:n]),
                "in place": (sharing.encode, allocated[:n]),
                "two copies": (copy, rows[:n]),
            }
            times: dict[str, list[float]] = {way: [] for way in ways}
            for do, array in ways.values():
                do(array)
            until = time.perf_counter() + seconds
            while time.perf_counter() < until or len(times["bytes"]) < 3:
                for way, (do, array) in ways.items():
                    began = time.perf_counter()
                    do(array)
                    times[way].append(time.perf_counter() - began)
            found[str(size)] = {way: median(values) for way, values in times.items()}
    return found


def show(found: dict[str, dict[str, float]]) -> dict[str, float]:
    title(f"Encode of float32 rows of {DIM}, one client, one array at a time: MiB/s")
    print(f"{'array':>10}" + "".join(f"{way:>12}" for way in (*WAYS, "two copies")), end="")
    print("   shared/bytes   in place/bytes   ms a call: bytes, shared, in place")
    figures = {}
    for size, times in found.items():
        rates = {way: int(size) / MIB / taken for way, taken in times.items()}
        figures |= {f"mib_per_s.{way}.{size}": round(rate, 1) for way, rate in rates.items()}
        print(
            f"{int(size) // KIB:8} K" + "".join(f"{rate:12.0f}" for rate in rates.values()), end=""
        )
        for way in WAYS[1:]:
            print(f"{rates[way] / rates['bytes']:15.1f}", end="")
        print("     " + "".join(f"{1e3 * times[way]:9.2f}" for way in WAYS))
    print("Below 256 KiB arrays are sent as bytes either way: a call costs more than so few.")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short: figures mean little")
    parser.add_argument("--json", type=Path, help="write all figures to this file too")
    parser.add_argument("--client", metavar="TARGET", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = [64 * KIB, MIB, 16 * MIB] if arguments.quick else list(SIZES)
    if arguments.client:
        found = measure(arguments.client, sizes, 0.3 if arguments.quick else 8.0)
        print(json.dumps(found))
        return
    machine()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "made", DIM, 256)
        with beside("instant", "instant", checkpoint) as server:
            command = [sys.executable, __file__, "--client", server.target]
            command += ["--quick"] * arguments.quick
            client = subprocess.run(
                command, env=PLAIN | ALLOCATOR, stdout=subprocess.PIPE, check=True, text=True
            )
    figures = show(json.loads(client.stdout))
    print(f"\nload      {os.getloadavg()[0]:.2f} after the run")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
