"""Bytes of a file, from the page cache and past it."""

import os
import random
from contextlib import closing

import numpy as np
import pytest

from semid_client.files import FileError
from semid_client.files.memory import SLACK, pages
from semid_client.files.places import _is_cached, place

SIZE = (5 << 20) + 12345


@pytest.fixture(scope="module")
def content():
    return np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


@pytest.fixture
def path(tmp_path, content):
    content.tofile(tmp_path / "in")
    return tmp_path / "in"


def forget(path):
    """Have the page cache drop a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("cold", [True, False])
def test_any_range_is_read_whether_the_page_cache_has_it_or_not(path, content, cold):
    rng = random.Random(0)  # noqa: S311 - not for secrets
    ranges = [(0, SIZE), (0, 0), (1, SIZE - 1), (128, 2 << 20), (SIZE - 1, 1), (4096, 1 << 20)]
    ranges += [(at := rng.randrange(SIZE), rng.randrange(SIZE - at)) for _ in range(20)]
    memory = pages(SIZE + SLACK)
    with closing(place(path).ranges()) as file:
        for at, n in ranges:
            if cold:
                forget(path)
            for unit in (1, 4, 8):
                if at % unit == 0:
                    found = file.fetch(memory, at, n, unit)
                    assert found.ctypes.data % unit == 0
                    np.testing.assert_array_equal(found, content[at : at + n])


def test_what_the_page_cache_has_not_got_is_read_past_it(path, content):
    forget(path)
    with closing(place(path).ranges()) as file:
        if file._direct is None or _is_cached(file.file, 0, SIZE):
            pytest.skip("this file system has no O_DIRECT, or keeps what it is told to drop")
        found = file.fetch(pages(SIZE + SLACK), 128, SIZE - 128, 4)
        np.testing.assert_array_equal(found, content[128:])
        assert not _is_cached(file.file, 0, SIZE)


def test_a_file_system_that_cannot_is_read_through_the_page_cache(path, content):
    forget(path)
    with closing(place(path).ranges()) as file:
        memory = pages(SIZE + SLACK + 1)[1:]  # no place that can be read to past it
        np.testing.assert_array_equal(file.fetch(memory, 0, SIZE, 1), content)


@pytest.mark.parametrize("cold", [True, False])
def test_a_file_that_shrinks_while_it_is_read_is_an_error_that_says_where(path, cold):
    with closing(place(path).ranges()) as file:
        os.truncate(path, 2 << 20)
        if cold:
            forget(path)
        for at in (0, 3 << 20):
            with pytest.raises(FileError, match=f"in: ended at byte {max(at, 2 << 20)} while"):
                file.fetch(pages(SIZE + SLACK), at, SIZE - at, 1)


def test_files_are_closed(path):
    file = place(path).ranges()
    file.close()
    assert file.file.closed
    assert file._direct is None
