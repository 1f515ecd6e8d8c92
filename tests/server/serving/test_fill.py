"""The copy into the batch: every bit arrives, and nothing that is not finite goes unseen."""

from __future__ import annotations

import contextlib
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from semid_server.errors import InvalidInputError
from semid_server.serving.fill import MAX_READERS, READER_BYTES, copy_finite, read_finite
from semid_server.serving.shared_memory import Segment, SharedRows

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


@pytest.fixture
def shared(tmp_path):
    """Shares an array as a caller does, and returns its rows; the file may be shorter."""
    with contextlib.ExitStack() as ended:

        def share(array, *, cut=0):
            path = tmp_path / "shared"
            path.write_bytes(array.tobytes())
            os.truncate(path, array.nbytes - cut)
            segment = Segment(os.open(path, os.O_RDONLY), "handle", array.nbytes)
            ended.callback(segment.end)
            return SharedRows(segment, 0, array.shape, array.nbytes)

        yield share


# More than one thread reads the larger ones, and the last share is not as large as the others.
ROWS = [1, 3 * READER_BYTES // 4000 + 1]


@pytest.mark.parametrize("rows", ROWS)
def test_what_is_shared_arrives_bit_by_bit_however_many_threads_read(shared, rows):
    source = np.random.default_rng(0).standard_normal((rows, 1000), np.float32)
    target = np.zeros_like(source)
    assert read_finite(target, shared(source), "float32")
    assert target.tobytes() == source.tobytes()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_number_that_is_not_finite_is_seen_by_whichever_thread_reads_it(shared, rows, place):
    source = np.zeros((rows, 1000), np.float32)
    source.flat[round(place * (source.size - 1))] = np.nan
    assert not read_finite(np.empty_like(source), shared(source), "float32")


def test_a_file_that_ends_early_is_refused_with_the_place_whichever_thread_finds_it(shared):
    source = np.zeros((ROWS[-1], 1000), np.float32)
    with pytest.raises(InvalidInputError, match=f"ends at byte {source.nbytes - 7}"):
        read_finite(np.empty_like(source), shared(source, cut=7), "float32")


def test_when_one_thread_fails_no_other_writes_to_the_batch_any_more(shared):
    source = np.ones((ROWS[-1], 1000), np.float32)
    rows, target = shared(source), np.zeros_like(source)
    reading = threading.Event()
    if MAX_READERS == 1:
        reading.set()

    def read(into, start):
        if start == 0:  # the first share fails once another has begun
            assert reading.wait(60)
            raise InvalidInputError("no")
        reading.set()
        rows.read(into, start)

    with pytest.raises(InvalidInputError, match="no"):
        read_finite(target, SimpleNamespace(read=read), "float32")
    # All that the others began is done.
    assert MAX_READERS == 1 or target[-1].all()
