"""The ray engine on a real cluster: several nodes on this machine, of which some are killed.

    pip install -c docker/constraints.txt -e '.[ray]'
    pytest -m 'slow or not slow' tests/e2e/test_ray.py

Without a cluster: `tests/server/cli/test_ray_engine.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="ray is not installed: pip install -c docker/constraints.txt -e '.[ray]'",
    ),
]

SEMID = [sys.executable, "-m", "semid_client"]
CLUSTER = [sys.executable, str(Path(__file__).with_name("ray_cluster.py"))]

N_FILES, FILE_ROWS = 12, 150_000
README = Path(__file__).parents[2] / "README.md"


class Nodes:
    """A cluster: an address, and nodes to kill."""

    def __init__(self, process):
        self._process = process
        self.address = self._said("address ")

    def kill_one(self):
        self._process.stdin.write("kill\n")
        self._process.stdin.flush()
        return int(self._said("killed "))

    def _said(self, expected):
        for line in self._process.stdout:
            if line.startswith(expected):
                return line.removeprefix(expected).strip()
        raise AssertionError(f"the cluster ended before it said {expected!r}")


@contextlib.contextmanager
def cluster(folder, nodes, cpus, env=os.environ):
    with (
        (folder / "cluster.log").open("w") as log,
        subprocess.Popen(
            [*CLUSTER, str(nodes), str(cpus)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as process,
    ):
        try:
            yield Nodes(process)
        finally:
            process.stdin.close()
            try:
                process.wait(60)
            finally:
                process.kill()


def write_input(folder, digits, n_files, n_rows):
    folder.mkdir()
    rng = np.random.default_rng(0)
    at = 0
    for i in range(n_files):
        n = n_rows + 7 * i
        rows = digits[rng.integers(0, len(digits), n)]
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
        table = pa.table({"id": [f"item {j}" for j in range(at, at + n)], "x": lists})
        pq.write_table(table, folder / f"{i:02}.parquet", row_group_size=5000)
        at += n
    return at


@pytest.fixture(scope="module")
def checkpoint(request):
    return Path(__file__).parents[1] / "reference/digits_rkmeans/model.ckpt"


@pytest.fixture(scope="module")
def work(tmp_path_factory, reference_set_named, checkpoint):
    """A folder with a large input, and the output of one machine."""
    folder = tmp_path_factory.mktemp("ray")
    write_input(folder / "in", reference_set_named("digits_rkmeans").embeddings, N_FILES, FILE_ROWS)
    flags = ("--checkpoint", str(checkpoint), "--device", "cpu", "--unique", "grid")
    subprocess.run(
        [*SEMID, "encode", "in", "-o", "here.parquet", *flags],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder


SMALL_BLOCKS = {"RAY_DATA_PARQUET_BIN_PACKING_BYTES": str(4 << 20)}
"""Ray reads as much at once: less than by default, so that there are many blocks here too."""


def ray_command(checkpoint, nodes, *flags):
    return [
        *(*SEMID, "encode", "in", "-o", "there.parquet", "--unique", "grid"),
        *("--checkpoint", str(checkpoint), "--device", "cpu", "--engine", "ray"),
        *("--ray-address", nodes.address, *flags),
    ]


def wait_for_parts(folder, process, n):
    """Until ``n`` parts are there; a part tells nobody that it is."""
    while len(list(folder.glob("there.parquet.parts/*/*.parquet"))) < n:
        assert process.poll() is None, "it ended before"
        time.sleep(0.05)


def assert_same(folder):
    assert (folder / "there.parquet").read_bytes() == (folder / "here.parquet").read_bytes()
    assert not (folder / "there.parquet.parts").exists()
    (folder / "there.parquet").unlink()


def test_the_command_of_the_readme_writes_what_one_machine_writes(tmp_path):
    (command,) = re.findall(r"^semid encode .* --engine ray .*$", README.read_text(), re.MULTILINE)
    movies = np.load(README.parent / "tests/reference/data/movies.npy")
    write_input(tmp_path / "embeddings", movies, 3, 1000)
    (tmp_path / "checkpoints").symlink_to(README.parent / "checkpoints")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    made = []
    for line in (command, command.partition(" --engine")[0]):
        done = subprocess.run(
            ["bash", "-c", line],  # noqa: S607 - as a reader would
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "codes.parquet: 3,021 rows" in done.stdout
        assert "Traceback" not in done.stderr
        made.append((tmp_path / "codes.parquet").read_bytes())
        (tmp_path / "codes.parquet").unlink()
    assert made[0] == made[1]


@pytest.mark.slow
def test_a_node_that_is_killed_changes_no_byte(work, checkpoint):
    # Each node has room for one encoder, and one CPU for what reads and writes.
    with cluster(work, nodes=2, cpus=3) as nodes:
        command = ray_command(
            checkpoint, nodes, *("--workers", "2", "--worker-cpus", "2", "--part-rows", "10000")
        )
        with subprocess.Popen(
            command,
            cwd=work,
            env=os.environ | SMALL_BLOCKS,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                wait_for_parts(work, process, 3)
                assert nodes.kill_one() > 0, "no encoder was lost"
                killed_with = len(list(work.glob("there.parquet.parts/*/*.parquet")))
                told, said = process.communicate(timeout=400)
            finally:
                process.kill()
        assert process.returncode == 0, said
        assert "there.parquet: 1,800,462 rows" in told
    assert killed_with < 15, "it was killed too late to be missed"
    assert_same(work)


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on(work, checkpoint):
    with cluster(work, nodes=1, cpus=3) as nodes:
        command = ray_command(checkpoint, nodes, "--workers", "1", "--part-rows", "10000")
        with subprocess.Popen(
            command, cwd=work, env=os.environ | SMALL_BLOCKS, stderr=subprocess.DEVNULL
        ) as process:
            try:
                wait_for_parts(work, process, 6)
            finally:
                process.send_signal(signal.SIGKILL)
        assert not (work / "there.parquet").exists()
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "there.parquet.parts: goes on, with " in done.stderr
    assert_same(work)


@pytest.mark.slow
def test_a_bad_row_is_told_from_a_node(work, checkpoint):
    bad = work / "in/05.parquet"
    good = bad.read_bytes()
    table = pq.read_table(bad)
    rows = table["x"].combine_chunks().flatten().to_numpy().copy()
    rows[64 * 1234 + 5] = np.nan
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows), 64)
    try:
        pq.write_table(table.set_column(1, "x", lists), bad, row_group_size=5000)
        with cluster(work, nodes=1, cpus=2) as nodes:
            done = subprocess.run(
                ray_command(checkpoint, nodes),
                cwd=work,
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 1
        said = "Error: in/05.parquet: row 1234: number 5 is nan; embeddings are finite\n"
        assert done.stderr.endswith(said), done.stderr
        assert "Traceback" not in done.stderr
    finally:
        bad.write_bytes(good)


@pytest.fixture
def s3():
    """The environment of who speaks to an S3 server with an empty bucket."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(
        command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            found = next(filter(None, (re.search(r"Running on (\S+)", x) for x in process.stderr)))
            # Its log of requests goes on; somebody has to read it.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            env = {
                "AWS_ENDPOINT_URL": found[1],
                "AWS_ACCESS_KEY_ID": "anybody",
                "AWS_SECRET_ACCESS_KEY": "knows",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_CONFIG_FILE": os.devnull,
            }
            yield os.environ | env
        finally:
            process.kill()


STORE = """
import fsspec
store = fsspec.filesystem("s3")
store.mkdir("bucket")
store.put("in", "bucket/in", recursive=True)
"""

FETCH = """
import fsspec
store = fsspec.filesystem("s3")
assert sorted(store.find("bucket/out")) == ["bucket/out/there.parquet"], store.find("bucket")
store.get_file("bucket/out/there.parquet", "there.parquet")
"""


@pytest.mark.slow
def test_input_output_and_parts_may_be_in_an_object_store(
    tmp_path, checkpoint, reference_set_named, s3
):
    digits = reference_set_named("digits_rkmeans").embeddings
    write_input(tmp_path / "in", digits, 3, 5000)

    def run(*command, env=os.environ):
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    flags = ("--unique", "tiger", "--checkpoint", str(checkpoint), "--device", "cpu")
    run(*SEMID, "encode", "in", "-o", "here.parquet", *flags)
    run(sys.executable, "-c", STORE, env=s3)
    with cluster(tmp_path, nodes=2, cpus=2, env=s3) as nodes:
        run(
            *(*SEMID, "encode", "s3://bucket/in", "-o", "s3://bucket/out/there.parquet", *flags),
            *("--engine", "ray", "--ray-address", nodes.address, "--parts", "s3://bucket/out"),
            env=s3,
        )
    run(sys.executable, "-c", FETCH, env=s3)
    made = (tmp_path / "there.parquet").read_bytes()
    assert made == (tmp_path / "here.parquet").read_bytes()
