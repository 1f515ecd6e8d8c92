"""Many millions of rows through the GPU's encoder, against the definition on the CPU.

    PYTHONPATH=server:client:proto:tests/bench python3 tests/gpu/encode_sweep.py [--only TEXT]

Real rows with noise, random rows, and rows on the borders between codes, of several shapes and
all four types, on the device and from host memory. Prints the share of rows that went beyond the
fast product, and ends with exit status 1 if a single code differs. With the default share it has
more than ten million rows, each encoded from either memory: minutes on a machine with 16
processors, nearly all of them for the definition. Cases with an encoder network come last.
"""

from __future__ import annotations

import argparse
import datetime as dt
import platform
import sys
import time
from pathlib import Path

import encode_cases as cases
import numpy as np
import torch

from semid_server.checkpoint import load_checkpoint
from semid_server.encoding import ReferenceEncoder, make_encoder
from semid_server.encoding.network import sqrt

REFERENCE = Path(__file__).parents[1] / "reference"
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def real(name: str, embeddings: str, millions: float, *, noise: float):
    """A recorded checkpoint, and its own embeddings, plain and then with noise."""
    checkpoint = load_checkpoint(REFERENCE / name / "model.ckpt")
    rows = torch.from_numpy(np.load(REFERENCE / "data" / f"{embeddings}.npy")).to(GPU)

    def make(n, generator):
        picked = rows[torch.randint(len(rows), (n,), generator=generator, device=GPU)]
        size = noise * picked.std() * torch.rand(n, 1, generator=generator, device=GPU)
        return picked + size * torch.randn(picked.shape, generator=generator, device=GPU)

    return f"real, {name}", checkpoint.model, checkpoint.spec, rows.cpu, make, millions


def random(dim: int, widths: list[int], millions: float, *, normalize: bool = True):
    """Centroids and rows in random directions."""
    model, spec = cases.random_model(dim, widths, normalize=normalize)

    def make(n, generator):
        rows = torch.randn(n, dim, generator=generator, device=GPU)
        return rows * torch.exp2(6 * torch.randn(n, 1, generator=generator, device=GPU))

    def hard():
        ties = cases.near_ties(model, spec, 2000, dtype=torch.float32)
        return torch.cat([ties, cases.hard_rows(model, spec)])

    name = f"random, {dim} x {widths}{'' if normalize else ', raw residuals'}"
    return name, model, spec, hard, make, millions


def network(millions: float):
    """A random RQ-VAE."""
    model, spec = cases.random_network_model(64, (128, 64), 32, [256, 256, 256])

    def hard():
        return cases.near_ties(model, spec, 500, dtype=torch.float32)

    def make(n, generator):
        return torch.randn(n, 64, generator=generator, device=GPU)

    return "random, RQ-VAE 64-128-64-32", model, spec, hard, make, millions


SWEEPS = (
    lambda: real("movies_rkmeans", "movies", 1.0, noise=0.3),
    lambda: real("movies_rkmeans_64", "movies", 1.5, noise=0.3),
    lambda: real("digits_rkmeans_raw_residuals", "digits", 1.0, noise=0.3),
    lambda: random(8192, [300, 100], 0.05),
    lambda: random(100, [20] * 8, 0.3),
    lambda: random(64, [33, 256, 17, 5], 2.0, normalize=False),
    lambda: random(384, [256, 256, 256], 3.0),
    lambda: random(768, [256, 256, 256], 1.0),
    lambda: random(768, [2048, 2048, 2048], 0.1),
    lambda: random(2048, [256, 256, 256], 1.0),
    lambda: random(16, [8192, 1000], 0.2),
    lambda: network(0.1),
    lambda: real("digits_rqvae", "digits", 0.2, noise=0.3),
)


def sweep(case, generator, share) -> tuple[int, int, int]:
    """Encode the rows in all ways; return how many there were, were compared and differ."""
    began = time.monotonic()
    name, model, spec, hard, make, millions = case
    reference = ReferenceEncoder(model, spec, device=CPU)
    encoder = make_encoder(model, spec, device=GPU)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    hard_rows = hard()
    batches = [hard_rows.to(dtype) for dtype in dtypes]
    batches += [cases.near_ties(model, spec, 300, dtype=dtype) for dtype in dtypes]
    batches = [rows[rows.isfinite().all(dim=1)] for rows in batches]
    left, most = int(share * millions * 1e6), max(1, (1 << 27) // spec.input_dim)
    rows_done = compared = differing = 0
    while left > 0 or batches:
        if batches:
            rows = batches.pop()
        else:
            n = min(left, most, 200_000)
            left -= n
            dtype = dtypes[0] if rows_done % 3 else dtypes[1 + rows_done % 2]
            rows = make(n, generator).to(dtype).cpu()
            rows = rows[rows.isfinite().all(dim=1)]
        want = reference.encode(rows)
        order = torch.randperm(len(rows))
        on_device = rows.to(GPU)
        rows_done += len(rows)
        ways = [
            encoder.encode(on_device).cpu(),
            encoder.encode(rows),
            encoder.encode(on_device[order[:3000]]).cpu(),
            torch.cat([encoder.encode(on_device[i : i + 1]).cpu() for i in range(40)]),
            torch.cat([encoder.encode(rows[i : i + 17]) for i in range(0, 340, 17)]),
        ]
        wants = [want, want, want[order[:3000]], want[:40], want[:340]]
        for got, expected in zip(ways, wants, strict=True):
            differing += int((got != expected).any(dim=1).sum())
            compared += len(got)
    counts = encoder.counts()
    print(
        f"{name:46s} {rows_done:9,d} rows, {compared:10,d} compared, {differing} differ; decided "
        f"in float64 {counts.float64 / counts.rows:.3%}, by reference "
        f"{counts.reference / counts.rows:.3%}; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return rows_done, compared, differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the rows of the full sweep")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {platform.machine()}, "
        f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}"
    )
    began = time.monotonic()
    numbers = torch.rand(1 << 20, dtype=torch.float64) * 2.0 ** torch.randint(-600, 600, (1 << 20,))
    if not torch.equal(sqrt(numbers.to(GPU)).cpu(), sqrt(numbers)):
        print("square roots of the device are not rounded once")
        return 1
    generator = torch.Generator(GPU).manual_seed(0)
    total = [0, 0, 0]
    for make in SWEEPS:
        case = make()
        if options.only not in case[0]:
            continue
        total = [a + b for a, b in zip(total, sweep(case, generator, options.share), strict=True)]
    print(
        f"all: {total[0]:,d} rows, {total[1]:,d} comparisons, {total[2]} differ from the "
        f"definition, {time.monotonic() - began:.0f} s"
    )
    return 1 if total[2] else 0


if __name__ == "__main__":
    sys.exit(main())
