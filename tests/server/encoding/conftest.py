"""Models of all kinds, and rows that are hard for each."""

from __future__ import annotations

import functools

import encode_cases as cases
import pytest
import torch

from semid_server.checkpoint import load_checkpoint

torch.set_num_threads(1)

MODELS = {
    "one feature": lambda: cases.random_model(1, [3, 2]),
    "odd shapes": lambda: cases.random_model(5, [7, 1, 3]),
    "eight layers, raw residuals": lambda: cases.random_model(
        16, [33, 256, 17, 5, 2, 64, 9, 300], normalize=False
    ),
    "eight layers": lambda: cases.random_model(24, [9, 300, 5, 64, 33, 2, 17, 128]),
    "short centroids": lambda: cases.random_model(64, [40, 40, 40], length=0.01),
    "long centroids": lambda: cases.random_model(64, [40, 40], normalize=False, length=100.0),
    "network": lambda: cases.random_network_model(20, (32, 16), 12, [40, 30, 20]),
}


@pytest.fixture(scope="session", params=MODELS)
def model_and_spec(request):
    return MODELS[request.param]()


@pytest.fixture(scope="session")
def checkpoint_of():
    """Model and spec of a reference set; each file is read once."""

    @functools.cache
    def load(path):
        checkpoint = load_checkpoint(path)
        return checkpoint.model, checkpoint.spec

    return lambda reference_set: load(reference_set.checkpoint)
