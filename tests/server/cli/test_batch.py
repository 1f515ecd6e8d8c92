"""A checkpoint as an engine of file commands: blocks overlap, and only one is on the device."""

from __future__ import annotations

import mmap
import threading
from queue import SimpleQueue

import ml_dtypes
import numpy as np
import pytest

from semid_client import InvalidInputError
from semid_server.cli.batch import CheckpointEngine


class WaitingBackend:
    """Tells of each block that is filled, and encodes one when the test says so."""

    def __init__(self):
        self.filled = SimpleQueue()
        self.may_encode = threading.Semaphore(0)
        self.on_device = 0
        self.most_on_device = 0

    def fill(self, dtype, payloads, buffers):
        self.filled.put(buffers)
        return payloads[0], [None]

    def encode_rows(self, rows):
        self.on_device += 1
        self.most_on_device = max(self.most_on_device, self.on_device)
        assert self.may_encode.acquire(timeout=300)
        self.on_device -= 1
        return rows[:, :1]


def read_only(rows):
    """Rows as Arrow has them, which torch cannot read where they are: they are copied."""
    rows.flags.writeable = False
    return rows


@pytest.fixture
def engine(reference_set_named):
    return CheckpointEngine(str(reference_set_named("digits_rkmeans").checkpoint), device="cpu")


def test_a_block_is_filled_while_another_is_on_the_device(engine):
    backend = engine._backend = WaitingBackend()
    engine._buffers.put({})  # a second one, as for a GPU
    answers = SimpleQueue()
    blocks = [read_only(np.full((2, 3), i, np.float32)) for i in range(3)]
    threads = [
        threading.Thread(target=lambda rows=rows: answers.put(engine.encode(rows)), daemon=True)
        for rows in blocks
    ]
    for thread in threads:
        thread.start()
    buffers = [backend.filled.get(timeout=300) for _ in range(2)]
    assert buffers[0] is not buffers[1]
    assert backend.filled.empty()  # the third block has no buffer yet
    backend.may_encode.release()
    assert any(backend.filled.get(timeout=300) is one for one in buffers)
    for _ in range(2):
        backend.may_encode.release()
    found = sorted(answers.get(timeout=300)[0, 0] for _ in blocks)
    for thread in threads:
        thread.join(timeout=300)
    assert found == [0, 1, 2]
    assert backend.most_on_device == 1


def test_a_block_that_is_refused_gives_its_buffer_back(engine, reference_set_named):
    digits = reference_set_named("digits_rkmeans")
    bad = digits.embeddings[:5].copy()
    bad[3, 7] = np.nan
    bad = read_only(bad)
    for _ in range(2 * engine.threads):
        with pytest.raises(InvalidInputError, match=r"embeddings\[3\]"):
            engine.encode(bad)
    codes = engine.encode(read_only(digits.embeddings[:50].copy()))
    np.testing.assert_array_equal(codes, digits.codes[:50])
    engine.encode(read_only(digits.embeddings[50:100].copy()))
    np.testing.assert_array_equal(codes, digits.codes[:50])


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", ">f2", "bfloat16"])
def test_rows_are_encoded_where_they_are_in_whatever_form(engine, reference_set_named, dtype):
    digits = reference_set_named("digits_rkmeans")
    whole = np.rint(digits.embeddings[:64])  # the same numbers in every type
    expected = engine.encode(whole.astype(np.float32))
    rows = whole.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    forms = [rows, read_only(rows.copy()), np.asfortranarray(rows), np.repeat(rows, 2, axis=0)[::2]]
    for form in forms:
        np.testing.assert_array_equal(engine.encode(form), expected)
    assert engine.encode(rows[:0]).shape == (0, expected.shape[1])


def test_rows_are_read_to_the_beginning_of_a_page(engine):
    memory = engine.memory(12345)
    assert len(memory) >= 12345
    assert memory.ctypes.data % mmap.PAGESIZE == 0
    memory[:] = 1
