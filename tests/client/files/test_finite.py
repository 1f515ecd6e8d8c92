"""NaN and infinities, found by their bits."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from semid_client.files import finite
from semid_client.files.finite import not_finite

TYPES = ["<f2", "<f4", "<f8", ">f4", ">f8"]
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf]


def naive(rows, start):
    """One number after another."""
    found = {}
    for i, row in enumerate(rows):
        for j, number in enumerate(row.astype(np.float64)):
            if not np.isfinite(number):
                found[start + i] = f"number {j} is {row[j]}; embeddings are finite"
                break
    return found


@given(
    rows=st.sampled_from(TYPES).flatmap(
        lambda dtype: npst.arrays(
            dtype,
            st.tuples(st.integers(0, 6), st.integers(0, 5)),
            elements=st.sampled_from(SPECIAL)
            | st.floats(width=16)
            | st.sampled_from([0.0, -0.0, float(np.finfo(dtype).max), -float(np.finfo(dtype).max)]),
        )
    ),
    start=st.integers(0, 10**12),
    fortran=st.booleans(),
)
def test_a_row_is_bad_exactly_if_a_number_of_it_is_not_finite(rows, start, fortran):
    rows = np.asfortranarray(rows) if fortran else rows
    assert not_finite(rows, start) == naive(rows, start)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_every_number_of_a_type_is_judged_right(dtype):
    if np.dtype(dtype).itemsize == 2:
        numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    else:
        edges = np.array([0, 1, -1, np.finfo(dtype).tiny, np.finfo(dtype).max, np.inf, np.nan])
        numbers = np.concatenate([edges, -edges]).astype(dtype)
        bits = numbers.view(f"u{numbers.itemsize}")
        numbers = np.concatenate([bits - 1, bits, bits + 1]).view(dtype)
    with np.errstate(invalid="ignore"):
        expected = np.flatnonzero(~np.isfinite(numbers)).tolist()
    assert list(not_finite(numbers[:, None], 0)) == expected


def test_sums_that_overflow_are_no_reason():
    assert not_finite(np.full((3, 50), np.finfo(np.float32).max, np.float32), 0) == {}


def test_a_bad_row_is_found_in_any_chunk():
    n = 3 * finite.CHUNK_BYTES // 400
    rows = np.zeros((n, 100), np.float32)
    rows[[0, n // 2, n - 1], [99, 3, 0]] = [np.nan, np.inf, -np.inf]
    found = not_finite(rows, 1000)
    assert found == {
        1000: "number 99 is nan; embeddings are finite",
        1000 + n // 2: "number 3 is inf; embeddings are finite",
        1000 + n - 1: "number 0 is -inf; embeddings are finite",
    }


def test_integers_are_finite():
    assert not_finite(np.full((2, 2), 0xFFFF_FFFF, np.uint32), 0) == {}
