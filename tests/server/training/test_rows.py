"""Files of embeddings, and the batches that training makes of them."""

from __future__ import annotations

import os
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semid_server.errors import ConfigurationError
from semid_server.training.rows import LONGEST, ArrayRows, TrainableRows, batches, open_rows


class Blocks:
    """Rows ``0.0, 1.0, ...`` in blocks of the sizes given, which notes what is read."""

    def __init__(self, sizes):
        stops = np.cumsum(sizes).tolist()
        self.blocks = [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
        self.n_rows, self.dim = stops[-1], 1
        self.was_read = []

    def read(self, block):
        self.was_read.append(block)
        return np.arange(*self.blocks[block], dtype=np.float32)[:, None]


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(deadline=None)
@given(sizes=sizes, batch_size=st.integers(1, 12), shuffle_rows=st.integers(1, 20))
def test_an_epoch_has_every_row_once_in_batches_of_one_size_but_the_last(
    sizes, batch_size, shuffle_rows
):
    source = Blocks(sizes)
    whole, rest = divmod(source.n_rows, batch_size)
    left_out = rest == 1 and whole > 0
    expected = [batch_size] * whole + ([rest] if rest and not left_out else [])
    stream = batches(source, batch_size=batch_size, seed=1, shuffle_bytes=4 * shuffle_rows)
    for _ in range(2):
        epoch = list(islice(stream, len(expected)))
        assert [len(batch) for batch in epoch] == expected
        seen = np.concatenate(epoch).flatten()
        assert len(set(seen)) == len(seen) == source.n_rows - left_out


def test_more_ranks_than_rows_of_a_batch_are_refused():
    with pytest.raises(ConfigurationError, match="2 rows for 3 processes"):
        next(batches(Blocks([8]), batch_size=2, seed=0, world_size=3))


@settings(deadline=None)
@given(
    sizes=sizes,
    batch_size=st.integers(1, 12),
    first=st.integers(0, 30),
    shuffle_rows=st.integers(1, 20),
)
def test_batches_from_a_later_one_on_are_those_that_would_have_come(
    sizes, batch_size, first, shuffle_rows
):
    settings = {"batch_size": batch_size, "seed": 5, "shuffle_bytes": 4 * shuffle_rows}
    whole = batches(Blocks(sizes), **settings)
    later = batches(Blocks(sizes), first=first, **settings)
    expected = islice(whole, first, first + 5)
    for one, other in zip(expected, later, strict=False):
        assert np.array_equal(one, other)


@settings(deadline=None)
@given(sizes=sizes, batch_size=st.integers(1, 12), world_size=st.integers(1, 3))
def test_ranks_share_a_batch_equally(sizes, batch_size, world_size):
    def first_epoch(**rank):
        source = Blocks(sizes)
        stream = batches(source, batch_size=batch_size, seed=2, **rank)
        return list(islice(stream, max(source.n_rows // batch_size, 1)))

    if batch_size < world_size or sum(sizes) < world_size:
        return
    shares = [first_epoch(rank=rank, world_size=world_size) for rank in range(world_size)]
    for batch, *parts in zip(first_epoch(), *shares, strict=False):
        assert len({len(part) for part in parts}) == 1
        together = np.concatenate(parts).flatten()
        assert set(together) <= set(batch.flatten())
        assert len(together) == len(batch) - len(batch) % world_size


def test_epochs_and_seeds_differ_in_their_order():
    first, second = islice(batches(Blocks([40]), batch_size=40, seed=0), 2)
    (other,) = islice(batches(Blocks([40]), batch_size=40, seed=1), 1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_going_on_reads_no_group_that_lies_behind():
    source = Blocks([4] * 10)
    next(batches(source, batch_size=4, seed=0, first=8, shuffle_bytes=16))
    assert len(source.was_read) == 1


def test_an_npy_file_is_read_block_by_block_as_float32(tmp_path):
    array = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float16)
    np.save(tmp_path / "x.npy", array)
    rows = open_rows(tmp_path / "x.npy")
    assert (rows.n_rows, rows.dim) == (5000, 3)
    assert rows.blocks == [(0, 4096), (4096, 5000)]
    read = rows.read(1)
    assert read.dtype == np.float32
    assert np.array_equal(read, array[4096:].astype(np.float32))


@pytest.mark.parametrize("fixed", [True, False])
def test_a_parquet_file_is_read_row_group_by_row_group(tmp_path, fixed):
    array = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    flat = pa.array(array.ravel())
    lists = (
        pa.FixedSizeListArray.from_arrays(flat, 3)
        if fixed
        else pa.ListArray.from_arrays(np.arange(0, 31, 3, dtype=np.int32), flat)
    )
    table = pa.table({"id": pa.array(range(10)), "embedding": lists})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=4)
    rows = open_rows(tmp_path / "x.parquet")
    assert (rows.n_rows, rows.dim) == (10, 3)
    assert rows.blocks == [(0, 4), (4, 8), (8, 10)]
    assert np.array_equal(np.concatenate([rows.read(b) for b in range(3)]), array)


def test_a_parquet_row_of_another_length_is_named(tmp_path):
    pq.write_table(pa.table({"x": [[1.0, 2.0], [3.0, 4.0], [5.0]]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigurationError, match=r"row 2 of column 'x' has 1 numbers; expected 2"):
        open_rows(tmp_path / "x.parquet")


def grouped(path, groups):
    """Write a Parquet file with one row group for each list of rows, empty ones as well."""
    kind = pa.list_(pa.float32())
    with pq.ParquetWriter(path, pa.schema([("x", kind)])) as writer:
        for rows in groups:
            writer.write_table(pa.table({"x": pa.array(rows, kind)}))
    assert pq.ParquetFile(path).num_row_groups == len(groups)
    return path


def test_row_groups_without_rows_are_no_blocks(tmp_path):
    path = grouped(tmp_path / "x.parquet", [[], [[1, 2], [3, 4]], [], [[5, 6]], []])
    rows = open_rows(path)
    assert (rows.n_rows, rows.dim, rows.blocks) == (3, 2, [(0, 2), (2, 3)])
    assert [rows.read(block).tolist() for block in range(2)] == [[[1, 2], [3, 4]], [[5, 6]]]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 2)],
    ids=str,
)
@pytest.mark.parametrize("row", [0, 2])
def test_a_parquet_row_that_is_null_is_named(tmp_path, kind, row):
    lists = [[1.0, 2.0]] * 3
    lists[row] = None
    pq.write_table(pa.table({"x": pa.array(lists, kind)}), tmp_path / "x.parquet")
    with pytest.raises(ConfigurationError, match=f"row {row} of column 'x' is null; expected a"):
        open_rows(tmp_path / "x.parquet")


def test_a_number_of_a_parquet_row_that_is_null_is_named(tmp_path):
    path = grouped(tmp_path / "x.parquet", [[[1, 2]], [[3, 4], [5, None]]])
    with pytest.raises(ConfigurationError, match="row 2 of column 'x' holds a null as number 1"):
        open_rows(path).read(1)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("a", "list<element: string>"),
        ([1.0, 2.0], "list<element: list<element: double>>"),
        (True, "list<element: bool>"),
    ],
)
def test_parquet_lists_of_anything_but_numbers_are_refused(tmp_path, value, kind):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": [1], "x": [[value]]}), path)
    for column, words in ((None, "lists of numbers: none; there are: id"), ("x", "column 'x' is")):
        with pytest.raises(ConfigurationError, match=words) as refused:
            open_rows(path, column)
        assert kind in str(refused.value)
    table = pa.table({"x": [[value]], "y": [[1, 2]]})
    pq.write_table(table, path)
    assert open_rows(path).read(0).tolist() == [[1.0, 2.0]]


def test_a_parquet_file_with_two_lists_asks_which(tmp_path):
    pq.write_table(pa.table({"x": [[1.0]], "y": [[2.0]]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigurationError, match="x, y; name the one"):
        open_rows(tmp_path / "x.parquet")
    assert open_rows(tmp_path / "x.parquet", "y").read(0).tolist() == [[2.0]]
    with pytest.raises(ConfigurationError, match="no column 'z'"):
        open_rows(tmp_path / "x.parquet", "z")


@pytest.mark.parametrize("column", [None, "x"])
def test_a_name_of_two_parquet_columns_tells_neither(tmp_path, column):
    lists = pa.array([[1.0]])
    pq.write_table(pa.Table.from_arrays([lists, lists], ["x", "x"]), tmp_path / "x.parquet")
    with pytest.raises(ConfigurationError, match=r"x, x; name the one|2 columns 'x'; expected one"):
        open_rows(tmp_path / "x.parquet", column)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named(bad):
    array = np.ones((6000, 2), np.float32)
    array[5000, 1] = bad
    with pytest.raises(ConfigurationError, match="row 5000 holds NaN or infinity"):
        ArrayRows(array).read(1)


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_number_beyond_float32_is_told_from_one_that_is_none(tmp_path, suffix):
    array = np.ones((3, 2))
    array[1, 1] = -1e200
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        np.save(path, array)
    else:
        pq.write_table(pa.table({"x": array.tolist()}), path)
    message = r"x\.\w+: row 1 holds -1e\+200, which is beyond float32 \(up to 3\.40282e\+38\)"
    with pytest.raises(ConfigurationError, match=message):
        open_rows(path).read(0)


def test_all_numbers_of_float32_are_taken_from_a_wider_type():
    limit = float(np.finfo(np.float32).max)
    assert ArrayRows(np.array([[limit, -limit]])).read(0).tolist() == [[limit, -limit]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(3, np.float32), r"shape \(3,\); expected \(n, dim\)"),
        (np.ones((0, 3), np.float32), r"shape \(0, 3\)"),
        (np.ones((3, 2), np.int64), "dtype int64; expected a floating-point type"),
    ],
)
def test_what_is_no_matrix_of_floats_is_refused(tmp_path, array, message):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ConfigurationError, match=message):
        open_rows(tmp_path / "x.npy")


def test_a_row_too_long_for_squares_in_float32_is_not_trained_on():
    array = np.ones((6000, 2), np.float32)
    array[:, 0] = np.arange(6000)
    array[5000] = LONGEST / 2
    assert np.array_equal(TrainableRows(ArrayRows(array)).read(1), array[4096:])
    array[5000] = LONGEST
    rows = TrainableRows(ArrayRows(array, "x.npy"))
    message = r"x\.npy: row 5000 has length 1\.41421e\+15; expected at most 1e\+15"
    with pytest.raises(ConfigurationError, match=message):
        rows.read(1)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_rows_that_are_all_equal_are_not_trained_on(value):
    array = np.full((6000, 2), value)
    with pytest.raises(ConfigurationError, match=r"x\.npy: all 6000 rows are equal; expected at "):
        TrainableRows(ArrayRows(array, "x.npy"))
    array[-1, -1] = 2
    assert TrainableRows(ArrayRows(array)).n_rows == 6000
    assert TrainableRows(ArrayRows(array[:1])).n_rows == 1


def test_rows_of_a_file_tell_their_origin_and_those_in_memory_have_none(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    table = pa.table({"x": [[1.0]], "y": [[2.0]]})
    pq.write_table(table, tmp_path / "x.parquet")
    for name, column in (("x.npy", {}), ("x.parquet", {"column": "y"})):
        path = tmp_path / name
        os.utime(path, ns=(5, 7))
        rows = open_rows(path, column.get("column"))
        size = path.stat().st_size
        assert rows.name == str(path)
        assert rows.origin == {"path": str(path), "bytes": size, "changed_ns": 7, **column}
    assert ArrayRows(np.ones((3, 2))).origin is None


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"no array")
    (tmp_path / "x.parquet").write_bytes(b"no table")
    (tmp_path / "x.csv").write_text("1,2")
    for name in ("x.npy", "x.parquet", "missing.npy", "x.csv"):
        with pytest.raises(ConfigurationError, match=name):
            open_rows(tmp_path / name)
