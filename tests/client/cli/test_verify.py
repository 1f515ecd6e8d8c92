"""`semid verify`: codes, ids and extra digits, of every format, beside the embeddings."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from file_formats import FORMATS, ids_of, read_output, table

from semid_client.cli.root import root
from semid_client.files.rows import MatrixRows

verify = import_module("semid_client.cli.verify")  # the module, not its command

N = 300


def semid(*arguments):
    return CliRunner().invoke(root, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def target(make_server):
    return ("--target", make_server(max_rows=100).target)


def embeddings(n=N):
    rows = np.zeros((n, 4), np.float32)
    rows[:, 0] = np.arange(n) % 50
    return rows


def write_codes(name, ids, codes, *, metadata=None):
    """A file of codes as `semid encode` writes it."""
    if name.endswith(".npz"):
        np.savez(name, codes=codes, id=np.array(ids))
    elif name.endswith(".parquet"):
        lists = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1])
        pq.write_table(pa.table({"id": ids, "codes": lists}, metadata=metadata), name)
    else:
        lines = [
            json.dumps({"id": id_, "codes": row}) + "\n"
            for id_, row in zip(ids, codes.tolist(), strict=True)
        ]
        Path(name).write_text("".join(lines), "utf-8")


@pytest.mark.parametrize(
    ("suffix", "unique"),
    [
        (suffix, unique)
        for suffix in FORMATS
        for unique in ("grid", "tiger", "none")
        if (suffix, unique) != ("pt", "none")  # GRID's file has the extra digit
    ],
)
def test_what_was_encoded_is_verified(target, folder, suffix, unique):
    options = {"grid": ("--all",), "tiger": ("--rows", "7"), "none": ()}[unique]
    pq.write_table(table(embeddings()), "in.parquet", row_group_size=77)
    output = f"out.{suffix}"
    made = semid("encode", "in.parquet", "-o", output, "--unique", unique, *target)
    assert made.exit_code == 0, made.output
    recorded = suffix in {"parquet", "safetensors"}
    digit = () if recorded or suffix == "pt" or unique == "none" else ("--extra-digit",)
    result = semid("verify", output, "in.parquet", *options, *digit, *target, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["rows_checked"] == (7 if "--rows" in options else N)
    assert told["fingerprint_recorded"] == recorded
    assert told["ids_checked"] == (suffix in {"parquet", "npz", "jsonl"})
    assert told["unique"] == (None if unique == "none" else unique)
    assert told["rows_different"] == told["ids_different"] == told["digits_different"] == 0


@pytest.mark.parametrize("unique", ["grid", "tiger"])
@pytest.mark.parametrize("suffix", ["parquet", "npz", "jsonl"])
def test_every_kind_of_difference_is_shown_and_is_status_1(target, folder, suffix, unique):
    pq.write_table(table(embeddings()), "in.parquet", row_group_size=77)
    output = f"out.{suffix}"
    semid("encode", "in.parquet", "-o", output, "--unique", unique, *target)
    ids, codes = read_output(output, "codes")
    codes[[1, 201], 3] = [250, 251]
    ids[2], ids[3] = ids[3], ids[2]
    write_codes(output, ids, codes.astype(np.uint8))
    command = ("verify", output, "in.parquet", "--extra-digit", *target)
    result = semid(*command)
    assert result.exit_code == 1
    right = {"tiger": (0, 4), "grid": (1, 5)}[unique]
    for line in (
        f"row 1 of {output} has extra digit 250, by {unique} it is {right[0]}",
        f"row 201 of {output} has extra digit 251, by {unique} it is {right[1]}",
        f"row 2: {output} has id 'item é 3', in.parquet has 'item é 2'",
        f"0 differ, 2 ids differ, 2 extra digits differ ({unique})",
    ):
        assert line in result.stdout
    told = json.loads(semid(*command, "--json").stdout)
    assert (told["ids_different"], told["digits_different"]) == (2, 2)
    assert told["first_ids_different"][1] == {
        "row": 3,
        "written": "item é 2",
        "given": "item é 3",
    }


def test_a_recorded_convention_is_the_one_that_is_checked(target, folder):
    np.save("in.npy", embeddings())
    semid("encode", "in.npy", "-o", "out.parquet", "--unique", "tiger", *target)
    found = pq.read_table("out.parquet")
    metadata = found.schema.metadata | {b"semid.unique": b"grid"}
    pq.write_table(found.replace_schema_metadata(metadata), "out.parquet")
    result = semid("verify", "out.parquet", "in.npy", *target)
    assert result.exit_code == 1
    assert f"{N} extra digits differ (grid)" in result.stdout


def test_rows_that_are_null_or_left_out_have_ids_and_digits_of_their_own(target, folder):
    rows = embeddings()
    rows[[0, 50, 299], 1] = np.nan
    pq.write_table(table(rows), "in.parquet", row_group_size=77)
    for what, suffix in (
        ("skip", "parquet"),
        ("null", "parquet"),
        ("skip", "npz"),
        ("null", "jsonl"),
    ):
        output = f"{what}.{suffix}"
        options = ("--unique", "grid", "--on-bad-row", what)
        made = semid("encode", "in.parquet", "-o", output, *options, *target)
        assert made.exit_code == 0, made.output
        result = semid("verify", output, "in.parquet", "--all", "--extra-digit", *target)
        assert result.exit_code == 0, result.output
        assert "297 of 300 rows checked, 0 differ, 0 ids differ, 0 extra digits" in result.stdout


def test_ids_are_compared_across_formats_as_json_has_them(target, folder):
    days = pa.array(np.arange(3).astype("datetime64[D]"))
    lists = pa.array(list(embeddings(3)), pa.list_(pa.float32()))
    pq.write_table(pa.table({"id": days, "v": lists}), "in.parquet")
    semid("encode", "in.parquet", "-o", "out.jsonl", *target)
    assert semid("verify", "out.jsonl", "in.parquet", *target).exit_code == 0
    made = semid("encode", "in.parquet", "-o", "out.npz", *target)
    assert "an .npz file has no ids of type date32[day], as in.parquet has" in made.stderr


class Counted(MatrixRows):
    """Rows that tell how often reading began, and in how large blocks."""

    def __init__(self, *, through):
        super().__init__("in.npy", "embeddings", np.arange(100)[:, None])
        self.through, self.begun = through, []

    def blocks(self, start, n_rows):
        self.begun.append((start, n_rows))
        return super().blocks(start, n_rows)

    def reads_on(self, at, start):
        return self.through and at <= start


@pytest.mark.parametrize(
    ("through", "begun"), [(True, [(3, 16)]), (False, [(3, 2), (40, 1), (97, 3)])]
)
def test_a_sample_is_sought_or_read_through_as_the_file_is(through, begun):
    source = Counted(through=through)
    cursor = verify._Cursor(source, 16)
    for start, stop in ((3, 5), (5, 8), (40, 41), (97, 100)):
        rows, bad = cursor.read(start, stop)
        assert (rows[:, 0].tolist(), bad) == (list(range(start, stop)), {})
    assert source.begun == begun


def test_codes_that_no_model_has_are_named(target, folder):
    np.save("in.npy", embeddings())
    write_codes("out.jsonl", list(range(N)), np.full((N, 4), 300))
    result = semid("verify", "out.jsonl", "in.npy", "--extra-digit", *target)
    assert result.exit_code == 1
    assert "row 0: code 300 of layer 0 is out of range; model 'fake' has 256" in result.stderr


@pytest.mark.parametrize("line", ['{"id": 1, "codes": [0.5, 1, 2]}', '{"id": 1, "codes": "abc"}'])
def test_codes_that_are_no_whole_numbers_are_never_rounded(target, folder, line):
    (folder / "out.jsonl").write_text(f'{{"id": 0, "codes": [0, 1, 2]}}\n{line}\n')
    result = semid("decode", "out.jsonl", "-o", "back.npy", *target)
    assert result.exit_code == 1
    assert "out.jsonl: line 2: its codes are no list of whole numbers" in result.stderr


def test_ids_of_a_folder_are_those_of_its_files(target, folder):
    assert ids_of(2) == ["item é 0", "item é 1"]
    (folder / "in").mkdir()
    whole = table(embeddings())
    for i in range(3):
        pq.write_table(whole.slice(100 * i, 100), f"in/{i}.parquet", row_group_size=30)
    semid("encode", "in", "-o", "out.parquet", "--unique", "tiger", *target)
    result = semid("verify", "out.parquet", "in", "--all", *target)
    assert "0 differ, 0 ids differ, 0 extra digits differ (tiger)" in result.stdout
