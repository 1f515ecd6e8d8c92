"""What each part of the recipe for unique IDs brings, on the movies: the table of RECIPE.md.

    python tests/bench/recipe.py [--seeds 42 0 1] [--threads 1]

For each variant: items with an ID of their own and mean squared error of decode mode CALIBRATED
(of SUM without normalisation), fitted on all rows; then fitted on a random 80 % of them, for
the rows fitted, the rows held out (among themselves), and both together.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from semid_server.model import DecodeMode, KMeansPlusPlusInitInitializer
from semid_server.training import ArrayRows, TrainingRun, TrainingSettings, calibrate
from semid_server.training.codebooks import Residuals, lloyd, relocate, separate

MOVIES = Path(__file__).parent.parent / "reference" / "data" / "movies.npy"


def mini_batches(settings):
    """Train by mini-batches, with the settings given."""

    def fit(rows, seed):
        with tempfile.TemporaryDirectory() as folder:
            run = TrainingRun(
                replace(settings, seed=seed), rows, Path(folder), device=torch.device("cpu")
            )
            assert run.run()
        return run.model

    return fit


def layer_by_layer(*stages, normalize=True):
    """Fit layer after layer, from k-means++ on, by some of the stages of the recipe."""

    def fit(rows, seed):
        model = TrainingSettings(normalize_residuals=normalize).build(rows.dim)
        for index, layer in enumerate(model.layers):
            torch.manual_seed(seed + index)
            residuals = Residuals(model, rows, index)
            whole = torch.cat(list(residuals))
            centroids = KMeansPlusPlusInitInitializer()(whole, layer.n_clusters)
            if "spherical" in stages:
                centroids = lloyd(residuals, centroids, 30, spherical=True)
            if "lloyd" in stages:
                centroids = lloyd(residuals, centroids, 100)
            if "relocate" in stages:
                centroids = relocate(residuals, centroids)
            if "separate" in stages and index == model.n_layers - 1:
                centroids = separate(residuals.prefixes(), whole, centroids)
            layer.centroids.data = centroids
        return model.eval()

    return fit


GRID = TrainingSettings()
VARIANTS = {
    "mini-batches, as the original": mini_batches(GRID),
    "mini-batches, 300 steps": mini_batches(replace(GRID, steps=300)),
    "mini-batches, then `--refine 50`": mini_batches(replace(GRID, refine=50)),
    "Lloyd": layer_by_layer("lloyd"),
    "spherical": layer_by_layer("spherical"),
    "Lloyd, relocate": layer_by_layer("lloyd", "relocate"),
    "spherical, Lloyd": layer_by_layer("spherical", "lloyd"),
    "spherical, Lloyd, relocate": layer_by_layer("spherical", "lloyd", "relocate"),
    "spherical, Lloyd, separate": layer_by_layer("spherical", "lloyd", "separate"),
    "**spherical, Lloyd, relocate, separate** (`--distinct`)": layer_by_layer(
        "spherical", "lloyd", "relocate", "separate"
    ),
    "the same, residuals not normalised": layer_by_layer(
        "spherical", "lloyd", "relocate", "separate", normalize=False
    ),
}


def measure(model, calibration, array):
    """Items with an ID of their own, and the mean squared error of decoding."""
    rows = torch.from_numpy(array)
    codes = model.predict_step(rows).codes
    _, inverse, counts = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    decoded = model.decode(codes, mode=DecodeMode.CALIBRATED, calibration=calibration)
    error = (rows - decoded).square().sum(dim=1).mean().item()
    return int((counts[inverse] == 1).sum()), error


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 0, 1])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    array = np.load(MOVIES)
    order = np.random.default_rng(0).permutation(len(array))
    cut = len(array) * 4 // 5
    fitted, held_out = array[np.sort(order[:cut])], array[np.sort(order[cut:])]
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} thread(s), ", end="")
    print(f"torch {torch.__version__}, python {sys.version.split()[0]}, seeds {arguments.seeds}\n")
    print("| fitted by | unique of 3,201 | error | 80 %: fitted | held out | all | error | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, fit in VARIANTS.items():
        cells = [[] for _ in range(6)]
        started = time.perf_counter()
        for seed in arguments.seeds:
            model = fit(ArrayRows(array), seed)
            unique, error = measure(model, calibrate(model, ArrayRows(array)), array)
            cells[0].append(f"{unique:,}")
            cells[1].append(f"{error:.4f}")
            model = fit(ArrayRows(fitted), seed)
            calibration = calibrate(model, ArrayRows(fitted))
            for cell, part in zip(cells[2:5], (fitted, held_out, array), strict=True):
                unique, error = measure(model, calibration, part)
                cell.append(f"{unique / len(part):.1%}")
                if part is held_out:
                    cells[5].append(f"{error:.4f}")
        seconds = (time.perf_counter() - started) / len(arguments.seeds) / 2
        columns = " | ".join(", ".join(cell) for cell in cells)
        print(f"| {name} | {columns} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
