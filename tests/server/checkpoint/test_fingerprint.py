"""The fingerprint: of the arithmetic, of all of it, and of nothing else."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest
import torch

from semid_server.checkpoint import fingerprint, load_checkpoint
from semid_server.model import Activation, ModelKind, ModelSpec

TWO_LAYERS = ModelSpec(
    kind=ModelKind.RQ_KMEANS,
    input_dim=2,
    codebook_widths=(2, 1),
    embedding_dim=2,
    normalize_residuals=True,
)
CODEBOOKS = {
    "quantization_layer_list.0.centroids": torch.tensor([[1.0, -0.0], [0.5, 2.0]]),
    "quantization_layer_list.1.centroids": torch.tensor([[-3.0, 0.25]]),
}


def test_the_bytes_digested_are_those_of_the_format_description():
    def record(name: bytes, shape: tuple[int, ...], *values: float) -> bytes:
        return (
            struct.pack("<Q", len(name))
            + name
            + struct.pack(f"<{1 + len(shape)}Q", len(shape), *shape)
            + struct.pack(f"<{len(values)}d", *values)
        )

    by_hand = hashlib.sha256(
        b"semid fingerprint 1\n"
        + record(b"normalize_residuals", (), 1)
        + record(b"normalize_input", (), 0)
        + record(b"codebook.0", (2, 2), 1.0, 0.0, 0.5, 2.0)
        + record(b"codebook.1", (1, 2), -3.0, 0.25)
    )
    assert fingerprint(TWO_LAYERS, CODEBOOKS) == by_hand.hexdigest()


def test_the_digest_of_version_1_never_changes():
    assert (
        fingerprint(TWO_LAYERS, CODEBOOKS)
        == "a2490039019623cbc2451738eb6e4a3eddb185653d3d9418fc9d2df87acc6e5d"
    )


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("digits_rqvae", "b4181f07cb9524bc44fdcfc4c0701f73fd3cffe0057197ef783dfb10ac847b09"),
        ("movies_rkmeans_64", "9940962a7b48dd01606285e902a64254336c52cc1a5d7e9e85c94c6fec029dce"),
    ],
)
def test_the_reference_checkpoints_have_known_fingerprints(reference_dir, name, digest):
    assert load_checkpoint(reference_dir / name / "model.ckpt").fingerprint == digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_storage_does_not_matter(dtype):
    stored = {name: tensor.to(dtype) for name, tensor in CODEBOOKS.items()}
    assert fingerprint(TWO_LAYERS, stored) == fingerprint(TWO_LAYERS, CODEBOOKS)


def test_the_sign_of_zero_does_not_matter():
    positive = {name: tensor + 0.0 for name, tensor in CODEBOOKS.items()}
    assert fingerprint(TWO_LAYERS, positive) == fingerprint(TWO_LAYERS, CODEBOOKS)


def test_the_layout_in_memory_does_not_matter():
    transposed = {name: tensor.t().contiguous().t() for name, tensor in CODEBOOKS.items()}
    assert fingerprint(TWO_LAYERS, transposed) == fingerprint(TWO_LAYERS, CODEBOOKS)


def test_the_kind_does_not_matter():
    other = replace(TWO_LAYERS, kind=ModelKind.R_VQ)
    assert fingerprint(other, CODEBOOKS) == fingerprint(TWO_LAYERS, CODEBOOKS)


def test_the_activation_and_epsilon_matter_only_where_they_are_used(rq_kmeans_spec, make_model):
    state = make_model(rq_kmeans_spec).state_dict()
    other = replace(rq_kmeans_spec, activation=Activation.TANH, batch_norm_eps=0.5)
    assert fingerprint(other, state) == fingerprint(rq_kmeans_spec, state)


@pytest.mark.parametrize(
    "change",
    [
        {"normalize_residuals": True},
        {"normalize_input": False},
        {"activation": Activation.GELU},
        {"batch_norm_eps": 1e-3},
    ],
)
def test_every_switch_matters(rq_vae_spec, make_model, change):
    state = make_model(rq_vae_spec).state_dict()
    assert fingerprint(replace(rq_vae_spec, **change), state) != fingerprint(rq_vae_spec, state)


def test_the_last_bit_of_every_weight_matters(spec, model):
    state = model.state_dict()
    seen = {fingerprint(spec, state)}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            changed = tensor.clone()
            changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9.0))
            seen.add(fingerprint(spec, {**state, name: changed}))
    assert len(seen) == 1 + sum(tensor.is_floating_point() for tensor in state.values())


def test_rows_and_columns_are_told_apart():
    wide = replace(TWO_LAYERS, codebook_widths=(1, 1), input_dim=4, embedding_dim=4)
    tall = replace(TWO_LAYERS, codebook_widths=(2, 2))
    numbers = torch.arange(4.0)
    names = list(CODEBOOKS)
    assert fingerprint(wide, {n: numbers.reshape(1, 4) for n in names}) != fingerprint(
        tall, {n: numbers.reshape(2, 2) for n in names}
    )


def test_the_number_of_batches_seen_does_not_matter(rq_vae_spec, make_model):
    state = make_model(rq_vae_spec).state_dict()
    name = "normalization_layer.0.num_batches_tracked"
    assert fingerprint(rq_vae_spec, {**state, name: torch.tensor(9)}) == fingerprint(
        rq_vae_spec, state
    )
