"""Arrays of every kind go in, and the right arrays come out."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semid.v1 import semid_pb2 as pb
from semid_client import Client, InvalidInputError

EMBEDDING_TYPES = ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", ml_dtypes.bfloat16]
INTEGER_TYPES = ["i1", "u1", "<i2", ">i2", "<u2", ">u2", "<i4", ">u4", "<i8", ">i8", "<u8", ">u8"]
LAYOUTS = {
    "C order": lambda a: a,
    "Fortran order": np.asfortranarray,
    "every other row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "every other column": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "backwards": lambda a: a[::-1].copy()[::-1],
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


def embeddings(n, dtype="f4", *, input_dim=4):
    rows = np.zeros((n, input_dim))
    rows[:, 0] = np.arange(n) % 128  # exact in every type
    return rows.astype(dtype)


@pytest.mark.parametrize("dtype", EMBEDDING_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_embeddings_of_any_type_and_layout_mean_their_values(server, connect, dtype, layout):
    client = connect(server)
    rows = LAYOUTS[layout](embeddings(5, dtype))
    np.testing.assert_array_equal(
        client.encode(rows), server.expected_codes(rows.astype(np.float64))
    )


@pytest.mark.parametrize(
    ("dtype", "wire"),
    [
        (">f8", pb.DATA_TYPE_FLOAT64),
        ("<f4", pb.DATA_TYPE_FLOAT32),
        (">f2", pb.DATA_TYPE_FLOAT16),
        (ml_dtypes.bfloat16, pb.DATA_TYPE_BFLOAT16),
    ],
)
def test_embeddings_travel_in_their_own_precision(server, connect, dtype, wire):
    connect(server).encode(embeddings(2, dtype))
    assert server.requests["Encode"][0].tensor.dtype == wire


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_of_any_integer_type_and_layout_mean_their_values(server, connect, dtype, layout):
    codes = LAYOUTS[layout](np.array([[1, 2, 3], [127, 0, 5], [7, 7, 7]]).astype(dtype))
    np.testing.assert_array_equal(
        connect(server).decode(codes), server.expected_reconstruction(codes)
    )


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    n=st.integers(0, 70),
    max_rows=st.integers(1, 80),
    message_bytes=st.integers(400, 900),
    max_in_flight=st.integers(1, 5),
    dtype=st.sampled_from(["<f2", ">f4", "<f8"]),
)
def test_however_an_array_is_split_its_rows_stay_in_order_and_under_the_limits(  # noqa: PLR0917 - hypothesis draws them by name
    server, n, max_rows, message_bytes, max_in_flight, dtype
):
    server.max_rows, server.max_message_bytes, server.largest_message = max_rows, message_bytes, 0
    rows = embeddings(n, dtype)
    with Client(server.target, max_in_flight=max_in_flight) as client:
        codes = client.encode(rows)
        np.testing.assert_array_equal(codes, server.expected_codes(rows))
        np.testing.assert_array_equal(client.decode(codes), server.expected_reconstruction(codes))
    assert server.largest_message <= message_bytes


def test_large_work_goes_in_messages_of_about_a_mebibyte(make_server, connect):
    server = make_server(input_dim=4096, max_message_bytes=16 << 20)
    connect(server).encode(embeddings(200, input_dim=4096))
    sizes = [request.ByteSize() for request in server.requests["Encode"]]
    assert len(sizes) == 4
    assert max(sizes) == pytest.approx(1 << 20, rel=0.02)


def test_an_answer_above_grpcs_own_limit_of_4_mib_is_received(make_server, connect):
    server = make_server(input_dim=(5 << 20) // 4, max_message_bytes=8 << 20)
    assert connect(server).decode([1, 2, 3]).shape == (server.input_dim,)


def test_a_single_row_gives_a_single_row(server, connect):
    client = connect(server)
    codes = client.encode(embeddings(8)[7])
    assert codes.tolist() == [7, 8, 9]
    assert client.decode(codes).tolist() == [24, 25, 26, 27]


def test_no_rows_give_no_rows_of_the_right_width_and_type(server, connect):
    client = connect(server)
    codes = client.encode(embeddings(0))
    assert (codes.shape, codes.dtype) == ((0, 3), np.uint8)
    vectors = client.decode(codes)
    assert (vectors.shape, vectors.dtype) == ((0, 4), np.float32)


def test_a_list_of_floats_counts_as_float64(server, connect):
    assert connect(server).encode([[5.0, 0, 0, 0.1]]).tolist() == [[5, 6, 7]]
    assert server.requests["Encode"][0].tensor.dtype == pb.DATA_TYPE_FLOAT64


def test_the_first_codes_alone_are_decoded(server, connect):
    assert connect(server).decode([[10, 20]]).tolist() == [[30, 31, 32, 33]]


@pytest.mark.parametrize(
    ("wire", "width", "dtype"),
    [
        (pb.DATA_TYPE_UINT8, 256, np.uint8),
        (pb.DATA_TYPE_UINT16, 1 << 16, np.uint16),
        (pb.DATA_TYPE_UINT32, 1 << 20, np.uint32),
    ],
)
def test_what_comes_out_is_native_writable_and_as_small_as_the_model_says(
    make_server, connect, wire, width, dtype
):
    client = connect(make_server(code_dtype=wire, codebook_width=width))
    codes = client.encode(embeddings(3))
    assert codes.dtype == np.dtype(dtype).newbyteorder("=")
    vectors = client.decode(codes)
    assert vectors.dtype == np.float32
    codes[0], vectors[0] = 0, 0


def test_codes_travel_in_the_smallest_type_that_holds_them(make_server, connect):
    server = make_server(codebook_width=1 << 20, code_dtype=pb.DATA_TYPE_UINT32)
    client = connect(server)
    for largest in (255, 256, 65535, 65536):
        client.decode(np.array([[0, largest]]))
    assert [r.tensor.dtype for r in server.requests["Decode"]] == [
        pb.DATA_TYPE_UINT8,
        pb.DATA_TYPE_UINT16,
        pb.DATA_TYPE_UINT16,
        pb.DATA_TYPE_UINT32,
    ]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 4), int), "embeddings are int64; expected float32"),
        ([[1, 2, 3, 4]], "embeddings are int64"),
        (np.zeros((2, 4), bool), "embeddings are bool"),
        (np.zeros((2, 4), complex), "embeddings are complex128"),
        (np.zeros((2, 4), object), "embeddings are object"),
        (np.zeros((2, 4), np.longdouble), "embeddings are"),
        (np.zeros((2, 4, 1)), r"shape \(2, 4, 1\)"),
        (np.float32(1), r"shape \(\)"),
        ([[1.0], [1.0, 2.0]], "do not form an array"),
    ],
)
def test_what_is_no_embedding_is_refused_before_anything_is_sent(server, connect, array, says):
    with pytest.raises(InvalidInputError, match=says):
        connect(server).encode(array)
    assert not server.metadata


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 3)), "codes are float64; expected an integer type"),
        (np.zeros((2, 3), bool), "codes are bool"),
        (np.zeros((2, 3, 1), int), r"shape \(2, 3, 1\)"),
    ],
)
def test_what_is_no_code_is_refused_before_anything_is_sent(server, connect, array, says):
    with pytest.raises(InvalidInputError, match=says):
        connect(server).decode(array)
    assert not server.metadata


@pytest.mark.parametrize("code", [-1, 1 << 32])
@pytest.mark.parametrize("max_rows", [1000, 2])
def test_a_code_that_no_message_holds_is_refused_with_its_row(make_server, connect, code, max_rows):
    server = make_server(max_rows=max_rows)
    codes = np.zeros((6, 3), np.int64)
    codes[5, 1] = code
    with pytest.raises(InvalidInputError, match=f"row 5: code {code} of layer 1") as caught:
        connect(server).decode(codes)
    assert caught.value.row == 5


def test_a_row_too_large_for_any_message_is_refused_with_both_numbers(make_server, connect):
    server = make_server(max_message_bytes=1000, input_dim=300)
    with pytest.raises(InvalidInputError, match=r"1200 bytes, but the server accepts .* 1000"):
        connect(server).encode(embeddings(1, input_dim=300))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ml_dtypes.bfloat16])
def test_a_row_that_is_not_finite_is_named_by_its_place_in_the_whole_array(
    make_server, connect, value, dtype
):
    rows = embeddings(50, dtype)
    rows[37, 2] = value
    with pytest.raises(InvalidInputError, match=f"row 37: number 2 is {value}") as caught:
        connect(make_server(max_rows=10)).encode(rows)
    assert caught.value.row == 37


def test_a_code_that_the_model_lacks_is_named_by_its_place_in_the_whole_array(make_server, connect):
    codes = np.zeros((50, 3), int)
    codes[37, 2] = 64
    with pytest.raises(InvalidInputError, match=r"row 37: code 64 of layer 2 .* 64 centroids"):
        connect(make_server(max_rows=10, codebook_width=64)).decode(codes)


def test_what_the_server_alone_finds_wrong_is_said_with_the_rows_of_the_message(
    make_server, connect
):
    rows = embeddings(25, input_dim=5)
    with pytest.raises(InvalidInputError, match=r"rows of 5 numbers \(in rows 0 to 9, counted"):
        connect(make_server(max_rows=10)).encode(rows)
    with pytest.raises(InvalidInputError, match=r"rows of 5 numbers$"):
        connect(make_server()).encode(rows)


def test_an_unknown_mode_is_refused_with_those_there_are(server, connect):
    with pytest.raises(ValueError, match="'exact'; expected one of sum, calibrated"):
        connect(server).decode([[1]], "exact")
