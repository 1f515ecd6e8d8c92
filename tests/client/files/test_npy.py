"""`.npy` files: read in pieces, refused in sentences, written whole or not at all."""

import os
import pickle
from contextlib import closing

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from semid_client.files import FileError, NpyReader

MATRICES = hnp.arrays(
    st.sampled_from(["<f2", ">f4", "<f8", "u1", ">i8", "<u4"]),
    st.tuples(st.integers(0, 20), st.integers(0, 5)),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=MATRICES,
    fortran=st.booleans(),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    rows=st.builds(slice, st.integers(0, 20), st.integers(0, 40)),
)
def test_any_slice_of_any_matrix_is_read_as_numpy_wrote_it(tmp_path, array, fortran, version, rows):
    path = tmp_path / "in.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.asfortranarray(array) if fortran else array, version)
    with closing(NpyReader(path)) as reader:
        assert (reader.shape, reader.dtype) == (array.shape, array.dtype.newbyteorder("="))
        np.testing.assert_array_equal(reader[rows], array[rows])


def test_what_was_read_outlives_the_reader(tmp_path):
    np.save(tmp_path / "in.npy", np.eye(3))
    with closing(NpyReader(tmp_path / "in.npy")) as reader:
        rows = reader[slice(1, 3)]
    assert rows.tolist() == [[0, 1, 0], [0, 0, 1]]


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_file_of_objects_is_refused_and_never_unpickled(tmp_path):
    trace = tmp_path / "trace"
    np.save(tmp_path / "in.npy", np.array([[Bomb(trace)]]), allow_pickle=True)
    with pytest.raises(FileError, match=r"in.npy: holds Python objects, which are never unpickled"):
        NpyReader(tmp_path / "in.npy")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros(3), r"has shape \(3,\); expected \(rows, columns\)"),
        (np.zeros(()), r"has shape \(\)"),
        (np.zeros((2, 2, 2)), r"has shape \(2, 2, 2\)"),
        (np.zeros((2, 2), complex), "holds complex128"),
        (np.zeros((2, 2), bool), "holds bool"),
        (np.zeros((2, 2), "U3"), "holds <U3"),
        (np.zeros((2, 2), [("a", "f4")]), "holds .*'a'"),
    ],
)
def test_an_array_that_is_no_matrix_of_numbers_is_refused(tmp_path, array, says):
    np.save(tmp_path / "in.npy", array)
    with pytest.raises(FileError, match=says):
        NpyReader(tmp_path / "in.npy")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a .npy file"),
        (b"PK\x03\x04 not numpy", "not a .npy file"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'}", "not a .npy file"),
        (b"\x93NUMPY\x01\x00\x04\x00abcd", "not a .npy file"),
        (b"\x93NUMPY\x09\x00\x04\x00abcd", "not a .npy file"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, says):
    path = tmp_path / "in.npy"
    path.write_bytes(content)
    with pytest.raises(FileError, match=says):
        NpyReader(path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_file_gives_anything_but_a_sentence_or_a_matrix(tmp_path, data):
    path = tmp_path / "in.npy"
    np.save(path, np.ones((3, 4), np.float32))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        with closing(NpyReader(path)) as reader:
            assert reader[slice(0, 1)].ndim == 2
    except FileError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017 - either outcome is right


def test_a_truncated_file_is_refused_with_both_sizes(tmp_path):
    path = tmp_path / "in.npy"
    np.save(path, np.zeros((10, 4), np.float32))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileError, match="truncated: 287 bytes where 10 x 4 float32 takes 288"):
        NpyReader(path)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileError, match=r"none.npy: No such file or directory"):
        NpyReader(tmp_path / "none.npy")


def test_an_error_of_a_file_survives_pickling():
    error = pickle.loads(pickle.dumps(FileError("a.npy", "is gone")))  # noqa: S301 - our own bytes
    assert str(error) == "a.npy: is gone"
