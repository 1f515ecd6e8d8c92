"""Callers of one server, large and small, beside one another."""

from __future__ import annotations

import numpy as np

from semid.v1 import semid_pb2 as pb

SLOWLY = ("--reference", "--threads", "1")
"""One thread of the float64 reference: a large request is many turns, however fast the machine."""


def test_single_rows_are_answered_while_large_requests_are_in_work(
    serve_gated, reference_set_named, tensor_of
):
    movies = reference_set_named("movies_rkmeans")
    server, gate = serve_gated(movies.checkpoint, *SLOWLY)
    width, answered = movies.embeddings.shape[1], []

    def encode(stub, rows):
        call = stub.Encode.future(pb.EncodeRequest(tensor=tensor_of(rows)))
        call.add_done_callback(lambda _: answered.append(len(rows)))
        return call

    with server.stub() as stub:
        first = gate.hold(stub, width)
        large = [encode(stub, movies.embeddings) for _ in range(3)]
        gate.wait_for_queue(3)
        single = [encode(stub, movies.embeddings[row : row + 1]) for row in range(5)]
        gate.wait_for_queue(8)
        gate.release()
        for call in (first, *large, *single):
            call.result()
    # In order of arrival, each of them would have waited for all that is large.
    assert answered == [1] * 5 + [len(movies.embeddings)] * 3
    # What was done in parts, between those of others, has the codes that it always has.
    truth = movies.codes.astype("u1")
    decided = ~movies.vanishing
    for call in large:
        codes = np.frombuffer(call.result().tensor.data, "u1").reshape(truth.shape)
        np.testing.assert_array_equal(codes[decided], truth[decided])
    assert server.stop() == 0
