"""Code usage and quantisation error over a sliding window."""

from __future__ import annotations

import numpy as np
import pytest

from semid_server.serving.drift import DriftWatch, add_windows

CODEBOOKS = [np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[:3] / 2]


def watch(**settings):
    return DriftWatch(
        CODEBOOKS,
        **{"normalize_residuals": False, "features": lambda rows: rows.astype(np.float64)}
        | settings,
    )


def test_before_any_row_there_is_nothing_to_tell():
    assert watch().summary() == []


def test_perplexity_counts_the_codes_in_use_and_dead_codes_the_rest():
    drift = watch()
    codes = np.array([[0, 0], [1, 0], [0, 0], [1, 0]])
    drift.observe(codes, np.ones((1, 4)), codes[:1])
    first, second = drift.summary()
    assert first.perplexity == pytest.approx(2)
    assert second.perplexity == pytest.approx(1)
    assert (first.dead_codes, second.dead_codes) == (2, 2)


def test_the_error_is_what_a_layer_leaves_of_what_it_gets():
    drift = watch()
    rows = np.array([[2.0, 0, 0, 0], [1, 1, 0, 0]])
    codes = np.array([[0, 0], [0, 1]])
    drift.observe(codes, rows, codes)
    first, second = drift.summary()
    # 4 -> 1 and 2 -> 1, then 1 -> 1/4 and 1 -> 1/4
    assert first.error == pytest.approx((1 + 1) / (4 + 2))
    assert second.error == pytest.approx(1 / 4)


def test_with_normalised_residuals_every_layer_gets_rows_of_length_1():
    drift = watch(normalize_residuals=True)
    rows = np.array([[20.0, 0, 0, 0], [0, 3, 0, 0]])
    codes = np.array([[0, 0], [0, 0]])
    drift.observe(codes, rows, codes)
    first, _ = drift.summary()
    assert first.error == pytest.approx((0 + 2) / 2)


def test_a_row_on_its_centroid_leaves_nothing_and_later_layers_no_nan():
    drift = watch(normalize_residuals=True)
    codes = np.array([[0, 0]])
    drift.observe(codes, np.array([[1.0, 0, 0, 0]]), codes)
    # Nothing is left, so the second layer gets a row of zeros.
    assert [layer.error for layer in drift.summary()] == [0, 0]


def test_rows_leave_the_window_when_enough_newer_ones_have_come():
    drift = watch(window_rows=160)
    old, new = np.zeros((10, 2), int), np.ones((10, 2), int)
    for _ in range(20):
        drift.observe(old, np.ones((1, 4)), old[:1])
    assert drift.summary()[0].perplexity == pytest.approx(1)
    drift.observe(new, np.ones((1, 4)), new[:1])
    assert drift.summary()[0].perplexity > 1
    for _ in range(17):
        drift.observe(new, np.ones((1, 4)), new[:1])
    assert drift.summary()[0].perplexity == pytest.approx(1)
    assert drift.summary()[0].dead_codes == 3


@pytest.mark.parametrize("batch", [1, 7, 10, 11, 160, 500])
def test_the_window_is_no_more_than_a_part_or_a_batch_too_long(batch):
    drift = watch(window_rows=160)
    old, new = np.zeros((batch, 2), int), np.ones((batch, 2), int)
    for _ in range(500 // batch):
        drift.observe(old)
    rows = 0
    while not drift.summary() or drift.summary()[0].perplexity != 1 or not rows:
        drift.observe(new)
        rows += batch
    assert 160 <= rows <= 160 + max(10, batch) + batch


def test_a_row_too_long_to_be_squared_hides_nothing_of_the_others():
    drift = watch()
    rows = np.array([[2.0, 0, 0, 0], [1e200, 0, 0, 0]])
    codes = np.array([[0, 0], [0, 0]])
    for sample in (rows[:1], rows, rows[:1]):
        drift.observe(codes[: len(sample)], sample, codes[: len(sample)])
    assert [layer.error for layer in drift.summary()] == pytest.approx([1 / 4, 1 / 4])


def test_windows_of_processes_together_tell_what_one_of_all_rows_tells():
    one, other, both, unused = watch(), watch(), watch(), watch()
    for drift, codes in ((one, [[0, 0], [1, 0]]), (other, [[1, 2], [1, 2], [2, 0]])):
        rows = np.arange(4 * len(codes), dtype=np.float64).reshape(-1, 4)
        drift.observe(np.array(codes), rows, np.array(codes))
        both.observe(np.array(codes), rows, np.array(codes))
    together = add_windows([one.summary(), unused.summary(), other.summary()])
    for found, expected in zip(together, both.summary(), strict=True):
        assert found.perplexity == pytest.approx(expected.perplexity)
        assert found.dead_codes == expected.dead_codes == 1
        assert found.error == pytest.approx(expected.error)
    assert one.summary()[0].dead_codes == other.summary()[0].dead_codes == 2
    assert add_windows([]) == add_windows([unused.summary()]) == []


def test_a_window_of_other_layers_is_not_added():
    one, other = watch(), DriftWatch(CODEBOOKS[:1], normalize_residuals=False, features=np.copy)
    one.observe(np.array([[0, 0]]))
    other.observe(np.array([[1]]))
    assert [layer.counts.sum() for layer in add_windows([one.summary(), other.summary()])] == [1, 1]
