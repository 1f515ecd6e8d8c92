"""Commands that are killed, refused, or run out of disk, and go on; bad rows; the summary.

The long sweep of kills, and the memory that 10 GB take, are run by

    pytest -m slow tests/client/cli/test_resume.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from semid_client.cli.root import root

D = 1024
BLOCK = (4 << 20) // (4 * D)
"""Rows that are sent as one block."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(make_server):
    return make_server(input_dim=D, max_message_bytes=2 << 20, max_rows=1 << 20)


def semid(*arguments):
    return CliRunner().invoke(root, [str(argument) for argument in arguments])


def embeddings(n):
    rows = np.zeros((n, D), np.float32)
    rows[:, 0] = np.random.default_rng(0).integers(0, 256, n)
    return rows


def write_parquet(name, n, *, bad=()):
    rows = embeddings(n)
    rows[list(bad), 7] = np.nan
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), D)
    ids = pa.array([f"item {i}" for i in range(n)])
    pq.write_table(
        pa.table({"id": ids, "embedding": lists}), name, row_group_size=1500, compression="none"
    )


def encode(server, source, output, *options):
    """Arguments of a command that records its progress after each block."""
    return [
        *("encode", source, "-o", output, "--save-every", "0"),
        *("--target", server.target, *options),
    ]


def slowed(server):
    """Let each message take 10 ms, so that a kill finds the command at work."""
    usual = server.usual_Encode

    def slowly(request, context):
        time.sleep(0.01)
        return usual(request, context)

    server.usual_Encode = slowly


def killed_within(process, folder, sign, moment):
    """Kill a process ``moment`` seconds after a sign of its work; tell whether it was alive."""
    while process.poll() is None:
        seen = moment is not None and any(folder.glob(sign))
        try:
            process.wait(moment if seen else 0.005)
        except subprocess.TimeoutExpired:
            if seen:
                process.kill()
    return process.returncode == -signal.SIGKILL


def kill_at_random_moments(server, folder, case, *, kills):
    """Kill the same command again and again; whenever it completes, compare what it wrote.

    It ends when one has gone on with what a killed one left.
    """
    source, output, options = case
    command = [sys.executable, "-m", "semid_client", *encode(server, source, output, *options)]
    slowed(server)
    whole = json.loads(subprocess.check_output([*command, "--json"]))["seconds"]
    made = [path for path in folder.iterdir() if path.name.startswith("out.")]
    expected = {path.name: path.read_bytes() for path in made}
    for path in made:
        path.unlink()
    rng = random.Random(0)  # noqa: S311 - not for secrets
    killed = resumed = 0
    while killed < kills or not resumed:
        begun = any(folder.glob("*.partial/progress.json"))
        moment = rng.uniform(0, whole / 2) if killed < kills or not begun else None
        sign = rng.choice(["*.partial", "*.partial/progress.json"])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, **pipes) as process:
            if killed_within(process, folder, sign, moment):
                killed += 1
                continue
            out, err = process.communicate()
        if b"exists already" in err:  # killed when all was done, but before it said so
            assert not (folder / f"{output}.partial").exists()
        else:
            assert process.returncode == 0, err
            resumed += b"by an earlier command" in out
        found = {p.name: p.read_bytes() for p in folder.iterdir() if p.name.startswith("out.")}
        assert found == expected
        for name in found:
            (folder / name).unlink()


CASES = [
    ("in.parquet", "out.parquet", ("--unique", "grid", "--on-bad-row", "skip")),
    ("in.npy", "out.npy", ()),
    ("in.npy", "out.pt", ()),
]


def test_a_command_that_is_killed_goes_on_to_the_same_bytes(server, folder):
    write_parquet("in.parquet", 12 * BLOCK, bad=[5, 6, 9000])
    kill_at_random_moments(server, folder, CASES[0], kills=5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_command_that_is_killed_thirty_times_goes_on_to_the_same_bytes(server, folder, case):
    write_parquet("in.parquet", 20 * BLOCK, bad=[5, 6, 9000])
    np.save("in.npy", embeddings(20 * BLOCK))
    kill_at_random_moments(server, folder, case, kills=30)


def fail_after(server, calls, failure):
    """Let the server answer some calls and then fail each one until told otherwise."""
    server.script["Encode"] += [None] * calls + [failure] * 1000


def no_more(_request, context):
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no more")


def begun(server, source, output, *options):
    """Fail in the middle; return what the whole command writes."""
    whole = semid(*encode(server, source, f"whole-{output}", *options))
    assert whole.exit_code == 0, whole.output
    fail_after(server, 13, no_more)
    result = semid(*encode(server, source, output, *options))
    assert result.exit_code == 1
    assert "no more" in result.stderr
    assert rows_done(output)
    server.script["Encode"].clear()


def rows_done(output):
    with open(f"{output}.partial/progress.json") as file:  # noqa: PTH123 - a plain name
        return json.load(file)["rows_in"]


def same(folder, output):
    return (folder / output).read_bytes() == (folder / f"whole-{output}").read_bytes()


def test_what_was_done_before_a_failure_is_not_done_again(server, folder):
    np.save("in.npy", embeddings(8 * BLOCK))
    begun(server, "in.npy", "out.npy")
    done, before = rows_done("out.npy"), server.calls("Encode")
    result = semid(*encode(server, "in.npy", "out.npy"))
    assert result.exit_code == 0, result.output
    assert f", {done:,} of them by an earlier command" in result.stdout
    assert server.calls("Encode") - before == (8 * BLOCK - done) * 4 * D // (1 << 20)
    assert same(folder, "out.npy")
    assert not (folder / "out.npy.partial").exists()


def changed_input(server):
    os.utime("in.npy", ns=(1, 1))
    return []


def changed_model(server):
    server.fingerprint = "0" * 64
    return []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed_input, "holds work that was begun with input"),
        (changed_model, f'was begun with fingerprint "{"f" * 64}", but now it is "0000'),
        (lambda _: ["--unique", "tiger"], 'begun with unique "none", but now it is "tiger"'),
        (lambda _: ["--on-bad-row", "skip"], 'begun with on_bad_row "fail"'),
    ],
)
def test_a_change_is_noticed_and_nothing_is_lost(server, folder, change, says):
    np.save("in.npy", embeddings(8 * BLOCK))
    begun(server, "in.npy", "out.npy")
    done = rows_done("out.npy")
    options = change(server)
    result = semid(*encode(server, "in.npy", "out.npy", *options))
    assert result.exit_code == 1
    assert says in result.stderr
    assert "--restart" in result.stderr
    assert rows_done("out.npy") == done
    result = semid(*encode(server, "in.npy", "out.npy", *options, "--restart"))
    assert result.exit_code == 0, result.output


def test_an_input_that_changes_while_it_is_read_gives_no_output(server, folder):
    np.save("in.npy", embeddings(8 * BLOCK))

    def touch(_request, _context):
        os.utime("in.npy", ns=(1, 1))

    server.script["Encode"] += [None] * 13 + [touch]
    result = semid(*encode(server, "in.npy", "out.npy"))
    assert result.exit_code == 1
    assert "in.npy: has changed while it was read: --restart reads it anew" in result.stderr
    assert not (folder / "out.npy").exists()
    assert semid(*encode(server, "in.npy", "out.npy")).exit_code == 1
    assert semid(*encode(server, "in.npy", "out.npy", "--restart")).exit_code == 0


def test_a_server_replaced_in_the_middle_is_refused_and_its_return_goes_on(server, folder):
    np.save("in.npy", embeddings(8 * BLOCK))
    semid(*encode(server, "in.npy", "whole-out.npy"))

    def replace(_request, _context):
        server.fingerprint = "0" * 64

    server.script["Encode"] += [None] * 13 + [replace]
    result = semid(*encode(server, "in.npy", "out.npy"))
    assert result.exit_code == 1
    assert "another codebook" in result.stderr or "0000" in result.stderr
    assert rows_done("out.npy")
    server.fingerprint = "f" * 64
    assert semid(*encode(server, "in.npy", "out.npy")).exit_code == 0
    assert same(folder, "out.npy")


def test_an_output_that_appears_meanwhile_is_kept_with_its_list(server, folder):
    np.save("in.npy", embeddings(8 * BLOCK))

    def appear(_request, _context):
        (folder / "out.npy").write_bytes(b"another's")
        (folder / "out.npy.bad-rows.jsonl").write_bytes(b"another's too")

    server.script["Encode"].append(appear)
    result = semid(*encode(server, "in.npy", "out.npy"))
    assert result.exit_code == 1
    assert "out.npy: exists" in result.stderr
    assert (folder / "out.npy").read_bytes() == b"another's"
    assert (folder / "out.npy.bad-rows.jsonl").read_bytes() == b"another's too"


def decode_calibrated(server, output):
    return ("decode", "in.npy", "-o", output, "--mode", "calibrated", "--target", server.target)


@pytest.mark.parametrize(
    ("when", "says"),
    [
        ("between two commands", "no more"),
        ("in the middle of one", f"calibration {'b' * 64}, but {'a' * 64} is expected"),
    ],
)
def test_vectors_of_two_calibrations_are_never_in_one_file(make_server, folder, when, says):
    server = make_server(calibration="a" * 64, max_rows=50_000)
    np.save("in.npy", np.zeros((3_000_000, 3), np.uint8))
    whole = semid(*decode_calibrated(server, "whole-out.npy"))
    assert whole.exit_code == 0, whole.output
    half = server.calls("Decode") // 2

    def calibrate(_request, _context):
        server.calibration = "b" * 64

    ends = [no_more] * 1000 if when == "between two commands" else [calibrate]
    server.script["Decode"] += [None] * half + ends
    result = semid(*decode_calibrated(server, "out.npy"))
    assert result.exit_code == 1
    assert says in result.stderr
    server.script["Decode"].clear()
    done = rows_done("out.npy")
    assert done
    server.calibration = "b" * 64
    result = semid(*decode_calibrated(server, "out.npy"))
    assert result.exit_code == 1
    begun, now = "a" * 64, "b" * 64
    assert f'begun with calibration "{begun}", but now it is "{now}"' in result.stderr
    assert rows_done("out.npy") == done
    server.calibration = "a" * 64
    assert semid(*decode_calibrated(server, "out.npy")).exit_code == 0
    assert same(folder, "out.npy")


@pytest.mark.parametrize("output", ["out.npy", "out.parquet", "out.jsonl"])
def test_a_full_disk_is_one_sentence_and_with_room_it_goes_on(server, folder, output):
    np.save("in.npy", embeddings(8 * BLOCK))
    semid(*encode(server, "in.npy", f"whole-{output}"))
    script = (
        "import resource, semid_client.cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))\n"
        "semid_client.cli.main()"
    )
    command = [sys.executable, "-c", script, *encode(server, "in.npy", output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"{output}.partial: keeps 3,072 rows, and the same command goes on with them\n"
        f"Error: {output}: File too large\n"
    )
    assert not (folder / output).exists()
    assert rows_done(output) == 3 * BLOCK
    assert semid(*encode(server, "in.npy", output)).exit_code == 0
    assert same(folder, output)


@pytest.mark.parametrize(
    ("output", "room"),
    [
        ("out.npy", 28_000),
        ("out.parquet", 35_000),
        pytest.param("out.pt", 40_000, marks=pytest.mark.slow),
        ("out.pt", 263_000),
    ],
)
def test_a_disk_that_is_full_at_the_end_leaves_all_rows_and_nothing_else(
    server, folder, output, room
):
    np.save("in.npy", embeddings(8 * BLOCK))
    options = ("--unique", "tiger")
    semid(*encode(server, "in.npy", f"whole-{output}", *options))
    script = (
        "import resource, semid_client.cli\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))\n"
        "semid_client.cli.main()"
    )
    command = [sys.executable, "-c", script, *encode(server, "in.npy", output, *options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert done.stderr.count("\n") == 2
    assert "keeps 8,192 rows" in done.stderr
    assert rows_done(output) == 8 * BLOCK
    kept = {path.name for path in (folder / f"{output}.partial").iterdir()}
    assert kept == {"lock", "rows.npy", "bad-rows.jsonl", "progress.json"}
    asked = server.calls("Encode")
    assert semid(*encode(server, "in.npy", output, *options)).exit_code == 0
    assert server.calls("Encode") == asked
    assert same(folder, output)


def test_bad_rows_are_left_out_counted_and_listed(server, folder):
    write_parquet("in.parquet", 3000, bad=[0, 1499, 2999])
    result = semid(*encode(server, "in.parquet", "out.parquet", "--on-bad-row", "skip", "--json"))
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["rows_written"], summary["bad_rows"]) == (3000, 2997, 3)
    listed = [
        json.loads(line) for line in (folder / summary["bad_rows_list"]).read_text().splitlines()
    ]
    assert [item["row"] for item in listed] == [0, 1499, 2999]
    assert listed[0]["problem"] == "number 7 is nan; embeddings are finite"
    out = pq.read_table("out.parquet")
    good = np.setdiff1d(np.arange(3000), [0, 1499, 2999])
    assert out["id"].to_pylist() == [f"item {i}" for i in good]
    np.testing.assert_array_equal(
        np.array(out["codes"].to_pylist()), server.expected_codes(embeddings(3000)[good])
    )


@pytest.mark.parametrize("output", ["out.parquet", "out.jsonl"])
def test_bad_rows_are_null_in_their_places(make_server, folder, output):
    server = make_server()
    lists = [[0.0] * 4, None, [1.0, 2.0], [1.0, None, 0, 0], [float("inf"), 0, 0, 0], [0.0] * 4]
    table = pa.table({"id": range(10, 16), "v": pa.array(lists, pa.list_(pa.float32()))})
    pq.write_table(table, "in.parquet")
    options = ("--on-bad-row", "null", "--unique", "grid")
    result = semid(*encode(server, "in.parquet", output, *options))
    assert result.exit_code == 0, result.output
    if output == "out.parquet":
        out = pq.read_table(output).to_pylist()
    else:
        out = [json.loads(line) for line in (folder / output).read_text().splitlines()]
    assert [item["id"] for item in out] == list(range(10, 16))
    assert [item["codes"] for item in out] == [[0, 1, 2, 1], *[None] * 4, [0, 1, 2, 2]]
    problems = [
        json.loads(line) for line in (folder / f"{output}.bad-rows.jsonl").read_text().splitlines()
    ]
    assert problems == [
        {"row": 1, "problem": "is null"},
        {"row": 2, "problem": "has 2 numbers; expected 4"},
        {"row": 3, "problem": "number 1 is null"},
        {"row": 4, "problem": "number 0 is inf; embeddings are finite"},
    ]
    back = semid(
        *("decode", output, "-o", "back.parquet", "--on-bad-row", "null", "--extra-digit"),
        *("--target", server.target),
    )
    assert back.exit_code == 0, back.output
    vectors = pq.read_table("back.parquet")["embedding"].to_pylist()
    assert vectors == [[3.0, 4.0, 5.0, 6.0], *[None] * 4, [3.0, 4.0, 5.0, 6.0]]


def test_the_summary_for_programs_says_what_was_done(server, folder):
    np.save("in.npy", embeddings(100))
    summary = json.loads(semid(*encode(server, "in.npy", "out.npy", "--json")).stdout)
    assert summary["fingerprint"] == "f" * 64
    assert summary["model"] == "fake"
    assert summary["bottleneck"] in summary["stage_seconds"]
    assert set(summary["stage_seconds"]) == {"reading", "server", "writing"}
    assert (summary["rows"], summary["rows_resumed"], summary["bad_rows_list"]) == (100, 0, None)


@pytest.mark.parametrize("options", [(), ("--rows", "7"), ("--all",)])
@pytest.mark.parametrize("output", ["out.npy", "out.parquet", "out.jsonl", "out.pt"])
def test_codes_of_the_embeddings_are_verified(server, folder, output, options):
    np.save("in.npy", embeddings(300))
    semid(*encode(server, "in.npy", output))
    result = semid("verify", output, "in.npy", *options, "--target", server.target, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["rows_checked"] == 7 if "--rows" in options else 300
    assert summary["fingerprint_recorded"] == (output == "out.parquet")


def test_rows_that_were_left_out_do_not_move_what_is_verified(server, folder):
    write_parquet("in.parquet", 300, bad=[0, 77])
    semid(*encode(server, "in.parquet", "out.npy", "--on-bad-row", "skip"))
    result = semid("verify", "out.npy", "in.parquet", "--all", "--target", server.target)
    assert result.exit_code == 0, result.output
    assert "298 of 300 rows checked, 0 differ" in result.stdout


def test_a_code_that_differs_is_shown_and_is_status_1(server, folder):
    np.save("in.npy", embeddings(300))
    semid(*encode(server, "in.npy", "out.npy"))
    codes = np.load("out.npy")
    codes[123, 1] += 1
    np.save("out.npy", codes)
    result = semid("verify", "out.npy", "in.npy", "--target", server.target)
    assert result.exit_code == 1
    assert f"row 123: out.npy has {codes[123].tolist()}, the model gives" in result.stdout
    assert "1 differ" in result.stdout


def test_files_that_do_not_belong_together_are_not_compared(server, folder):
    np.save("in.npy", embeddings(300))
    np.save("out.npy", np.zeros((299, 3), np.uint8))
    result = semid("verify", "out.npy", "in.npy", "--target", server.target)
    assert result.exit_code == 1
    assert "they do not belong together" in result.stderr


class Nowhere(list):
    """Ten gigabytes of requests are too many to keep."""

    def append(self, _):
        pass


@pytest.mark.slow
def test_ten_gigabytes_take_less_than_one_and_a_half_of_memory(server, folder):
    server.requests["Encode"] = Nowhere()
    shape = (10 * 10**9 // (4 * D), D)
    np.lib.format.open_memmap("in.npy", "w+", np.dtype("<f4"), shape)  # a sparse file
    script = (  # not what getrusage tells, which counts this process, too
        "import sys, semid_client.cli\n"
        "try: semid_client.cli.main()\n"
        "finally:\n"
        "    with open('/proc/self/status') as lines:\n"
        "        peak = next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
        "    print(peak, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, *encode(server, "in.npy", "out.npy")]
    done = subprocess.run(
        [*command, "--save-every", "1", "--unique", "grid"],
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"peak {int(done.stderr) / 1024:.0f} MiB; {done.stdout}")  # noqa: T201 - the measure
    assert int(done.stderr) * 1024 < 1.5e9
