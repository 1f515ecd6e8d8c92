"""Files: `semid encode` beside the limits of this machine, the extra digit beside other ways.

    python tests/bench/files.py [--rows N] [--dim D] [--digits N] [--device cpu|cuda]

The limits are measured in the same run: reading the file, copying it in memory, and the encoder
alone on rows in memory. The extra digit is compared with a loop over items, which is how it is
usually done, and with pandas where that is installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from semid_client.files import extra_digits
from semid_server.checkpoint import save_checkpoint
from semid_server.cli.batch import CheckpointEngine
from semid_server.model import ModelKind, ModelSpec, build_model

LAYERS, WIDTH = 3, 256


def make_checkpoint(folder: Path, dim: int) -> Path:
    """A model of random unit centroids."""
    spec = ModelSpec(
        kind=ModelKind.RQ_KMEANS,
        input_dim=dim,
        embedding_dim=dim,
        codebook_widths=(WIDTH,) * LAYERS,
        normalize_residuals=True,
    )
    model = build_model(spec)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.layers:
            drawn = torch.randn(layer.centroids.shape, generator=generator)
            layer.centroids.copy_(drawn / drawn.norm(dim=1, keepdim=True))
    save_checkpoint(folder / "model", model=model, spec=spec, name="bench")
    return folder / "model"


def seconds(work, repeat=3):
    """The median time of some runs."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(8 << 20)
        while file.readinto(buffer):
            pass


def encode(path: Path, checkpoint: Path, device: str) -> float:
    """Seconds that the command says it worked, from the first row to the renamed output."""
    output = path.with_name("out.npy")
    told = subprocess.run(
        [
            *(sys.executable, "-m", "semid_client", "encode", str(path), "-o", str(output)),
            *("--force", "--json", "--checkpoint", str(checkpoint), "--device", device),
        ],
        check=True,
        capture_output=True,
    ).stdout
    summary = json.loads(told)
    print(f"  stages {summary['stage_seconds']}, bottleneck {summary['bottleneck']}")
    return float(summary["seconds"])


def files(n: int, dim: int, device: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder, dim)
        path = folder / "in.npy"
        rows = np.random.default_rng(0).standard_normal((n, dim), np.float32)
        np.save(path, rows)
        engine = CheckpointEngine(str(checkpoint), device=device)
        block = engine.block_bytes // (4 * dim)
        engine.encode(rows[:block])

        def alone() -> None:
            for start in range(0, n, block):
                engine.encode(rows[start : start + block])

        print(f"\nencode {n:,} x {dim} float32 ({rows.nbytes / 1e6:,.0f} MB), {device}")
        limits = {
            "reading, from the page cache": seconds(lambda: read(path)),
            "copying in memory": seconds(rows.copy),
            "the encoder alone": seconds(alone),
        }
        took = encode(path, checkpoint, device)
        for what, limit in {**limits, "semid encode": took}.items():
            print(f"  {what:<30}{n / limit:>14,.0f} rows/s{rows.nbytes / limit / 1e6:>10,.0f} MB/s")
        print(f"  of the slowest limit: {max(limits.values()) / took:.2f}")


def loop(codes: np.ndarray) -> np.ndarray:
    """Number the items of each group, one after the other."""
    seen: dict[tuple, int] = {}
    digits = np.empty(len(codes), np.int64)
    for item, row in enumerate(map(tuple, codes.tolist())):
        digits[item] = seen.get(row, 0)
        seen[row] = digits[item] + 1
    return digits


def digits(n: int) -> None:
    codes = np.random.default_rng(0).integers(0, WIDTH, (n, LAYERS), np.uint8)
    print(f"\nextra digit (tiger) of {n:,} items, {LAYERS} x {WIDTH}")
    step = 1 << 17
    with tempfile.TemporaryDirectory() as name:
        blocks = [(np.arange(i, min(i + step, n)), codes[i : i + step]) for i in range(0, n, step)]
        began = time.perf_counter()
        found = extra_digits(blocks, n, "tiger", Path(name))[0:n]
        took = time.perf_counter() - began
    print(f"  {'semid':<30}{took:>10.2f} s")
    some = min(n, 1_000_000)
    began = time.perf_counter()
    naive = loop(codes[:some])
    per_item = (time.perf_counter() - began) / some
    print(f"  {'a loop over items':<30}{per_item * n:>10.2f} s (from {some:,} items)")
    if some == n:
        np.testing.assert_array_equal(found, naive)
    try:
        import pandas as pd  # noqa: PLC0415 - a peer that may be missing
    except ModuleNotFoundError:
        print("  pandas is not installed")
        return
    began = time.perf_counter()
    frame = pd.DataFrame({str(layer): codes[:, layer] for layer in range(LAYERS)})
    counted = frame.groupby(list(frame.columns)).cumcount()
    took = time.perf_counter() - began
    print(f"  {f'pandas {pd.__version__}, groupby.cumcount':<30}{took:>10.2f} s")
    np.testing.assert_array_equal(found, counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--digits", type=int, default=10_000_000)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "torch"))
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads; {versions}")
    if arguments.device.startswith("cuda"):
        print(torch.cuda.get_device_name(arguments.device))
    files(arguments.rows, arguments.dim, arguments.device)
    digits(arguments.digits)


if __name__ == "__main__":
    main()
