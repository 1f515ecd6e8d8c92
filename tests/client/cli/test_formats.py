"""Every format of embeddings to every format of IDs, over a real socket, and back."""

import io
import json
import os
import subprocess
import sys
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors
import torch
from click.testing import CliRunner
from file_formats import FORMATS, INPUTS, NAMED, as_stream, ids_of, read_output, read_stream, table

from semid_client.cli.root import root

FINGERPRINT = "f" * 64
N = 95
IDS = ids_of(N)


def semid(*arguments, stdin=None):
    return CliRunner().invoke(root, [str(argument) for argument in arguments], input=stdin)


def embeddings(n=N, dtype=np.float32):
    rows = np.zeros((n, 4), dtype)
    rows[:, 0] = np.arange(n) % 50
    return rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("output", [f"out.{suffix}" for suffix in FORMATS])
@pytest.mark.parametrize("source", [*INPUTS, "-"])
def test_every_input_goes_to_every_output_and_back(make_server, folder, source, output):
    server = make_server(max_rows=10)
    rows = embeddings()
    stdin = as_stream(table(rows)) if source == "-" else INPUTS[source](folder, rows)
    target = ("--target", server.target, "--unique", "grid")
    result = semid("encode", source, "-o", output, *target, stdin=stdin)
    assert result.exit_code == 0, result.output
    ids, codes = read_output(output, "codes")
    expected = server.expected_codes(rows)
    np.testing.assert_array_equal(codes[:, :3], expected)
    first = np.arange(N) % 50
    np.testing.assert_array_equal(codes[:, 3], np.where(np.arange(N) < 50, first < 45, 2))
    if ids is not None:
        assert ids == (IDS if source in {*NAMED, "-"} else list(range(N)))
    result = semid("decode", output, "-o", "back.npy", "--extra-digit", *target[:2])
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load("back.npy"), server.expected_reconstruction(expected))


@pytest.mark.parametrize("output", [f"back.{suffix}" for suffix in FORMATS])
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_file_of_codes_is_decoded_to_every_output_with_its_ids(
    make_server, folder, suffix, output
):
    server = make_server(max_rows=10)
    pq.write_table(table(embeddings()), "in.parquet")
    target, codes = ("--target", server.target), f"out.{suffix}"
    assert semid("encode", "in.parquet", "-o", codes, *target).exit_code == 0
    result = semid("decode", codes, "-o", output, *target)
    assert result.exit_code == 0, result.output
    ids, vectors = read_output(output, "embedding")
    assert vectors.dtype == np.float32 or output in {"back.parquet", "back.jsonl"}
    expected = server.expected_reconstruction(server.expected_codes(embeddings()))
    np.testing.assert_array_equal(vectors, expected)
    kept = suffix in {"parquet", "jsonl", "npz"}
    assert ids in (None, IDS if kept else list(range(N)))


@pytest.mark.parametrize("source", [*INPUTS, "-"])
def test_standard_output_is_an_arrow_stream_that_decode_takes(make_server, folder, source):
    server = make_server(max_rows=10)
    rows = embeddings()
    stdin = as_stream(table(rows)) if source == "-" else INPUTS[source](folder, rows)
    result = semid("encode", source, "-o", "-", "--target", server.target, stdin=stdin)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("-: 95 rows in ")
    ids, codes, schema = read_stream(result.stdout_bytes)
    assert ids == (IDS if source in {*NAMED, "-"} else list(range(N)))
    assert codes == server.expected_codes(rows).tolist()
    assert schema.metadata[b"semid.fingerprint"] == FINGERPRINT.encode()
    back = semid(
        *("decode", "-", "-o", "-", "--json", "--target", server.target), stdin=result.stdout_bytes
    )
    assert back.exit_code == 0, back.output
    again, vectors, schema = read_stream(back.stdout_bytes)
    assert again == ids
    np.testing.assert_array_equal(vectors, server.expected_reconstruction(np.array(codes)))
    assert json.loads(back.stderr)["rows"] == N
    server.fingerprint = "0" * 64
    refused = semid(
        *("decode", "-", "-o", "x.npy", "--target", server.target), stdin=result.stdout_bytes
    )
    assert f"standard input: holds codes of fingerprint {FINGERPRINT}" in refused.stderr


@pytest.mark.parametrize(
    ("what", "expected", "told"),
    [
        ("skip", [0, 2, 4], "5 rows read, 3 written in "),
        ("null", [0, None, 2, None, 4], "5 rows in "),
    ],
)
def test_bad_rows_of_a_stream_are_listed_among_the_messages(server, folder, what, expected, told):
    rows = embeddings(5)
    rows[[1, 3]] = np.nan
    pq.write_table(table(rows), "in.parquet", row_group_size=2)
    options = ("--on-bad-row", what, "--target", server.target)
    result = semid("encode", "in.parquet", "-o", "-", *options)
    assert result.exit_code == 0, result.output
    ids, codes, _ = read_stream(result.stdout_bytes)
    assert [codes and codes[0] for codes in codes] == expected
    assert ids == [IDS[i] for i in (range(5) if what == "null" else expected)]
    first, second, last = result.stderr.splitlines()
    assert [json.loads(line)["row"] for line in (first, second)] == [1, 3]
    assert last.startswith(f"-: {told}")
    assert ", 2 bad ones, " in last


def test_a_stream_has_no_extra_digit(server, folder):
    np.save("in.npy", embeddings())
    result = semid("encode", "in.npy", "-o", "-", "--unique", "grid", "--target", server.target)
    assert result.exit_code == 1
    assert "standard output: the extra digit is known when all rows are" in result.stderr


def test_a_stream_whose_reader_goes_away_ends_without_a_traceback(server, folder):
    np.save("in.npy", np.zeros((1 << 20, 4), np.float32))
    command = [sys.executable, "-m", "semid_client", "encode", "in.npy", "-o", "-"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--target", server.target], **pipes) as process:
        process.stdout.read(1)
        process.stdout.close()
        stderr = process.stderr.read()
        assert process.wait(300) == 1
    assert b"Traceback" not in stderr


def test_safetensors_records_the_model(server, folder):
    np.save("in.npy", embeddings())
    command = ("encode", "in.npy", "-o", "out.safetensors", "--unique", "tiger")
    semid(*command, "--target", server.target)
    with safetensors.safe_open("out.safetensors", "numpy") as file:
        assert file.metadata() == {
            "semid.fingerprint": FINGERPRINT,
            "semid.model": "fake",
            "semid.unique": "tiger",
        }
    back = semid("decode", "out.safetensors", "-o", "back.npy", "--target", server.target)
    assert back.exit_code == 0, back.output  # it records that there is a digit, too
    server.fingerprint = "0" * 64
    result = semid("decode", "out.safetensors", "-o", "x.npy", "--target", server.target)
    assert f"out.safetensors: holds codes of fingerprint {FINGERPRINT}" in result.stderr


def test_parquet_records_the_model_and_its_lists_have_one_length(server, folder):
    np.save("in.npy", embeddings())
    semid("encode", "in.npy", "-o", "out.parquet", "--target", server.target)
    schema = pq.read_schema("out.parquet")
    assert schema.field("codes").type == pa.list_(pa.uint8(), 3)
    assert schema.metadata == {
        b"semid.fingerprint": FINGERPRINT.encode(),
        b"semid.model": b"fake",
        b"semid.unique": b"none",
    }


def test_codes_of_another_model_are_not_decoded(server, folder):
    np.save("in.npy", embeddings())
    semid("encode", "in.npy", "-o", "out.parquet", "--target", server.target)
    server.fingerprint = "0" * 64
    result = semid("decode", "out.parquet", "-o", "back.npy", "--target", server.target)
    assert result.exit_code == 1
    assert f"out.parquet: holds codes of fingerprint {FINGERPRINT}" in result.stderr


def test_decoding_to_parquet_keeps_the_ids(server, folder):
    pq.write_table(table(embeddings()), "in.parquet")
    semid("encode", "in.parquet", "-o", "out.jsonl", "--target", server.target)
    result = semid("decode", "out.jsonl", "-o", "back.parquet", "--target", server.target)
    assert result.exit_code == 0, result.output
    back = pq.read_table("back.parquet")
    assert back["id"].to_pylist() == IDS
    assert back["embedding"].type == pa.list_(pa.float32(), 4)
    assert back["embedding"][1].as_py() == [6.0, 7.0, 8.0, 9.0]


def test_tokens_follow_a_template(server, folder):
    np.save("in.npy", embeddings(2))
    arguments = ("encode", "in.npy", "--target", server.target, "-o")
    semid(*arguments, "a.jsonl")
    semid(*arguments, "b.jsonl", "--tokens", '"{layer}:{code}" ')
    first = {"id": 1, "codes": [1, 2, 3], "tokens": "<a_1><b_2><c_3>"}
    assert json.loads((folder / "a.jsonl").read_text().splitlines()[1]) == first
    again = first | {"tokens": '"0:1" "1:2" "2:3" '}
    assert json.loads((folder / "b.jsonl").read_text().splitlines()[1]) == again


def test_grids_file_is_a_column_of_int64_for_each_item(server, folder):
    np.save("in.npy", embeddings(3))
    semid("encode", "in.npy", "-o", "out.pt", "--target", server.target)
    tensor = torch.load("out.pt", weights_only=True)
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 0, 0]]


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (range(200), False),
        (pa.array(range(200), pa.uint64()), False),
        (range(1, 201), True),
        ([*range(198), 199, 198], True),
        ([*range(199), None], True),
        ([f"item-{i}" for i in range(200)], True),
    ],
)
@pytest.mark.parametrize("source", ["in.parquet", "-"])
def test_ids_that_are_not_the_columns_of_grids_file_are_told(server, folder, source, ids, told):
    rows = embeddings(200)
    content = pa.table({"id": ids, "v": pa.array(list(rows), pa.list_(pa.float32()))})
    pq.write_table(content, "in.parquet", row_group_size=70)
    stdin = as_stream(content) if source == "-" else None
    result = semid("encode", source, "-o", "out.pt", "--target", server.target, stdin=stdin)
    assert result.exit_code == 0, result.output
    assert ("out.pt: column i is row i, whatever its id" in result.stderr) == told
    codes = torch.load("out.pt", weights_only=True)[:3].T
    np.testing.assert_array_equal(codes, server.expected_codes(rows))


def test_a_list_of_bad_rows_does_not_outlive_its_output(server, folder):
    rows = embeddings(5)
    rows[2] = np.nan
    np.save("in.npy", rows)
    command = ("encode", "in.npy", "-o", "out.npy", "--on-bad-row", "skip")
    assert semid(*command, "--target", server.target).exit_code == 0
    assert (folder / "out.npy.bad-rows.jsonl").exists()
    (folder / "out.npy").unlink()
    np.save("in.npy", embeddings(5))
    assert semid(*command, "--target", server.target).exit_code == 0
    assert not (folder / "out.npy.bad-rows.jsonl").exists()


def test_a_digit_too_large_for_a_code_widens_the_type(server, folder):
    np.save("in.npy", np.zeros((300, 4), np.float32))
    semid("encode", "in.npy", "-o", "out.npy", "--unique", "tiger", "--target", server.target)
    codes = np.load("out.npy")
    assert codes.dtype == np.uint16
    np.testing.assert_array_equal(codes[:, 3], np.arange(300))


@pytest.mark.parametrize("output", [f"out.{suffix}" for suffix in FORMATS])
def test_no_rows_are_no_rows(server, folder, output):
    np.save("in.npy", embeddings(0))
    result = semid("encode", "in.npy", "-o", output, "--target", server.target)
    assert result.exit_code == 0, result.output
    assert len(read_output(output, "codes")[1]) == 0
    result = semid("decode", output, "-o", f"back-{output}", "--target", server.target)
    assert result.exit_code == 0, result.output
    assert len(read_output(f"back-{output}", "embedding")[1]) == 0


def test_the_same_command_writes_the_same_bytes(server, folder):
    pq.write_table(table(embeddings()), "in.parquet")
    for suffix in FORMATS:
        for name in ("one", "other"):
            semid("encode", "in.parquet", "-o", f"{name}.{suffix}", "--target", server.target)
        same = {(folder / f"{name}.{suffix}").read_bytes() for name in ("one", "other")}
        assert len(same) == 1


def test_bfloat16_is_read_where_it_is_stored(server, folder):
    rows = torch.from_numpy(embeddings()).bfloat16()
    torch.save(rows, "in.pt")
    __import__("safetensors.torch").torch.save_file({"x": rows}, "in.safetensors")
    for source in ("in.pt", "in.safetensors"):
        result = semid("encode", source, "-o", "out.npy", "--force", "--target", server.target)
        assert result.exit_code == 0, result.output
        np.testing.assert_array_equal(np.load("out.npy"), server.expected_codes(embeddings()))


def damaged(name, make, says):
    return pytest.param(name, make, says, id=says)


def write(name, content):
    with open(name, "wb") as file:  # noqa: PTH123 - a plain name
        file.write(content)


def write_twice(name):
    content = pa.table({"v": list(embeddings(2)), "id": ["a", "b"]})
    pq.write_table(content.append_column(name, content[name]), "in.parquet")


NULLS = pa.array([None] * 3, pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        damaged("in.npz", lambda: write("in.npz", b"x"), "cannot be read as .npz: File is not"),
        damaged("in.npz", lambda: np.savez("in.npz", a=[1.0]), "two-dimensional arrays are none"),
        damaged(
            "in.npz",
            lambda: np.savez("in.npz", a=embeddings(), b=embeddings()),
            "two-dimensional arrays are a, b; name the one to read by --column",
        ),
        damaged(
            "in.npz", lambda: np.savez("in.npz", np.asfortranarray(embeddings())), "by columns"
        ),
        damaged("in.pt", lambda: torch.save(embeddings, "in.pt"), "cannot be read as tensors al"),
        damaged("in.pt", lambda: torch.save([1], "in.pt"), "holds list; expected a tensor"),
        damaged("in.pt", lambda: torch.save(torch.eye(4).to_sparse(), "in.pt"), "a sparse_coo ten"),
        damaged(
            "in.pt",
            lambda: torch.save(torch.eye(4).to(torch.float8_e4m3fn), "in.pt"),
            "in.pt: holds a tensor of float8_e4m3fn; expected a float type, such as float32",
        ),
        damaged(
            "in.pt",
            lambda: torch.save(torch.eye(4).to("meta"), "in.pt"),
            "in.pt: holds a tensor of float32 on the meta device, which has no numbers; expected",
        ),
        damaged(
            "in.pt",
            lambda: torch.save(torch.eye(4), "in.pt", _use_new_zipfile_serialization=False),
            "in.pt: cannot be read as tensors alone: it is no file of torch.save, or one",
        ),
        damaged("in.npz", lambda: np.savez("in.npz", np.array([[1, "a"]], object)), "never unpick"),
        damaged("in.npy", lambda: np.save("in.npy", np.float32(1)), "has shape (); expected (rows"),
        damaged("in.npy", lambda: np.save("in.npy", embeddings()[:, :0]), "has rows of 0 numbers"),
        damaged("in.npy", lambda: os.mkfifo("in.npy"), "is no regular file: only an Arrow stream"),
        damaged("in.parquet", lambda: os.mkfifo("in.parquet"), "in.parquet: is no regular file"),
        damaged(
            "in.parquet",
            lambda: pq.write_table(pa.table({"v": NULLS}), "in.parquet"),
            "column 'v' holds no row of numbers, so that nothing tells how many a row has",
        ),
        damaged("in.parquet", lambda: write_twice("id"), "has 2 columns named 'id'; give each a"),
        damaged("in.parquet", lambda: write_twice("v"), "has 2 columns named 'v'; give each a"),
        damaged("in.safetensors", lambda: write("in.safetensors", b"{}"), "as safetensors: "),
        damaged("in.parquet", lambda: write("in.parquet", b"PAR1"), "cannot be read as Parquet: "),
        damaged(
            "in.parquet",
            lambda: pq.write_table(pa.table({"x": [1]}), "in.parquet"),
            "has no column of lists of numbers, an embedding or the codes of an item each; its "
            "columns are x",
        ),
        damaged(
            "in.parquet",
            lambda: pq.write_table(pa.table({f"f{i}": [1.0] for i in range(384)}), "in.parquet"),
            "f10, f11 and 372 more",
        ),
        damaged("in.parquet", lambda: None, "in.parquet: No such file or directory"),
        damaged("*.parquet", lambda: None, "there are no .parquet files"),
        damaged("in.jsonl", lambda: write("in.jsonl", b"{}"), "in.jsonl: is not a .npy file"),
        damaged("-", lambda: None, "standard input: cannot be read as an Arrow IPC stream"),
    ],
)
def test_an_input_that_cannot_be_read_is_one_sentence(server, folder, name, make, says):
    make()
    result = semid("encode", name, "-o", "out.npy", "--target", server.target, stdin=b"nothing")
    assert result.exit_code == 1, result.output
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (folder / "out.npy").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["x.parquet", "--column", "tags"], "column 'tags' is list<element: string>; expected li"),
        (["x.parquet", "--column", "emb"], "'emb' is not one of its columns of lists: vector"),
        (["x.parquet", "--id-column", "ID"], "has no column 'ID'; there are vector, tags"),
        (["in.npy", "--column", "x"], "in.npy: has one array and no names: --column x says no"),
        (["in.npy", "--id-column", "x"], "in.npy: has no ids: --id-column x says nothing"),
        (["in.pt", "--id-column", "x"], "in.pt: has no ids: --id-column x says nothing"),
        (["one.pt", "--column", "x"], "one.pt: has one tensor and no names: --column x says noth"),
        (["turned.npy"], "takes embeddings of 4; it is turned: transpose it"),
        (["in.csv"], "in.csv: is not a .npy file: "),
    ],
)
def test_a_mistake_that_is_often_made_is_named(server, folder, options, says):
    np.save("in.npy", embeddings())
    np.save("turned.npy", embeddings().T.copy())
    (folder / "in.csv").write_text("a,b\n1,2\n")
    (folder / "in.pt").touch()
    torch.save(torch.tensor(embeddings()), "one.pt")
    content = table(embeddings())
    tags = pa.array([["a"]] * N)
    pq.write_table(pa.table({"vector": content["vector"], "tags": tags}), "x.parquet")
    result = semid("encode", *options, "-o", "out.npy", "--target", server.target)
    assert result.exit_code == 1
    assert says in result.stderr
    assert semid("encode", "x.parquet", "-o", "out.npy", "--target", server.target).exit_code == 0


def test_a_row_group_that_cannot_be_read_is_named_and_what_came_before_is_kept(server, folder):
    pq.write_table(
        table(embeddings(), fixed=True), "in.parquet", row_group_size=10, compression="none"
    )
    group = pq.ParquetFile("in.parquet").metadata.row_group(5).column(1)
    with open("in.parquet", "rb+") as file:  # noqa: PTH123 - a plain name
        file.seek(group.data_page_offset)
        file.write(b"\xff" * 64)
    result = semid("encode", "in.parquet", "-o", "out.npy", "--target", server.target)
    assert result.exit_code == 1
    assert "in.parquet: row group 5 cannot be read as Parquet" in result.stderr
    kept = json.loads((folder / "out.npy.partial/progress.json").read_text())
    assert kept["rows_in"] == 50


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["-o", "out.csv"],
            "out.csv: give it a name that ends in .npy, .npz, .parquet",
        ),
        (["-o", "out.npy", "--on-bad-row", "null"], "out.npy: a .npy file has no null"),
        (["-o", "out.pt", "--on-bad-row", "skip"], "out.pt: the columns of a GRID file are the"),
        (["-o", "out.pt", "--unique", "none"], "out.pt: a GRID file has the extra digit"),
        (["-o", "out.jsonl", "--tokens", "{word}"], "out.jsonl: '{word}' is no template"),
        (
            ["-o", "out.npy", "--tokens", "<{letter}_{code}>"],
            "out.npy: has no tokens, as .jsonl has: --tokens <{letter}_{code}> says nothing",
        ),
        (["-o", "-", "--tokens", "{code}"], "standard output: has no tokens, as .jsonl has"),
    ],
)
def test_an_output_that_cannot_be_is_one_sentence_before_any_work(server, folder, arguments, says):
    np.save("in.npy", embeddings())
    result = semid("encode", "in.npy", *arguments, "--target", server.target)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: " + says)
    assert server.calls("Encode") == 0
    assert [path.name for path in folder.iterdir()] == ["in.npy"]


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("pyarrow", ["in.parquet", "-o", "out.npy"], "needs pyarrow, which is not installed"),
        ("pyarrow", ["in.npy", "-o", "-"], "needs pyarrow, which is not installed"),
        ("fsspec", ["s3://b/in.npy", "-o", "out.npy"], "needs fsspec, which is not installed"),
        ("s3fs", ["s3://b/in.npy", "-o", "out.npy"], "what speaks to s3:// is not installed"),
        ("gcsfs", ["in.npy", "-o", "gs://b/out.npy"], "speaks to gs:// is not installed"),
        ("torch", ["in.pt", "-o", "out.npy"], "a .pt file needs torch, which is not installed"),
        ("torch", ["in.npy", "-o", "out.pt"], "a .pt file needs torch, which is not installed"),
        ("torch", ["in.npy", "-o", "out.npy", "--checkpoint", "x"], "--checkpoint needs torch"),
    ],
)
def test_a_format_whose_library_is_missing_says_what_to_install(folder, module, arguments, says):
    np.save("in.npy", embeddings())
    for name in ("in.parquet", "in.safetensors", "in.pt"):
        (folder / name).touch()
    script = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
        "import semid_client.cli; semid_client.cli.main()"
    )
    where = [] if "--checkpoint" in arguments else ["--target", "127.0.0.1:1"]
    done = subprocess.run(
        [sys.executable, "-c", script, "encode", *arguments, *where],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert "pip install 'semid[" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("source", ["in.npy", "ids.npz", "in.safetensors"])
def test_matrices_need_none_of_the_libraries_of_other_formats(server, folder, source):
    INPUTS[source](folder, embeddings())
    script = (
        "import sys, semid_client.cli\n"
        "try: semid_client.cli.main()\n"
        "finally:\n"
        "    print([n for n in ('torch', 'pyarrow', 'safetensors') if n in sys.modules])"
    )
    done = subprocess.run(
        [*(sys.executable, "-c", script, "encode", source, "-o", "out.npy"), "--unique", "grid"],
        env={"SEMID_TARGET": server.target},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("n_null", [1, 200])
@pytest.mark.parametrize("source", ["in.parquet", "-"])
def test_a_file_may_begin_with_rows_that_are_null(server, folder, source, n_null):
    rows = embeddings(5)
    content = pa.table({"v": pa.array([None] * n_null + list(rows), pa.list_(pa.float32()))})
    pq.write_table(content, "in.parquet", row_group_size=7)
    command = ("encode", source, "-o", "out.npy", "--on-bad-row", "skip", "--target", server.target)
    result = semid(*command, stdin=as_stream(content) if source == "-" else None)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load("out.npy"), server.expected_codes(rows))
    assert len((folder / "out.npy.bad-rows.jsonl").read_text().splitlines()) == n_null


@pytest.mark.parametrize("source", ["in.parquet", "-"])
@pytest.mark.parametrize("first", [[[1.0] * 3], [[]], [[1.0] * 3] * 70, [None, [1.0] * 3]])
def test_rows_of_another_width_at_the_beginning_are_bad_ones(server, folder, source, first):
    content = pa.table({"v": pa.array([*first, *embeddings(5).tolist()], pa.list_(pa.float32()))})
    pq.write_table(content, "in.parquet")
    stdin = None
    if source == "-":
        stdin = pa.BufferOutputStream()
        with pa.ipc.new_stream(stdin, content.schema) as writer:
            writer.write_table(content)
        stdin = stdin.getvalue().to_pybytes()
    options = ("--on-bad-row", "skip", "--target", server.target)
    result = semid("encode", source, "-o", "out.npy", *options, stdin=stdin)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load("out.npy"), server.expected_codes(embeddings(5)))
    listed = (folder / "out.npy.bad-rows.jsonl").read_text().splitlines()
    assert len(listed) == len(first)
    assert f"has {len(first[-1])} numbers; expected 4" in listed[-1]
    verified = semid("verify", "out.npy", "in.parquet", "--target", server.target)
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("n", [1, 100])
def test_rows_that_are_all_of_another_width_are_refused(server, folder, n):
    content = pa.table({"v": pa.array([[1.0] * 3] * n, pa.list_(pa.float32()))})
    pq.write_table(content, "in.parquet")
    options = ("--on-bad-row", "skip", "--target", server.target)
    result = semid("encode", "in.parquet", "-o", "out.npy", *options)
    assert "in.parquet: has rows of 3 numbers, but model 'fake' at 127.0.0.1" in result.stderr
    assert not (folder / "out.npy").exists()


def test_a_row_of_fewer_codes_at_the_beginning_is_a_bad_one(server, folder):
    codes = [[0], *server.expected_codes(embeddings(5)).tolist()]
    pq.write_table(pa.table({"codes": codes}), "in.parquet")
    options = ("--on-bad-row", "skip", "--target", server.target)
    result = semid("decode", "in.parquet", "-o", "out.npy", *options)
    assert result.exit_code == 0, result.output
    assert np.load("out.npy").shape == (5, 4)


@pytest.mark.parametrize("target", ["there.npy", "deeper/there.npy", "new.npy"])
def test_an_output_that_is_a_link_goes_where_it_points_to(server, folder, target):
    (folder / "deeper").mkdir()
    np.save("in.npy", embeddings())
    if target != "new.npy":
        np.save(target, np.zeros(3))
    (folder / "out.npy").symlink_to(target)
    command = ("encode", "in.npy", "-o", "out.npy", "--target", server.target)
    if target != "new.npy":
        assert "out.npy: exists already" in semid(*command).stderr
        assert np.load(target).shape == (3,)
    assert semid(*command, "--force").exit_code == 0
    assert (folder / "out.npy").is_symlink()
    np.testing.assert_array_equal(np.load(target), server.expected_codes(embeddings()))
    assert not (folder / "out.npy.partial").exists()


def test_an_output_that_is_a_link_to_nowhere_is_refused_before_any_work(server, folder):
    np.save("in.npy", embeddings())
    (folder / "out.npy").symlink_to("no/such/folder/out.npy")
    result = semid("encode", "in.npy", "-o", "out.npy", "--target", server.target)
    assert "out.npy: No such file or directory: make the folder first" in result.stderr
    assert server.calls("Encode") == 0


def test_an_input_by_another_name_is_not_overwritten(server, folder):
    np.save("in.npy", embeddings())
    (folder / "soft.npy").symlink_to("in.npy")
    (folder / "hard.npy").hardlink_to("in.npy")
    for output in ("in.npy", "./in.npy", "soft.npy", "hard.npy"):
        result = semid("encode", "in.npy", "-o", output, "--force", "--target", server.target)
        assert "is the input too; give the output another name" in result.stderr
    np.testing.assert_array_equal(np.load("in.npy"), embeddings())


def test_ids_may_be_dictionaries_that_differ_from_file_to_file(server, folder):
    (folder / "many").mkdir()
    for name, some in (("a", ["x", "y"]), ("b", ["z", "x"])):
        ids = pa.array(some).dictionary_encode()
        content = pa.table({"id": ids, "v": pa.array(list(embeddings(2)))})
        pq.write_table(content, folder / f"many/{name}.parquet")
    for output in ("out.parquet", "out.jsonl"):
        result = semid("encode", "many", "-o", output, "--target", server.target)
        assert result.exit_code == 0, result.output
        assert read_output(output, "codes")[0] == ["x", "y", "z", "x"]


def test_ids_of_a_stream_may_be_more_than_the_indices_of_its_dictionaries_count(server, folder):
    batches = []
    for start in range(0, 300, 100):
        names = pa.array([f"item {i}" for i in range(start, start + 100)])
        ids = pa.DictionaryArray.from_arrays(pa.array(range(100), pa.int8()), names)
        rows = pa.array(list(embeddings(100)), pa.list_(pa.float32()))
        batches.append(pa.record_batch([ids, rows], ["id", "v"]))
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    for output in ("out.parquet", "out.npz", "out.jsonl", "-"):
        command = ("encode", "-", "-o", output, "--target", server.target)
        result = semid(*command, stdin=sink.getvalue())
        assert result.exit_code == 0, result.output
        found = read_stream(result.stdout_bytes) if output == "-" else read_output(output, "codes")
        assert found[0] == [f"item {i}" for i in range(300)]
    assert pq.read_schema("out.parquet").field("id").type == pa.string()


@pytest.mark.parametrize("kind", [">i8", ">u2", ">U6"])
@pytest.mark.parametrize("output", ["out.parquet", "out.npz", "out.jsonl"])
def test_ids_may_be_stored_by_another_kind_of_machine(server, folder, kind, output):
    np.savez("in.npz", embedding=embeddings(3), id=np.array([1, 2, 3]).astype(kind))
    result = semid("encode", "in.npz", "-o", output, "--target", server.target)
    assert result.exit_code == 0, result.output
    expected = ["1", "2", "3"] if "U" in kind else [1, 2, 3]
    assert read_output(output, "codes")[0] == expected


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([None, 1, 2]),
        pa.array([None, "a", None]),
        pa.array([0, 1 << 63, (1 << 64) - 1], pa.uint64()),
        pa.array([-(1 << 63), None, (1 << 63) - 1]),
        pa.array([0.5, 1.0, None]),
        pa.array([True, None, False]),
        pa.nulls(3),
    ],
    ids=str,
)
def test_ids_come_back_from_lines_of_json(server, folder, ids):
    pq.write_table(table(embeddings(3), ids=ids), "in.parquet")
    target = ("--target", server.target)
    for command in (
        ("encode", "in.parquet", "-o", "out.jsonl"),
        ("verify", "out.jsonl", "in.parquet"),
        ("decode", "out.jsonl", "-o", "back.parquet"),
    ):
        result = semid(*command, *target)
        assert result.exit_code == 0, result.output
    assert pq.read_table("back.parquet")["id"].combine_chunks() == ids


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (["1", str(1 << 64)], f"line 2: its id {1 << 64} is out of range; whole numbers run from"),
        (["1", str(-(1 << 63) - 1)], f"line 2: its id {-(1 << 63) - 1} is out of range"),
        ([str(1 << 63), "1", "-5"], f"line 3: its id -5 and {1 << 63} of line 1 are of no one"),
        (["-5", "1", str(1 << 63)], f"line 3: its id {1 << 63} and -5 of line 1 are of no one"),
        (["null", "1", '"a"'], "line 3: its id 'a' is of another type than 1 of line 2"),
    ],
)
def test_ids_of_lines_of_json_that_no_column_holds_are_refused_by_line(server, folder, ids, says):
    lines = [f'{{"id": {id_}, "codes": [1, 2, 3]}}\n' for id_ in ids]
    (folder / "in.jsonl").write_text("".join(lines))
    result = semid("decode", "in.jsonl", "-o", "out.npy", "--target", server.target)
    assert result.exit_code == 1
    assert f"in.jsonl: {says}" in result.stderr
    assert server.calls("Decode") == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--column", "x"], 'in.jsonl: has its codes in "codes": --column x says nothing'),
        (["--id-column", "x"], "in.jsonl: has no 'x' in any of 1 lines"),
    ],
)
def test_a_name_that_lines_of_json_do_not_have_is_refused(server, folder, options, says):
    (folder / "in.jsonl").write_text('{"id": 1, "codes": [1, 2, 3]}\n')
    result = semid("decode", "in.jsonl", *options, "-o", "out.npy", "--target", server.target)
    assert result.exit_code == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary(2), pa.list_(pa.binary(), 1)], ids=str
)
def test_bytes_are_no_ids_of_lines_of_json(server, folder, kind):
    ids = pa.array([b"ab", b"cd"])
    ids = pa.array([[b"ab"], [b"cd"]], kind) if pa.types.is_nested(kind) else ids.cast(kind)
    pq.write_table(table(embeddings(2), ids=ids), "in.parquet")
    result = semid("encode", "in.parquet", "-o", "out.jsonl", "--target", server.target)
    assert result.exit_code == 1
    assert (
        "out.jsonl: JSON has no bytes, which column 'item_id' of in.parquet is made of "
        f"({pq.read_schema('in.parquet').field('item_id').type}): use .parquet, or cast the ids to "
        "strings"
    ) in result.stderr
    assert server.calls("Encode") == 0


@pytest.mark.skipif(not hasattr(pa, "uuid"), reason="an older pyarrow reads UUIDs as bytes")
def test_a_uuid_is_text_in_lines_of_json(server, folder):
    ids = [uuid.UUID(int=i) for i in range(2)]
    kept = pa.array([id_.bytes for id_ in ids], pa.uuid())
    pq.write_table(table(embeddings(2), ids=kept), "in.parquet")
    target = ("--target", server.target)
    result = semid("encode", "in.parquet", "-o", "out.jsonl", *target)
    assert result.exit_code == 0, result.output
    assert read_output("out.jsonl", "codes")[0] == [str(id_) for id_ in ids]
    assert semid("verify", "out.jsonl", "in.parquet", *target).exit_code == 0


@pytest.mark.parametrize("statistics", [True, False])
def test_a_null_id_is_refused_before_any_work_where_there_is_no_null(server, folder, statistics):
    content = table(embeddings(30), ids=[None if i == 17 else i for i in range(30)])
    pq.write_table(content, "in.parquet", row_group_size=10, write_statistics=statistics)
    result = semid("encode", "in.parquet", "-o", "out.npz", "--target", server.target)
    assert result.exit_code == 1
    assert (
        "out.npz: an .npz file has no null, as the id of row 17 of in.parquet is: use .parquet"
    ) in result.stderr
    assert server.calls("Encode") == 0


def test_a_null_id_of_lines_of_json_is_refused_where_there_is_no_null(server, folder):
    (folder / "in.jsonl").write_text(
        '{"id": 1, "codes": [1, 2, 3]}\n{"id": null, "codes": [1, 2, 3]}\n'
    )
    result = semid("decode", "in.jsonl", "-o", "out.npz", "--target", server.target)
    assert "has no null, as the id of row 1 of in.jsonl is: use .parquet" in result.stderr
    assert server.calls("Decode") == 0


@pytest.mark.parametrize("source", ["in.parquet", "-"])
def test_a_null_id_matters_where_its_row_is_kept(server, folder, source):
    rows = embeddings(2000)
    rows[3] = np.nan
    for null, kept in ((3, True), (5, False)):
        content = table(rows, ids=[None if i == null else i for i in range(2000)])
        pq.write_table(content, "in.parquet", row_group_size=10)
        stdin = as_stream(content) if source == "-" else None
        command = ("encode", source, "-o", "out.npz", "--force", "--on-bad-row", "skip")
        result = semid(*command, "--target", server.target, stdin=stdin)
        assert (result.exit_code == 0) == kept, result.output
        name = "standard input" if source == "-" else source
        assert kept or f"no null, as the id of row 5 of {name} is: use" in result.stderr
    done = server.calls("Encode")
    assert done < 2 * 200  # the second ended near its beginning
