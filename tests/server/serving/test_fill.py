"""The copy into the batch: every bit arrives, and nothing that is not finite goes unseen."""

from __future__ import annotations

import numpy as np
import pytest

from semid_server.serving.fill import copy_finite

NUMPY = {"float32": np.float32, "float16": np.float16, "float64": np.float64}
EDGES = {
    "float32": [3.4028235e38, -3.4028235e38, 1e-45, -0.0],
    "float16": [65504, -65504, 6e-8, -0.0],
    "float64": [1.7976931348623157e308, 5e-324, -0.0, 1.0],
}


@pytest.mark.parametrize("dtype", NUMPY)
def test_finite_numbers_arrive_bit_by_bit(dtype):
    source = np.array(EDGES[dtype] * 25, NUMPY[dtype]).reshape(20, 5)
    source.setflags(write=False)
    target = np.ones_like(source)
    assert copy_finite(target, source, dtype)
    assert target.tobytes() == source.tobytes()


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 37, 99])
def test_a_single_number_that_is_not_finite_is_seen_wherever_it_is(dtype, value, place):
    source = np.zeros((20, 5), NUMPY[dtype])
    source.flat[place] = value
    assert not copy_finite(np.empty_like(source), source, dtype)


@pytest.mark.parametrize(
    ("bits", "finite"),
    [(0x7F7F, True), (0x7F80, False), (0xFF80, False), (0x7FC0, False), (0x8000, True)],
)
def test_bfloat16_travels_as_its_bits(bits, finite):
    source = np.full((3, 7), bits, np.uint16)
    target = np.zeros_like(source)
    assert copy_finite(target, source, "bfloat16") is finite
    assert (target == bits).all()


def test_no_rows_are_finite():
    assert copy_finite(np.empty((0, 5), np.float32), np.empty((0, 5), np.float32), "float32")
