"""Folders and patterns of Parquet files: which are read, and where an output may be."""

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from file_formats import ids_of, read_output, table

from semid_client.cli.root import root
from semid_client.files import FileError, open_rows
from semid_client.files.places import place
from semid_client.files.rows.parquet import would_read

FILES = (
    "in/day=1/a.parquet",
    "in/day=2/a.parquet",
    "in/day=2/_tmp/b.parquet",
    "in/day=2/.crc/b.parquet",
    "in/_tmp/x/a.parquet",
    "in/z.parquet/part-0.parquet",
    "in/z.parquet/_metadata",
    "in/z.parquet/_SUCCESS",
    "in/z.parquet/.part-0.parquet.crc",
)
SHOWN = ["day=1/a.parquet", "day=2/a.parquet", "z.parquet/part-0.parquet"]


def semid(*arguments):
    return CliRunner().invoke(root, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def many(folder):
    """A folder as Spark and Hive write it, with a row in each file."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(np.zeros((1, 4), np.float32)), folder / name)
    return folder


@pytest.fixture
def stored(many):
    """The same in a store."""
    store = fsspec.filesystem("memory")
    for name in FILES:
        store.put_file(str(many / name), f"/bucket/{name}")
    yield store
    store.rm("/bucket", recursive=True)


@pytest.mark.parametrize("root", ["", "memory://bucket/"])
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("in", SHOWN),
        ("in/**/*.parquet", SHOWN),
        ("in/**", SHOWN),
        ("in/*", SHOWN),
        ("in/*/*", SHOWN),
        ("in/day=*", SHOWN[:2]),
        ("in/[!a-c]*.parquet", SHOWN[2:]),
        ("in/z.parquet/*", SHOWN[2:]),
        ("in/**/_tmp/*.parquet", ["day=2/_tmp/b.parquet"]),
        ("in/*/_t*", ["day=2/_tmp/b.parquet"]),
        ("in/_tmp/*", ["_tmp/x/a.parquet"]),
        ("in/*/.crc/*", ["day=2/.crc/b.parquet"]),
    ],
)
def test_a_pattern_leaves_out_what_a_folder_does_unless_it_says_so(stored, root, pattern, names):
    found = [place.name for place in open_rows(root + pattern, "embeddings").places()]
    assert [name.partition("in/")[2] for name in found] == names
    for name in FILES:
        expected = any(name == f"in/{read}" for read in names)
        assert would_read(root + pattern, place(root + name)) is expected, name


@pytest.mark.parametrize(
    ("source", "output", "named"),
    [
        ("in", "in/codes.parquet", "in/codes.parquet"),
        ("in", "in/day=1/codes.parquet", "in/day=1/codes.parquet"),
        ("in/", "./in/codes.parquet", "./in/codes.parquet"),
        ("link", "in/codes.parquet", "in/codes.parquet"),
        ("in", "link/codes.parquet", "link/codes.parquet"),
        ("in", "codes.parquet", "codes.parquet"),  # a link to where the folder is
        ("in/**/*.parquet", "in/codes.parquet", "in/codes.parquet"),
        ("in/day=*", "in/day=3/codes.parquet", "in/day=3/codes.parquet"),
        ("in/*", "in/codes.npy", "in/codes.npy"),
        ("in/*/*.parquet", "in/codes.parquet", "in/codes.parquet.partial/output.parquet"),
        ("memory://bucket/in", "memory://bucket/in/codes.parquet", "memory://bucket/in/codes.parq"),
        ("memory://bucket/in/*", "memory://bucket/in/codes.npy", "memory://bucket/in/codes.npy"),
    ],
)
def test_an_output_that_the_input_would_hold_is_refused_before_anything_is_written(
    stored, many, source, output, named
):
    (many / "link").symlink_to("in")
    (many / "in/day=3").mkdir()
    (many / "codes.parquet").symlink_to("in/codes.parquet")
    before = sorted(many.rglob("*"))
    for command in ("encode", "decode"):
        result = semid(command, source, "-o", output, "--target", "127.0.0.1:1")
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: {named}")
        assert f": would be read as a part of {source}: write to where" in result.stderr
        assert result.stderr.count("\n") == 1
    assert sorted(many.rglob("*")) == before
    assert not stored.glob("/bucket/in/codes*")


def test_a_work_folder_that_the_input_would_hold_is_refused(server, many):
    command = ("encode", "in", "-o", "out.parquet", "--work-dir", "in/day=1")
    result = semid(*command, "--target", server.target)
    assert result.stderr.startswith("Error: in/day=1/out.parquet.")
    assert ".partial/output.parquet: would be read as a part of in: " in result.stderr


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("in", "in/codes.npy"),
        ("in", "in/_codes.parquet"),
        ("in/day=*", "in/codes.parquet"),
        ("in/day=*/*.parquet", "in/codes.parquet"),
        ("in/day=1/a.parquet", "in/day=1/codes.parquet"),
    ],
)
def test_an_output_beside_what_is_read_is_written_and_made_again(server, many, source, output):
    for _ in range(2):
        result = semid("encode", source, "-o", output, "--force", "--target", server.target)
        assert result.exit_code == 0, result.output
    result = semid("verify", output, source, "--target", server.target)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("value", [None, np.nan, 2.0])
def test_a_bad_row_is_named_by_its_file_and_its_row_there(server, folder, value):
    (folder / "in").mkdir()
    rows = [[0.0] * 4] * 5
    for name, some in (("a", rows), ("b", [*rows[:3], [value] * (3 if value == 2 else 4)])):
        content = pa.table({"v": pa.array(some, pa.list_(pa.float32()))})
        pq.write_table(content, folder / f"in/{name}.parquet")
    result = semid("encode", "in", "-o", "out.npy", "--target", server.target)
    assert "Error: in/b.parquet: row 3: " in result.stderr
    result = semid(
        *("encode", "in", "-o", "out.parquet", "--on-bad-row", "skip"), "--target", server.target
    )
    assert result.exit_code == 0, result.output
    assert read_output("out.parquet", "codes")[0] == list(range(8))


def test_a_column_whose_name_occurs_twice_in_a_further_file_is_refused(folder):
    (folder / "in").mkdir()
    content = table(np.zeros((2, 4), np.float32))
    pq.write_table(content, folder / "in/a.parquet")
    twice = content.append_column("item_id", pa.array(ids_of(2)))
    pq.write_table(twice, folder / "in/b.parquet")
    with pytest.raises(FileError, match=r"in/b.parquet: has 2 columns named 'item_id'; give each"):
        open_rows("in", "embeddings")
