"""Files of embeddings through a real server and through its checkpoint: the same bytes.

A server that is killed in the middle of a file, and comes back, or another in its place:

    pytest -m slow tests/e2e/test_files.py
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from file_formats import FORMATS, INPUTS, as_stream, read_output, table

from semid_client.cli.root import root

PATIENCE = 400.0


def semid(*arguments, stdin=None):
    result = CliRunner().invoke(root, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def engines(digits_server, reference_dir):
    """The flags that name a server, and those that name its checkpoint."""
    checkpoint = reference_dir / "digits_rkmeans/model.ckpt"
    return {
        "server": ("--target", digits_server.target),
        "checkpoint": ("--checkpoint", checkpoint, "--device", "cpu"),
    }


@pytest.fixture
def source(tmp_path, digits):
    ids = pa.array([f"digit {i}" for i in range(len(digits))])
    lists = pa.FixedSizeListArray.from_arrays(pa.array(digits.reshape(-1)), digits.shape[1])
    pq.write_table(pa.table({"id": ids, "x": lists}), tmp_path / "in.parquet", row_group_size=500)
    return tmp_path / "in.parquet"


def test_a_server_and_its_checkpoint_write_the_same_bytes(
    engines, source, tmp_path, reference_set_named
):
    for suffix in FORMATS:
        made = []
        for name, flags in engines.items():
            output = tmp_path / f"{name}.{suffix}"
            semid("encode", source, "-o", output, "--unique", "grid", *flags)
            made.append(output.read_bytes())
        assert made[0] == made[1]
    codes = np.load(tmp_path / "server.npy")
    np.testing.assert_array_equal(codes[:, :-1], reference_set_named("digits_rkmeans").codes)


@pytest.mark.parametrize(
    "source",
    [
        "list.parquet",
        "-",
        *(pytest.param(each, marks=pytest.mark.slow) for each in INPUTS if each != "list.parquet"),
    ],
)
def test_every_pair_of_formats_holds_the_recorded_codes(
    engines, digits, tmp_path, reference_set_named, source
):
    n = 200
    given = as_stream(table(digits[:n])) if source == "-" else INPUTS[source](tmp_path, digits[:n])
    source = source if source == "-" else tmp_path / source
    expected = reference_set_named("digits_rkmeans").codes[:n]
    for suffix in FORMATS:
        codes, back = tmp_path / f"out.{suffix}", tmp_path / f"back.{suffix}"
        flags = ("--unique", "grid", *engines["server"])
        semid("encode", source, "-o", codes, *flags, stdin=given)
        _, found = read_output(codes, "codes")
        np.testing.assert_array_equal(found[:, :-1], expected)
        alone = tmp_path / f"alone.{suffix}"
        flags = ("--unique", "grid", *engines["checkpoint"])
        semid("encode", source, "-o", alone, *flags, stdin=given)
        assert alone.read_bytes() == codes.read_bytes()
        if source != "-":
            flags = ("--all", "--extra-digit", *engines["server"])
            assert "200 of 200 rows checked, 0 differ" in semid("verify", codes, source, *flags)
        semid("decode", codes, "-o", back, "--extra-digit", *engines["server"])
        ids, vectors = read_output(back, "embedding")
        assert vectors.shape == (n, 64)
        assert ids is None or len(ids) == n


def save_bfloat16(path, rows):
    safetensors.torch.save_file({"x": torch.from_numpy(rows).bfloat16()}, path)


def save_lists(path, rows, kind):
    pq.write_table(pa.table({"x": pa.array(list(rows), kind)}), path)


FORMS = {
    "big_endian.npy": lambda path, rows: np.save(path, rows.astype(">f4")),
    "by_columns.npy": lambda path, rows: np.save(path, np.asfortranarray(rows)),
    "big_endian_by_columns.npy": lambda path, rows: np.save(path, np.asfortranarray(rows, ">f8")),
    "float16.npy": lambda path, rows: np.save(path, rows.astype(np.float16)),
    "float64.npy": lambda path, rows: np.save(path, rows.astype(np.float64)),
    "big_endian.npz": lambda path, rows: np.savez(path, rows.astype(">f4")),
    "bfloat16.safetensors": save_bfloat16,
    "turned.pt": lambda path, rows: torch.save(torch.from_numpy(rows.T.copy()).T, path),
    "float16.parquet": lambda path, rows: save_lists(
        path, rows.astype(np.float16), pa.list_(pa.float16())
    ),
    "large_lists.parquet": lambda path, rows: save_lists(path, rows, pa.large_list(pa.float32())),
}
"""Files of numbers that every type has, in the forms that numbers and rows can have."""


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_the_numbers_is_no_part_of_the_codes(
    engines, digits, tmp_path, reference_set_named, name
):
    rows = digits.copy()  # torch would warn of one that must not be written to
    assert (torch.from_numpy(rows).bfloat16().float().numpy() == rows).all()
    FORMS[name](tmp_path / name, rows)
    expected = reference_set_named("digits_rkmeans").codes
    for engine, flags in engines.items():
        semid("encode", tmp_path / name, "-o", tmp_path / f"{engine}.npy", *flags)
        np.testing.assert_array_equal(np.load(tmp_path / f"{engine}.npy"), expected)


def test_the_way_back_is_the_same_too(engines, source, tmp_path):
    codes = tmp_path / "codes.parquet"
    semid("encode", source, "-o", codes, *engines["checkpoint"])
    made = []
    for name, flags in engines.items():
        output = tmp_path / f"{name}.npy"
        semid("decode", codes, "-o", output, *flags)
        made.append(output.read_bytes())
    assert made[0] == made[1]


def test_what_a_server_wrote_its_checkpoint_verifies(engines, source, tmp_path):
    codes = tmp_path / "codes.parquet"
    semid("encode", source, "-o", codes, "--unique", "tiger", *engines["server"])
    told = json.loads(semid("verify", codes, source, "--all", "--json", *engines["checkpoint"]))
    assert (told["rows_checked"], told["rows_different"]) == (1797, 0)
    assert told["fingerprint_recorded"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--checkpoint", "nothing"], "nothing: "),
        (["--checkpoint", "CHECKPOINT", "--device", "tpu"], "device 'tpu' is not one of"),
        (["--checkpoint", "CHECKPOINT", "--fingerprint", "0" * 64], "but 0000"),
        (["--checkpoint", "CHECKPOINT", "--target", "x"], "exclude each other"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_one_sentence(
    reference_dir, source, tmp_path, flags, says
):
    checkpoint = str(reference_dir / "digits_rkmeans/model.ckpt")
    flags = [checkpoint if flag == "CHECKPOINT" else flag for flag in flags]
    result = CliRunner().invoke(
        root, ["encode", str(source), "-o", str(tmp_path / "out.npy"), *flags]
    )
    assert result.exit_code in {1, 2}
    assert says in result.stderr
    assert not (tmp_path / "out.npy").exists()
    assert not (tmp_path / "out.npy.partial").exists()


def test_codes_and_modes_that_a_checkpoint_lacks_are_one_sentence(reference_dir, tmp_path):
    checkpoint = reference_dir / "movies_rkmeans_64/model.ckpt"
    np.save(tmp_path / "codes.npy", np.array([[0, 0, 0], [0, 64, 0]]))
    arguments = ["decode", tmp_path / "codes.npy", "-o", tmp_path / "out.npy"]
    for more, says in (
        ([], "row 1: code 64 of layer 1 is out of range; the layer has 64 centroids"),
        (["--mode", "calibrated"], "mode calibrated needs residual norms"),
    ):
        result = CliRunner().invoke(
            root, [str(a) for a in [*arguments, *more, "--checkpoint", checkpoint]]
        )
        assert result.exit_code == 1
        assert says in result.stderr


@pytest.fixture
def long_file(tmp_path, digits):
    """An input that takes a few seconds, and a command for it."""
    rows = np.tile(digits, (400, 1))
    np.save(tmp_path / "in.npy", rows)
    command = [sys.executable, "-m", "semid_client", "encode", "in.npy", "-o", "out.npy"]
    return [*command, "--save-every", "0", "--unique", "grid", "--timeout", "300", "--target"]


def begun(command, target, folder):
    """Start the command, and wait until some rows are done."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, target], cwd=folder, **pipes)
    while not (folder / "out.npy.partial/progress.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    return process


def whole(reference_set, n):
    return np.tile(reference_set.codes, (400, 1))[:n]


@pytest.mark.slow
def test_a_server_that_is_killed_in_the_middle_is_waited_for(
    serve, lasting_port, reference_set_named, tmp_path, long_file
):
    checkpoint = reference_set_named("digits_rkmeans").checkpoint
    server = serve(checkpoint, "--port", lasting_port())
    with begun(long_file, server.target, tmp_path) as process:
        try:
            server.signal(signal.SIGKILL)
            server.wait()
            done = json.loads((tmp_path / "out.npy.partial/progress.json").read_text())["rows_in"]
            serve(checkpoint, "--port", server.target.rpartition(":")[2])
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 0, err
    codes = np.load(tmp_path / "out.npy")
    assert done < len(codes)
    expected = whole(reference_set_named("digits_rkmeans"), len(codes))
    np.testing.assert_array_equal(codes[:, :-1], expected)
    assert "718,800 rows" in out


@pytest.mark.slow
def test_another_model_in_the_middle_is_refused_and_the_first_goes_on(
    serve, lasting_port, reference_set_named, tmp_path, long_file
):
    first, other = (
        reference_set_named(name).checkpoint
        for name in ("digits_rkmeans", "digits_rkmeans_raw_residuals")
    )
    port = lasting_port()
    server = serve(first, "--port", port)
    with begun(long_file, server.target, tmp_path) as process:
        try:
            server.signal(signal.SIGKILL)
            server.wait()
            another = serve(other, "--port", port)
            _, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "FAILED_PRECONDITION" in err or "another codebook" in err
    assert "rows, and the same command goes on with them" in err
    assert not (tmp_path / "out.npy").exists()
    again = subprocess.run(
        [*long_file, server.target], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "holds work that was begun with fingerprint" in again.stderr
    another.stop()
    serve(first, "--port", port)
    command = [*long_file, server.target]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "by an earlier command" in out
    codes = np.load(tmp_path / "out.npy")
    expected = whole(reference_set_named("digits_rkmeans"), len(codes))
    np.testing.assert_array_equal(codes[:, :-1], expected)
