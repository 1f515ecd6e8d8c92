"""Quantising and decoding, against the recorded runs and against naive arithmetic."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semid_server.errors import InvalidInputError, UnsupportedDecodeModeError
from semid_server.model import (
    MLP,
    Calibration,
    DecodeMode,
    MiniBatchKMeans,
    ModelKind,
    ModelSpec,
    ResidualQuantization,
    VectorQuantization,
    build_model,
)

KINDS = {"rkmeans": ModelKind.RQ_KMEANS, "rvq": ModelKind.R_VQ, "rqvae": ModelKind.RQ_VAE}


def spec_of(reference_set) -> ModelSpec:
    info = reference_set.info
    rqvae = info["kind"] == "rqvae"
    return ModelSpec(
        kind=KINDS[info["kind"]],
        input_dim=info["embedding_dim"],
        codebook_widths=(info["codebook_width"],) * info["n_layers"],
        embedding_dim=32 if rqvae else info["embedding_dim"],
        normalize_residuals=info["normalize_residuals"],
        encoder_hidden_dims=(128, 64) if rqvae else None,
        decoder_hidden_dims=(64, 128) if rqvae else None,
        batch_norm=rqvae,
        normalize_input=rqvae,
    )


@pytest.fixture
def model(reference_set) -> ResidualQuantization:
    checkpoint = torch.load(reference_set.checkpoint, map_location="cpu", weights_only=False)
    model = build_model(spec_of(reference_set))
    own = {k: v for k, v in checkpoint["state_dict"].items() if ".initializer." not in k}
    model.load_state_dict(own, strict=True)
    return model


def naive_codes(model: ResidualQuantization, features: np.ndarray) -> np.ndarray:
    """The definition in numpy, float64, written down once more."""
    residual, codes = features, []
    for layer in model.layers:
        centroids = layer.centroids.detach().double().numpy()
        if model.normalize_residuals:
            length = np.linalg.norm(residual, axis=1, keepdims=True)
            residual = residual / np.maximum(length, 1e-12)
        distances = np.stack([((residual - c) ** 2).sum(axis=1) for c in centroids], axis=1)
        code = distances.argmin(axis=1)
        codes.append(code)
        residual = residual - centroids[code]
    return np.stack(codes, axis=1)


def test_predict_step_gives_the_recorded_codes_and_reconstruction(reference_set, model):
    predicted = model.predict_step(torch.tensor(reference_set.embeddings))
    settled = ~reference_set.vanishing
    codes = predicted.codes.numpy()
    assert predicted.codes.dtype == torch.int64
    assert np.array_equal(codes[settled], reference_set.codes[settled])
    recorded = reference_set.reconstruction
    compared = settled[: len(recorded)]
    difference = predicted.reconstruction.numpy()[: len(recorded)] - recorded
    assert np.abs(difference[compared]).max() <= 1e-5


def test_in_float64_every_code_is_that_of_naive_arithmetic(reference_set, model):
    model = model.double()
    embeddings = torch.tensor(reference_set.embeddings).double()
    codes = model.predict_step(embeddings).codes.numpy()
    with torch.no_grad():
        features = model.features(embeddings).numpy()
    assert np.array_equal(codes, naive_codes(model, features))
    settled = ~reference_set.vanishing
    assert np.array_equal(codes[settled], reference_set.codes[settled])


def test_decoding_the_recorded_codes_gives_the_recorded_reconstruction(reference_set, model):
    recorded = reference_set.reconstruction
    decoded = model.decode(torch.tensor(reference_set.codes[: len(recorded)])).numpy()
    assert decoded.dtype == np.float32
    if reference_set.info["kind"] == "rqvae":
        assert np.abs(decoded - recorded).max() <= 1e-5
    else:
        assert np.array_equal(decoded, recorded)


def state_of(model: torch.nn.Module) -> dict:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {name: value.clone() for name, value in model.named_buffers()}
    state |= {f"training of {name}": part.training for name, part in model.named_modules()}
    state |= {f"gradient of {name}": value.grad for name, value in model.named_parameters()}
    return state


def same(before: dict, after: dict) -> bool:
    return before.keys() == after.keys() and all(
        torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        for name, value in before.items()
    )


@pytest.mark.parametrize("mode", ["training", "evaluating", "mixed"])
def test_predict_step_changes_nothing_not_even_in_a_fresh_model(mode):
    spec = ModelSpec(
        kind=ModelKind.RQ_VAE,
        input_dim=5,
        codebook_widths=(3, 4),
        embedding_dim=2,
        normalize_residuals=False,
        encoder_hidden_dims=(4,),
        decoder_hidden_dims=(4,),
        batch_norm=True,
        normalize_input=True,
    )
    model = build_model(spec).train(mode != "evaluating")
    if mode == "mixed":
        model.encoder.eval()
    before, random_state = state_of(model), torch.get_rng_state()
    first = model.predict_step(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
    again = model.predict_step(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
    assert same(before, state_of(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert torch.equal(first.reconstruction, again.reconstruction)
    assert not first.codes.any()


def small_model(widths=(4, 7, 2), *, normalize=True, seed=0) -> ResidualQuantization:
    spec = ModelSpec(
        kind=ModelKind.RQ_KMEANS,
        input_dim=3,
        codebook_widths=widths,
        embedding_dim=3,
        normalize_residuals=normalize,
    )
    model = build_model(spec)
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        layer.centroids.data = torch.randn(layer.centroids.shape, generator=generator)
    return model


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    n_rows=st.integers(0, 17),
    normalize=st.booleans(),
)
def test_codes_are_nearest_centroids_of_residuals_for_any_widths(seed, widths, n_rows, normalize):
    model = small_model(tuple(widths), normalize=normalize, seed=seed).double()
    rows = torch.randn(n_rows, 3, generator=torch.Generator().manual_seed(seed + 1)).double()
    predicted = model.predict_step(rows)
    assert predicted.codes.shape == (n_rows, len(widths))
    assert np.array_equal(predicted.codes.numpy(), naive_codes(model, rows.numpy()))
    assert torch.equal(model.decode(predicted.codes), predicted.quantized.float())


def test_a_tie_goes_to_the_lowest_index():
    model = small_model((4,), normalize=False)
    model.layers[0].centroids.data = torch.tensor(
        [[5.0, 0, 0], [1.0, 0, 0], [-1.0, 0, 0], [1.0, 0, 0]]
    )
    rows = torch.tensor([[0.0, 0, 0], [0.9, 0, 0], [0.0, 3.0, 0]])
    assert model.predict_step(rows).codes[:, 0].tolist() == [1, 1, 1]


def test_the_first_codes_alone_decode_to_a_coarser_sum():
    model = small_model()
    codes = torch.tensor([[3, 6, 1], [0, 0, 0]], dtype=torch.uint8)
    layers = [layer.centroids.detach() for layer in model.layers]
    assert torch.equal(model.decode(codes[:, :1]), layers[0][[3, 0]])
    assert torch.equal(model.decode(codes[:, :2]), layers[0][[3, 0]] + layers[1][[6, 0]])


def test_calibrated_decoding_puts_the_mean_lengths_back():
    model = small_model()
    norms = tuple(torch.rand(len(layer.centroids)) for layer in model.layers)
    calibration = Calibration(input_norm=2.5, residual_norms=norms)
    codes = torch.tensor([[3, 6, 1]])
    c = [layer.centroids.detach()[k] for layer, k in zip(model.layers, (3, 6, 1), strict=True)]
    expected = 2.5 * (c[0] + norms[0][3] * (c[1] + norms[1][6] * c[2]))
    decoded = model.decode(codes, mode=DecodeMode.CALIBRATED, calibration=calibration)
    torch.testing.assert_close(decoded[0], expected)
    coarse = model.decode(codes[:, :2], mode=DecodeMode.CALIBRATED, calibration=calibration)
    torch.testing.assert_close(coarse[0], 2.5 * (c[0] + norms[0][3] * c[1]))


def test_calibrated_decoding_without_a_calibration_says_how_to_get_one():
    with pytest.raises(UnsupportedDecodeModeError, match="semid calibrate"):
        small_model().decode(torch.tensor([[0]]), mode=DecodeMode.CALIBRATED)


def test_without_residual_normalisation_calibrated_is_the_sum():
    model = small_model(normalize=False)
    codes = torch.tensor([[3, 6, 1], [1, 2, 0]])
    calibrated = model.decode(codes, mode=DecodeMode.CALIBRATED)
    assert torch.equal(calibrated, model.decode(codes))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([[0, 0, 0], [0, 7, 0]]), r"codes\[1, 1\]: 7; expected 0 to 6"),
        (torch.tensor([[-1]]), r"codes\[0, 0\]: -1; expected 0 to 3"),
        (torch.zeros(2, 4, dtype=torch.int64), r"shape \(2, 4\); expected \(n, l\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"1 <= l <= 3"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\)"),
        (torch.zeros(2, 3), "dtype torch.float32; expected integers"),
    ],
)
def test_codes_that_name_no_centroid_are_refused(codes, message):
    with pytest.raises(InvalidInputError, match=message):
        small_model().decode(codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int32])
def test_codes_of_every_integer_type_decode(dtype):
    codes = torch.tensor([[3, 6, 1]])
    model = small_model()
    assert torch.equal(model.decode(codes.to(dtype)), model.decode(codes))


def test_each_layer_owns_its_centroids():
    layer = MiniBatchKMeans(n_clusters=4, n_features=3)
    model = ResidualQuantization(n_layers=3, quantization_layer=layer)
    model.layers[0].centroids.data.fill_(1)
    assert not layer.centroids.any()
    assert not model.layers[1].centroids.any()


def test_layers_of_different_widths_can_be_given_one_by_one():
    layers = [VectorQuantization(4, 3), VectorQuantization(8, 3)]
    model = ResidualQuantization(2, layers)
    assert model.layers[1] is layers[1]
    with pytest.raises(ValueError, match="n_layers is 3, but 2 layers were given"):
        ResidualQuantization(3, layers)


def test_a_state_dict_has_the_keys_of_the_original_and_no_others():
    spec = ModelSpec(
        kind=ModelKind.RQ_VAE,
        input_dim=8,
        codebook_widths=(4,),
        embedding_dim=2,
        normalize_residuals=False,
        encoder_hidden_dims=(6, 5, 4),
        decoder_hidden_dims=(4, 5, 6),
        batch_norm=True,
        normalize_input=True,
    )
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    linears = [f"model.{i}.{part}" for i in (0, 2, 5, 8) for part in ("weight", "bias")]
    assert set(build_model(spec).state_dict()) == {
        "quantization_layer_list.0.centroids",
        *(f"normalization_layer.0.{part}" for part in norm),
        *(f"encoder.{name}" for name in linears),
        *(f"decoder.{name}" for name in linears),
    }
    assert set(small_model().state_dict()) == {
        f"quantization_layer_list.{layer}.centroids" for layer in range(3)
    }


def test_nothing_follows_the_last_linear_map_but_dropout():
    network = MLP(3, 2, (5, 4), dropout=0.5)
    names = [type(part).__name__ for part in network.model]
    assert names == ["Linear", "ReLU", "Linear", "Dropout", "ReLU", "Linear", "Dropout"]


def test_decoding_leaves_the_decoder_as_it_was():
    model = build_model(
        ModelSpec(
            kind=ModelKind.RQ_VAE,
            input_dim=4,
            codebook_widths=(3,),
            embedding_dim=2,
            normalize_residuals=False,
            encoder_hidden_dims=(),
            decoder_hidden_dims=(3,),
        )
    ).train()
    before = copy.deepcopy(model.state_dict())
    model.decode(torch.tensor([[1], [2]]))
    assert all(part.training for part in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
