"""Time to train 3 x 256, and the error that is left, beside faiss and scikit-learn.

    python tests/bench/train.py --rows 1000000 --dim 384 --device cpu --threads 2
    python tests/bench/train.py --rows 1000000 --dim 384 --device cuda --skip sklearn

Each fits three codebooks of 256, each on the residuals (not normalised) that the ones before
leave, on the same synthetic embeddings: a hierarchy of clusters, so that every layer has
structure to find. Peers are fitted layer by layer: `faiss.Kmeans` (25 iterations on its own
sample of 65,536 rows) and `sklearn.cluster.MiniBatchKMeans` (batches of 2,048, as many steps as
semid takes in an epoch a layer); one that is not installed is left out and said so. The limit
printed with them is one Lloyd pass over all rows a layer: nothing that looks at every row once,
in float32, is faster. The error is the share of the variance that is left after three layers,
with codes by the nearest centroid.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from semid_server.training import ArrayRows, TrainingRun, TrainingSettings, fit_distinct
from semid_server.training.codebooks import Residuals, lloyd, nearest

LAYERS, WIDTH = 3, 256


def embeddings(rows, dim, seed=0):
    """Sums of a centre of 200, one of its 20 children, one of 5 of theirs, and noise; length 1."""
    random = np.random.default_rng(seed)
    centres = [random.standard_normal((count, dim), np.float32) for count in (200, 4000, 20000)]
    array = np.empty((rows, dim), np.float32)
    for start in range(0, rows, 65536):
        part = array[start : start + 65536]
        first = random.integers(0, 200, len(part))
        second = first * 20 + random.integers(0, 20, len(part))
        third = second * 5 + random.integers(0, 5, len(part))
        part[:] = random.standard_normal(part.shape, np.float32) * np.float32(0.5)
        for scale, level, index in zip(
            (1.0, 0.7, 0.5), centres, (first, second, third), strict=True
        ):
            part += np.float32(scale) * level[index]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return array


def error_left(array, codebooks, device):
    """Share of the variance that the codebooks leave."""
    left, spread = 0.0, 0.0
    mean = torch.from_numpy(array.mean(axis=0)).to(device)
    for start in range(0, len(array), 65536):
        residual = torch.from_numpy(array[start : start + 65536]).to(device)
        spread += (residual - mean).double().square().sum().item()
        for centroids in codebooks:
            residual = residual - centroids[nearest(residual, centroids)]
        left += residual.double().square().sum().item()
    return left / spread


def by_run(settings):
    def fit(array, device):
        with tempfile.TemporaryDirectory() as folder:
            run = TrainingRun(settings, ArrayRows(array), Path(folder), device=device)
            assert run.run()
        return [layer.centroids.detach() for layer in run.model.layers]

    return fit


def by_recipe(array, device):
    model = TrainingSettings(normalize_residuals=False).build(array.shape[1]).to(device)
    for _ in fit_distinct(model, ArrayRows(array), seed=0):
        pass
    return [layer.centroids.detach() for layer in model.layers]


def by_one_pass(array, device):
    model = TrainingSettings(normalize_residuals=False).build(array.shape[1]).to(device)
    rows = ArrayRows(array)
    for index, layer in enumerate(model.layers):
        residuals = Residuals(model, rows, index)
        layer.centroids.data = lloyd(residuals, residuals.sample(WIDTH, seed=0), 1)
    return [layer.centroids.detach() for layer in model.layers]


def layer_by_layer(fit_layer):
    """Fit each layer on the residuals of those before; peers see arrays in host memory."""

    def fit(array, device):
        codebooks, residual = [], array.copy()
        for _ in range(LAYERS):
            centroids = torch.from_numpy(np.ascontiguousarray(fit_layer(residual), np.float32))
            codebooks.append(centroids.to(device))
            for start in range(0, len(residual), 65536):
                part = torch.from_numpy(residual[start : start + 65536]).to(device)
                part = part - codebooks[-1][nearest(part, codebooks[-1])]
                residual[start : start + 65536] = part.cpu().numpy()
        return codebooks

    return fit


def faiss_layer(residual):
    faiss = importlib.import_module("faiss")
    kmeans = faiss.Kmeans(residual.shape[1], WIDTH, niter=25, seed=0)
    kmeans.train(residual)
    return kmeans.centroids


def sklearn_layer(residual):
    cluster = importlib.import_module("sklearn.cluster")
    kmeans = cluster.MiniBatchKMeans(
        WIDTH, batch_size=2048, max_iter=1, n_init=1, init_size=3072, random_state=0
    )
    return kmeans.fit(residual).cluster_centers_


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--skip", nargs="*", default=[], help="parts of names of lines to leave out"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{place}, {arguments.threads} threads, torch {torch.__version__}, ", end="")
    print(f"python {sys.version.split()[0]}; {arguments.rows:,} x {arguments.dim}, 3 x 256")
    array = embeddings(arguments.rows, arguments.dim)
    epoch = -(-arguments.rows // 2048)
    grid = TrainingSettings(normalize_residuals=False)
    variants = {
        "one Lloyd pass a layer (the limit)": by_one_pass,
        "semid train (30 steps in all, the default)": by_run(grid),
        f"semid train --steps {LAYERS * epoch} (an epoch a layer)": by_run(
            replace(grid, steps=LAYERS * epoch)
        ),
        "semid train --refine 10": by_run(replace(grid, refine=10)),
        "semid train --distinct": by_recipe,
    }
    for module, package, fit_layer in (
        ("faiss", "faiss-cpu", faiss_layer),
        ("sklearn", "scikit-learn", sklearn_layer),
    ):
        if importlib.util.find_spec(module) is None:
            print(f"{module} is not installed: left out")
            continue
        name = {"faiss": "faiss.Kmeans", "sklearn": "sklearn MiniBatchKMeans, an epoch a layer"}
        variants[f"{name[module]} {version(package)}, host"] = layer_by_layer(fit_layer)
    for part in arguments.skip:
        variants = {name: fit for name, fit in variants.items() if part not in name}
    # The first use of a device pays for its start; that is no part of training.
    by_one_pass(array[:8192], device)
    print(f"\n{'':50} {'seconds':>9} {'of limit':>9} {'error left':>11}")
    limit = None
    for name, fit in variants.items():
        started = time.perf_counter()
        codebooks = fit(array, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        limit = limit or seconds
        left = error_left(array, codebooks, device)
        print(f"{name:50} {seconds:9.1f} {seconds / limit:9.1f} {left:11.4f}", flush=True)


if __name__ == "__main__":
    main()
