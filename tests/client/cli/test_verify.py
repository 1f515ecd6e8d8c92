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
from semid_client.files import ids, outputs
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


BAD_SPANS = {"all": range(30), "first": range(10), "last": range(20, 30)}


@pytest.fixture
def short_spans(folder, monkeypatch):
    """Rows are written, and ids read, ten at a time."""
    monkeypatch.setattr(outputs, "WRITE_ROWS", 10)
    monkeypatch.setattr(ids, "READ_ROWS", 10)
    monkeypatch.setattr(verify, "READ_ROWS", 10)


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize("unique", ["grid", "tiger", "none"])
@pytest.mark.parametrize("bad", BAD_SPANS)
@pytest.mark.parametrize("source", ["in.npy", pytest.param("in.parquet", marks=pytest.mark.slow)])
def test_whole_spans_of_bad_rows_are_encoded_and_verified(target, source, bad, unique):
    rows = embeddings(30) * 0
    rows[BAD_SPANS[bad]] = np.nan
    np.save("in.npy", rows)
    pq.write_table(table(rows), "in.parquet")
    n_good = 30 - len(BAD_SPANS[bad])
    for what, suffix in (
        *(("skip", suffix) for suffix in FORMATS if suffix != "pt"),
        ("null", "parquet"),
        ("null", "jsonl"),
    ):
        output = f"{what}.{suffix}"
        options = ("--unique", unique, "--on-bad-row", what)
        made = semid("encode", source, "-o", output, *options, *target)
        assert made.exit_code == 0, (output, made.output)
        if suffix != "jsonl":
            found = [row for row in read_column(output) if row is not None]
            first = unique == "grid"
            digits = [] if unique == "none" else list(range(first, n_good + first))
            assert [row[3] for row in found if unique != "none"] == digits
        digit = () if unique == "none" else ("--extra-digit",)
        result = semid("verify", output, source, "--all", *digit, *target)
        assert result.exit_code == 0, (output, result.output)
        assert f"{n_good} of 30 rows checked, 0 differ" in result.stdout


def read_column(path):
    """Codes of an output as lists; None where null."""
    if path.endswith(".parquet"):
        return pq.read_table(path)["codes"].to_pylist()
    return read_output(path, "codes")[1].tolist()


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("unique", ["grid", "none"])
def test_an_output_of_nulls_alone_is_decoded_to_nulls(target, folder, suffix, unique):
    np.save("in.npy", np.full((3, 4), np.nan, np.float32))
    options = ("--unique", unique, "--on-bad-row", "null")
    semid("encode", "in.npy", "-o", f"codes.{suffix}", *options, *target)
    digit = () if unique == "none" else ("--extra-digit",)
    command = ("decode", f"codes.{suffix}", "-o", "back.parquet", *digit, *target)
    failed = semid(*command)
    assert failed.exit_code == 1
    assert f"codes.{suffix}: row 0: is null" in failed.stderr
    made = semid(*command, "--on-bad-row", "null", "--restart")
    assert made.exit_code == 0, made.output
    assert pq.read_table("back.parquet")["embedding"].to_pylist() == [None] * 3


def test_lines_of_no_codes_at_all_are_refused(target, folder):
    (folder / "out.jsonl").write_text('{"id": 0, "codes": null}\n{"id": 1, "codes": []}\n')
    result = semid("decode", "out.jsonl", "-o", "back.npy", *target)
    assert result.exit_code == 1
    assert "out.jsonl: holds no codes" in result.stderr


@pytest.mark.parametrize(
    ("digit", "found"),
    [((), "2 codes"), (("--extra-digit",), "1 codes and an extra digit")],
)
def test_an_output_without_all_layers_is_refused(target, folder, digit, found):
    np.save("in.npy", embeddings())
    semid("encode", "in.npy", "-o", "whole.npy", *target)
    np.save("out.npy", np.load("whole.npy")[:, :2])
    result = semid("verify", "out.npy", "in.npy", *digit, *target)
    assert result.exit_code == 1
    assert f"out.npy: has rows of {found}, but model 'fake' " in result.stderr
    assert "has 3 layers" in result.stderr


@pytest.mark.parametrize("suffix", ["npy", "npz", "parquet", "safetensors", "jsonl"])
def test_codes_of_rows_that_have_none_are_differences(target, folder, suffix):
    rows = embeddings()
    np.save("in.npy", rows)
    semid("encode", "in.npy", "-o", f"out.{suffix}", *target)
    rows[7, 2], rows[9, 0] = np.nan, np.inf
    np.save("in.npy", rows)
    command = ("verify", f"out.{suffix}", "in.npy", "--all", *target)
    result = semid(*command)
    assert result.exit_code == 1
    assert (
        f"row 7: out.{suffix} has [7, 8, 9], but that row of in.npy has none: number 2 is nan"
    ) in result.stdout
    assert "300 of 300 rows checked, 2 differ" in result.stdout
    told = json.loads(semid(*command, "--json").stdout)
    assert told["rows_different"] == 2
    assert told["first_different"][1] == {
        "row": 9,
        "written": [9, 10, 11],
        "computed": None,
        "problem": "number 0 is inf; embeddings are finite",
    }


def test_rows_without_the_codes_they_should_have_are_differences(target, folder):
    rows = embeddings()
    rows[[3, 299], 0] = np.nan
    np.save("in.npy", rows)
    for what in ("skip", "null"):
        semid("encode", "in.npy", "-o", f"{what}.parquet", "--on-bad-row", what, *target)
    np.save("in.npy", embeddings())
    for what in ("skip", "null"):
        result = semid("verify", f"{what}.parquet", "in.npy", "--all", *target)
        assert result.exit_code == 1
        assert "300 of 300 rows checked, 2 differ" in result.stdout
        for row, given in ((3, [3, 4, 5]), (299, [49, 50, 51])):
            assert (
                f"row {row}: {what}.parquet has no codes, the model gives {given}" in result.stdout
            )


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
