"""`semid encode`, `semid decode` and `semid info`, as somebody types them."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from semid.v1 import semid_pb2 as pb
from semid_client.cli.root import root

FINGERPRINT = "f" * 64
SEMID = [sys.executable, "-c", "import semid_client.cli; semid_client.cli.main()"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def semid(*arguments, **environment):
    return CliRunner().invoke(root, [str(argument) for argument in arguments], env=environment)


def save(path, n, dtype=np.float32, n_columns=4):
    rows = np.zeros((n, n_columns), dtype)
    rows[:, 0] = np.arange(n) % 50
    np.save(path, rows)
    return rows


@pytest.mark.parametrize("n", [0, 1, 12, 95])
@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
def test_a_file_of_embeddings_becomes_a_file_of_codes(make_server, folder, n, dtype):
    server = make_server(max_rows=10, code_dtype=pb.DATA_TYPE_UINT16)
    rows = save("in.npy", n, dtype)
    result = semid("encode", "in.npy", "-o", "out.npy", "--target", server.target)
    assert (result.exit_code, result.stderr) == (0, "")
    codes = np.load("out.npy")
    np.testing.assert_array_equal(codes, server.expected_codes(rows))
    assert (codes.dtype, codes.shape) == (np.uint16, (n, 3))
    assert names(folder) == ["in.npy", "out.npy"]


def test_a_file_of_codes_becomes_a_file_of_reconstructions(make_server, folder):
    server = make_server(max_rows=10)
    codes = save("in.npy", 95, np.int64, 2)
    result = semid("decode", "in.npy", "-o", "out.npy", "--target", server.target)
    assert (result.exit_code, result.stderr) == (0, "")
    vectors = np.load("out.npy")
    np.testing.assert_array_equal(vectors, server.expected_reconstruction(codes))
    assert vectors.dtype == np.float32


def test_the_last_line_tells_rows_speed_and_fingerprint(server, folder):
    save("in.npy", 5)
    result = semid("encode", "in.npy", "-o", "out.npy", "--target", server.target)
    assert re.match(r"out\.npy: 5 rows in [\d.]+ s \(", result.stdout), result.stdout
    assert result.stdout.endswith(f" rows/s), fingerprint {FINGERPRINT}\n")


def test_the_environment_stands_in_for_the_flags(server, folder):
    save("in.npy", 5)
    result = semid(
        "encode",
        "in.npy",
        SEMID_TARGET=server.target,
        SEMID_ENCODE_OUTPUT="out.npy",
        SEMID_TOKEN="an open secret",  # noqa: S106 - it opens nothing
        SEMID_FINGERPRINT=FINGERPRINT,
        SEMID_MODEL="fake",
    )
    assert result.exit_code == 0, result.output
    assert server.metadata[0]["authorization"] == "Bearer an open secret"
    assert server.requests["Encode"][0].expected_fingerprint == FINGERPRINT
    assert server.requests["Encode"][0].model == "fake"


def test_an_output_that_exists_is_refused_before_any_work(server, folder):
    save("in.npy", 5)
    (folder / "out.npy").write_text("precious")
    result = semid("encode", "in.npy", "-o", "out.npy", "--target", server.target)
    assert result.exit_code == 1
    assert result.stderr == "Error: out.npy: exists already; --force replaces it\n"
    assert (folder / "out.npy").read_text() == "precious"
    assert not server.metadata


def test_an_output_that_exists_is_replaced_by_force(server, folder):
    save("in.npy", 5)
    save("out.npy", 1)
    result = semid("encode", "in.npy", "-o", "out.npy", "--force", "--target", server.target)
    assert result.exit_code == 0
    assert len(np.load("out.npy")) == 5


@pytest.mark.parametrize("name", ["in.npy", "./in.npy", "link.npy", "hardlink.npy"])
def test_the_input_is_never_the_output(server, folder, name):
    save("in.npy", 5)
    (folder / "link.npy").symlink_to("in.npy")
    (folder / "hardlink.npy").hardlink_to("in.npy")
    result = semid("encode", "in.npy", "-o", name, "--force", "--target", server.target)
    assert result.exit_code == 1
    assert "is the input too; give the output another name" in result.stderr
    assert len(np.load("in.npy")) == 5


def wide(path):
    save(path, 3, n_columns=5)


def with_nan(path):
    rows = save(path, 95)
    rows[77, 2] = np.nan
    np.save(path, rows)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _: None, "in.npy: No such file or directory"),
        (lambda path: path.write_text("a,b\n1,2\n"), "in.npy: not a .npy file"),
        (lambda path: path.mkdir(), "in.npy: Is a directory"),
        (lambda path: np.save(path, np.zeros(4)), "in.npy: has shape (4,); expected (rows, col"),
        (lambda path: np.save(path, [[None]], allow_pickle=True), "in.npy: holds Python objects"),
        (lambda path: save(path, 5, int), "in.npy: embeddings are int64; expected float32"),
        (wide, "in.npy: has rows of 5 numbers, but model 'fake' at 127.0.0.1:PORT takes embeddi"),
        (with_nan, "in.npy: row 77: number 2 is nan; embeddings are finite"),
    ],
)
def test_an_input_that_cannot_be_encoded_is_one_sentence(make_server, folder, make, says):
    server = make_server(max_rows=10)
    make(folder / "in.npy")
    result = semid("encode", "in.npy", "-o", "out.npy", "--target", server.target)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: " + says.replace("PORT", str(server.port)))
    assert result.stderr.count("\n") == 1
    assert not (folder / "out.npy").exists()
    assert not [name for name in names(folder) if "partial" in name]


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        (np.zeros((5, 3)), "in.npy: codes are float64; expected an integer type"),
        (np.zeros((5, 4), int), "in.npy: has rows of 4 codes, but model 'fake' at 127.0.0.1"),
        (np.zeros((5, 0), int), "in.npy: has rows of 0 codes"),
        (np.arange(300)[:, None], "in.npy: row 256: code 256 of layer 0 is out of range"),
        (-np.arange(30)[:, None], "in.npy: row 1: code -1 of layer 0 is out of range"),
    ],
)
def test_an_input_that_cannot_be_decoded_is_one_sentence(make_server, folder, codes, says):
    server = make_server(max_rows=10)
    np.save("in.npy", codes)
    result = semid("decode", "in.npy", "-o", "out.npy", "--target", server.target)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: " + says)
    assert names(folder) == ["in.npy"]


@pytest.mark.parametrize("in_flight", [1, 3, 4, 5, 13])
@pytest.mark.parametrize("command", ["encode", "verify"])
def test_as_many_messages_are_under_way_as_are_asked_for(make_server, folder, command, in_flight):
    server = make_server(input_dim=1 << 16)
    save("in.npy", 64, n_columns=1 << 16)  # in messages of 3 rows
    if command == "verify":
        np.save("out.npy", server.expected_codes(np.load("in.npy")))
    together = threading.Barrier(in_flight)
    under_way, most = set(), []

    def wait_for_all(request, _context):
        with server.lock:
            under_way.add(id(request))
        together.wait(30)

    def answer(request, context):
        with server.lock:
            under_way.add(id(request))
            most.append(len(under_way))
        answer = usual(request, context)
        with server.lock:
            under_way.discard(id(request))
        return answer

    usual, server.usual_Encode = server.usual_Encode, answer
    server.script["Encode"] += [wait_for_all] * in_flight
    paths = ["out.npy", "in.npy", "--all"] if command == "verify" else ["in.npy", "-o", "out.npy"]
    result = semid(command, *paths, "--target", server.target, "--in-flight", in_flight)
    assert result.exit_code == 0, result.output
    assert max(most) == in_flight


def test_a_mode_that_the_model_lacks_is_one_sentence(server, folder):
    save("in.npy", 5, int, 3)
    result = semid(
        *("decode", "in.npy", "-o", "out.npy", "--target", server.target, "--mode", "calibrated")
    )
    assert result.exit_code == 1
    assert "the checkpoint has no norms" in result.stderr
    assert names(folder) == ["in.npy"]


@pytest.mark.parametrize("command", ["encode in.npy -o out.npy", "info"])
def test_a_server_that_is_not_there_is_named_with_what_to_do(folder, command):
    save("in.npy", 5)
    result = semid(*command.split(), "--target", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "GetModel at 127.0.0.1:1 failed with UNAVAILABLE" in result.stderr
    assert "check that a semid server runs at that address" in result.stderr
    assert names(folder) == ["in.npy"]


def test_another_model_than_expected_is_refused(server, folder):
    save("in.npy", 5)
    result = semid(
        *("encode", "in.npy", "-o", "out.npy", "--target", server.target),
        *("--fingerprint", "0" * 64),
    )
    assert result.exit_code == 1
    assert FINGERPRINT in result.stderr
    assert names(folder) == ["in.npy"]


def test_a_model_replaced_in_the_middle_leaves_no_output(make_server, folder):
    server = make_server(max_rows=10)
    save("in.npy", 95)

    def replace(_request, _context):
        server.fingerprint = "0" * 64

    server.script["Encode"] += [None, None, replace]
    result = semid("encode", "in.npy", "-o", "out.npy", "--target", server.target)
    assert result.exit_code == 1
    assert "FAILED_PRECONDITION" in result.stderr or "another codebook" in result.stderr
    assert names(folder) == ["in.npy"]


def test_a_server_that_restarts_in_the_middle_is_waited_for(make_server, folder):
    server = make_server(max_rows=10)
    rows = save("in.npy", 95)

    def away(_request, context):
        context.abort(grpc.StatusCode.UNAVAILABLE, "draining")

    server.script["Encode"] += [None, None, *[away] * 10]
    result = semid("encode", "in.npy", "-o", "out.npy", "--target", server.target)
    assert result.exit_code == 0
    np.testing.assert_array_equal(np.load("out.npy"), server.expected_codes(rows))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["encode", "in.npy", "-o", "out.npy"], "Missing option '--target' (env var: 'SEMID_TARG"),
        (["encode", "in.npy", "--target", "x"], "Missing option '-o' / '--output'"),
        (["encode", "-o", "out.npy", "--target", "x"], "Missing argument 'IN'"),
        (["decode", "in.npy", "-o", "out.npy", "--target", "x", "--mode", "y"], "'y' is not one"),
        (["info", "--target", "x", "--timeout", "0"], "0.0 is not in the range x>0"),
    ],
)
def test_a_wrong_use_is_status_2(folder, arguments, says):
    result = semid(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr


def test_an_interrupt_leaves_no_output_and_no_traceback(make_server, folder):
    server, came = make_server(max_rows=10), threading.Event()
    release = threading.Event()

    def hold(_request, _context):
        came.set()
        release.wait()

    server.script["Encode"] += [None, None, hold]
    save("in.npy", 95)
    command = [*SEMID, "encode", "in.npy", "-o", "out.npy", "--target", server.target]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert came.wait(300)
            assert any("partial" in name for name in names(folder))
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=300)
        finally:
            process.kill()
            release.set()
    assert (process.returncode, stderr) == (130, "Interrupted.\n")
    assert names(folder) == ["in.npy"]


def test_a_second_interrupt_ends_at_once(make_server, folder):
    server, came = make_server(max_rows=10), threading.Event()
    release = threading.Event()

    def hold(_request, _context):
        came.set()
        release.wait()

    server.script["Encode"] += [None, None, hold]
    save("in.npy", 95)
    # A first interrupt whose tidying up lasts for ever, as where a disk does not answer.
    script = (
        "import sys, threading, semid_client.cli\n"
        "from semid_client.cli import _engines\n"
        "def close(self):\n"
        "    print('closing', file=sys.stderr, flush=True)\n"
        "    threading.Event().wait()\n"
        "_engines.ServerEngine.close = close\n"
        "semid_client.cli.main()"
    )
    command = [sys.executable, "-c", script, "encode", "in.npy", "-o", "out.npy"]
    pipes = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--target", server.target], **pipes) as process:
        try:
            assert came.wait(300)
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() == "closing\n"
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=300)
        finally:
            process.kill()
            release.set()
    assert (process.returncode, stderr) == (-signal.SIGINT, "")


def test_a_terminal_sees_progress_and_the_stage_that_the_others_wait_for(make_server, folder):
    server = make_server(max_rows=10)
    usual = server.usual_Encode

    def slowly(request, context):
        threading.Event().wait(0.1)
        return usual(request, context)

    server.usual_Encode = slowly
    save("in.npy", 95)
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    command = [*SEMID, "encode", "in.npy", "-o", "out.npy", "--target", server.target]
    seen = b""
    with subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL) as process:
        os.close(stderr)
        with open(terminal, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # noqa: PTH123 - a descriptor
            while chunk := screen.read(1 << 16):  # a terminal ends by an error
                seen += chunk
    assert process.returncode == 0, seen
    assert b"95.0/95.0 [" in seen
    assert b"row/s, " in seen
    assert b"B/s, server]" in seen


def write_sparse_npy(name, n):
    np.lib.format.open_memmap(name, "w+", np.dtype("<f4"), (n, 1024))  # a sparse file


def write_one_row_group(name, n):
    """All rows in one row group, as the library writes by default."""
    schema = pa.schema({"x": pa.list_(pa.float32(), 1024)})
    with pq.ParquetWriter(name, schema, compression="none", use_dictionary=False) as writer:
        lists = pa.FixedSizeListArray.from_arrays(np.zeros(n << 10, np.float32), 1024)
        writer.write_table(pa.table([lists], schema=schema), row_group_size=n)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        ("npy", write_sparse_npy),
        pytest.param("parquet", write_one_row_group, marks=pytest.mark.slow),
    ],
)
def test_memory_does_not_grow_with_the_file(make_server, folder, suffix, write):
    server = make_server(input_dim=1024, max_message_bytes=2 << 20, max_rows=1 << 20)
    write(f"small.{suffix}", 1 << 12)
    write(f"large.{suffix}", 1 << 16)
    peaks = {}
    script = (
        "import re, sys, semid_client.cli\n"
        "try: semid_client.cli.main()\n"
        "finally:\n"
        # Not what getrusage says: that begins with the memory of the process which started it.
        "    with open('/proc/self/status') as status:\n"
        "        peak = re.search(r'VmHWM:\\s+(\\d+) kB', status.read())[1]\n"
        "    print(int(peak) >> 10, file=sys.stderr)"
    )
    for name in ("small", "large"):
        done = subprocess.run(
            [sys.executable, "-c", script, "encode", f"{name}.{suffix}", "-o", f"{name}-codes.npy"],
            env=os.environ | {"SEMID_TARGET": server.target},
            capture_output=True,
            text=True,
            timeout=400,
            check=True,
        )
        peaks[name] = int(done.stderr.split()[-1])
    assert os.stat(f"large.{suffix}").st_size > 256 << 20  # noqa: PTH116 - a plain name
    assert peaks["large"] < peaks["small"] + 60  # MiB


def test_info_describes_the_model_to_people(server):
    result = semid("info", "--target", server.target)
    assert result.exit_code == 0
    for fact in (FINGERPRINT, "rq-kmeans", "4 numbers", "3 of uint8, from codebooks of 256, 256"):
        assert fact in result.stdout


def test_info_describes_the_model_to_programs(server):
    result = semid("info", "--json", "--target", server.target)
    assert json.loads(result.stdout) == {
        "name": "fake",
        "fingerprint": FINGERPRINT,
        "kind": "rq-kmeans",
        "input_dim": 4,
        "layers": [{"codebook_width": 256, "embedding_dim": 4}] * 3,
        "normalize_residuals": True,
        "code_dtype": "uint8",
        "decode_modes": ["sum"],
        "limits": {"max_message_bytes": 1 << 20, "max_rows": 1000, "shared_memory": None},
        "calibration": "",
    }
