"""Builders of small checkpoints, sound and broken."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from semid_server.model import ModelKind, ModelSpec, build_model

torch.set_num_threads(1)

RQ_KMEANS = ModelSpec(
    kind=ModelKind.RQ_KMEANS,
    input_dim=4,
    codebook_widths=(3, 3),
    embedding_dim=4,
    normalize_residuals=True,
)
RQ_VAE = ModelSpec(
    kind=ModelKind.RQ_VAE,
    input_dim=6,
    codebook_widths=(3, 3),
    embedding_dim=2,
    normalize_residuals=False,
    encoder_hidden_dims=(5, 4),
    decoder_hidden_dims=(4, 5),
    batch_norm=True,
    normalize_input=True,
)


def random_model(spec: ModelSpec):
    model = build_model(spec)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model


@pytest.fixture(params=["rq-kmeans", "rq-vae"])
def spec(request) -> ModelSpec:
    return RQ_KMEANS if request.param == "rq-kmeans" else RQ_VAE


@pytest.fixture
def model(spec):
    return random_model(spec)


@pytest.fixture
def make_model():
    return random_model


@pytest.fixture
def lightning(tmp_path):
    """Write a Lightning checkpoint of ``spec`` with the changes asked for, and give its path."""

    def write(
        spec: ModelSpec = RQ_KMEANS, *, state=None, without=(), filename="run.ckpt", **changes
    ):
        state_dict = OrderedDict(random_model(spec).state_dict())
        for name, value in (state or {}).items():
            if value is None:
                del state_dict[name]
            else:
                state_dict[name] = value
        file = {
            "epoch": 1,
            "global_step": 30,
            "pytorch-lightning_version": "2.6.6",
            "state_dict": state_dict,
            "loops": {},
            "callbacks": {},
            "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.5, "dampening": 0}]}],
            "lr_schedulers": [],
            "hparams_name": "kwargs",
            "hyper_parameters": {
                "n_layers": spec.n_layers,
                "normalize_residuals": spec.normalize_residuals,
                "train_layer_wise": spec.kind is not ModelKind.RQ_VAE,
            },
            "current_layer": spec.n_layers - 1,
            "layers_initialized": [True] * spec.n_layers,
        }
        file.update(changes)
        for key in without:
            del file[key]
        path = tmp_path / filename
        torch.save(file, path)
        return path

    return write


@pytest.fixture
def rq_kmeans_spec() -> ModelSpec:
    return RQ_KMEANS


@pytest.fixture
def rq_vae_spec() -> ModelSpec:
    return RQ_VAE
