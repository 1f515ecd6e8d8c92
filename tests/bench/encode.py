"""Encoding speed, side by side with what else there is and with the limits of the machine.

    PYTHONPATH=server:client:proto:tests/bench python tests/bench/encode.py [--device cuda]

Every number is of this run: the ways take turns, round after round, and the table gives the median
in microseconds (CPU) or nanoseconds (GPU) a row, and its ratio to the bare float32 product of the
rows with all centroids. Rows are of clusters, their codebooks trained on them (a few Lloyd
steps); `random` is the hardest case instead: rows and centroids in random directions, where the
two nearest are as close as chance makes them. On a CPU faiss and semantic-id are measured where
they are installed (`pip install 'semid[bench]'`); the first line of the output says which are.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import os
import platform
import statistics
import time
from typing import TYPE_CHECKING

import encode_cases as cases
import numpy as np
import torch

from semid_server.encoding import make_encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SHAPES = ((384, 256), (768, 256), (2048, 256), (768, 2048))
LAYERS = 3
BATCHES = (1, 16, 256, 4096, 131072)


def clusters(dim: int, width: int, n: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Codebooks of three layers, trained on rows of ``8 width`` clusters, and ``n`` such rows."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    centres = normal(8 * width, dim)

    def draw(count):
        picked = torch.randint(len(centres), (count,), generator=generator, device=device)
        return centres[picked] + normal(count, dim)

    residual = torch.nn.functional.normalize(draw(max(4096, 16 * width)))
    codebooks = []
    for _ in range(LAYERS):
        codebook = residual[:width].clone()
        for _ in range(6):
            code = nearest(residual, codebook)
            total = torch.zeros_like(codebook).index_add_(0, code, residual)
            members = torch.bincount(code, minlength=width)[:, None]
            codebook = torch.where(members > 0, total / members.clamp(min=1), codebook)
        codebooks.append(codebook.cpu())
        residual = residual - codebook[nearest(residual, codebook)]
        residual = torch.nn.functional.normalize(residual[residual.norm(dim=1) > 1e-3])
    return codebooks, draw(n)


def nearest(rows: Tensor, codebook: Tensor) -> Tensor:
    return (codebook.square().sum(dim=1) / 2 - rows @ codebook.T).argmin(dim=1)


def original(rows: Tensor, codebooks: list[Tensor]) -> Tensor:
    """Broadcast difference, argmin, subtract, normalise."""
    residual, codes = rows, []
    for codebook in codebooks:
        residual = torch.nn.functional.normalize(residual)
        code = (residual[:, None] - codebook).square().sum(dim=-1).argmin(dim=1)
        codes.append(code)
        residual = residual - codebook[code]
    return torch.stack(codes, dim=1)


def three_products(rows: Tensor, codebooks: list[Tensor]) -> Tensor:
    """The same with a matrix product a layer, and no proof."""
    residual, codes = rows, []
    for codebook in codebooks:
        residual = torch.nn.functional.normalize(residual)
        code = nearest(residual, codebook)
        codes.append(code)
        residual = residual - codebook[code]
    return torch.stack(codes, dim=1)


def faiss_ways(
    rows: Tensor, codebooks: list[Tensor], threads: int
) -> dict[str, Callable[[], object]]:
    """faiss: a flat search for each layer, and its residual quantiser, greedy."""
    if installed_version("faiss") is None:
        return {}
    import faiss  # noqa: PLC0415 - only where it is installed

    faiss.omp_set_num_threads(threads)
    dim = rows.shape[1]
    values = rows.numpy()
    tables = [codebook.numpy() for codebook in codebooks]
    indices = []
    for table in tables:
        index = faiss.IndexFlatL2(dim)
        index.add(table)
        indices.append(index)

    def flat():
        residual, codes = values, []
        for index, table in zip(indices, tables, strict=True):
            residual = residual / np.linalg.norm(residual, axis=1, keepdims=True)
            _, code = index.search(residual, 1)
            codes.append(code[:, 0])
            residual = residual - table[code[:, 0]]
        return np.stack(codes, axis=1)

    bits = int(np.log2(len(tables[0])))
    quantizer = faiss.ResidualQuantizer(dim, LAYERS, bits)
    quantizer.max_beam_size = 1
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    faiss.copy_array_to_vector(np.concatenate(tables).ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    return {
        "faiss, flat search a layer": flat,
        "faiss, residual quantiser (no normalisation)": lambda: quantizer.compute_codes(values),
    }


def semantic_id_ways(
    rows: Tensor, codebooks: list[Tensor], threads: int
) -> dict[str, Callable[[], object]]:
    """semantic-id: its residual k-means, which knows no normalisation of residuals."""
    if installed_version("semantic_id") is None:
        return {}
    import semantic_id  # noqa: PLC0415 - only where it is installed
    import threadpoolctl  # noqa: PLC0415 - comes with its scikit-learn

    # On a CPU it computes with numpy and scikit-learn, whose products are the BLAS's.
    threadpoolctl.threadpool_limits(threads, user_api="blas")
    values = rows.numpy()
    quantizer = semantic_id.RQKMeans(n_levels=LAYERS, n_clusters=len(codebooks[0]))
    quantizer.codebooks_ = [codebook.numpy() for codebook in codebooks]
    quantizer.D_ = rows.shape[1]
    return {
        "semantic-id, residual k-means (no normalisation)": lambda: quantizer.encode(values),
    }


def in_turns(
    ways: dict[str, Callable[[], object]], rounds: int, device: torch.device, pause: float = 0.0
) -> dict[str, float]:
    """Median seconds of each way; all of them take turns, ``pause`` seconds apart."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            time.sleep(pause)
            began = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first is to warm up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def table(
    shape: tuple[int, int], n: int, *, device: torch.device, threads: int, rounds: int
) -> None:
    """Measure and print one shape, ``(D, K)``."""
    dim, width = shape
    gpu = device.type == "cuda"
    unit, scale = ("ns", 1e9) if gpu else ("us", 1e6)
    codebooks, rows = clusters(dim, width, n, device)
    encoder = make_encoder(*cases.model_of(codebooks), device=device, threads=threads)
    hard_encoder = make_encoder(
        *cases.random_model(dim, [width] * LAYERS), device=device, threads=threads
    )
    encoder.warm_up()
    hard_encoder.warm_up()
    on_device = [codebook.to(device) for codebook in codebooks]
    stacked = torch.cat(on_device).T.contiguous()
    random_rows = torch.randn(n, dim, device=device)
    few = rows[: max(1, min(n, (1 << (31 if gpu else 27)) // (4 * dim * width)))]
    ways: dict[str, Callable[[], object]] = {
        "bare product, float32": lambda: rows @ stacked,
        "semid": lambda: encoder.encode(rows),
        "semid, random": lambda: hard_encoder.encode(random_rows),
        "a product a layer, float32, not proved": lambda: three_products(rows, on_device),
        "one read of the rows": rows.sum,
    }
    rows16, stacked16 = rows.bfloat16(), stacked.bfloat16()
    ways["bare product, bfloat16"] = lambda: rows16 @ stacked16
    if gpu:
        half, stacked_half = rows.half(), stacked.half()
        ways["semid, float16 rows"] = lambda: encoder.encode(half)
        ways["bare product, float16"] = lambda: torch.mm(
            half, stacked_half, out_dtype=torch.float32
        )
        ways["bare product, TF32"] = in_tf32(lambda: rows @ stacked)
        ways["a product a layer, TF32, not proved"] = in_tf32(
            lambda: three_products(rows, on_device)
        )
        pinned = rows.cpu().pin_memory()
        target = torch.empty_like(rows)
        ways["pinned copy to the device"] = lambda: target.copy_(pinned, non_blocking=True)
        ways["semid, from pinned memory"] = lambda: encoder.encode(pinned)
    else:
        ways |= faiss_ways(rows, codebooks, threads) | semantic_id_ways(rows, codebooks, threads)
    before, hard_before = encoder.counts(), hard_encoder.counts()
    # Workers of numpy's BLAS spin on after a call and would take a core from the way that follows.
    seconds = in_turns(ways, rounds, device, pause=0.0 if gpu else 0.1)
    once = {"original arithmetic": lambda: original(few, on_device)}
    seconds |= {name: value * n / len(few) for name, value in in_turns(once, 1, device).items()}
    bare = seconds["bare product, float32"]
    print(f"\n{dim} x {width} x {LAYERS}, {n:,d} rows\n")
    print(f"| way | {unit} a row | x bare float32 product |\n| --- | ---: | ---: |")
    for name, value in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"| {name} | {value / n * scale:,.2f} | {value / bare:.2f} |")
    for name, now, then in (
        ("semid", encoder.counts(), before),
        ("semid, random", hard_encoder.counts(), hard_before),
    ):
        total = now.rows - then.rows
        print(
            f"\n{name}: {(now.float64 - then.float64) / total:.2%} of rows decided in float64, "
            f"{(now.reference - then.reference) / total:.3%} by the reference arithmetic"
        )
    print("\n| batch | semid, us a call | original arithmetic |\n| ---: | ---: | ---: |")
    host = rows.cpu()
    for size in (size for size in BATCHES if size <= n):
        part, from_host = rows[:size].contiguous(), host[:size].contiguous()
        calls = {"call": lambda part=part: encoder.encode(part)}
        if gpu:
            calls["host"] = lambda rows=from_host: encoder.encode(rows)
        if size <= len(few):
            calls["original"] = lambda part=part: original(part, on_device)
        took = in_turns(calls, 50 if size <= 256 else 5, device)
        text = {name: f"{value * 1e6:,.0f}" for name, value in took.items()}
        host_text = f" ({text['host']} from host memory)" if gpu else ""
        print(f"| {size:,d} | {text['call']}{host_text} | {text.get('original', '')} |", flush=True)


def in_tf32(way: Callable[[], object]) -> Callable[[], object]:
    """Let float32 products round their factors to TF32 for the time of ``way``."""

    def run():
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return way()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def installed_version(module: str) -> str | None:
    """Version of the distribution that has ``module``; None where there is none."""
    names = importlib.metadata.packages_distributions().get(module)
    return importlib.metadata.version(names[0]) if names else None


def machine(device: torch.device, threads: int) -> str:
    """What the numbers belong to."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peers = ""
    else:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123 - a device of the kernel
            name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
        name += f", {threads} threads"
        peers = "".join(
            f", {peer} {installed_version(module) or 'not installed'}"
            for peer, module in (("faiss", "faiss"), ("semantic-id", "semantic_id"))
        )
    today = dt.datetime.now(tz=dt.UTC)
    return (
        f"{name}; torch {torch.__version__}, numpy {np.__version__}{peers}, "
        f"Python {platform.python_version()}; {today:%Y-%m-%d}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rows", type=int, help="default: 131072 on a GPU, 8192 on a CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--shape", action="append", metavar="DxK", help="384x256; may be given again"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = [tuple(map(int, text.split("x"))) for text in options.shape or ()] or SHAPES
    rows = options.rows or (131072 if options.device.type == "cuda" else 8192)
    print(machine(options.device, options.threads))
    for shape in shapes:
        table(shape, rows, device=options.device, threads=options.threads, rounds=options.rounds)


if __name__ == "__main__":
    main()
