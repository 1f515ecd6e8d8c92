"""Encode Parquet files by Ray on a GPU: the same bytes as on one machine, and how fast.

    PYTHONPATH=$PWD/server:$PWD/client:$PWD/proto:$PWD/tests/bench python tests/gpu/ray_gpu.py

A cluster is begun on this machine. Both commands are the user's, `semid encode`, with and without
`--engine ray`; each tells its own seconds, which are those of the work and, with Ray, of its start.
Where semid is not installed, see `tests/bench/files.py`; the paths are whole ones because Ray's
workers need not be in this folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import encode as arithmetic
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from files import save

WIDTH, GROUP_ROWS = 256, 20_000


def write_files(folder: Path, rows: np.ndarray, n_files: int) -> None:
    """Parquet files of unlike sizes, with ids that are text."""
    folder.mkdir()
    ends = np.cumsum(np.arange(n_files) + n_files)
    ends = [0, *(ends * len(rows) // ends[-1]).tolist()]
    for i, (start, stop) in enumerate(itertools.pairwise(ends)):
        lists = pa.FixedSizeListArray.from_arrays(
            pa.array(rows[start:stop].reshape(-1)), rows.shape[1]
        )
        table = pa.table({"id": [f"item {j}" for j in range(start, stop)], "x": lists})
        pq.write_table(
            table,
            folder / f"{i:03}.parquet",
            row_group_size=GROUP_ROWS,
            compression="none",
            use_dictionary=False,
        )


def encode(folder: Path, output: str, *flags: str) -> dict:
    """Run the command; what it tells, and the seconds it took from its start to its end."""
    began = time.perf_counter()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "semid_client", "encode", "in", "-o", output),
            *("--checkpoint", "model", "--unique", "grid", "--json", *flags),
        ],
        cwd=folder,
        check=False,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{output}: the command ended with {done.returncode}")
    try:
        return json.loads(done.stdout) | {"whole": time.perf_counter() - began}
    except ValueError:
        raise SystemExit(f"{output}: the command said, in place of JSON: {done.stdout}") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--folder", type=Path, help="a folder on the disk")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{arithmetic.machine(device, 0)}; ray {ray.__version__}", flush=True)
    codebooks, drawn = arithmetic.clusters(options.dim, WIDTH, options.rows, device)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="semid-ray-") as name:
        folder = Path(name)
        save(folder, codebooks)
        write_files(folder / "in", drawn.cpu().numpy(), options.files)
        size = sum(path.stat().st_size for path in (folder / "in").iterdir())
        print(f"{options.rows:,} x {options.dim} in {options.files} files, {size / 1e6:,.0f} MB")
        here = ("--device", options.device)
        cluster = (*here, "--engine", "ray", "--ray-address", "local")
        for output, flags in {
            "cpu.parquet": ("--device", "cpu"),
            "here.parquet": here,
            "there.parquet": cluster,
        }.items():
            told = encode(folder, output, *flags)
            print(
                f"{output:14} {told['rows_per_second']:12,} rows/s, {told['seconds']:.1f} s, from "
                f"its start {told['whole']:.1f} s; stages {told['stage_seconds']}",
                flush=True,
            )
            if (folder / output).read_bytes() != (folder / "cpu.parquet").read_bytes():
                raise SystemExit(f"{output} differs from cpu.parquet")
            left = sorted(path.name for path in folder.glob(f"{output}.*"))
            if left:
                raise SystemExit(f"{output}: left behind {', '.join(left)}")
        print("the same bytes by all")


if __name__ == "__main__":
    main()
