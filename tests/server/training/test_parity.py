"""Training follows the recorded runs of the original, step by step.

Given the order of the rows and the centroids that each layer started from, every later step
is determined; each must agree in all centroids and in the loss.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from semid_server.model import (
    MLP,
    BetaQuantizationLoss,
    L2Normalize,
    MiniBatchKMeans,
    ResidualQuantization,
    VectorQuantization,
)
from semid_server.training.trainer import Trainer

TOLERANCE = 1e-5


class Recorded:
    """An initializer that returns what was once drawn."""

    def __init__(self, centroids):
        self.centroids = centroids

    def __call__(self, points, n_clusters):
        assert len(points) >= n_clusters == len(self.centroids)
        return self.centroids.clone()


@pytest.fixture
def two_threads():
    """The runs were recorded on two threads; sums are split and rounded accordingly.

    Adagrad divides small gradients by their size, so that rounding is not forgotten.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def model_of(info, initial_state) -> ResidualQuantization:
    width, dim, buffer = info["codebook_width"], info["embedding_dim"], info["init_buffer_size"]
    adagrad = partial(torch.optim.Adagrad, lr=0.001)
    if info["kind"] == "rkmeans":
        layer = MiniBatchKMeans(n_clusters=width, n_features=dim)
        network = {}
    elif info["kind"] == "rvq":
        layer = VectorQuantization(n_clusters=width, n_features=dim, optimizer=adagrad)
        network = {}
    else:
        layer = VectorQuantization(
            width, 32, loss_function=BetaQuantizationLoss(0.25, "mean"), optimizer=adagrad
        )
        network = {
            "train_layer_wise": False,
            "normalization_layer": nn.Sequential(nn.BatchNorm1d(dim), L2Normalize()),
            "encoder": MLP(dim, 32, (128, 64)),
            "decoder": MLP(32, dim, (64, 128)),
            "reconstruction_loss_function": nn.MSELoss(),
            "reconstruction_loss_weight": 1.0,
        }
    model = ResidualQuantization(
        n_layers=info["n_layers"],
        quantization_layer=layer,
        init_buffer_size=buffer,
        normalize_residuals=info["normalize_residuals"],
        **network,
    )
    if initial_state is not None:
        own = {k: v for k, v in initial_state.items() if ".initializer." not in k}
        model.load_state_dict(own)
    return model


def batches_of(order, batch_size):
    """One epoch is the whole order, its last batch short; then it starts over."""
    while True:
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


@pytest.mark.parametrize(
    "reference_set",
    ["digits_rkmeans", "digits_rkmeans_raw_residuals", "digits_rvq", "digits_rqvae"],
    indirect=True,
)
@pytest.mark.usefixtures("two_threads")
def test_every_step_agrees_with_the_recorded_run(reference_set):
    recorded = np.load(reference_set.folder / "training.npz")
    centroids = torch.tensor(recorded["centroids"])
    initial = reference_set.folder / "initial.pt"
    state = torch.load(initial, weights_only=True) if initial.exists() else None
    model = model_of(reference_set.info, state)
    for index, layer in enumerate(model.layers):
        first = next(c for c in centroids[:, index] if c.any())
        layer.initializer = Recorded(first)
    rows = torch.tensor(reference_set.embeddings)
    trainer = Trainer(model, max_steps=int(recorded["steps"]))

    largest = centroids.norm(dim=-1).max()
    batches = batches_of(recorded["order"], int(recorded["batch_size"]))
    for step, (expected, loss) in enumerate(zip(centroids, recorded["loss"], strict=True)):
        assert not trainer.done
        outcome = trainer.step(rows[next(batches)])
        for layer, wanted in zip(model.layers, expected, strict=True):
            difference = (layer.centroids.detach() - wanted).norm(dim=-1).max()
            assert difference <= TOLERANCE * largest, f"step {step}"
        assert outcome.loss.item() == pytest.approx(loss, rel=TOLERANCE, abs=1e-7), f"step {step}"
    assert trainer.done

    checkpoint = torch.load(reference_set.checkpoint, map_location="cpu", weights_only=False)
    assert model.current_layer == checkpoint["current_layer"]
    assert model.layers_initialized == checkpoint["layers_initialized"]
    codes = model.predict_step(rows).codes
    assert np.array_equal(codes.numpy(), reference_set.codes)
