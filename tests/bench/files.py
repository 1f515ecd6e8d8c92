"""Files: `semid encode` beside the limits of this machine, the extra digit beside other ways.

    python tests/bench/files.py [--only encode|digits|spill|sparse] [--device cpu|cuda]

encode    a file, from the disk and from the page cache, beside what bounds it: reading the disk
          (past the page cache, by O_DIRECT), reading the page cache, copying in memory, each by one
          thread and by several, on a GPU the copy from pinned memory, the bare product; and beside
          its parts, the encoder alone and the pipeline with an encoder that takes no time. All
          take turns in one run. The original's arithmetic is measured on a few rows, and
          multiplied. For a GPU the file has to be large, for the work not to be over before its
          memory is warm: --rows 4000000.
digits    the extra digit of 10 million items, beside a loop over items (measured on a million,
          and multiplied) and pandas.
spill     the extra digit of 100 million items, a tenth of which have one ID: memory, and what
          goes to the disk.
sparse    peak memory of `semid encode` on a sparse file of 10 GB.

Where semid is not installed, its packages (server, client, proto) are on PYTHONPATH, and with them
a folder that holds the `.dist-info` of its wheel: the command finds its parts by entry points.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import encode as arithmetic
import encode_cases as cases
import numpy as np
import torch

from semid_client.files import Pipeline, Progress, Stages, extra_digits, open_rows
from semid_client.files.memory import pages
from semid_client.files.reading import READERS
from semid_server.checkpoint import save_checkpoint
from semid_server.cli.batch import CheckpointEngine

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS, WIDTH = 3, 256
READ_BYTES = 8 << 20
BUFFERS = [pages(READ_BYTES) for _ in range(2 * READERS)]
for buffer in BUFFERS:
    buffer[:] = 1
SECTIONS = ("encode", "digits", "spill", "sparse")


def save(folder: Path, codebooks: list[torch.Tensor], *, normalize: bool = True) -> Path:
    """Write a checkpoint of these centroids."""
    model, spec = cases.model_of(codebooks, normalize=normalize)
    save_checkpoint(folder / "model", model=model, spec=spec, name="bench")
    return folder / "model"


def turns(
    ways: dict[str, Callable[[], float | None]], repeat: int, within: float = np.inf
) -> dict[str, list[float]]:
    """Seconds of each way, all taking turns; a way may tell its seconds itself.

    No turn but the first begins after ``within`` seconds.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    first = time.perf_counter()
    for turn in range(repeat):
        if turn and time.perf_counter() - first > within:
            break
        for name, way in ways.items():
            began = time.perf_counter()
            told = way()
            found[name].append(time.perf_counter() - began if told is None else told)
    return found


def median(ways: dict[str, Callable[[], float | None]], repeat: int) -> dict[str, float]:
    """Median seconds of each way."""
    return {name: statistics.median(times) for name, times in turns(ways, repeat).items()}


# --- encode ----------------------------------------------------------------------------------


def read(path: Path, flags: int = 0) -> None:
    """Read a file once, through one buffer whose address O_DIRECT accepts."""
    file = os.open(path, os.O_RDONLY | flags)
    try:
        with mmap.mmap(-1, READ_BYTES) as buffer:
            while os.readv(file, [buffer]) == READ_BYTES:
                pass
    finally:
        os.close(file)


def read_at_once(path: Path, flags: int = 0) -> None:
    """Read a file once, in several places at once, into memory that was touched before."""
    file = os.open(path, os.O_RDONLY | flags)
    try:
        with ThreadPoolExecutor(READERS) as pool:
            starts = range(0, path.stat().st_size, READ_BYTES)
            # A buffer is read into by two threads where one is late, which harms nobody.
            buffers = cycle(BUFFERS)
            for done in [pool.submit(os.preadv, file, [next(buffers)], at) for at in starts]:
                done.result()
    finally:
        os.close(file)


def forget(path: Path) -> None:
    """Have the page cache drop a file, and make sure that it did."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # only clean pages can go
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
    kept = cached(path)
    if kept > 0.01:
        raise SystemExit(f"{path}: {kept:.0%} of it stay in the page cache")


def keep(path: Path) -> None:
    """Have the page cache hold a file, and make sure that it does."""
    read(path)
    kept = cached(path)
    if kept < 0.99:
        raise SystemExit(f"{path}: only {kept:.0%} of it stay in the page cache; use fewer --rows")


def cached_time(path: Path, way: Callable[[Path], None]) -> float:
    """Seconds of a way to read a file that the page cache holds."""
    keep(path)
    began = time.perf_counter()
    way(path)
    return time.perf_counter() - began


def file_system(folder: Path) -> str:
    """Type and options of the file system that a folder is on."""
    with open("/proc/self/mounts") as mounts:  # noqa: PTH123 - the kernel's
        found = [line.split()[1:4] for line in mounts]
    place, kind, options = max(
        (mount for mount in found if folder.resolve().is_relative_to(mount[0])),
        key=lambda mount: len(mount[0]),
    )
    return f"{kind} at {place} ({options})"


def cached(path: Path) -> float:
    """Which part of a file the page cache holds."""
    n_pages = -(-path.stat().st_size // mmap.PAGESIZE)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        view = (ctypes.c_ubyte * len(mapped)).from_buffer(mapped)
        resident = (ctypes.c_ubyte * n_pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.byref(view), ctypes.c_size_t(len(mapped)), resident)
        del view
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return float((np.frombuffer(resident, np.uint8) & 1).mean())


def semid_encode(path: Path, checkpoint: Path, device: str) -> dict:
    """What the command tells: its seconds are from the first row to the renamed output."""
    told = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "semid_client",
                "encode",
                path,
                "-o",
                path.with_name("out.npy"),
            ),
            *("--force", "--json", "--checkpoint", checkpoint, "--device", device),
        ],
        check=True,
        capture_output=True,
    ).stdout
    return json.loads(told)


def copy_at_once(target: np.ndarray, rows: np.ndarray) -> None:
    """Copy rows by several threads, a part each."""
    step = -(-len(rows) // READERS)
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(rows), step):
            pool.submit(np.copyto, target[start : start + step], rows[start : start + step])


def limits_of(
    path: Path, drawn: torch.Tensor, codebooks: list[torch.Tensor], device: torch.device, block: int
) -> dict[str, Callable[[], float | None]]:
    """What no way of encoding these rows from a file can be faster than."""
    rows = drawn.numpy()
    on_device, stacked = drawn.to(device), torch.cat(codebooks).T.contiguous().to(device)
    half, stacked_half = on_device.bfloat16(), stacked.bfloat16()
    copy = np.empty_like(rows)

    def product(left, right):
        for start in range(0, len(left), block):
            left[start : start + block] @ right
        ready(device)

    limits: dict[str, Callable[[], float | None]] = {
        "reading the disk": lambda: read(path, os.O_DIRECT),
        "reading the page cache": lambda: cached_time(path, read),
        f"reading the disk, {READERS} threads": lambda: read_at_once(path, os.O_DIRECT),
        f"reading the page cache, {READERS} threads": lambda: cached_time(path, read_at_once),
        "copying in memory": lambda: np.copyto(copy, rows),
        f"copying in memory, {READERS} threads": lambda: copy_at_once(copy, rows),
        "bare product, float32": lambda: product(on_device, stacked),
        "bare product, bfloat16": lambda: product(half, stacked_half),
    }
    if device.type == "cuda":
        target = torch.empty_like(on_device)

        def transfer():
            target.copy_(drawn, non_blocking=True)
            ready(device)

        limits["pinned copy to the GPU"] = transfer
    some = {
        "float32": lambda: product(on_device[:block], stacked),
        "bfloat16": lambda: product(half[:block], stacked_half),
    }
    some["bfloat16"]()
    seconds = median(some, 5)
    if seconds["bfloat16"] > seconds["float32"]:  # no limit, and on some processors minutes
        del limits["bare product, bfloat16"]
        times = seconds["bfloat16"] / seconds["float32"]
        print(f"\nbare product, bfloat16: left out, {times:.1f} times as slow as float32 here")
    return limits


class Nowhere:
    """Takes codes, and forgets them."""

    def __init__(self) -> None:
        self.progress = Progress({})

    def append(self, n_in, rows, bad) -> None:
        pass


def pipeline_alone(path: Path, engine: CheckpointEngine) -> float:
    """Seconds of all but the encoder: reading, looking for NaN, handing on."""
    codes = np.zeros((engine.block_bytes, LAYERS), np.uint8)
    with closing(open_rows(str(path), "embeddings")) as source:
        began = time.perf_counter()
        Pipeline(
            source=source,
            work=Nowhere(),
            engine=engine,
            compute=lambda rows: codes[: len(rows)],
            on_bad_row="fail",
            report=lambda _: None,
            stages=Stages(),
        ).run()
        return time.perf_counter() - began


def slowest_of(found, limits, where, *, of="semid encode", without="nothing") -> tuple[str, float]:
    """Which limit is the slowest for a file from ``where``, and how much of it is reached."""
    bounds: dict[str, tuple[float, str]] = {}
    for name in limits:
        kind, _, _ = name.partition(",")  # of two ways of doing the same the faster one bounds
        if kind != f"reading the {'disk' if where == 'page cache' else 'page cache'}":
            bounds[kind] = min(bounds.get(kind, (np.inf, "")), (found[name], name))
    seconds, name = max(bound for kind, bound in bounds.items() if not kind.startswith(without))
    return name, seconds / found[f"{of}, {where}"]


def ready(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def encode(
    folder: Path, n: int, dim: int, device: torch.device, *, repeat: int, within: float
) -> dict[str, float]:
    codebooks, drawn = arithmetic.clusters(dim, WIDTH, n, device)
    # For a GPU page-locked: it is copied from there, and encoded from there where alone.
    drawn = torch.empty(drawn.shape, pin_memory=device.type == "cuda").copy_(drawn)
    checkpoint = save(folder, codebooks)
    path = folder / "in.npy"
    rows = drawn.numpy()
    np.save(path, rows)
    engine = CheckpointEngine(str(checkpoint), device=str(device))
    block = engine.block_bytes // (4 * dim)
    limits = limits_of(path, drawn, codebooks, device, block)
    stages, whole = {}, {}

    def alone():
        engine.encode(rows)

    def command(*, cold):
        forget(path) if cold else keep(path)
        began = time.perf_counter()
        told = semid_encode(path, checkpoint, str(device))
        whole[cold], stages[cold] = time.perf_counter() - began, told["stage_seconds"]
        return float(told["seconds"])

    def piped(*, cold):
        forget(path) if cold else keep(path)
        return pipeline_alone(path, engine)

    alone()
    for limit in limits.values():
        limit()
    ways = {
        **limits,
        "the encoder alone": alone,
        "the pipeline alone, page cache": lambda: piped(cold=False),
        "the pipeline alone, disk": lambda: piped(cold=True),
        "semid encode, page cache": lambda: command(cold=False),
        "semid encode, disk": lambda: command(cold=True),
    }
    times = turns(ways, repeat, within)
    found = {name: statistics.median(some) for name, some in times.items()}
    few = drawn[: 64 if device.type == "cpu" else 4096].to(device)
    layers = [codebook.to(device) for codebook in codebooks]

    def original():
        arithmetic.original(few, layers)
        ready(device)

    once = median({"original arithmetic": original}, repeat)
    found |= {name: value * n / len(few) for name, value in once.items()}
    size, done = rows.nbytes, len(times["the encoder alone"])
    print(f"\nencode {n:,} x {dim} float32 ({size / 1e6:,.0f} MB), {device}, medians of {done}")
    print(f"on {file_system(folder)}\n")
    print("| what | rows/s | MB/s | from the page cache | from the disk |")
    print("| --- | ---: | ---: | ---: | ---: |")
    cached_, disk = (found[f"semid encode, {where}"] for where in ("page cache", "disk"))
    for name, value in sorted(found.items(), key=lambda item: item[1]):
        of = f"{value / cached_:.2f} | {value / disk:.2f}"
        print(f"| {name} | {n / value:,.0f} | {size / value / 1e6:,.0f} | {of} |")
    print("\nThe last columns are what `semid encode` reaches of it, by a file from there.")
    print(f"original arithmetic: from {len(few)} rows")
    for where in ("page cache", "disk"):
        took, cold = found[f"semid encode, {where}"], where == "disk"
        slowest, ratio = slowest_of(found, limits, where)
        found[f"of the slowest limit, {where}"] = ratio
        print(
            f"from the {where}: {ratio:.2f} of the slowest limit, {slowest}; "
            f"{found['the encoder alone'] / took:.2f} of the encoder alone; stages {stages[cold]}; "
            f"its last run took {whole[cold]:.1f} s with its start"
        )
        slowest, ratio = slowest_of(found, limits, where, of="the pipeline alone", without="bare")
        found[f"pipeline of the slowest limit, {where}"] = ratio
        print(f"  the pipeline alone: {ratio:.2f} of the slowest limit but the product, {slowest}")
    return found


# --- the extra digit -------------------------------------------------------------------------


def loop(codes: np.ndarray) -> np.ndarray:
    """Number the items of each group, one after the other."""
    seen: dict[tuple, int] = {}
    digits = np.empty(len(codes), np.int64)
    for item, row in enumerate(map(tuple, codes.tolist())):
        digits[item] = seen.get(row, 0)
        seen[row] = digits[item] + 1
    return digits


def digits(folder: Path, n: int, repeat: int) -> dict[str, float]:
    codes = np.random.default_rng(0).integers(0, WIDTH, (n, LAYERS), np.uint8)
    step = 1 << 17
    blocks = [(np.arange(i, min(i + step, n)), codes[i : i + step]) for i in range(0, n, step)]
    ways = {"semid": lambda: extra_digits(blocks, n, "tiger", folder)[0:n]}
    try:
        import pandas as pd  # noqa: PLC0415 - a peer that may be missing
    except ModuleNotFoundError:
        print("\npandas is not installed: pip install -c docker/constraints.txt pandas")
    else:

        def counted():
            frame = pd.DataFrame({str(layer): codes[:, layer] for layer in range(LAYERS)})
            return frame.groupby(list(frame.columns)).cumcount().to_numpy()

        ways[f"pandas {pd.__version__}, groupby.cumcount"] = counted
    answers: dict[str, np.ndarray] = {}

    def keeping(name, way):
        def run():
            answers[name] = way()

        return run

    found = median({name: keeping(name, way) for name, way in ways.items()}, repeat)
    some = min(n, 1_000_000)
    began = time.perf_counter()
    naive = loop(codes[:some])
    found["a loop over items"] = (time.perf_counter() - began) * n / some
    for name, answer in answers.items():
        np.testing.assert_array_equal(answer, answers["semid"], err_msg=name)
    np.testing.assert_array_equal(naive, answers["semid"][:some])
    print(f"\nextra digit (tiger) of {n:,} items, {LAYERS} x {WIDTH}, medians of {repeat}\n")
    print("| way | s | items/s |\n| --- | ---: | ---: |")
    for name, value in sorted(found.items(), key=lambda item: item[1]):
        told = f"{name} (from {some:,})" if name.startswith("a loop") and some < n else name
        print(f"| {told} | {value:,.2f} | {n / value:,.0f} |")
    return found


def peak_bytes() -> int:
    """Most memory that this process has had; getrusage would count its parent's, too."""
    with open("/proc/self/status") as lines:  # noqa: PTH123 - the kernel's
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def spilled_blocks(n: int):
    """Codes of ``n`` items, a tenth of which have one ID; made as they are asked for."""
    rng = np.random.default_rng(0)
    for start in range(0, n, 1 << 17):
        m = min(1 << 17, n - start)
        codes = rng.integers(0, WIDTH, (m, LAYERS), np.uint8)
        codes[rng.random(m) < 0.1] = 7
        yield np.arange(start, start + m), codes


def spill_here(folder: Path, n: int) -> dict[str, float]:
    """Number ``n`` items in this process, and check those of some IDs."""
    peak_before = peak_bytes()
    written = 0

    def blocks():
        nonlocal written
        yield from spilled_blocks(n)
        written = sum(path.stat().st_size for path in folder.glob("part-*"))

    began = time.perf_counter()
    found = extra_digits(blocks(), n, "grid", folder)
    took = time.perf_counter() - began
    peak = peak_bytes()
    groups: dict[int, list[int]] = {}
    for rows, codes in spilled_blocks(n):
        mine = codes[:, 0] == 9
        here = found[int(rows[0]) : int(rows[-1]) + 1][mine]
        keys = codes[mine, 1].astype(int) * WIDTH + codes[mine, 2]
        for key, digit in zip(keys.tolist(), here.tolist(), strict=True):
            groups.setdefault(key, []).append(digit)
    for group in groups.values():
        assert group == (list(range(1, len(group) + 1)) if len(group) > 1 else [0])
    return {
        "items_per_s": n / took,
        "seconds": took,
        "peak_bytes": peak,
        "peak_before_bytes": peak_before,
        "spilled_bytes": written,
        "checked_items": sum(map(len, groups.values())),
    }


def spill(folder: Path, n: int) -> dict[str, float]:
    child = [sys.executable, __file__, "--only", "spill", "--spill-items", str(n), "--here", folder]
    told = subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout
    found = json.loads(told)
    print(
        f"\nextra digit (grid) of {n:,} items, a tenth with one ID: {found['seconds']:.1f} s, "
        f"{found['items_per_s']:,.0f} items/s, peak memory {found['peak_bytes'] / 1e6:,.0f} MB "
        f"({found['peak_before_bytes'] / 1e6:,.0f} before), "
        f"{found['spilled_bytes'] / 1e6:,.0f} MB spilled; {found['checked_items']:,} checked"
    )
    return found


# --- memory ----------------------------------------------------------------------------------


MEASURED = """
import sys, semid_client.cli
try:
    semid_client.cli.main()
finally:
    with open("/proc/self/status") as lines:
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(peak * 1024, file=sys.stderr)
"""
"""The command `semid`, which ends by telling the most memory that it had."""


def sparse(folder: Path, size: float, dim: int, device: str) -> dict[str, float]:
    """Peak memory of a command that reads ``size`` bytes of zeros and writes unique IDs."""
    # Centroids of unlike lengths and residuals as they are: else all zeros would be ties.
    generator = torch.Generator().manual_seed(0)
    codebooks = [torch.randn(WIDTH, dim, generator=generator) for _ in range(LAYERS)]
    codebooks = [codebook * torch.linspace(1, 2, WIDTH)[:, None] for codebook in codebooks]
    checkpoint = save(folder, codebooks, normalize=False)
    n = int(size) // (4 * dim)
    np.lib.format.open_memmap(folder / "in.npy", "w+", np.dtype("<f4"), (n, dim))
    command = [
        *(sys.executable, "-c", MEASURED, "encode", folder / "in.npy"),
        *("-o", folder / "out.parquet", "--unique", "grid", "--json"),
        *("--checkpoint", checkpoint, "--device", device),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told, peak = json.loads(done.stdout), int(done.stderr.splitlines()[-1])
    print(
        f"\nsemid encode of a sparse file of {size / 1e9:g} GB, {n:,} x {dim}: peak memory "
        f"{peak / 1e6:,.0f} MB, {told['rows_per_second']:,} rows/s"
    )
    return {"peak_bytes": peak, "rows_per_s": told["rows_per_second"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=SECTIONS, help="may be given again")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--spill-items", type=int, default=100_000_000)
    parser.add_argument("--sparse-bytes", type=float, default=10e9)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--within", type=float, default=np.inf, help="encode: begin no turn after so many seconds"
    )
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here is not None:
        print(json.dumps(spill_here(options.here, options.spill_items)))
        return
    print(arithmetic.machine(options.device, len(os.sched_getaffinity(0))))
    figures = {}
    for section in options.only or SECTIONS:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="semid-bench-") as name:
            folder = Path(name)
            figures[section] = {
                "encode": lambda folder=folder: encode(
                    folder,
                    options.rows,
                    options.dim,
                    options.device,
                    repeat=options.repeat,
                    within=options.within,
                ),
                "digits": lambda folder=folder: digits(folder, options.items, options.repeat),
                "spill": lambda folder=folder: spill(folder, options.spill_items),
                "sparse": lambda folder=folder: sparse(
                    folder, options.sparse_bytes, options.dim, str(options.device)
                ),
            }[section]()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
