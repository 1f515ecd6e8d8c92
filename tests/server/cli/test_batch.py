"""A checkpoint as an engine of file commands: blocks overlap; on a GPU only one is computed."""

from __future__ import annotations

import json
import mmap
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from semid_client.cli.root import root
from semid_client.files import NotFiniteError
from semid_client.files.memory import SLACK
from semid_server.checkpoint import save_checkpoint
from semid_server.cli import batch
from semid_server.cli.batch import CheckpointEngine
from semid_server.model import build_model
from semid_server.serving.backend import Backend
from semid_server.serving.config import ModelSource, ServeConfig
from semid_server.training import TrainingSettings


class WaitingBackend:
    """Tells of each block that is filled or begun, and has one's codes when the test says so."""

    def __init__(self):
        self.filled, self.begun = SimpleQueue(), SimpleQueue()
        self.may_answer = threading.Semaphore(0)
        self.beginning = threading.Lock()

    def fill(self, dtype, payloads, buffers):
        self.filled.put(buffers)
        return payloads[0], [None]

    def begin_rows(self, rows):
        assert self.beginning.acquire(blocking=False)  # one at a time
        self.begun.put(rows)
        self.beginning.release()

        def wait():
            assert self.may_answer.acquire(timeout=300)
            return rows[:, :1], np.ones(len(rows), bool)

        return wait


class Together:
    """Encodes as soon as so many of its blocks are there to be encoded."""

    def __init__(self, n):
        self.all_there = threading.Barrier(n)

    def encode_rows(self, rows):
        self.all_there.wait(timeout=300)
        return rows.numpy()[:, :1]


def read_only(rows):
    """Rows as Arrow has them, which torch cannot read where they are: they are copied."""
    rows.flags.writeable = False
    return rows


@pytest.fixture
def engine(reference_set_named):
    return CheckpointEngine(str(reference_set_named("digits_rkmeans").checkpoint), device="cpu")


@pytest.fixture
def checkpoint(reference_set_named):
    return str(reference_set_named("digits_rkmeans").checkpoint)


def as_for_a_gpu(engine):
    engine._workers, engine.screens, engine.threads = None, True, batch.GPU_BLOCKS
    engine._buffers = SimpleQueue()
    for _ in range(batch.GPU_BLOCKS):
        engine._buffers.put({})
    return engine


def test_a_gpu_is_given_blocks_while_it_is_at_others_and_buffers_wait_for_codes(engine):
    backend = engine._backend = WaitingBackend()
    as_for_a_gpu(engine)
    answers = SimpleQueue()
    n = batch.GPU_BLOCKS
    blocks = [read_only(np.full((2, 3), i, np.float32)) for i in range(n + 1)]
    threads = [
        threading.Thread(target=lambda rows=rows: answers.put(engine.encode(rows)), daemon=True)
        for rows in blocks
    ]
    for thread in threads:
        thread.start()
    buffers = [backend.filled.get(timeout=300) for _ in range(n)]
    assert len({id(buffer) for buffer in buffers}) == n
    for _ in range(n):
        backend.begun.get(timeout=300)  # though the device has answered none
    assert backend.filled.empty()  # the last block has no buffer yet
    backend.may_answer.release()
    assert any(backend.filled.get(timeout=300) is one for one in buffers)
    for _ in range(n):
        backend.may_answer.release()
    found = sorted(answers.get(timeout=300)[0, 0] for _ in blocks)
    for thread in threads:
        thread.join(timeout=300)
    assert found == list(range(n + 1))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_rows_that_are_not_finite_are_told_and_the_others_get_their_codes(
    reference_set_named, dtype, reference
):
    digits = reference_set_named("digits_rkmeans")
    source = ModelSource(digits.checkpoint)
    config = ServeConfig(models=(source,), device="cpu", reference=reference)
    backend = Backend(source, config, on_verified=lambda rows, wrong: None)
    rows = torch.from_numpy(np.rint(digits.embeddings[:40])).to(getattr(torch, dtype))
    expected = backend.encode_rows(rows)
    largest = torch.finfo(rows.dtype).max
    bad = rows.clone()
    bad[3, 7], bad[5, 0], bad[39, 63] = torch.nan, torch.inf, -torch.inf
    bad[7, :2] = torch.tensor([largest, -largest], dtype=rows.dtype)
    codes, finite = backend.begin_rows(bad)()
    assert np.flatnonzero(~finite).tolist() == [3, 5, 39]
    same = np.delete(np.arange(40), [3, 5, 7, 39])
    np.testing.assert_array_equal(codes[same], expected[same])
    np.testing.assert_array_equal(codes[7], backend.encode_rows(bad[7:8])[0])
    codes, finite = backend.begin_rows(rows[:0])()
    assert codes.shape == (0, expected.shape[1])
    assert finite.shape == (0,)


@pytest.mark.parametrize("on_bad_row", ["fail", "skip", "null"])
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_bad_rows_that_a_gpu_finds_are_those_that_a_cpu_is_spared(
    reference_set_named, tmp_path, monkeypatch, on_bad_row, suffix
):
    digits = reference_set_named("digits_rkmeans")
    rows = digits.embeddings.copy()
    rows[[3, 700, 701], [7, 0, 63]] = np.nan, np.inf, -np.inf
    if suffix == ".npy":
        np.save(tmp_path / "in.npy", rows)
    else:
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
        pq.write_table(pa.table({"x": lists}), tmp_path / "in.parquet", row_group_size=100)
    checkpoint = str(digits.checkpoint)
    made = CheckpointEngine.__init__

    def small_blocks(engine, *args, **kwargs):
        made(engine, *args, **kwargs)
        engine.block_bytes = 50 * rows[0].nbytes

    def gpu(engine, *args, **kwargs):
        small_blocks(engine, *args, **kwargs)
        as_for_a_gpu(engine)

    told = []
    for name, init in (("cpu", small_blocks), ("gpu", gpu)):
        monkeypatch.setattr(CheckpointEngine, "__init__", init)
        out = tmp_path / f"{name}.jsonl"
        done = CliRunner().invoke(
            root,
            [
                *("encode", str(tmp_path / f"in{suffix}"), "-o", str(out)),
                *("--checkpoint", checkpoint, "--device", "cpu", "--on-bad-row", on_bad_row),
            ],
        )
        listed = out.with_name(f"{out.name}.bad-rows.jsonl")
        told.append(
            (
                done.exit_code,
                re.findall(r"row 3: .*finite", done.output),
                out.exists() and out.read_bytes(),
                listed.exists() and listed.read_bytes(),
            )
        )
    assert told[0] == told[1]
    status, messages, output, bad = told[1]
    if on_bad_row == "fail":
        assert (status, len(messages), output) == (1, 1, False)
    else:
        assert status == 0
        assert [json.loads(line)["row"] for line in bad.splitlines()] == [3, 700, 701]


def test_a_cpu_encodes_a_block_by_each_of_its_threads(checkpoint):
    engine = CheckpointEngine(checkpoint, device="cpu", threads=3)
    assert engine.threads == 3
    engine._backend = Together(3)
    with ThreadPoolExecutor(3) as pool:
        rows = [np.full((2, 3), i, np.float32) for i in range(3)]
        assert [codes[0, 0] for codes in pool.map(engine.encode, rows)] == [0, 1, 2]


def test_a_large_block_is_encoded_in_parts_side_by_side(checkpoint, reference_set_named):
    digits = reference_set_named("digits_rkmeans")
    engine = CheckpointEngine(checkpoint, device="cpu", threads=3)
    engine.block_bytes = digits.embeddings[:50].nbytes
    np.testing.assert_array_equal(engine.encode(digits.embeddings), digits.codes)
    engine._backend = Together(3)
    codes = engine.encode(np.arange(150 * 64, dtype=np.float32).reshape(150, 64))
    np.testing.assert_array_equal(codes[:, 0], np.arange(150) * 64)


def test_blocks_that_are_encoded_side_by_side_have_the_codes_that_each_has_alone(
    checkpoint, reference_set_named
):
    digits = reference_set_named("digits_rkmeans")
    rng = np.random.default_rng(0)
    # Rows between two others are hard: some are decided in float64, and by the reference.
    pairs = digits.embeddings[rng.integers(0, len(digits.embeddings), (2, 4000))]
    rows = np.concatenate([digits.embeddings, pairs.mean(axis=0), np.zeros((500, 64), np.float32)])
    rng.shuffle(rows)
    alone = CheckpointEngine(checkpoint, device="cpu", threads=1).encode(rows)
    engine = CheckpointEngine(checkpoint, device="cpu", threads=8)
    spans = [slice(a, a + size) for size in (7, 100, 1000) for a in range(0, len(rows), size)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            for span, codes in zip(
                spans, pool.map(lambda span: engine.encode(rows[span]), spans), strict=True
            ):
                np.testing.assert_array_equal(codes, alone[span])
    finally:
        sys.setswitchinterval(before)


def test_each_thread_of_a_cpu_computes_alone_and_that_of_the_caller_as_before(checkpoint):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine = CheckpointEngine(checkpoint, device="cpu", threads=2)
        assert torch.get_num_threads() == 2
        assert engine._workers.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)


def test_many_processors_have_smaller_blocks_and_no_more_than_so_many_bytes(
    checkpoint, monkeypatch
):
    monkeypatch.setattr(batch, "CPU_BYTES", 12 << 20)
    blocks = {n: CheckpointEngine(checkpoint, device="cpu", threads=n) for n in (1, 4, 64)}
    assert {n: engine.block_bytes for n, engine in blocks.items()} == {
        1: 4 << 20,
        4: 3 << 20,
        64: 1 << 20,
    }


def test_a_block_for_a_gpu_fits_in_a_power_of_two():
    asked = batch.GPU_BLOCK_BYTES + SLACK + mmap.PAGESIZE
    assert asked == 1 << (asked.bit_length() - 1)


def test_a_file_is_read_into_no_more_blocks_than_are_page_locked_beforehand(
    checkpoint, reference_set_named, tmp_path, monkeypatch
):
    digits = reference_set_named("digits_rkmeans").embeddings
    np.save(tmp_path / "in.npy", np.tile(digits, (20, 1)))
    made, memory, asked = CheckpointEngine.__init__, CheckpointEngine.memory, []

    def gpu(engine, *args, **kwargs):
        made(engine, *args, **kwargs)
        engine.block_bytes = digits[:300].nbytes
        as_for_a_gpu(engine)

    monkeypatch.setattr(CheckpointEngine, "__init__", gpu)
    monkeypatch.setattr(
        CheckpointEngine, "memory", lambda engine, n: asked.append(n) or memory(engine, n)
    )
    files = [str(tmp_path / "in.npy"), "-o", str(tmp_path / "out.npy")]
    done = CliRunner().invoke(
        root, ["encode", *files, "--checkpoint", checkpoint, "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    assert 20 * len(digits) / 300 > 2 * batch.LOCKED_AHEAD  # blocks in all
    assert 1 < len(asked) <= batch.LOCKED_AHEAD


def test_vectors_are_decoded_by_no_more_bytes_than_rows_are_encoded(
    checkpoint, reference_set_named, tmp_path, monkeypatch
):
    np.save(tmp_path / "codes.npy", np.tile(reference_set_named("digits_rkmeans").codes, (30, 1)))
    sizes = []
    decode = CheckpointEngine.decode

    def decoded(engine, codes, mode):
        vectors = decode(engine, codes, mode)
        sizes.append(vectors.nbytes)
        assert vectors.nbytes <= engine.block_bytes
        return vectors

    monkeypatch.setattr(CheckpointEngine, "decode", decoded)
    flags = ["--checkpoint", checkpoint, "--device", "cpu"]
    files = [str(tmp_path / "codes.npy"), "-o", str(tmp_path / "back.npy")]
    done = CliRunner().invoke(root, ["decode", *files, *flags])
    assert done.exit_code == 0, done.output
    assert len(sizes) > 1
    assert np.load(tmp_path / "back.npy").nbytes == sum(sizes)


def test_a_block_that_is_refused_gives_its_buffer_back(engine, reference_set_named):
    as_for_a_gpu(engine)
    digits = reference_set_named("digits_rkmeans")
    bad = digits.embeddings[:5].copy()
    bad[3, 7] = np.nan
    bad = read_only(bad)
    for _ in range(2 * engine.threads):
        with pytest.raises(NotFiniteError, match=r"embeddings\[3\]"):
            engine.encode(bad)
    codes = engine.encode(read_only(digits.embeddings[:50].copy()))
    np.testing.assert_array_equal(codes, digits.codes[:50])
    engine.encode(read_only(digits.embeddings[50:100].copy()))
    np.testing.assert_array_equal(codes, digits.codes[:50])


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", ">f2", "bfloat16"])
def test_rows_are_encoded_where_they_are_in_whatever_form(engine, reference_set_named, dtype):
    digits = reference_set_named("digits_rkmeans")
    whole = np.rint(digits.embeddings[:64])  # the same numbers in every type
    expected = engine.encode(whole.astype(np.float32))
    rows = whole.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    forms = [rows, read_only(rows.copy()), np.asfortranarray(rows), np.repeat(rows, 2, axis=0)[::2]]
    for form in forms:
        np.testing.assert_array_equal(engine.encode(form), expected)
    assert engine.encode(rows[:0]).shape == (0, expected.shape[1])


def test_rows_are_read_to_the_beginning_of_a_page(engine):
    memory = engine.memory(12345)
    assert len(memory) >= 12345
    assert memory.ctypes.data % mmap.PAGESIZE == 0
    memory[:] = 1


def test_a_degenerate_model_is_refused_or_if_that_is_allowed_warned_of(tmp_path, caplog):
    spec = TrainingSettings(layers=2, codebook_width=8).spec(6)
    degenerate = tmp_path / "never_initialised"
    save_checkpoint(degenerate, model=build_model(spec), spec=spec, name="never")
    np.save(tmp_path / "x.npy", np.ones((5, 6), np.float32))
    command = ["encode", str(tmp_path / "x.npy"), "-o", str(tmp_path / "codes.npy")]
    command += ["--checkpoint", str(degenerate), "--device", "cpu"]
    refused = CliRunner().invoke(root, command)
    assert refused.exit_code == 1
    assert "never initialised" in refused.output
    assert "(to use it all the same: --allow-degenerate)" in refused.output
    assert not (tmp_path / "codes.npy").exists()
    allowed = CliRunner().invoke(root, [*command, "--allow-degenerate"])
    assert allowed.exit_code == 0, allowed.output
    assert "never initialised" in caplog.text
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), np.zeros((5, 2), np.uint8))
