"""Work that goes on where a killed command stopped."""

import json
import stat

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from semid_client.files import FileError, Work

TASK = {"input": [["in.npy", 1, 2]], "option": "a"}
U1 = np.dtype(np.uint8)


class Killed(BaseException):
    """Ends a test's work without a word."""


def kill(work):
    """Leave a folder as a killed process does: with all that it wrote, recorded or not."""
    for file in (work._lock, work._rows, work._bad):
        if file is not None:
            file.close()


def rows(*numbers):
    return np.array(numbers, np.uint8).reshape(-1, 1)


def finish(work):
    reader = work.rows()
    reader.close()
    work.publish(work.folder / "rows.npy")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    array=npst.arrays(
        st.sampled_from(["<f4", ">f8", "u1", "<u2"]),
        st.tuples(st.integers(0, 9), st.integers(1, 4)),
        elements=st.integers(0, 100),
    ),
    cut=st.integers(0, 9),
)
def test_what_was_written_in_pieces_is_what_numpy_writes(tmp_path, array, cut):
    with Work(tmp_path / "out.npy", force=True) as work:
        work.begin(TASK, array.shape[1], array.dtype)
        for piece in (array[:cut], np.asfortranarray(array[cut:])):
            work.append(len(piece), piece, {})
        finish(work)
    np.save(tmp_path / "numpy.npy", array.astype(array.dtype.newbyteorder("<")))
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    assert names(tmp_path) == ["numpy.npy", "out.npy"]


def test_the_output_has_the_permissions_of_any_new_file(tmp_path):
    with Work(tmp_path / "out.npy") as work:
        work.begin(TASK, 1, U1)
        finish(work)
    (tmp_path / "any").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out.npy", "any")}
    assert len(modes) == 1


def test_what_was_not_recorded_is_cut_off(tmp_path):
    work = Work(tmp_path / "out.npy", save_every=100)
    work.begin(TASK, 1, U1)
    work.append(3, rows(1, 2), {1: "is bad"})
    work.save()
    work.append(2, rows(9, 9), {3: "is lost"})
    kill(work)
    with Work(tmp_path / "out.npy") as work:
        progress = work.begin(TASK, 1, U1)
        assert (progress.rows_in, progress.rows_out, progress.bad_rows) == (3, 2, 1)
        work.append(1, rows(3), {})
        finish(work)
    assert np.load(tmp_path / "out.npy")[:, 0].tolist() == [1, 2, 3]
    assert [json.loads(line) for line in work.bad_list.read_text().splitlines()] == [
        {"row": 1, "problem": "is bad"}
    ]


@pytest.mark.parametrize(
    "task", [TASK | {"option": "b"}, TASK | {"input": [["in.npy", 1, 3]]}, TASK | {"more": 1}]
)
def test_work_of_another_task_is_refused_and_kept(tmp_path, task):
    def begun():
        with Work(tmp_path / "out.npy") as work:
            work.begin(TASK, 1, U1)
            work.append(1, rows(1), {})
            raise Killed

    with pytest.raises(Killed):
        begun()
    (name,) = {key for key in task if TASK.get(key) != task[key]}
    with (
        pytest.raises(FileError, match=f"was begun with {name} .*--restart"),
        Work(tmp_path / "out.npy") as work,
    ):
        work.begin(task, 1, U1)
    with Work(tmp_path / "out.npy") as work:
        assert work.begin(TASK, 1, U1).rows_in == 1
        raise_nothing = work
    with Work(tmp_path / "out.npy", restart=True) as work:
        assert work.begin(task, 1, U1).rows_in == 0
    assert raise_nothing.output == work.output


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_before_any_row_leaves_nothing(tmp_path, error):
    def fail():
        with Work(tmp_path / "out.npy", force=True) as work:
            work.begin(TASK, 1, U1)
            raise error

    (tmp_path / "out.npy").write_text("before")
    with pytest.raises(error):
        fail()
    assert (tmp_path / "out.npy").read_text() == "before"
    assert names(tmp_path) == ["out.npy"]


@pytest.mark.parametrize("bad", [np.ones((1, 3), np.uint8), np.ones((1, 1), np.float32)])
def test_rows_that_do_not_belong_are_noticed(tmp_path, bad):
    with Work(tmp_path / "out.npy") as work:
        work.begin(TASK, 1, U1)
        with pytest.raises(ValueError, match="expected 1 uint8"):
            work.append(1, bad, {})


def test_a_kill_right_after_the_output_was_named_is_seen_as_done(tmp_path):
    work = Work(tmp_path / "out.npy")
    work.begin(TASK, 1, U1)
    work.append(1, rows(7), {})
    finish(work)
    kill(work)
    with Work(tmp_path / "out.npy") as work:
        work.begin(TASK, 1, U1)
        assert work.published
    assert names(tmp_path) == ["out.npy"]


def test_a_kill_right_before_the_output_is_named_goes_on(tmp_path):
    work = Work(tmp_path / "out.npy")
    work.begin(TASK, 1, U1)
    work.append(1, rows(7), {})
    work.rows().close()
    kill(work)
    with Work(tmp_path / "out.npy") as work:
        assert work.begin(TASK, 1, U1).rows_in == 1
        assert not work.published
        finish(work)
    assert np.load(tmp_path / "out.npy").tolist() == [[7]]


def test_two_processes_never_work_on_one_output(tmp_path):
    with (
        Work(tmp_path / "out.npy"),
        pytest.raises(FileError, match="another process is working on it"),
    ):
        Work(tmp_path / "out.npy")


def test_an_output_that_exists_is_refused_at_once_unless_forced(tmp_path):
    (tmp_path / "out.npy").write_text("precious")
    with pytest.raises(FileError, match="exists already; --force replaces it"):
        Work(tmp_path / "out.npy")
    assert names(tmp_path) == ["out.npy"]


def test_an_output_that_appeared_meanwhile_is_left_alone_and_the_work_kept(tmp_path):
    def made():
        with Work(tmp_path / "out.npy") as work:
            work.begin(TASK, 1, U1)
            work.append(1, rows(1), {})
            work.output.write_text("somebody else's")
            finish(work)

    with pytest.raises(FileError, match="exists already"):
        made()
    assert (tmp_path / "out.npy").read_text() == "somebody else's"
    with Work(tmp_path / "out.npy", force=True) as work:
        assert work.begin(TASK, 1, U1).rows_in == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [("none/out.npy", "none/out.npy: No such file"), ("folder.npy", "is a folder")],
)
def test_an_output_that_cannot_be_is_refused_at_once(tmp_path, name, says):
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(FileError, match=says):
        Work(tmp_path / name, force=True)
    assert names(tmp_path) == ["folder.npy"]


def test_a_record_that_is_damaged_is_named(tmp_path):
    (tmp_path / "out.npy.partial").mkdir()
    (tmp_path / "out.npy.partial/progress.json").write_text("{")
    (tmp_path / "out.npy.partial/rows.npy").touch()
    with pytest.raises(FileError, match=r"progress\.json: cannot be read"):
        Work(tmp_path / "out.npy")
    assert (tmp_path / "out.npy.partial/rows.npy").exists()
    with Work(tmp_path / "out.npy", restart=True) as work:
        assert work.begin(TASK, 1, U1).rows_in == 0
