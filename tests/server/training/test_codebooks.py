"""Codebooks fitted to a whole set, and the figures that are measured on one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semid_server.model import Calibration, DecodeMode, ModelKind, ModelSpec, build_model
from semid_server.training import ArrayRows, calibrate, fit_distinct, refine
from semid_server.training.codebooks import Residuals, lloyd, nearest, relocate, separate
from semid_server.training.report import LayerUse, report

unhurried = settings(deadline=None, max_examples=8)
"""Examples of fitting take as long as they take."""


def embeddings(n=300, dim=6, seed=0):
    """Rows in clumps of unequal sizes."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(12, dim)) * 3
    return (centres[random.integers(0, 12, n) ** 2 % 12] + random.normal(size=(n, dim))).astype(
        np.float32
    )


def fresh_model(widths=(8, 8), dim=6, normalize=True):
    return build_model(
        ModelSpec(
            kind=ModelKind.RQ_KMEANS,
            input_dim=dim,
            codebook_widths=widths,
            embedding_dim=dim,
            normalize_residuals=normalize,
        )
    )


def drawn_model(rows, **others):
    """A model whose centroids lie close to rows' residuals, layer by layer."""
    model = fresh_model(**others)
    for index, layer in enumerate(model.layers):
        residuals = torch.cat(list(Residuals(model, ArrayRows(rows), index)))
        # Not on them: a residual of length 0 is rounding noise once it is normalised.
        layer.centroids.data = 0.9 * residuals[: layer.n_clusters] + 0.01
    return model


def error_of(rows, centroids):
    return torch.cdist(rows, centroids).min(dim=1).values.square().mean().item()


def whole(array):
    """The residuals of the first layer without normalisation: the rows."""
    return Residuals(fresh_model(normalize=False, dim=array.shape[1]), ArrayRows(array), 0)


def unique_items(codes):
    _, inverse, counts = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    return int((counts[inverse] == 1).sum())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("normalize", [True, False])
def test_residuals_are_what_a_layer_quantises_whether_kept_or_not(layer, normalize):
    array = embeddings(9000)
    model = drawn_model(array, normalize=normalize)
    kept = torch.cat(list(Residuals(model, ArrayRows(array), layer)))
    anew = torch.cat(list(Residuals(model, ArrayRows(array), layer, memory_bytes=0)))
    assert torch.equal(kept, anew)
    rows = torch.from_numpy(array)
    if normalize:
        rows = rows / rows.norm(dim=1, keepdim=True)
    if layer == 1:
        rows = rows - model.layers[0].predict_step(rows).embeddings
        rows = rows / rows.norm(dim=1, keepdim=True) if normalize else rows
    torch.testing.assert_close(kept, rows)


def test_a_sample_has_rows_of_the_set_without_repetition():
    array = np.arange(9000, dtype=np.float32)[:, None]
    drawn = whole(array).sample(500, seed=1).flatten().tolist()
    assert len(set(drawn)) == 500
    assert max(drawn) > 8500
    assert whole(array).sample(10**6, seed=1).flatten().tolist() == array.flatten().tolist()


@unhurried
@given(seed=st.integers(0, 1000), width=st.integers(1, 9), n=st.integers(9, 60))
def test_a_lloyd_iteration_moves_centroids_to_the_means_of_their_rows(seed, width, n):
    rows = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    centroids = rows[:width]
    moved = lloyd(whole(rows.numpy()), centroids, 1)
    codes = nearest(rows, centroids)
    assert len(set(codes.tolist())) == width  # each has at least the row that it is
    for code in range(width):
        torch.testing.assert_close(moved[code], rows[codes == code].mean(dim=0))


def test_lloyd_iterations_never_raise_the_error_and_end_by_themselves():
    errors = []
    array = embeddings()
    lloyd(
        whole(array),
        torch.from_numpy(array[:8]),
        1000,
        on_pass=lambda _number, error: errors.append(error),
    )
    assert errors == sorted(errors, reverse=True)
    assert len(errors) < 100


def test_a_dead_centroid_goes_where_the_error_is_greatest():
    array = np.concatenate([embeddings(100, 2), embeddings(100, 2) + 100]).astype(np.float32)
    rows = torch.from_numpy(array)
    start = torch.tensor([[0.0, 0.0], [100.0, 100.0], [1e4, 1e4], [-1e4, 1e4]])
    torch.manual_seed(0)
    fitted = lloyd(whole(array), start, 50)
    assert set(nearest(rows, fitted).tolist()) == {0, 1, 2, 3}
    assert error_of(rows, fitted) < 0.8 * error_of(rows, lloyd(whole(array), start[:2], 50))


def test_spherical_iterations_keep_centroids_at_length_one():
    array = embeddings()
    residuals = Residuals(fresh_model(), ArrayRows(array), 0)
    fitted = lloyd(residuals, torch.cat(list(residuals))[:8], 20, spherical=True)
    torch.testing.assert_close(fitted.norm(dim=1), torch.ones(8))


@unhurried
@given(seed=st.integers(0, 30))
def test_relocation_never_raises_the_error(seed):
    array = embeddings(seed=seed)
    rows = torch.from_numpy(array)
    torch.manual_seed(seed)
    settled = lloyd(whole(array), rows[:8], 50)
    relocated = relocate(whole(array), settled, rounds=3, iterations=5)
    assert error_of(rows, relocated) <= error_of(rows, settled) * (1 + 1e-6)


def test_relocation_leaves_an_optimum_that_lloyd_iterations_cannot():
    # Two clumps far apart, one with three centroids and the other with one for three clumps.
    random = np.random.default_rng(0)
    centres = np.array([[0, 0], [100, 0], [110, 0], [120, 0]]).repeat(50, axis=0)
    array = (centres + random.normal(size=(200, 2))).astype(np.float32)
    start = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [110.0, 0.0]])
    settled = lloyd(whole(array), start, 100)
    torch.manual_seed(0)
    relocated = relocate(whole(array), settled)
    rows = torch.from_numpy(array)
    assert error_of(rows, relocated) < 0.1 * error_of(rows, settled)


@unhurried
@given(seed=st.integers(0, 200))
def test_separating_never_makes_fewer_ids_unique(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(60, 4, generator=generator)
    prefixes = torch.randint(8, (60,), generator=generator)
    centroids = torch.randn(5, 4, generator=generator)

    def ids(centroids):
        codes = torch.cdist(rows, centroids).argmin(dim=1)
        return torch.stack([prefixes, codes], dim=1)

    separated = separate(prefixes, rows, centroids)
    assert unique_items(ids(separated)) >= unique_items(ids(centroids))


def test_the_recipe_gives_nearly_all_items_an_id_of_their_own():
    array = embeddings(300)
    model = fresh_model((16, 16, 16))
    assert list(fit_distinct(model, ArrayRows(array), seed=0)) == [0, 1, 2]
    assert unique_items(model.predict_step(torch.from_numpy(array)).codes) >= 290


def test_refining_lowers_the_error_of_each_layer():
    array = embeddings()
    rows = torch.from_numpy(array)
    model = drawn_model(array, normalize=False)
    before = (rows - model.predict_step(rows).quantized).square().sum().item()
    assert list(refine(model, ArrayRows(array), iterations=20)) == [0, 1]
    after = (rows - model.predict_step(rows).quantized).square().sum().item()
    assert after < 0.8 * before


def test_calibration_measures_mean_lengths_by_layer_and_code():
    array = embeddings(9000) * 3
    model = drawn_model(array)
    model.layers[1].centroids.data[3] = 1e3  # a code that no row has
    measured = calibrate(model, ArrayRows(array))
    rows = torch.from_numpy(array)
    lengths = rows.norm(dim=1)
    assert measured.input_norm == pytest.approx(lengths.mean().item(), rel=1e-5)
    residual = rows
    for layer, norms in zip(model.layers, measured.residual_norms, strict=True):
        residual = residual / residual.norm(dim=1, keepdim=True)
        codes, embedding = layer.predict_step(residual)
        residual = residual - embedding
        lengths = residual.norm(dim=1)
        assert norms.dtype == torch.float32
        for code in range(8):
            mine = lengths[codes == code]
            expected = mine.mean() if len(mine) else lengths.mean()
            torch.testing.assert_close(norms[code], expected, rtol=1e-4, atol=1e-5)


def test_calibrated_decoding_comes_closer_than_the_sum_on_the_scale_of_the_input():
    array = embeddings() * 3
    model = drawn_model(array, widths=(16, 16))
    for _ in refine(model, ArrayRows(array), iterations=20):
        pass
    rows = torch.from_numpy(array)
    codes = model.predict_step(rows).codes
    calibration = calibrate(model, ArrayRows(array))
    calibrated = model.decode(codes, mode=DecodeMode.CALIBRATED, calibration=calibration)
    assert (rows - calibrated).square().sum() < 0.3 * (rows - model.decode(codes)).square().sum()


def test_a_report_counts_ids_codes_errors_and_neighbours():
    array = embeddings(9000)
    rows = torch.from_numpy(array)
    model = drawn_model(array, widths=(16, 16))
    calibration = Calibration(2.0, (torch.rand(16), torch.rand(16)))
    codes = model.predict_step(rows).codes
    measured = report(
        model,
        ArrayRows(array),
        lambda rows: model.predict_step(rows).codes.to(torch.uint8),
        calibration=calibration,
        neighbours=3,
        queries=50,
    )
    ids, counts = np.unique(codes.numpy(), axis=0, return_counts=True)
    assert measured.distinct_ids == len(ids)
    assert measured.largest_group == counts.max()
    assert measured.unique_items == unique_items(codes)
    assert measured.colliding_share == pytest.approx(1 - unique_items(codes) / 9000)
    assert measured.layers[1].counts == tuple(np.bincount(codes[:, 1], minlength=16))
    spread = (rows - rows.mean(dim=0)).square().sum().item()
    for depth in (1, 2):
        figures = measured.depths[depth - 1]
        prefix = codes[:, :depth]
        error = (rows - model.decode(prefix)).square().sum().item()
        assert figures.sum_error == pytest.approx(error / spread, rel=1e-4)
        decoded = model.decode(prefix, mode=DecodeMode.CALIBRATED, calibration=calibration)
        error = (rows - decoded).square().sum().item()
        assert figures.calibrated_error == pytest.approx(error / spread, rel=1e-4)
        _, inverse = np.unique(prefix.numpy(), axis=0, return_inverse=True)
        least = sum(
            ((array[inverse == g] - array[inverse == g].mean(0)) ** 2).sum()
            for g in range(inverse.max() + 1)
        )
        assert figures.least_error == pytest.approx(least / spread, rel=1e-3)
        assert figures.least_error <= figures.calibrated_error
        pairs = np.bincount(inverse.ravel())
        assert figures.chance == pytest.approx((pairs * (pairs - 1)).sum() / (9000 * 8999))
    assert 1 > measured.depths[0].neighbour_recall > measured.depths[1].neighbour_recall


def test_the_neighbours_of_a_report_are_the_nearest_items():
    array = np.array([[0.0, 0], [0.1, 0], [5, 0], [5.1, 0], [9, 9]], np.float32)
    model = fresh_model((2,), dim=2, normalize=False)
    model.layers[0].centroids.data = torch.tensor([[0.0, 0.0], [6.0, 3.0]])
    encode = lambda rows: model.predict_step(rows).codes  # noqa: E731
    measured = report(model, ArrayRows(array), encode, neighbours=1)
    assert measured.depths[0].neighbour_recall == 1.0
    farther = report(model, ArrayRows(array), encode, neighbours=2)
    # The second nearest of the first four items lies in the other pair, with the other code.
    assert farther.depths[0].neighbour_recall == pytest.approx(6 / 10)
    assert farther.depths[0].calibrated_error == farther.depths[0].sum_error


def test_entropy_and_perplexity_say_how_evenly_codes_are_used():
    even = LayerUse((5, 5, 5, 5))
    assert (even.entropy, even.perplexity, even.coverage, even.dead) == (2.0, 4.0, 1.0, 0)
    one = LayerUse((20, 0, 0, 0))
    assert (one.entropy, one.perplexity, one.coverage, one.dead) == (0.0, 1.0, 0.25, 3)
    assert LayerUse((3, 1)).entropy == pytest.approx(-0.75 * math.log2(0.75) + 0.5)
