"""Encoding speed, side by side with what else there is and with the limits of the machine.

    PYTHONPATH=server:client:proto:tests/bench python tests/bench/encode.py [--device cuda]

Every number is of this run: the ways take turns, round after round, and the table gives the median
in microseconds (CPU) or nanoseconds (GPU) a row, and its ratio to the bare float32 product of the
rows with all centroids. Rows are of clusters, their codebooks trained on them (a few Lloyd
steps); `random` is the hardest case instead: rows and centroids in random directions, where the
two nearest are as close as chance makes them. On a CPU faiss and semantic-id are measured where
they are installed (`pip install 'semid[bench]'`); the first line of the output says which are.

Then a hard checkpoint of `tests/reference`, on whose centroids some rows lie, and small batches of
a model with an encoder network. `--only` leaves out what is not named.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import os
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import encode_cases as cases
import llvmlite.binding
import numpy as np
import torch

from semid_server.checkpoint import load_checkpoint
from semid_server.encoding import make_encoder
from semid_server.encoding.cpu import CpuEncoder, has_integer_product

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SHAPES = ((384, 256), (768, 256), (2048, 256), (768, 2048))
LAYERS = 3
BATCHES = (1, 16, 200, 256, 4096, 131072)
SMALL = 256
REFERENCE = Path(__file__).parents[1] / "reference"
PARTS = ("shapes", "hard", "network")


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
        if has_integer_product():
            plain = CpuEncoder(*cases.model_of(codebooks), threads=threads, integer_product=False)
            ways["semid, as without AVX512-VNNI"] = lambda: plain.encode(rows)
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
    if gpu:
        copy, ours = seconds["pinned copy to the device"], seconds["semid, from pinned memory"]
        limit = max(copy, seconds["bare product, float16"])
        print(
            f"\nfrom pinned memory: {copy / ours:.2f} of the bare copy's speed, {limit / ours:.2f} "
            f"of that of the slower of copy and product; encoding on the device takes "
            f"{seconds['semid'] / copy:.2f} of the copy's time"
        )
    reference = make_encoder(
        *cases.model_of(codebooks), device=device, threads=threads, reference=True
    )
    ways = {"semid": encoder.encode, "reference arithmetic": reference.encode}
    ways["original arithmetic"] = lambda part: original(part, on_device)
    batches(ways, rows, device=device, most={"original arithmetic": len(few)})


def batches(
    ways: dict[str, Callable[[Tensor], object]],
    rows: Tensor,
    *,
    device: torch.device,
    most: dict[str, int],
) -> None:
    """Print the time of a call for several sizes, of each way up to its ``most`` rows."""
    gpu = device.type == "cuda"
    names = [*ways, *(["semid, from host memory and back"] if gpu else [])]
    print(f"\n| batch, us a call | {' | '.join(names)} |\n| ---: |{' ---: |' * len(names)}")
    host = rows.cpu()
    slow = {"reference arithmetic": SMALL, **most}
    for size in (size for size in BATCHES if size <= len(rows)):
        part, from_host = rows[:size].contiguous(), host[:size].contiguous()
        calls = {
            name: lambda part=part, way=way: way(part)
            for name, way in ways.items()
            if size <= slow.get(name, size)
        }
        took = {}
        for name in list(calls):
            if name in slow:
                took |= in_turns({name: calls.pop(name)}, 2, device)
        if gpu:
            encode = ways["semid"]
            calls[names[-1]] = lambda rows=from_host, encode=encode: encode(rows)
        took |= in_turns(calls, 50 if size <= SMALL else 5, device)
        texts = (f"{took[name] * 1e6:,.0f}" if name in took else "" for name in names)
        print(f"| {size:,d} | {' | '.join(texts)} |", flush=True)


def hard(n: int, *, device: torch.device, threads: int, rounds: int) -> None:
    """A checkpoint whose rows lie on centroids, and whose layers have one short centroid of many.

    Beside it: one of a quarter of its columns without such rows, random rows and centroids of its
    shape, and the bare product of its rows with its centroids.
    """
    movies = torch.from_numpy(np.load(REFERENCE / "data" / "movies.npy")).to(device)
    rows = movies.repeat(-(-n // len(movies)), 1)[:n].contiguous()
    ways: dict[str, Callable[[], object]] = {}
    encoders = {}
    for name in ("movies_rkmeans", "movies_rkmeans_64"):
        loaded = load_checkpoint(REFERENCE / name / "model.ckpt")
        encoder = make_encoder(loaded.model, loaded.spec, device=device, threads=threads)
        encoders[f"semid, {name}"] = encoder
        ways[f"semid, {name}"] = lambda encoder=encoder: encoder.encode(rows)
        if name == "movies_rkmeans":
            tables = [layer.centroids.detach().to(device) for layer in loaded.model.layers]
            stacked = torch.cat(tables).T.contiguous()
            widths = loaded.spec.codebook_widths
    random_encoder = make_encoder(
        *cases.random_model(rows.shape[1], list(widths)), device=device, threads=threads
    )
    random_rows = torch.randn(rows.shape, device=device)
    encoders["semid, random of its shape"] = random_encoder
    ways["semid, random of its shape"] = lambda: random_encoder.encode(random_rows)
    ways["bare product, float32"] = lambda: rows @ stacked
    for encoder in encoders.values():
        encoder.warm_up()
    seconds = in_turns(ways, rounds, device, pause=0.0 if device.type == "cuda" else 0.1)
    unit, scale = ("ns", 1e9) if device.type == "cuda" else ("us", 1e6)
    print(f"\na hard checkpoint: movies_rkmeans, {rows.shape[1]} x {list(widths)}, {n:,d} rows\n")
    print(f"| way | {unit} a row | decided in float64 | by the reference |")
    print("| --- | ---: | ---: | ---: |")
    for name, value in seconds.items():
        shares = ("", "")
        if name in encoders:
            counts = encoders[name].counts()
            shares = (
                f"{counts.float64 / counts.rows:.2%}",
                f"{counts.reference / counts.rows:.3%}",
            )
        print(f"| {name} | {value / n * scale:,.2f} | {' | '.join(shares)} |", flush=True)


def network(n: int, *, device: torch.device, threads: int) -> None:
    """Batches through a trained RQ-VAE, in float64; a GPU replays graphs of it."""
    loaded = load_checkpoint(REFERENCE / "digits_rqvae" / "model.ckpt")
    model, spec = loaded.model, loaded.spec
    encoder = make_encoder(model, spec, device=device, threads=threads)
    reference = make_encoder(model, spec, device=device, threads=threads, reference=True)
    encoder.warm_up()
    digits = torch.from_numpy(np.load(REFERENCE / "data" / "digits.npy"))
    rows = digits.repeat(-(-n // len(digits)), 1)[:n].to(device)
    ways = {"semid": encoder.encode, "reference arithmetic": reference.encode}
    if device.type == "cuda":
        from semid_server.encoding import gpu  # noqa: PLC0415 - only where Triton is

        def kernel_by_kernel(part):
            queued = encoder.queue(gpu.Rows.of(part))
            left = (queued.levels == gpu.kernels.REFERENCE.value).nonzero()[:, 0]
            return encoder.resolve(queued.wide, queued.codes, left) if len(left) else queued.codes

        ways["semid, without a graph"] = kernel_by_kernel
    dims = "-".join(map(str, (spec.input_dim, *spec.encoder_hidden_dims, spec.embedding_dim)))
    print(f"\nwith a network: digits_rqvae, {dims}, {list(spec.codebook_widths)}")
    batches(ways, rows, device=device, most={"semid, without a graph": SMALL})


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
        name += f" ({llvmlite.binding.get_host_cpu_name()}), {threads} threads"
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
    parser.add_argument("--only", action="append", choices=PARTS, help="may be given again")
    options = parser.parse_args()
    parts = options.only or PARTS
    torch.set_num_threads(options.threads)
    shapes = [tuple(map(int, text.split("x"))) for text in options.shape or ()] or SHAPES
    rows = options.rows or (131072 if options.device.type == "cuda" else 8192)
    print(machine(options.device, options.threads))
    began = time.monotonic()
    how = {"device": options.device, "threads": options.threads}
    if "shapes" in parts:
        for shape in shapes:
            table(shape, rows, rounds=options.rounds, **how)
    if "hard" in parts:
        hard(rows, rounds=options.rounds, **how)
    if "network" in parts:
        network(rows, **how)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
