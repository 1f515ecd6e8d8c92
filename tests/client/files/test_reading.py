"""Blocks that are read before they are asked for."""

import threading
from contextlib import closing

import numpy as np
import pytest

from semid_client.files import Block, FileError, open_rows
from semid_client.files.memory import pages
from semid_client.files.reading import AHEAD, READERS, ReadAhead
from semid_client.files.rows import MatrixRows, Source

WAIT = 60


class Numbers:
    """A matrix of which row i is i; tells what is read, and waits or fails where it is told to."""

    dtype = np.dtype(np.float32)

    def __init__(self, n):
        self.shape = (n, 1)
        self.begun = []
        self.wait_for = {}
        self.done = {start: threading.Event() for start in range(n)}
        self.fails = {}

    def read(self, start, stop, memory):
        self.begun.append(start)
        if start in self.wait_for:
            assert self.wait_for[start].wait(WAIT)
        if start in self.fails:
            raise self.fails[start]
        rows = memory[: 4 * (stop - start)].view(np.float32).reshape(-1, 1)
        rows[:, 0] = np.arange(start, stop)
        self.done[start].set()
        return rows


class Blocks(Source):
    """A source that is read from one block to the next."""

    def __init__(self, n, error=None):
        super().__init__()
        self.path, self.n_rows, self.width, self.dtype = "blocks", n, 1, np.dtype(np.float32)
        self.error, self.given = error, 0

    def blocks(self, start, n_rows):
        for at in range(start, self.n_rows, n_rows):
            self.given += 1
            stop = min(at + n_rows, self.n_rows)
            yield Block(at, np.arange(at, stop, dtype=np.float32)[:, None])
        if self.error:
            raise self.error

    def places(self):
        return []


def matrix(n):
    numbers = Numbers(n)
    return numbers, MatrixRows("in.npy", "embeddings", numbers)


def read(source, start, n_rows):
    """All rows, each block copied before its memory is used again."""
    with ReadAhead(source, start, n_rows, pages) as reads:
        found = []
        for item in reads:
            if isinstance(item, BaseException):
                raise item
            found.append((item.block.start, item.block.rows.copy()))
            reads.take_back(item.memory)
    return found


@pytest.mark.parametrize("make", [lambda n: matrix(n)[1], Blocks])
@pytest.mark.parametrize("start", [0, 7, 50, 99, 100])
def test_all_rows_come_in_their_order(make, start):
    found = read(make(100), start, 3)
    assert [at for at, _ in found] == list(range(start, 100, 3))
    rows = np.concatenate([rows for _, rows in found]) if found else np.empty((0, 1))
    np.testing.assert_array_equal(rows[:, 0], np.arange(start, 100))


def test_a_block_that_is_read_later_than_its_successors_comes_before_them():
    numbers, source = matrix(20)
    numbers.wait_for[0] = numbers.done[READERS - 1]
    assert [at for at, _ in read(source, 0, 1)] == list(range(20))


def test_a_bounded_number_of_blocks_is_read_ahead_into_as_much_memory():
    numbers, source = matrix(100)
    made = []

    def memory(n_bytes):
        made.append(n_bytes)
        return pages(n_bytes)

    with ReadAhead(source, 0, 1, memory) as reads:
        items = iter(reads)
        for i in range(30):
            item = next(items)
            reads.take_back(item.memory)
            assert len(numbers.begun) <= i + 1 + READERS + AHEAD
    assert len(made) <= READERS + AHEAD + 1


def test_an_error_comes_after_what_was_read_before_it():
    numbers, source = matrix(30)
    numbers.fails = {start: FileError("in.npy", f"row {start}") for start in (11, 13)}
    with ReadAhead(source, 0, 1, pages) as reads:
        *blocks, error = reads
    assert [item.block.start for item in blocks] == list(range(11))
    assert str(error) == "in.npy: row 11"


def test_an_error_of_a_source_that_is_read_on_comes_last():
    with ReadAhead(Blocks(10, OSError("cut")), 0, 4, pages) as reads:
        *blocks, error = reads
    assert [item.block.start for item in blocks] == [0, 4, 8]
    assert str(error) == "cut"


def test_what_is_left_before_its_end_ends_its_threads():
    source = Blocks(1000)
    others = set(threading.enumerate())  # servers that other tests have begun read by such, too
    with ReadAhead(source, 0, 1, pages) as reads:
        next(iter(reads))
        assert set(threading.enumerate()) - others
    left = set(threading.enumerate()) - others
    assert not [thread.name for thread in left if thread.name.startswith("semid-read")]
    assert source.given <= AHEAD + 3


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_bad_rows_are_found_wherever_they_are_read(tmp_path, dtype, order):
    rows = np.arange(60, dtype=dtype).reshape(20, 3)
    rows[[4, 19], [2, 0]] = np.nan
    np.save(tmp_path / "in.npy", np.asarray(rows, order=order))
    with (
        closing(open_rows(str(tmp_path / "in.npy"), "embeddings")) as source,
        ReadAhead(source, 2, 3, pages) as reads,
    ):
        blocks = [item.block for item in reads]
    np.testing.assert_array_equal(np.concatenate([block.rows for block in blocks]), rows[2:])
    assert {row for block in blocks for row in block.bad} == {4, 19}
    assert all(block.rows.dtype.isnative for block in blocks)
