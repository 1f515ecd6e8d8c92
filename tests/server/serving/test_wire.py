"""Responses that are put together from parts are those that protobuf writes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from semid.v1 import semid_pb2 as pb
from semid_server.serving import wire
from semid_server.serving.types import ServedModel

SHAPES = st.tuples(st.integers(0, 300), st.integers(1, 5))


def served(fingerprint):
    return ServedModel(
        name="m",
        fingerprint=fingerprint,
        kind="rq-kmeans",
        input_dim=4,
        embedding_dim=4,
        codebook_widths=(4, 4),
        normalize_residuals=False,
        decode_modes=("sum",),
        code_dtype=np.dtype("u1"),
        device="cpu",
    )


@given(
    fingerprint=st.text(max_size=200),
    codes=st.sampled_from(["<u1", "<u2", "<u4"]).flatmap(
        lambda dtype: arrays.arrays(dtype, SHAPES)
    ),
)
def test_codes_are_written_as_protobuf_does(fingerprint, codes):
    tensor = pb.Tensor(
        dtype=wire.CODE_TYPE_NAMES[codes.dtype], shape=codes.shape, data=codes.tobytes()
    )
    expected = pb.EncodeResponse(fingerprint=fingerprint, tensor=tensor)
    written = wire.encode_response(codes, served(fingerprint), "tensor")
    assert written == expected.SerializeToString()
    in_stream = pb.EncodeStreamResponse(response=expected).SerializeToString()
    assert wire.in_stream(written) == in_stream


@given(
    fingerprint=st.text(max_size=200),
    rows=arrays.arrays("<f4", SHAPES, elements=st.floats(width=32)),
    transposed=st.booleans(),
)
def test_reconstructions_are_written_as_protobuf_does(fingerprint, rows, transposed):
    if transposed:  # not contiguous
        rows = rows.T
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=rows.shape, data=rows.tobytes())
    expected = pb.DecodeResponse(fingerprint=fingerprint, tensor=tensor)
    written = wire.decode_response(rows, served(fingerprint), "tensor")
    assert written == expected.SerializeToString()
    in_stream = pb.DecodeStreamResponse(response=expected).SerializeToString()
    assert wire.in_stream(written) == in_stream


@pytest.mark.parametrize("name", ["EncodeStreamResponse", "DecodeStreamResponse"])
def test_the_response_in_a_stream_is_the_field_that_is_written(name):
    assert pb.DESCRIPTOR.message_types_by_name[name].fields_by_number[1].name == "response"
