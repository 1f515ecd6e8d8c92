"""The ray engine: rows are put where they belong, whatever Ray does. Ray itself is not needed.

With a real cluster: `tests/e2e/test_ray.py`.
"""

from __future__ import annotations

import json
import pickle
import socket
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from semid_client import ConfigurationError, FingerprintMismatchError
from semid_client.cli.root import root
from semid_client.files import FileError, Work
from semid_server.checkpoint import save_checkpoint
from semid_server.cli.batch import CheckpointEngine
from semid_server.cli.ray_engine import Encoder, RayEngine, Task, check_reachable, content_of
from semid_server.cli.ray_parts import Parts, gaps, part_of
from semid_server.cli.ray_rows import ClusterError, indices, seed
from semid_server.model import build_model
from semid_server.training import TrainingSettings

WORD = 1 << 64


def row_hash(path: str, row: int) -> int:
    """What Ray says of a row: the finalizer of splitmix64, in Python's integers."""
    mixed = (seed(path) + row) % WORD
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % WORD
    return mixed ^ (mixed >> 31)


def hashes(path, rows):
    return np.array([row_hash(path, row) for row in rows], np.uint64)


# --- which row a row is ----------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(min_size=1), st.lists(st.integers(0, 10**12 - 1), min_size=1))
def test_a_row_is_told_by_its_number_and_its_file(path, rows):
    files = {path: (10**6, 10**12), "another": (0, 10**6)}
    found = indices(pa.array([path] * len(rows)), hashes(path, rows), files)
    assert found.tolist() == [10**6 + row for row in rows]


def test_rows_of_several_files_may_come_in_any_order():
    files = {"a": (0, 10), "b": (10, 5)}
    given_ = [("b", 4), ("a", 0), ("b", 0), ("a", 9)]
    numbers = np.array([row_hash(*row) for row in given_], np.uint64)
    found = indices(pa.array([path for path, _ in given_]), numbers, files)
    assert found.tolist() == [14, 0, 10, 9]


@pytest.mark.parametrize("number", [0, 1, WORD - 1, row_hash("a", 10), row_hash("b", 0)])
def test_a_number_that_is_none_of_its_file_is_refused(number):
    with pytest.raises(ClusterError, match="a has 10 rows, but Ray numbers one in a way"):
        indices(pa.array(["a"]), np.array([number], np.uint64), {"a": (0, 10), "b": (10, 5)})


def test_a_file_that_was_not_given_is_refused():
    with pytest.raises(ClusterError, match="x, which is none of the files"):
        indices(pa.array(["x"]), hashes("x", [0]), {"a": (0, 10)})


# --- parts -----------------------------------------------------------------------------------

N = 60
CODES = np.arange(N * 2, dtype=np.uint8).reshape(N, 2)
PROBLEMS = {7: "is null", 8: "number 0 is nan", 40: "is null"}


def write_part(parts, name, rows):
    parts.create()
    bad = {place: PROBLEMS[row] for place, row in enumerate(rows) if row in PROBLEMS}
    path = f"{parts.folder}/{name}.parquet"
    pq.write_table(part_of(np.array(rows, np.int64), CODES[rows], bad), path)
    return path


def rows_of_a_work(tmp_path, parts, on_bad_row):
    with Work(tmp_path / "out.npy", restart=True) as work:
        work.begin({}, 2, np.dtype(np.uint8))
        parts.append_to(work, parts.runs(), on_bad_row)
        rows = work.rows()
        listed = (work.folder / "bad-rows.jsonl").read_text().splitlines()
        found = rows[0 : rows.shape[0]]
        rows.close()
    return found, [json.loads(line) for line in listed]


SPANS = st.lists(st.tuples(st.integers(0, N - 1), st.integers(1, N)), max_size=6)


@settings(max_examples=25, deadline=None)
@given(st.lists(SPANS, min_size=1, max_size=4), st.sampled_from(["skip", "null"]), st.randoms())
def test_parts_in_any_order_and_with_rows_twice_are_all_rows_in_order(
    tmp_path_factory, drawn, on_bad_row, random
):
    folder = tmp_path_factory.mktemp("parts")
    parts = Parts(str(folder / "parts"), {"task": 1})
    have = [[row for a, n in spans for row in range(a, min(a + n, N))] for spans in drawn]
    have.append([row for row in range(N) if not any(row in some for some in have)])
    random.shuffle(have)
    for i, rows in enumerate(filter(None, have)):
        write_part(parts, f"{i}", rows)
    assert gaps(parts.runs(), 0, N) == []
    found, listed = rows_of_a_work(folder, parts, on_bad_row)
    kept = list(range(N)) if on_bad_row == "null" else sorted(set(range(N)) - set(PROBLEMS))
    np.testing.assert_array_equal(found, CODES[kept])
    assert listed == [{"row": row, "problem": text} for row, text in PROBLEMS.items()]


def test_what_no_part_holds_is_told(tmp_path):
    parts = Parts(str(tmp_path), {})
    assert gaps(parts.runs(), 0, N) == [(0, N)]
    write_part(parts, "a", [*range(5, 10), *range(20, 30)])
    assert gaps(parts.runs(), 0, N) == [(0, 5), (10, 20), (30, N)]
    assert gaps(parts.runs(), 7, 25) == [(10, 20)]


def test_a_part_without_its_end_holds_nothing(tmp_path):
    parts = Parts(str(tmp_path / "parts"), {})
    path = write_part(parts, "a", range(N))
    content = (tmp_path / path).read_bytes()
    for length in (0, 4, len(content) // 2, len(content) - 1):
        (tmp_path / path).write_bytes(content[:length])
        assert parts.runs() == []


def test_parts_of_another_task_are_not_mixed_in(tmp_path):
    write_part(Parts(str(tmp_path / "parts"), {"model": "a"}), "a", range(N))
    other = Parts(str(tmp_path / "parts"), {"model": "b"})
    with pytest.raises(FileError, match="holds codes of another input, model or option"):
        other.check_alone()
    other.remove()
    other.check_alone()
    assert not (tmp_path / "parts").exists()


def test_what_else_is_in_the_folder_is_left_alone(tmp_path):
    (tmp_path / "precious").mkdir()
    parts = Parts(str(tmp_path), {})
    write_part(parts, "a", range(N))
    with pytest.raises(FileError, match="or something else"):
        parts.check_alone()
    parts.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


# --- an encoder ------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(reference_dir):
    return reference_dir / "digits_rkmeans/model.ckpt"


@pytest.fixture
def engine(checkpoint):
    return CheckpointEngine(str(checkpoint), device="cpu")


@pytest.fixture
def task(checkpoint, engine, digits):
    return Task(
        checkpoint=checkpoint.name,
        content=content_of(checkpoint),
        fingerprint=engine.info.fingerprint,
        device="cpu",
        threads=1,
        source="in",
        files={"a": (100, len(digits))},
        names={"a": "in/a"},
        column="x",
        width=64,
        dtype="<f4",
        fail=True,
    )


@pytest.fixture
def digits(reference_set_named):
    return reference_set_named("digits_rkmeans").embeddings[:50]


def block(digits, rows, **more):
    lists = pa.FixedSizeListArray.from_arrays(pa.array(digits[rows].reshape(-1)), 64)
    table = pa.table({"x": lists, "path": ["a"] * len(rows), "row_hash": hashes("a", rows)})
    for name, column in more.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def test_an_encoder_gives_codes_with_the_rows_they_are_of(task, digits, engine):
    encoder = Encoder(pickle.loads(pickle.dumps(task)))  # noqa: S301 - as it is sent
    rows = [9, 8, 30, 31]
    part = encoder(block(digits, rows))
    assert part["row"].to_pylist() == [109, 108, 130, 131]
    assert part["codes"].to_pylist() == engine.encode(digits[rows]).tolist()
    assert part["problem"].to_pylist() == [None] * 4
    assert encoder(block(digits, rows).slice(0, 0)).num_rows == 0


def test_a_bad_row_ends_the_job_or_is_marked(task, digits):
    rows = digits.copy()
    rows[12, 3] = np.nan
    table = block(rows, [11, 12, 13])
    with pytest.raises(FileError, match=r"in/a: row 12: number 3 is nan"):
        Encoder(task)(table)
    lists = pa.array([digits[11].tolist(), None, [1.0]], pa.list_(pa.float32()))
    with pytest.raises(FileError, match="in/a: row 12: is null"):
        Encoder(task)(block(digits, [11, 12, 13], x=lists))
    part = Encoder(replace(task, fail=False))(block(digits, [11, 12, 13], x=lists))
    assert part["problem"].to_pylist() == [None, "is null", "has 1 numbers; expected 64"]


def test_a_model_that_is_another_on_a_node_is_refused(task, digits):
    encoder = Encoder(replace(task, fingerprint="0" * 64))
    with pytest.raises(FingerprintMismatchError, match="000 where the job was begun"):
        encoder(block(digits, [0]))


def test_what_a_node_cannot_use_is_told_by_the_first_block(task, digits):
    encoder = Encoder(replace(task, content={"": b"no checkpoint"}))
    with pytest.raises(ConfigurationError, match=r"model\.ckpt"):
        encoder(block(digits, [0]))


def test_a_checkpoint_that_is_a_folder_is_sent_whole(reference_dir, task):
    folder = reference_dir.parents[1] / "checkpoints/movies"
    here = CheckpointEngine(str(folder), device="cpu").info
    there = Encoder(
        replace(task, checkpoint="movies", content=content_of(folder), fingerprint=here.fingerprint)
    )
    assert there._engine.info == here


# --- the whole job, by a Ray that mixes everything up ------------------------------------------


class MixedUp:
    """Ray Data in one thread: blocks of all files in another order, some of them twice.

    ``fails`` is raised after half of the parts were written.
    """

    def __init__(self, seed=0, fails=None):
        self._random, self._fails = np.random.default_rng(seed), fails
        self.read = []
        self.DataContext = SimpleNamespace(get_current=SimpleNamespace)
        self.ActorPoolStrategy = SimpleNamespace

    def read_parquet(self, paths, *, filesystem, **_):
        self.read.append(paths)
        self._tables = []
        for path in paths:
            table = pq.read_table(path, filesystem=filesystem, partitioning=None)
            table = table.append_column("path", pa.array([path] * len(table)))
            table = table.append_column(
                "row_hash", pa.array(hashes(path, range(len(table))), pa.uint64())
            )
            self._tables += [table.slice(i, 37) for i in range(0, len(table), 37)]
        return self

    def select_columns(self, names):
        self._tables = [table.select(names) for table in self._tables]
        return self

    def map_batches(self, make, *, fn_constructor_args, batch_size, num_gpus, **_):
        assert not num_gpus or batch_size, "as Ray demands"
        order = self._random.integers(0, len(self._tables), 2 * len(self._tables)).tolist()
        order += self._random.permutation(len(self._tables)).tolist()
        encoder, tables = make(*fn_constructor_args), self._tables
        self._tables = (encoder(tables[i]) for i in order)
        return self

    def write_parquet(self, folder, *, filesystem, **_):
        for i, table in enumerate(self._tables):
            if self._fails is not None and i == 20:
                raise self._fails
            pq.write_table(table, f"{folder}/{len(self.read)}-{i}.parquet", filesystem=filesystem)


@pytest.fixture
def ray(monkeypatch):
    """Take the place of Ray; what it does is to be set."""
    module = ModuleType("ray")
    module.data = MixedUp()
    module.exceptions = SimpleNamespace(RayError=type("RayError", (Exception,), {}))
    module.is_initialized = lambda: True
    module.nodes = lambda: [
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    module.available_resources = lambda: {"CPU": 5.0}
    monkeypatch.setitem(sys.modules, "ray", module)
    monkeypatch.setitem(sys.modules, "ray.data", module.data)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    return module


@pytest.fixture
def folder(tmp_path, reference_set_named, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = reference_set_named("digits_rkmeans").embeddings.copy()
    rows[777, 7] = np.inf
    (tmp_path / "in").mkdir()
    for name, start, stop in (("a", 0, 600), ("b", 600, 601), ("c", 601, 601), ("d", 601, 1797)):
        some = rows[start:stop]
        table = pa.table(
            {
                "id": [f"digit {i}" for i in range(start, stop)],
                "x": pa.FixedSizeListArray.from_arrays(pa.array(some.reshape(-1)), 64),
            },
            schema=pa.schema({"id": pa.string(), "x": pa.list_(pa.float32(), 64)}),
        )
        pq.write_table(table, tmp_path / f"in/{name}.parquet", row_group_size=100)
    return tmp_path


def encode(checkpoint, output, *flags):
    return CliRunner().invoke(
        root, ["encode", "in", "-o", output, "--checkpoint", str(checkpoint), *flags]
    )


RAY = ("--engine", "ray")


@pytest.mark.parametrize(
    ("suffix", "flags"),
    [
        ("parquet", ("--unique", "grid", "--on-bad-row", "null")),
        ("npy", ("--unique", "tiger", "--on-bad-row", "skip")),
        ("jsonl", ("--on-bad-row", "skip")),
    ],
)
def test_the_output_is_that_of_one_machine(ray, folder, checkpoint, suffix, flags):
    here = encode(checkpoint, f"here.{suffix}", "--device", "cpu", *flags)
    there = encode(checkpoint, f"there.{suffix}", *RAY, *flags)
    assert (here.exit_code, there.exit_code) == (0, 0), there.output
    for ending in ("", ".bad-rows.jsonl"):
        made = (folder / f"there.{suffix}{ending}").read_bytes()
        assert made == (folder / f"here.{suffix}{ending}").read_bytes()
    assert sorted(path.name for path in folder.glob("there*")) == [
        f"there.{suffix}",
        f"there.{suffix}.bad-rows.jsonl",
    ]


def test_a_degenerate_model_that_is_allowed_is_so_on_the_nodes_too(ray, folder):
    spec = TrainingSettings(layers=2, codebook_width=8).spec(64)
    save_checkpoint("never", model=build_model(spec), spec=spec, name="never")
    flags = (*RAY, "--on-bad-row", "skip")
    assert "--allow-degenerate" in encode("never", "there.npy", *flags).stderr
    done = encode("never", "there.npy", *flags, "--allow-degenerate")
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(np.load("there.npy"), np.zeros((1796, 2), np.uint8))


def test_input_and_parts_may_be_in_a_store(ray, folder, checkpoint):
    store = fsspec.filesystem("memory")
    store.put(str(folder / "in"), "/ray/in", recursive=True)
    flags = ("--checkpoint", str(checkpoint), "--on-bad-row", "null")
    here = ["encode", "in", "-o", "here.parquet", *flags]
    there = ["encode", "memory://ray/in", "-o", "there.parquet", *flags, *RAY]
    try:
        for command in (here, [*there, "--parts", "memory://ray/work/"]):
            result = CliRunner().invoke(root, command)
            assert result.exit_code == 0, result.output
        assert all(path.startswith("/ray/in/") for path in ray.data.read[0])
        assert store.find("/ray/work") == []
        made = (folder / "there.parquet").read_bytes()
        assert made == (folder / "here.parquet").read_bytes()
    finally:
        store.rm("/ray", recursive=True)


def test_a_job_that_failed_goes_on_with_what_it_wrote(ray, folder, checkpoint):
    flags = (*RAY, "--on-bad-row", "skip")
    ray.data = MixedUp(fails=RuntimeError("no node is left"))
    failed = encode(checkpoint, "there.npy", *flags)
    assert failed.exit_code == 1
    assert failed.stderr == (
        "there.npy.parts: keeps codes, and the same command goes on with them\n"
        "Error: the Ray job failed: RuntimeError: no node is left\n"
    )
    assert list((folder / "there.npy.parts").glob("*/*.parquet"))
    other = encode(checkpoint, "there.npy", *RAY, "--on-bad-row", "skip", "--unique", "tiger")
    assert other.exit_code == 1
    assert "holds codes of another input, model or option" in other.stderr
    ray.data = MixedUp(seed=1)
    done = encode(checkpoint, "there.npy", *flags)
    assert done.exit_code == 0, done.output
    assert "there.npy.parts: goes on, with " in done.stderr
    encode(checkpoint, "here.npy", "--on-bad-row", "skip")
    assert (folder / "there.npy").read_bytes() == (folder / "here.npy").read_bytes()
    assert not (folder / "there.npy.parts").exists()


def test_what_is_complete_is_not_read_again(ray, folder, checkpoint):
    flags = (*RAY, "--on-bad-row", "skip")
    ray.data = MixedUp(fails=RuntimeError("stop"))
    encode(checkpoint, "there.npy", *flags)
    (base,) = (folder / "there.npy.parts").iterdir()
    parts = Parts(str(folder / "there.npy.parts"), {})
    parts.folder = str(base)
    engine = CheckpointEngine(str(checkpoint), device="cpu")
    rows = pq.read_table(folder / "in/a.parquet")["x"].combine_chunks().flatten().to_numpy()
    whole = part_of(np.arange(600), engine.encode(rows.reshape(600, 64)), {})
    pq.write_table(whole, base / "whole.parquet")
    ray.data = MixedUp()
    assert encode(checkpoint, "there.npy", *flags).exit_code == 0
    (read,) = ray.data.read
    assert str(folder / "in/a.parquet") not in read
    assert str(folder / "in/d.parquet") in read


def test_a_bad_row_is_the_same_sentence_as_on_one_machine(ray, folder, checkpoint):
    here = encode(checkpoint, "here.npy", "--device", "cpu")
    there = encode(checkpoint, "there.npy", *RAY)
    assert there.exit_code == 1
    said = [result.stderr.splitlines()[-1] for result in (here, there)]
    assert said == ["Error: in/d.parquet: row 176: number 7 is inf; embeddings are finite"] * 2


def test_what_ray_adds_to_a_message_is_left_out(ray, folder, checkpoint):
    said = "device 'cuda' asked for\nFailed to apply UDF transform after 1/1 attempts\nTo change"
    failed = ray.exceptions.RayError("all that Ray says")
    failed.cause = ConfigurationError(said)
    ray.data = MixedUp(fails=failed)
    result = encode(checkpoint, "there.npy", *RAY, "--on-bad-row", "skip")
    assert result.stderr.splitlines()[1:] == ["Error: device 'cuda' asked for"]


def test_nodes_that_write_elsewhere_are_noticed(ray, folder, checkpoint):
    ray.data.write_parquet = lambda *_, **__: None
    result = encode(checkpoint, "there.npy", *RAY)
    assert "1797 of 1797 rows are not here after the job: some nodes write" in result.stderr


def test_an_input_that_nodes_do_not_see_is_one_sentence(ray, folder, checkpoint):
    ray.data = MixedUp(fails=FileNotFoundError(2, "No such file or directory", "/in/a.parquet"))
    result = encode(checkpoint, "there.npy", *RAY, "--on-bad-row", "skip")
    assert "in: a node says: " in result.stderr
    assert "the input must be where all nodes see it" in result.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--workers", "2"), "--workers is a flag of --engine ray."),
        ((*RAY, "--device", "cuda:1"), "device 'cuda:1' is not one of auto, cpu, cuda"),
        ((*RAY, "--device", "cuda"), "the Ray cluster has no GPU"),
        ((*RAY, "--worker-cpus", "5"), "no node of the Ray cluster has the 5 CPUs"),
        ((*RAY, "--ray-address", "ray://x:1"), "ray://x:1 is for Ray Client"),
        ((*RAY, "--fingerprint", "0" * 64), "but 0000"),
    ],
)
def test_flags_that_cannot_be_meant_are_one_sentence(ray, folder, checkpoint, flags, says):
    result = encode(checkpoint, "out.npy", *flags)
    assert result.exit_code in {1, 2}
    assert says in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("nodes", "flags", "expected"),
    [
        ([(8, 2), (8, 2)], (), ("cuda", 4)),
        ([(8, 2), (8, 2)], ("--workers", "3"), ("cuda", 3)),
        ([(8, 2), (8, 2)], ("--device", "cpu"), ("cpu", 8)),
        ([(8, 0), (8, 0)], ("--worker-cpus", "4"), ("cpu", 2)),
        ([(4, 0)], ("--workers", "9"), ("cpu", 3)),  # one reads
        ([(2, 4)], (), ("cuda", 1)),
        ([(2, 0)], (), ("cpu", 1)),
    ],
)
def test_there_is_an_encoder_a_gpu_or_one_for_every_second_cpu(
    ray, checkpoint, nodes, flags, expected
):
    ray.nodes = lambda: [
        {"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}
        for cpus, gpus in nodes
    ]
    given = {f[2:].replace("-", "_"): v for f, v in zip(flags[::2], flags[1::2], strict=True)}
    engine = RayEngine(
        str(checkpoint),
        device=given.pop("device", "auto"),
        **{name: int(value) for name, value in given.items()},
    )
    assert engine._connect() == expected


@pytest.mark.parametrize(
    ("nodes", "device", "says"),
    [
        ([(8, 0)], "cuda", "the Ray cluster has no GPU"),
        ([(1, 0)], "auto", "has 1 CPUs: an encoder takes 1 .--worker-cpus., and what reads"),
        ([(0, 1), (4, 0)], "cuda", "no node of the Ray cluster has the 1 CPUs .* and a GPU"),
    ],
)
def test_a_cluster_too_small_is_refused(ray, checkpoint, nodes, device, says):
    ray.nodes = lambda: [
        {"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}
        for cpus, gpus in nodes
    ]
    with pytest.raises(ConfigurationError, match=says):
        RayEngine(str(checkpoint), device=device)._connect()


def test_a_cluster_that_others_use_is_waited_for(ray, checkpoint, capsys):
    ray.available_resources = lambda: {"CPU": 1.0}
    RayEngine(str(checkpoint), device="cpu")._connect()
    assert "are taken: waiting for some" in capsys.readouterr().err


def test_what_is_not_parquet_is_refused(ray, folder, checkpoint):
    np.save("in.npy", np.zeros((3, 64), np.float32))
    result = CliRunner().invoke(
        root, ["encode", "in.npy", "-o", "out.npy", "--checkpoint", str(checkpoint), *RAY]
    )
    assert "in.npy: is not Parquet, which the ray engine reads" in result.stderr


def test_a_cluster_needs_a_checkpoint(folder):
    result = CliRunner().invoke(root, ["encode", "in", "-o", "out.npy", *RAY, "--target", "x:1"])
    assert result.exit_code == 2
    assert "--engine ray needs --checkpoint" in result.stderr


def test_without_ray_it_says_what_to_install(folder, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    result = encode(checkpoint, "out.npy", *RAY)
    assert result.exit_code == 1
    assert "pip install 'semid[ray,server]', on all nodes" in result.stderr


def test_an_address_where_nobody_listens_is_refused_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigurationError, match=f"no Ray cluster at '{address}'"):
            check_reachable(address)
        free.listen()
        check_reachable(address)
    for words in ("", "auto", "local"):
        check_reachable(words)
    with pytest.raises(ConfigurationError, match="no Ray cluster at 'x:port'"):
        check_reachable("x:port")
