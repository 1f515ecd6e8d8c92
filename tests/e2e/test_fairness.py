"""Callers of one server, large and small, beside one another."""

from __future__ import annotations

import numpy as np
import pytest

from semid.v1 import semid_pb2 as pb

SLOWLY = ("--reference", "--threads", "1")
"""One thread of the float64 reference: the bulk below keeps it busy for seconds."""


@pytest.fixture
def movies(reference_dir):
    return np.tile(np.load(reference_dir / "data/movies.npy"), (3, 1))


@pytest.fixture
def server(serve, reference_dir):
    return serve(reference_dir / "movies_rkmeans/model.ckpt", *SLOWLY)


@pytest.fixture
def bulk(server, movies, tensor_of):
    """Five requests of all of them, nearly the largest there can be, under way."""
    with server.stub() as stub:
        calls = [stub.Encode.future(pb.EncodeRequest(tensor=tensor_of(movies))) for _ in range(5)]
        while server.metric("semid_batch_rows_count", operation="encode") < 2:
            assert server.process.poll() is None
        yield calls
        for call in calls:
            call.cancel()


def test_single_rows_are_answered_while_large_requests_are_in_work(server, bulk, movies, tensor_of):
    with server.stub() as stub:
        for row in range(5):
            one = pb.EncodeRequest(tensor=tensor_of(movies[row : row + 1]))
            assert stub.Encode(one).tensor.data
        # In order of arrival, the first of them would have waited for all of the bulk.
        assert not all(call.done() for call in bulk)
        codes = bulk[0].result().tensor.data
        for call in bulk[1:]:
            call.cancel()
        # What was done in parts, between those of others, has the codes that it always has.
        alone = stub.Encode(pb.EncodeRequest(tensor=tensor_of(movies))).tensor.data
    assert codes == alone
    assert server.stop() == 0
