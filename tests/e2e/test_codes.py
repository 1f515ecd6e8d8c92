"""Codes over gRPC are the recorded ones, whatever the batch, the caller or the form."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from semid.v1 import semid_pb2 as pb
from semid_client import Client
from semid_server.checkpoint import load_checkpoint

ALONE = 300
"""Rows that are sent one by one."""


def _codes_by_definition(rows: np.ndarray, centroids: list[np.ndarray]) -> np.ndarray:
    """The arithmetic of residual quantisation in float64, feature by feature in index order."""
    residual = rows.astype(np.float64)
    codes = np.empty((len(rows), len(centroids)), np.int64)
    for layer, codebook in enumerate(centroids):
        squares = np.zeros(len(rows))
        for feature in range(rows.shape[1]):
            squares += residual[:, feature] * residual[:, feature]
        residual /= np.maximum(np.sqrt(squares), 1e-12)[:, None]
        distances = np.zeros((len(rows), len(codebook)))
        for feature in range(rows.shape[1]):
            difference = residual[:, feature, None] - codebook[None, :, feature]
            distances += difference * difference
        codes[:, layer] = distances.argmin(axis=1)
        residual -= codebook[codes[:, layer]]
    return codes


@pytest.fixture(scope="module")
def truth(reference_set) -> np.ndarray:
    """The recorded codes; on rows whose recorded codes are rounding noise, those of float64."""
    codes = reference_set.codes.copy()
    if reference_set.vanishing.any():
        state = load_checkpoint(reference_set.checkpoint).model.state_dict()
        centroids = [
            state[f"quantization_layer_list.{layer}.centroids"].double().numpy()
            for layer in range(reference_set.n_layers)
        ]
        rows = reference_set.vanishing
        codes[rows] = _codes_by_definition(reference_set.embeddings[rows], centroids)
    return codes


@pytest.fixture
def set_client(set_server):
    with Client(set_server.target) as client:
        yield client


def test_codes_are_the_recorded_ones(reference_set, set_client, truth):
    codes = set_client.encode(reference_set.embeddings)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, truth)


def test_each_row_alone_has_the_codes_it_has_in_a_batch(reference_set, set_client, truth):
    spread = np.linspace(0, len(truth) - 1, ALONE).astype(int)
    chosen = np.union1d(spread, np.flatnonzero(reference_set.vanishing)[:50])
    alone = [set_client.encode(reference_set.embeddings[row]) for row in chosen]
    np.testing.assert_array_equal(np.stack(alone), truth[chosen])


@pytest.mark.parametrize("rows_a_call", [2, 17, 256, 1000])
def test_the_size_of_a_request_changes_no_code(reference_set, set_client, truth, rows_a_call):
    # The last rows first, so that no row keeps its place in a batch either.
    backwards = reference_set.embeddings[::-1][:1000]
    parts = [
        set_client.encode(backwards[start : start + rows_a_call])
        for start in range(0, len(backwards), rows_a_call)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), truth[::-1][:1000])


def test_callers_that_share_batches_get_their_own_codes(reference_set, set_server, truth):
    callers, calls = 8, 25

    def call_often(seed: int) -> None:
        random = np.random.default_rng(seed)
        with Client(set_server.target) as client:
            for _ in range(calls):
                rows = random.integers(len(truth), size=random.integers(1, 60))
                np.testing.assert_array_equal(
                    client.encode(reference_set.embeddings[rows]), truth[rows]
                )

    def of(name: str) -> float:
        return set_server.metric(f"semid_{name}", operation="encode")

    def keep_busy(done: threading.Event) -> int:
        # Short requests are answered as they come; they wait, and share, behind what is not short.
        rows = np.resize(np.arange(len(truth)), 2048)
        count = 0
        with Client(set_server.target) as client:
            while not done.is_set():
                codes = client.encode(reference_set.embeddings[rows])
                np.testing.assert_array_equal(codes, truth[rows])
                count += 1
        return count

    def spared() -> float:
        # The sum first: what runs in between can only make it seem that fewer were shared.
        return of("batch_requests_sum") - of("batch_requests_count")

    before, spared_before = of("queue_seconds_count"), spared()
    done = threading.Event()
    rounds = 0
    with ThreadPoolExecutor(callers + 1) as pool:
        bulk = pool.submit(keep_busy, done)
        try:
            while spared() <= spared_before:  # until two have shared one: else nothing was shown
                list(pool.map(call_often, range(rounds * callers, (rounds + 1) * callers)))
                rounds += 1
        finally:
            done.set()
    assert bulk.result() > 0
    # each request is counted once, in however many batches it was
    requests = of("queue_seconds_count") - before
    assert requests == rounds * callers * calls + bulk.result()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("<f4", "FLOAT32"), ("<f2", "FLOAT16"), ("<f8", "FLOAT64"), ("bf16", "BFLOAT16")],
)
def test_a_number_means_its_value_in_every_type(reference_set, set_server, dtype, name):
    rows = reference_set.embeddings[:200]
    if dtype == "bf16":
        bits = rows.view("<u4") >> 16
        data, exact = bits.astype("<u2").tobytes(), (bits << 16).view("<f4")
    else:
        data, exact = rows.astype(dtype).tobytes(), rows.astype(dtype).astype("<f8")
    tensor = pb.Tensor(dtype=f"DATA_TYPE_{name}", shape=rows.shape, data=data)
    with set_server.stub() as stub, Client(set_server.target) as client:
        answer = stub.Encode(pb.EncodeRequest(tensor=tensor)).tensor
        codes = np.frombuffer(answer.data, "u1").reshape(answer.shape)
        np.testing.assert_array_equal(codes, client.encode(exact.astype(np.float64)))


def test_numbers_written_out_have_the_codes_of_bytes(reference_set, set_server, truth):
    rows = pb.FloatRows(
        rows=[pb.FloatRows.Row(values=row) for row in reference_set.embeddings[:20]]
    )
    with set_server.stub() as stub:
        answer = stub.Encode(pb.EncodeRequest(rows=rows))
    assert [list(row.codes) for row in answer.rows.rows] == truth[:20].tolist()


def test_a_stream_answers_each_message_in_order(reference_set, set_server, truth, tensor_of):
    random = np.random.default_rng(5)
    cuts = np.sort(random.integers(len(truth), size=40))
    spans = list(itertools.pairwise([0, *cuts, len(truth)]))
    messages = (
        pb.EncodeStreamRequest(
            request=pb.EncodeRequest(tensor=tensor_of(reference_set.embeddings[start:stop]))
        )
        for start, stop in spans
    )
    with set_server.stub() as stub:
        answers = [answer.response.tensor for answer in stub.EncodeStream(messages)]
    assert [list(answer.shape) for answer in answers] == [
        [stop - start, reference_set.n_layers] for start, stop in spans
    ]
    codes = np.frombuffer(b"".join(answer.data for answer in answers), "u1")
    np.testing.assert_array_equal(codes.reshape(truth.shape), truth)
