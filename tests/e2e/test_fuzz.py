"""No bytes make the server fail: every answer is a result or a caller's own error."""

from __future__ import annotations

import grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semid.v1 import semid_pb2 as pb

METHODS = ("Encode", "Decode", "GetModel", "ListModels", "EncodeStream", "DecodeStream")

CALLERS_OWN = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}

# One server serves every example, and its first answers may be slow: neither is a fault.
quietly = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _outcome(channel: grpc.Channel, method: str, data: bytes) -> grpc.StatusCode:
    """Send bytes as they are, to any method, and return the status."""
    path = f"/semid.v1.SemanticIdService/{method}"
    try:
        if method.endswith("Stream"):
            list(channel.stream_stream(path)(iter([data, data]), timeout=60))
        else:
            channel.unary_unary(path)(data, timeout=60)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


numbers = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([-(2**63), 2**31, 2**32, 2**62, 2**63 - 1, 16_384, 16_385]),
)
types = st.integers(-1, 9)
tensors = st.builds(
    pb.Tensor,
    dtype=types,
    shape=st.lists(numbers, max_size=4),
    data=st.binary(max_size=600),
)


@st.composite
def fitting_tensors(draw):
    """Tensors whose bytes fit their shape, so that deeper checks are reached."""
    dtype = draw(st.integers(1, 7))
    size = {1: 4, 2: 2, 3: 2, 4: 8, 5: 1, 6: 2, 7: 4}[dtype]
    rows = draw(st.integers(0, 4))
    columns = draw(st.sampled_from([0, 1, 2, 3, 4, 63, 64, 65]))
    length = rows * columns * size
    data = draw(st.binary(min_size=length, max_size=length))
    return pb.Tensor(dtype=dtype, shape=[rows, columns], data=data)


any_tensor = tensors | fitting_tensors()
names = st.sampled_from(["", "model", "digits_rkmeans", "\x00", "é" * 50]) | st.text(max_size=20)
floats = st.floats(width=32)
float_rows = st.builds(
    pb.FloatRows,
    rows=st.lists(st.builds(pb.FloatRows.Row, values=st.lists(floats, max_size=66)), max_size=4),
)
code_rows = st.builds(
    pb.CodeRows,
    rows=st.lists(
        st.builds(pb.CodeRows.Row, codes=st.lists(st.integers(0, 2**32 - 1), max_size=4)),
        max_size=4,
    ),
)
common = {"model": names, "expected_fingerprint": names}
encode_requests = st.one_of(
    st.builds(pb.EncodeRequest, tensor=any_tensor),
    st.builds(pb.EncodeRequest, tensor=any_tensor, **common),
    st.builds(pb.EncodeRequest, rows=float_rows),
)
decode_requests = st.one_of(
    st.builds(pb.DecodeRequest, tensor=any_tensor, mode=st.integers(-1, 4)),
    st.builds(pb.DecodeRequest, tensor=any_tensor, **common),
    st.builds(pb.DecodeRequest, rows=code_rows),
)


@quietly
@given(method=st.sampled_from(METHODS), data=st.binary(max_size=200))
def test_no_bytes_fail(digits_channel, method, data):
    assert _outcome(digits_channel, method, data) in CALLERS_OWN


@quietly
@given(request=encode_requests)
def test_no_encode_request_fails(digits_channel, request):
    assert _outcome(digits_channel, "Encode", request.SerializeToString()) in CALLERS_OWN
    message = pb.EncodeStreamRequest(request=request).SerializeToString()
    assert _outcome(digits_channel, "EncodeStream", message) in CALLERS_OWN


@quietly
@given(request=decode_requests)
def test_no_decode_request_fails(digits_channel, request):
    assert _outcome(digits_channel, "Decode", request.SerializeToString()) in CALLERS_OWN
    message = pb.DecodeStreamRequest(request=request).SerializeToString()
    assert _outcome(digits_channel, "DecodeStream", message) in CALLERS_OWN


@quietly
@given(request=encode_requests | decode_requests, cut=st.integers(0, 700), flip=st.integers(0, 255))
def test_no_damaged_message_fails(digits_channel, request, cut, flip):
    data = bytearray(request.SerializeToString())
    if data:
        data[cut % len(data)] ^= flip
    method = "Encode" if isinstance(request, pb.EncodeRequest) else "Decode"
    assert _outcome(digits_channel, method, bytes(data)) in CALLERS_OWN
    assert _outcome(digits_channel, method, bytes(data[: cut % (len(data) + 1)])) in CALLERS_OWN


def test_the_server_saw_no_bug_of_its_own(digits_server, digits_channel):
    """After all of the above it is alive and healthy, and counted no failure."""
    assert _outcome(digits_channel, "GetModel", b"") is grpc.StatusCode.OK
    for code in ("INTERNAL", "UNKNOWN"):
        lines = [
            line
            for line in digits_server.scrape().splitlines()
            if line.startswith("grpc_server_handled_total") and f'grpc_code="{code}"' in line
        ]
        assert all(line.endswith(" 0.0") for line in lines), lines
    assert "Traceback" not in digits_server.stderr()
