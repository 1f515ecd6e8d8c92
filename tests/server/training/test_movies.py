"""The recipe for unique IDs on real embeddings, and the checkpoint made by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from semid_server.checkpoint import load_checkpoint
from semid_server.model import DecodeMode
from semid_server.training import ArrayRows, TrainingSettings, calibrate, fit_distinct

CHECKPOINT = Path(__file__).parents[3] / "checkpoints" / "movies-3x256"

LLOYD_ERROR = 0.2819
"""The least mean squared error of three tries by Lloyd iterations alone (RECIPE.md)."""


def unique_share(codes):
    _, inverse, counts = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    return (counts[inverse] == 1).double().mean().item()


def error(model, calibration, rows):
    codes = model.predict_step(rows).codes
    decoded = model.decode(codes, mode=DecodeMode.CALIBRATED, calibration=calibration)
    return (rows - decoded).square().sum(dim=1).mean().item()


@pytest.fixture
def movies(reference_dir):
    return np.load(reference_dir / "data" / "movies.npy")


def test_every_movie_has_an_id_of_its_own_in_the_checkpoint(movies):
    checkpoint = load_checkpoint(CHECKPOINT)
    rows = torch.from_numpy(movies)
    assert unique_share(checkpoint.model.predict_step(rows).codes) == 1
    assert error(checkpoint.model, checkpoint.calibration, rows) < LLOYD_ERROR
    assert checkpoint.warnings == ()


def test_fitted_on_four_fifths_the_recipe_holds_for_the_rest(movies):
    order = np.random.default_rng(1).permutation(len(movies))
    cut = len(movies) * 4 // 5
    fitted, held_out = movies[order[:cut]], movies[order[cut:]]
    model = TrainingSettings().build(movies.shape[1]).eval()
    for _ in fit_distinct(model, ArrayRows(fitted), seed=7):
        pass
    codes = {
        name: model.predict_step(torch.from_numpy(part)).codes
        for name, part in (("fitted", fitted), ("held out", held_out), ("all", movies))
    }
    assert unique_share(codes["fitted"]) > 0.99
    assert unique_share(codes["held out"]) > 0.98
    assert unique_share(codes["all"]) > 0.97
    assert error(model, calibrate(model, ArrayRows(fitted)), torch.from_numpy(fitted)) < LLOYD_ERROR
