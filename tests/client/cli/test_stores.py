"""Files in object stores: a real S3 server in a process of its own, and a store in memory.

The sweep of kills while an output is uploaded is run by

    pytest -m slow tests/client/cli/test_stores.py
"""

import contextlib
import json
import os
import queue
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import grpc
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from file_formats import FORMATS, INPUTS, NAMED, ids_of

from semid_client.cli.root import root
from semid_client.files import FileError, Work

N, D = 95, 1024
SEMID = [sys.executable, "-c", "import semid_client.cli; semid_client.cli.main()"]


@pytest.fixture(scope="module")
def s3():
    """An S3 server, in the environment of this process and of those it starts."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with (
        subprocess.Popen(command, text=True, **pipes) as process,
        pytest.MonkeyPatch.context() as p,
    ):
        try:
            lines = queue.SimpleQueue()
            reader = threading.Thread(
                target=lambda: [lines.put(line) for line in process.stderr], daemon=True
            )
            reader.start()
            while not (found := re.search(r"Running on (\S+)", lines.get(timeout=300))):
                pass
            p.setenv("AWS_ENDPOINT_URL", found[1])
            p.setenv("AWS_ACCESS_KEY_ID", "anybody")
            p.setenv("AWS_SECRET_ACCESS_KEY", "knows")  # an open secret
            p.setenv("AWS_DEFAULT_REGION", "us-east-1")
            p.setenv("AWS_CONFIG_FILE", os.devnull)
            store = fsspec.filesystem("s3", use_listings_cache=False)
            store.mkdir("bucket")
            yield store
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            process.kill()
            process.wait()
            reader.join()


@pytest.fixture
def store(s3):
    """The same, with nothing in its one bucket."""
    for key in s3.find("bucket"):
        s3.rm_file(key)
    return s3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def semid(*arguments):
    return CliRunner().invoke(root, [str(argument) for argument in arguments])


def embeddings(n=N, width=4):
    rows = np.zeros((n, width), np.float32)
    rows[:, 0] = np.arange(n) % 50
    return rows


def upload(store, folder, name):
    """Put what a test wrote under ``name`` into the bucket, a folder as it is."""
    first = name.partition("/")[0]
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).parts[0] == first:
            store.put_file(str(path), f"bucket/{path.relative_to(folder)}")


@pytest.mark.parametrize("source", INPUTS)
def test_every_input_is_read_from_a_store_as_from_a_disk(server, store, folder, source):
    INPUTS[source](folder, embeddings())
    upload(store, folder, source)
    for name in (source, f"s3://bucket/{source}"):
        output = folder / f"{len(name)}.parquet"
        result = semid("encode", name, "-o", output, "--target", server.target)
        assert result.exit_code == 0, result.output
    here, there = sorted(folder.glob("[0-9]*.parquet"))
    assert here.read_bytes() == there.read_bytes()
    assert pq.read_table(here)["id"].to_pylist() == (
        ids_of(N) if source in NAMED else list(range(N))
    )
    whole = semid("verify", here, f"s3://bucket/{source}", "--all", "--target", server.target)
    assert whole.exit_code == 0, whole.output


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_output_is_written_to_a_store_as_to_a_disk_and_read_again(
    server, store, folder, suffix
):
    INPUTS["list.parquet"](folder, embeddings())
    target = ("--target", server.target)
    for to in ("", "s3://bucket/"):
        for command, source, output in (
            ("encode", "list.parquet", f"{to}codes.{suffix}"),
            ("decode", f"{to}codes.{suffix}", f"{to}back.{suffix}"),
            ("verify", f"{to}codes.{suffix}", "list.parquet"),
        ):
            arguments = (source, output) if command == "verify" else (source, "-o", output)
            result = semid(command, *arguments, *target)
            assert result.exit_code == 0, result.output
    for name in (f"codes.{suffix}", f"back.{suffix}"):
        assert store.cat_file(f"bucket/{name}") == (folder / name).read_bytes()
    assert sorted(store.find("bucket")) == [f"bucket/back.{suffix}", f"bucket/codes.{suffix}"]
    assert not list(folder.glob("*.partial"))


def test_a_file_url_is_this_machine(server, folder):
    np.save("in.npy", embeddings())
    command = ("encode", f"file://{folder}/in.npy", "-o", f"file://{folder}/out.npy")
    result = semid(*command, "--target", server.target)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load("out.npy"), server.expected_codes(embeddings()))
    result = semid(*command, "--target", server.target)
    assert "out.npy: exists already; --force replaces it" in result.stderr


def test_any_store_that_fsspec_knows_will_do(server, folder):
    store = fsspec.filesystem("memory")
    np.save("in.npy", embeddings())
    store.put_file("in.npy", "/bucket/in.npy")
    command = ("encode", "memory://bucket/in.npy", "-o", "memory://bucket/out.npy")
    result = semid(*command, "--target", server.target)
    assert result.exit_code == 0, result.output
    np.save("out.npy", server.expected_codes(embeddings()))
    assert store.cat_file("/bucket/out.npy") == (folder / "out.npy").read_bytes()
    store.rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("s3://bucket/none.npy", "out.npy"), "s3://bucket/none.npy: there is no such object"),
        (("s3://bucket/none.parquet", "out.npy"), "s3://bucket/none.parquet: there is no such obj"),
        (("s3://bucket/none", "out.npy"), "s3://bucket/none: there is no such object"),
        (
            ("s3://bucket/*.parquet", "out.npy"),
            "s3://bucket/*.parquet: there are no .parquet",
        ),
        (
            ("s3://none/in.npy", "out.npy"),
            "s3://none/in.npy: there is no such object (The spec",
        ),
        (("in.npy", "s3://none/out.npy"), "s3://none/out.npy: there is no bucket 'none'"),
        (("in.npy", "s3://bucket/in.csv"), "s3://bucket/in.csv: give it a name that ends in .npy"),
        (("in.npy", "nostore://bucket/out.npy"), "is no URL that can be used: Protocol not known"),
        (("file://in.npy", "out.npy"), "file://in.npy: a file:// URL has a whole path after it"),
        (("s3://bucket/taken.npy", "s3://bucket/taken.npy"), "is the input too; give the output"),
        (("in.npy", "s3://bucket/taken.npy"), "s3://bucket/taken.npy: exists already; --force rep"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_sentence(server, store, folder, arguments, says):
    source, output = arguments
    np.save("in.npy", embeddings())
    store.put_file("in.npy", "bucket/taken.npy")
    result = semid("encode", source, "-o", output, "--target", server.target)
    assert result.exit_code == 1, result.output
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert server.calls("Encode") == 0
    assert [path.name for path in folder.iterdir()] == ["in.npy"]


def test_an_object_is_replaced_by_force(server, store, folder):
    np.save("in.npy", embeddings())
    store.put_file("in.npy", "bucket/out.npy")
    store.put_file("in.npy", "bucket/out.npy.bad-rows.jsonl")
    command = ("encode", "in.npy", "-o", "s3://bucket/out.npy", "--target", server.target)
    assert semid(*command, "--force").exit_code == 0
    np.save("whole.npy", server.expected_codes(embeddings()))
    assert store.cat_file("bucket/out.npy") == (folder / "whole.npy").read_bytes()
    assert store.find("bucket") == ["bucket/out.npy"]  # the list was of what was replaced


def test_bad_rows_are_listed_beside_the_object_and_verify_finds_them(server, store, folder):
    rows = embeddings()
    rows[[3, 77]] = np.nan
    np.save("in.npy", rows)
    command = ("encode", "in.npy", "-o", "s3://bucket/out.npy", "--target", server.target)
    result = semid(*command, "--on-bad-row", "skip")
    assert "2 bad ones listed in s3://bucket/out.npy.bad-rows.jsonl" in result.stdout
    lines = store.cat_file("bucket/out.npy.bad-rows.jsonl").splitlines()
    assert [json.loads(line)["row"] for line in lines] == [3, 77]
    result = semid("verify", "s3://bucket/out.npy", "in.npy", "--all", "--target", server.target)
    assert "93 of 95 rows checked, 0 differ" in result.stdout


def work_folder(folder):
    (found,) = folder.glob("out.npy.*.partial")
    return found


@pytest.fixture
def wide_server(make_server):
    return make_server(input_dim=D, max_message_bytes=2 << 20, max_rows=1 << 20)


def fail_after(server, calls):
    def no_more(_request, context):
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no more")

    server.script["Encode"] += [None] * calls + [no_more] * 1000


def test_work_on_an_object_goes_on_where_its_folder_is_and_says_so(wide_server, store, folder):
    np.save("in.npy", embeddings(8 << 10, D))
    store.put_file("in.npy", "bucket/in.npy")
    arguments = ["encode", "s3://bucket/in.npy", "-o", "s3://bucket/out.npy", "--save-every", "0"]
    arguments += ["--target", wide_server.target]
    fail_after(wide_server, 13)
    result = semid(*arguments)
    assert result.exit_code == 1
    assert "s3://bucket/out.npy: begins at row 0; what is done is kept in out.npy." in result.stderr
    assert store.find("bucket") == ["bucket/in.npy"]
    done = json.loads((work_folder(folder) / "progress.json").read_text())["rows_in"]
    assert done
    wide_server.script["Encode"].clear()
    (folder / "elsewhere").mkdir()
    other = semid(*arguments, "--work-dir", "elsewhere", "--json")
    assert json.loads(other.stdout)["rows_resumed"] == 0
    assert "begins at row 0; what is done is kept in elsewhere/out.npy." in other.stderr
    whole = store.cat_file("bucket/out.npy")
    store.rm_file("bucket/out.npy")
    result = semid(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert f"s3://bucket/out.npy: goes on with {done:,} rows in out.npy." in result.stderr
    assert json.loads(result.stdout)["rows_resumed"] == done
    assert store.cat_file("bucket/out.npy") == whole
    assert not list(folder.glob("*.partial"))


def test_an_object_that_was_replaced_is_another_input(wide_server, store, folder):
    rows = embeddings(8 << 10, D)
    np.save("in.npy", rows)
    store.put_file("in.npy", "bucket/in.npy")
    arguments = ["encode", "s3://bucket/in.npy", "-o", "s3://bucket/out.npy", "--save-every", "0"]
    arguments += ["--target", wide_server.target]
    fail_after(wide_server, 13)
    assert semid(*arguments).exit_code == 1
    rows[-1, -1] = 1
    np.save("in.npy", rows)
    store.put_file("in.npy", "bucket/in.npy")
    result = semid(*arguments)
    assert result.exit_code == 1
    assert "holds work that was begun with input" in result.stderr
    assert work_folder(folder).exists()


def begun(folder, url):
    """Work that is done but for its output's appearance."""
    work = Work(url, work_dir=folder)
    work.begin({"input": []}, 1, np.dtype(np.uint8))
    work.append(3, np.array([[1], [2], [3]], np.uint8), {})
    work.rows().close()
    return work


def leave(work):
    """Leave a folder as a killed process does."""
    for file in (work._lock, work._rows, work._bad):
        file.close()


def test_a_kill_after_the_upload_is_seen_as_done_and_another_object_is_left_alone(store, folder):
    work = begun(folder, "s3://bucket/out.npy")
    work.progress.publishing = True
    work.save()
    store.put_file(str(work.folder / "rows.npy"), "bucket/out.npy")
    leave(work)
    before = store.info("bucket/out.npy")["LastModified"]
    with Work("s3://bucket/out.npy", work_dir=folder) as work:
        assert work.begin({"input": []}, 1, np.dtype(np.uint8)).rows_in == 3
        work.rows().close()
        work.publish(work.folder / "rows.npy")
        assert work.published
    assert store.info("bucket/out.npy")["LastModified"] == before
    store.rm_file("bucket/out.npy")

    def replace_by_another():
        with begun(folder, "s3://bucket/out.npy") as work:
            work.progress.publishing = True
            store.pipe_file("bucket/out.npy", b"somebody else's")
            work.publish(work.folder / "rows.npy")

    with pytest.raises(FileError, match="exists already; --force replaces it"):
        replace_by_another()
    assert store.cat_file("bucket/out.npy") == b"somebody else's"


def publishing(folder):
    """Whether the command in a folder uploads, as its progress tells while there is any."""
    with contextlib.suppress(FileNotFoundError):
        for found in folder.glob("out.npy.*.partial/progress.json"):
            return json.loads(found.read_text())["publishing"]
    return False


def kill_while_uploading(server, store, folder, *, kills):
    """Kill the same command while it uploads; nobody ever sees a part of the object."""
    codes = np.zeros((12 << 10, 3), np.uint8)
    codes[:, 0] = np.arange(len(codes)) % 251
    np.save("codes.npy", codes)
    command = [*SEMID, "decode", "codes.npy", "--target", server.target, "-o"]
    subprocess.run([*command, "whole.npy"], check=True, capture_output=True, timeout=300)
    whole, url = Path("whole.npy").read_bytes(), "s3://bucket/out.npy"
    assert len(whole) > 40 << 20  # some parts
    rng, seen = random.Random(0), 0  # noqa: S311 - not for secrets
    for _ in range(kills):
        with subprocess.Popen([*command, url], stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                if publishing(folder):
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(rng.uniform(0, 0.5))
                    process.kill()
                    process.wait()
        seen += not store.exists("bucket/out.npy")
        if store.exists("bucket/out.npy"):
            assert store.cat_file("bucket/out.npy") == whole
    done = subprocess.run([*command, url], check=False, capture_output=True, timeout=300)
    assert done.returncode == 0 or b"exists already" in done.stderr  # killed when all was done
    assert store.cat_file("bucket/out.npy") == whole
    assert not list(folder.glob("*.partial"))
    return seen


def test_a_command_that_is_killed_while_it_uploads_shows_no_part(wide_server, store, folder):
    kill_while_uploading(wide_server, store, folder, kills=1)


@pytest.mark.slow
def test_a_command_that_is_killed_often_while_it_uploads_shows_no_part(wide_server, store, folder):
    assert kill_while_uploading(wide_server, store, folder, kills=30)
