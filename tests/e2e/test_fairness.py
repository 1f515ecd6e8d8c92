"""Callers of one server, large and small, beside one another; and those in a hurry."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from semid.v1 import semid_pb2 as pb

OK = grpc.StatusCode.OK
SLOWLY = ("--reference", "--threads", "1")
"""One thread of the float64 reference: the bulk below keeps it busy for seconds."""


@pytest.fixture
def movies(reference_dir):
    return np.load(reference_dir / "data/movies.npy")[:1500]


@pytest.fixture
def server(serve, reference_dir):
    return serve(reference_dir / "movies_rkmeans/model.ckpt", *SLOWLY)


@pytest.fixture
def bulk(server, movies, tensor_of):
    """Three callers with all of them, under way."""
    with server.stub() as stub:
        calls = [stub.Encode.future(pb.EncodeRequest(tensor=tensor_of(movies))) for _ in range(3)]
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
        assert not any(call.done() for call in bulk)
        codes = [call.result().tensor.data for call in bulk]
        # What was done in parts, between those of others, has the codes that it always has.
        alone = stub.Encode(pb.EncodeRequest(tensor=tensor_of(movies))).tensor.data
    assert codes == [alone] * 3
    assert server.stop() == 0


def test_what_cannot_be_done_in_time_is_refused_as_it_comes(server, bulk, movies, tensor_of):
    request = pb.EncodeRequest(tensor=tensor_of(movies))
    with server.stub() as stub:
        hurried = stub.Encode.future(request, timeout=0.5)
        assert hurried.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "what is ahead of this request takes about" in hurried.details()
        assert dict(hurried.trailing_metadata())["grpc-retry-pushback-ms"]
        # It is not for lack of room.
        one = pb.EncodeRequest(tensor=tensor_of(movies[:1]))
        assert stub.Encode.future(one, timeout=20).code() is OK
    assert not any(call.done() for call in bulk)
