"""The extra digit, against a naive loop.

A hundred million rows are numbered by

    pytest -m slow tests/client/files/test_unique.py
"""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semid_client.files import extra_digits, unique


def naive(codes, convention):
    """One item after the other, as one would by hand."""
    groups: dict[tuple, list[int]] = {}
    for item, row in enumerate(codes.tolist()):
        groups.setdefault(tuple(row), []).append(item)
    digits = np.zeros(len(codes), np.uint32)
    for items in groups.values():
        for place, item in enumerate(items):
            digits[item] = place + (convention == "grid" and len(items) > 1)
    return digits


def numbered(codes, convention, folder, *, block_rows, part_rows):
    rows = np.arange(len(codes))
    blocks = [
        (rows[i : i + block_rows], codes[i : i + block_rows])
        for i in range(0, len(codes), block_rows)
    ]
    return extra_digits(blocks, len(codes), convention, folder, part_rows=part_rows)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("convention", ["grid", "tiger"])
def test_digits_are_those_of_the_loop_in_memory_and_spilled(tmp_path, convention, data):
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16, np.uint32]))
    n = data.draw(st.integers(0, 60))
    n_layers = data.draw(st.integers(1, 12))
    width = data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    codes = rng.integers(0, width, (n, n_layers)).astype(dtype)
    codes *= data.draw(st.sampled_from([1, np.iinfo(dtype).max // 4]))
    digits = numbered(
        codes,
        convention,
        tmp_path,
        block_rows=data.draw(st.integers(1, 20)),
        part_rows=data.draw(st.integers(1, 100)),
    )
    expected = naive(codes, convention)
    np.testing.assert_array_equal(digits[0:n], expected)
    assert digits.largest == expected.max(initial=0)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_an_id_that_everything_shares_is_numbered_in_pieces(tmp_path):
    codes = np.zeros((1000, 3), np.uint8)
    digits = numbered(codes, "grid", tmp_path, block_rows=300, part_rows=64)
    np.testing.assert_array_equal(digits[0:1000], np.arange(1, 1001))


def test_rows_without_codes_are_nobodys_namesakes(tmp_path):
    blocks = [(np.array([0, 2]), np.zeros((2, 1), np.uint8))]
    assert extra_digits(blocks, 4, "grid", tmp_path)[0:4].tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("part_rows", [2, 100])
@pytest.mark.parametrize("n_layers", [3, 9])
def test_blocks_without_rows_are_passed_over(tmp_path, n_layers, part_rows):
    none = np.empty(0, np.int64), np.empty((0, n_layers), np.uint8)
    some = np.arange(3, 6), np.zeros((3, n_layers), np.uint8)
    digits = extra_digits([none, some, none], 9, "grid", tmp_path, part_rows=part_rows)
    assert digits[0:9].tolist() == [0, 0, 0, 1, 2, 3, 0, 0, 0]
    digits = extra_digits([none, none], 9, "grid", tmp_path, part_rows=part_rows)
    assert digits[0:9].tolist() == [0] * 9


def test_digits_cross_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(unique, "WINDOW_ROWS", 1024)
    codes = np.random.default_rng(0).integers(0, 9, (5000, 2), np.uint8)
    digits = numbered(codes, "tiger", tmp_path, block_rows=999, part_rows=2000)
    np.testing.assert_array_equal(digits[0:5000], naive(codes, "tiger"))


MANY = 100_000_000

SCRIPT = """
import resource, sys, time
from pathlib import Path
import numpy as np
from semid_client.files import extra_digits

n, step = int(sys.argv[1]), 1 << 17

def blocks():
    rng = np.random.default_rng(0)
    for start in range(0, n, step):
        rows = np.arange(start, min(start + step, n))
        yield rows, rng.integers(0, 256, (len(rows), 3), np.uint8)

began = time.monotonic()
digits = extra_digits(blocks(), n, "tiger", Path(sys.argv[2]))
print(digits.largest, time.monotonic() - began,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_million_rows_are_numbered_in_bounded_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(MANY), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    largest, took, peak = (float(number) for number in done.stdout.split())
    print(f"{MANY:,} rows in {took:.0f} s, peak {peak / 1e6:.0f} MB")  # noqa: T201 - the measure
    assert peak < 1e9
    # Of a group of m rows the digits are 0 to m-1: they are that many, and that much in all.
    sizes, sums = np.zeros(1 << 24, np.int64), np.zeros(1 << 24, np.int64)
    rng, step = np.random.default_rng(0), 1 << 17
    with (tmp_path / "digits").open("rb") as file:
        for start in range(0, MANY, step):
            codes = rng.integers(0, 256, (min(step, MANY - start), 3), np.uint8).astype(np.int64)
            keys = codes @ [1 << 16, 1 << 8, 1]
            digits = np.fromfile(file, np.uint32, len(keys))
            first = np.unique(keys, return_index=True)[1]
            # Within a file the digits of a key ascend, one by one.
            np.testing.assert_array_equal(digits[first], sizes[keys[first]])
            np.add.at(sizes, keys, 1)
            np.add.at(sums, keys, digits)
    np.testing.assert_array_equal(sums, sizes * (sizes - 1) // 2)
    assert sizes.max() - 1 == largest
