"""The contract as spoken by the servicer, over a real socket, with a toy model behind it."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semid.v1 import semid_pb2 as pb
from semid_server.errors import (
    DeadlineExpiredError,
    DeviceLostError,
    FingerprintMismatchError,
    InvalidInputError,
    ModelNotFoundError,
    OverloadedError,
)
from semid_server.serving.batcher import Runner
from semid_server.serving.calls import Calls
from semid_server.serving.metrics import Metrics
from semid_server.serving.servicer import STREAM_WINDOW, _in_message
from semid_server.serving.types import DecodeKey, EncodeKey

FLOAT_TYPES = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "float16": pb.DATA_TYPE_FLOAT16,
    "float64": pb.DATA_TYPE_FLOAT64,
}
CODE_TYPES = {
    np.dtype("u1"): pb.DATA_TYPE_UINT8,
    np.dtype("u2"): pb.DATA_TYPE_UINT16,
    np.dtype("u4"): pb.DATA_TYPE_UINT32,
}
ROWS = np.array([[1, 2, 3, 4], [11, 301, 8, 0], [9, 299, 6, -1]], np.float32)


def tensor(array, dtype=None):
    types = {np.dtype(name): number for name, number in FLOAT_TYPES.items()} | CODE_TYPES
    number = types[array.dtype] if dtype is None else dtype
    return pb.Tensor(dtype=number, shape=array.shape, data=array.tobytes())


def encode_request(array, **fields):
    return pb.EncodeRequest(tensor=tensor(array), **fields)


def decode_request(array, **fields):
    return pb.DecodeRequest(tensor=tensor(array), **fields)


def codes_of(response):
    types = {number: dtype for dtype, number in CODE_TYPES.items()}
    message = response.tensor
    return np.frombuffer(message.data, types[message.dtype]).reshape(message.shape)


async def failure(call):
    """Return the status, message, and details of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    metadata = dict(error.trailing_metadata() or ())
    details = []
    if packed := metadata.get("grpc-status-details-bin"):
        for detail in status_pb2.Status.FromString(packed).details:
            for kind in (error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
                if detail.Is(kind.DESCRIPTOR):
                    message = kind()
                    any_pb2.Any.Unpack(detail, message)
                    details.append(message)
    return error.code(), error.details(), details, metadata


async def test_encode_answers_with_codes_of_the_smallest_type_and_the_fingerprint(toy, toy_codes):
    response = await toy.stub.Encode(encode_request(ROWS))
    assert response.fingerprint == "f" * 64
    assert response.tensor.dtype == pb.DATA_TYPE_UINT16
    np.testing.assert_array_equal(codes_of(response), toy_codes(ROWS))


@pytest.mark.parametrize("name", FLOAT_TYPES)
async def test_encode_takes_every_type_of_number(toy, toy_runner, toy_served, toy_codes, name):
    response = await toy.stub.Encode(encode_request(ROWS.astype(name)))
    np.testing.assert_array_equal(codes_of(response), toy_codes(ROWS))
    assert toy_runner.keys == [EncodeKey(toy_served, name)]


async def test_bfloat16_reaches_the_runner_as_its_bits(serve_runner, toy_served):
    seen = []

    class Model(Runner):
        def run(self, key, payloads):
            seen.append((key, payloads[0].copy()))
            return [np.zeros((len(rows), 3), np.uint16) for rows in payloads]

        def after(self): ...

    service = await serve_runner(Model())
    bits = (ROWS.view(np.uint32) >> 16).astype(np.uint16)
    request = pb.EncodeRequest(tensor=tensor(bits, pb.DATA_TYPE_BFLOAT16))
    await service.stub.Encode(request)
    assert seen[0][0] == EncodeKey(toy_served, "bfloat16")
    np.testing.assert_array_equal(seen[0][1], bits)


async def test_rows_written_out_are_answered_in_kind(toy, toy_codes):
    rows = pb.FloatRows(rows=[pb.FloatRows.Row(values=row) for row in ROWS.tolist()])
    response = await toy.stub.Encode(pb.EncodeRequest(rows=rows))
    assert [list(row.codes) for row in response.rows.rows] == toy_codes(ROWS).tolist()
    decoded = await toy.stub.Decode(pb.DecodeRequest(rows=response.rows))
    assert [list(row.values) for row in decoded.rows.rows] == [
        [float(sum(codes))] * 4 for codes in toy_codes(ROWS).tolist()
    ]


async def test_no_rows_are_answered_with_no_codes(toy):
    response = await toy.stub.Encode(encode_request(np.empty((0, 4), np.float32)))
    assert list(response.tensor.shape) == [0, 3]
    response = await toy.stub.Encode(pb.EncodeRequest(rows=pb.FloatRows()))
    assert list(response.rows.rows) == []


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("dtype", CODE_TYPES)
async def test_decode_takes_the_first_codes_of_every_unsigned_type(
    toy, toy_runner, toy_codes, depth, dtype
):
    codes = np.minimum(toy_codes(ROWS)[:, :depth], 255).astype(dtype)
    response = await toy.stub.Decode(decode_request(codes))
    assert response.fingerprint == "f" * 64
    assert response.tensor.dtype == pb.DATA_TYPE_FLOAT32
    got = np.frombuffer(response.tensor.data, np.float32).reshape(response.tensor.shape)
    np.testing.assert_array_equal(got, np.repeat(codes.sum(axis=1)[:, None], 4, 1))
    assert toy_runner.keys == [DecodeKey(toy.catalogue.find(""), depth, "sum")]


async def test_get_model_tells_what_is_served_and_the_limits(toy):
    model = (await toy.stub.GetModel(pb.GetModelRequest())).model
    assert (model.name, model.fingerprint, model.input_dim) == ("toy", "f" * 64, 4)
    assert [layer.codebook_width for layer in model.layers] == [10, 300, 7]
    assert model.kind == pb.MODEL_KIND_RQ_KMEANS
    assert model.code_dtype == pb.DATA_TYPE_UINT16
    assert list(model.decode_modes) == [pb.DECODE_MODE_SUM]
    assert model.limits.max_message_bytes == 16 << 20
    assert model.limits.max_rows == 16384


async def test_list_models_names_the_default(toy):
    response = await toy.stub.ListModels(pb.ListModelsRequest())
    assert [model.name for model in response.models] == ["toy"]
    assert response.default_model == "toy"


def broken(**fields):
    """Return a request for ROWS with fields of its tensor replaced."""
    request = encode_request(ROWS)
    for name, value in fields.items():
        request.tensor.ClearField(name)
        if name == "shape":
            request.tensor.shape.extend(value)
        else:
            setattr(request.tensor, name, value)
    return request


@pytest.mark.parametrize(
    ("request_", "field", "text"),
    [
        (pb.EncodeRequest(), "embeddings", "give either tensor or rows"),
        (broken(dtype=0), "tensor.dtype", "DATA_TYPE_UNSPECIFIED is not a type of embeddings"),
        (broken(dtype=5), "tensor.dtype", "DATA_TYPE_UINT8 is not a type of embeddings"),
        (broken(dtype=99), "tensor.dtype", "99 is not a type of embeddings"),
        (broken(shape=[]), "tensor.shape", "0 dimensions"),
        (broken(shape=[12]), "tensor.shape", "1 dimensions"),
        (broken(shape=[3, 4, 1]), "tensor.shape", "3 dimensions"),
        (broken(shape=[1] * 9), "tensor.shape", "[1, 1, 1, 1, 1, 1, 1, 1, ...] has 9 dimensions"),
        (broken(shape=[-3, -4]), "tensor.shape", "negative"),
        (broken(shape=[4, 3]), "tensor.shape", "rows of 3 numbers; model 'toy' expects 4"),
        (broken(shape=[3, 5]), "tensor.data", "48 bytes; shape [3, 5]"),
        (broken(shape=[0, 1 << 62], data=b""), "tensor.shape", "too many columns"),
        (broken(data=b"123"), "tensor.data", "3 bytes; shape [3, 4] of DATA_TYPE_FLOAT32 takes 48"),
        (broken(shape=[0, 5], data=b""), "tensor.shape", "rows of 5 numbers"),
        (
            pb.EncodeRequest(
                rows=pb.FloatRows(rows=[pb.FloatRows.Row(values=[1] * n) for n in (4, 4, 3, 5)])
            ),
            "embeddings[2]",
            "3 numbers; model 'toy' expects 4 (and 1 more rows)",
        ),
    ],
)
async def test_a_malformed_encode_request_is_told_the_field_and_both_values(
    toy, request_, field, text
):
    code, message, details, _ = await failure(toy.stub.Encode(request_))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith(field)
    assert text in message
    assert details[0].field_violations[0].field == field


@pytest.mark.parametrize(
    ("request_", "field", "text"),
    [
        (pb.DecodeRequest(), "codes", "give either tensor or rows"),
        (
            pb.DecodeRequest(tensor=tensor(ROWS), mode=1),
            "tensor.dtype",
            "DATA_TYPE_FLOAT32 is not a type of codes",
        ),
        (
            decode_request(np.zeros((2, 4), "u1")),
            "tensor.shape",
            "4 codes a row; model 'toy' has 3",
        ),
        (decode_request(np.zeros((2, 0), "u1")), "tensor.shape", "0 codes a row"),
        (
            decode_request(np.array([[9, 299, 6], [0, 300, 7]], "u2")),
            "codes[1][1]",
            "300 is out of range; expected 0 to 299 (and 1 more codes)",
        ),
        (
            pb.DecodeRequest(rows=pb.CodeRows(rows=[pb.CodeRows.Row(codes=[2**32 - 1])])),
            "codes[0][0]",
            "4294967295 is out of range; expected 0 to 9",
        ),
        (
            pb.DecodeRequest(rows=pb.CodeRows(rows=[pb.CodeRows.Row()])),
            "codes[0]",
            "0 codes a row",
        ),
        (
            pb.DecodeRequest(
                rows=pb.CodeRows(rows=[pb.CodeRows.Row(codes=[1] * n) for n in (2, 3)])
            ),
            "codes[1]",
            "3 numbers; the first row has 2",
        ),
        (decode_request(np.zeros((2, 3), "u1"), mode=9), "mode", "9 is not a decode mode"),
    ],
)
async def test_a_malformed_decode_request_is_told_the_field_and_both_values(
    toy, request_, field, text
):
    code, message, details, _ = await failure(toy.stub.Decode(request_))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith(field)
    assert text in message
    assert details[0].field_violations[0].field == field


async def test_an_unknown_model_is_not_found_and_the_served_one_named(toy):
    code, message, _, _ = await failure(toy.stub.Encode(encode_request(ROWS, model="other")))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "'other'" in message
    assert "'toy'" in message


async def test_however_long_a_name_is_the_answer_arrives(toy):
    code, message, _, _ = await failure(toy.stub.Encode(encode_request(ROWS, model="é" * 100_000)))
    assert code == grpc.StatusCode.NOT_FOUND
    assert message.startswith("no model named 'ééé")


async def test_a_wrong_fingerprint_is_a_failed_precondition_and_both_are_named(toy):
    for call in (
        toy.stub.Encode(encode_request(ROWS, expected_fingerprint="abc")),
        toy.stub.Decode(decode_request(np.zeros((1, 3), "u1"), expected_fingerprint="abc")),
    ):
        code, message, _, _ = await failure(call)
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "abc" in message
        assert "f" * 64 in message
    await toy.stub.Encode(encode_request(ROWS, model="toy", expected_fingerprint="f" * 64))


async def test_a_mode_that_the_checkpoint_lacks_is_a_failed_precondition(toy):
    request = decode_request(np.zeros((1, 3), "u1"), mode=pb.DECODE_MODE_CALIBRATED)
    code, message, _, _ = await failure(toy.stub.Decode(request))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "CALIBRATED" in message


async def test_more_rows_than_the_published_limit_are_too_large(serve_runner, toy_runner):
    service = await serve_runner(toy_runner, max_batch_rows=2)
    code, message, _, _ = await failure(service.stub.Encode(encode_request(ROWS)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "3 rows" in message
    assert "at most 2" in message


async def test_before_the_model_is_loaded_every_method_is_unavailable(serve_runner, toy_runner):
    stub = (await serve_runner(toy_runner, model=None)).stub
    for call in (
        stub.Encode(encode_request(ROWS)),
        stub.Decode(decode_request(np.zeros((1, 3), "u1"))),
        stub.GetModel(pb.GetModelRequest()),
        stub.ListModels(pb.ListModelsRequest()),
    ):
        code, message, _, _ = await failure(call)
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "being loaded" in message


async def test_a_full_queue_is_told_with_a_retry_hint_in_details_and_pushback(serve_runner, device):
    service = await serve_runner(device, max_queue_requests=1)
    running = service.stub.Encode(encode_request(ROWS))
    await asyncio.to_thread(device.began.get, timeout=60)
    queued = service.stub.Encode(encode_request(ROWS))
    while not service.batcher.queue.requests:
        await asyncio.sleep(0)
    code, message, details, metadata = await failure(service.stub.Encode(encode_request(ROWS)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the queue is full" in message
    assert details[0].retry_delay.ToMilliseconds() > 0
    assert int(metadata["grpc-retry-pushback-ms"]) == details[0].retry_delay.ToMilliseconds()
    running.cancel()
    queued.cancel()
    device.free()


SERVICE = "semid.v1.SemanticIdService"
ENCODE = f"/{SERVICE}/Encode"
LABELS = ("grpc_type", "grpc_service", "grpc_method", "grpc_code")
INTERNAL = grpc.StatusCode.INTERNAL


async def test_a_call_is_refused_before_its_message_is_read(serve_runner, device):
    service = await serve_runner(device, max_queue_requests=1)
    running = service.stub.Encode(encode_request(ROWS))
    await asyncio.to_thread(device.began.get, timeout=60)
    queued = service.stub.Encode(encode_request(ROWS))
    while not service.batcher.queue.requests:
        await asyncio.sleep(0)
    # A call that never sends one is answered all the same.
    call = service.channel.stream_unary(ENCODE)()
    assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the queue is full" in await call.details()
    refused = service.metrics.registry.get_sample_value(
        "semid_refused_requests_total", {"operation": "encode"}
    )
    assert refused == 1
    # What needs no room is answered.
    await service.stub.GetModel(pb.GetModelRequest())
    device.free()
    await asyncio.gather(running, queued, return_exceptions=True)


async def test_of_more_calls_than_the_limit_the_last_is_refused_with_a_hint(serve_runner, device):
    service = await serve_runner(device, max_concurrent_rpcs=1)
    running = service.stub.Encode(encode_request(ROWS))
    await asyncio.to_thread(device.began.get, timeout=60)
    for call in (
        service.stub.GetModel(pb.GetModelRequest()),
        service.channel.stream_stream("/semid.v1.SemanticIdService/EncodeStream")().read(),
    ):
        code, message, details, metadata = await failure(call)
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert message.endswith(" calls are in progress; this server takes 1")
        assert details[0].retry_delay.ToMilliseconds() == 100
        assert metadata["grpc-retry-pushback-ms"] == "100"
    running.cancel()
    device.free()


async def test_a_method_that_is_not_there_is_unimplemented(toy):
    call = toy.channel.unary_unary("/semid.v1.SemanticIdService/Guess")(b"")
    assert await call.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_bug_is_internal_and_its_text_stays_in_the_log(serve_runner, caplog):
    class Model(Runner):
        def run(self, key, payloads):
            raise RuntimeError("secret path")

        def after(self): ...

    service = await serve_runner(Model())
    code, message, _, _ = await failure(service.stub.Encode(encode_request(ROWS)))
    assert code == grpc.StatusCode.INTERNAL
    assert "secret" not in message
    assert "secret path" in caplog.text


async def test_a_request_past_its_deadline_is_not_computed(serve_runner, device):
    service = await serve_runner(device)
    running = asyncio.ensure_future(service.stub.Encode(encode_request(ROWS)))
    await asyncio.to_thread(device.began.get, timeout=60)
    queued, seconds = False, 0.05
    while not queued:  # on a machine that is busy it may expire on its way there
        call = service.stub.Encode(encode_request(ROWS[:1]), timeout=seconds)
        while not (queued or call.done()):
            await asyncio.sleep(0)
            queued = service.batcher.queue.requests == 1
        assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        seconds *= 4
    while service.batcher.queue.requests:
        await asyncio.sleep(0)
    device.outcomes.put(lambda payloads: [np.zeros((3, 3), np.uint16)])
    await running
    last = asyncio.ensure_future(service.stub.Encode(encode_request(ROWS[:2])))
    await asyncio.to_thread(device.began.get, timeout=60)
    device.outcomes.put(lambda payloads: [np.zeros((2, 3), np.uint16)])
    await last
    assert [[len(rows) for rows in payloads] for _, payloads in device.batches] == [[3], [2]]


async def requests_of(arrays):
    for array in arrays:
        yield pb.EncodeStreamRequest(request=encode_request(array))


async def test_a_stream_answers_each_message_in_order(toy, toy_codes):
    arrays = [np.full((1 + i % 3, 4), i, np.float32) for i in range(100)]
    got = [codes_of(m.response) async for m in toy.stub.EncodeStream(requests_of(arrays))]
    assert len(got) == len(arrays)
    for codes, array in zip(got, arrays, strict=True):
        np.testing.assert_array_equal(codes, toy_codes(array))


async def test_a_decode_stream_answers_each_message_in_order(toy):
    async def requests():
        for i in range(20):
            codes = np.full((1, 3), i % 7, np.uint8)
            yield pb.DecodeStreamRequest(request=decode_request(codes))

    got = [m.response.tensor.data async for m in toy.stub.DecodeStream(requests())]
    assert got == [np.full(4, 3 * (i % 7), np.float32).tobytes() for i in range(20)]


async def test_an_error_ends_a_stream_after_the_answers_before_it_and_names_the_message(toy):
    async def requests():
        async for request in requests_of([ROWS] * 3):
            yield request
        yield pb.EncodeStreamRequest()
        async for request in requests_of([ROWS] * 3):
            yield request

    answers = []

    async def read():
        async for message in toy.stub.EncodeStream(requests()):
            answers.append(message)  # noqa: PERF401 - they are wanted although it fails

    code, message, details, _ = await failure(read())
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith("message 3 of the stream: embeddings")
    assert details[0].field_violations[0].field == "embeddings"
    assert len(answers) == 3


async def test_an_error_that_several_callers_get_names_to_each_its_own_message(
    serve_runner, device
):
    service = await serve_runner(device)
    occupying = asyncio.ensure_future(service.stub.Encode(encode_request(ROWS)))
    await asyncio.to_thread(device.began.get)

    async def read(count):
        async for _ in service.stub.EncodeStream(requests_of([ROWS] * count)):
            pass

    streams = [asyncio.ensure_future(failure(read(count))) for count in (1, 2)]
    unary = asyncio.ensure_future(failure(service.stub.Encode(encode_request(ROWS))))
    while service.batcher.queue.requests < 4:
        await asyncio.sleep(0)
    device.outcomes.put(RuntimeError("no"))
    await failure(occupying)
    device.outcomes.put(RuntimeError("no"))  # of all four at once
    said = "the device failed while it computed this batch"
    assert (await unary)[:2] == (grpc.StatusCode.INTERNAL, said)
    for stream in streams:
        assert (await stream)[:2] == (grpc.StatusCode.INTERNAL, f"message 0 of the stream: {said}")


@pytest.mark.parametrize(
    "error",
    [
        InvalidInputError.at("embeddings[3]", "is NaN"),
        FingerprintMismatchError(model="toy", expected="e", actual="f"),
        ModelNotFoundError(name="x", available=["toy"]),
        OverloadedError("full", retry_after=0.5),
        DeviceLostError("lost"),
    ],
)
def test_an_error_in_a_stream_is_a_copy_that_has_all_of_it(error):
    text, attributes = str(error), dict(vars(error))
    told = _in_message(_in_message(error, 7), 2)
    assert type(told) is type(error)
    assert str(told) == f"message 2 of the stream: message 7 of the stream: {text}"
    assert vars(told) == attributes
    assert str(error) == text


async def test_a_stream_is_read_no_further_ahead_than_its_window(serve_runner, device):
    service = await serve_runner(device, max_batch_rows=1)
    sent = 0

    async def requests():
        nonlocal sent
        while True:
            yield pb.EncodeStreamRequest(request=encode_request(np.zeros((1, 4), np.float32)))
            sent += 1

    call = service.stub.EncodeStream(requests())
    await asyncio.to_thread(device.began.get, timeout=60)
    # One runs and one is read but has no place in the window; HTTP/2 holds the rest back.
    while service.batcher.queue.requests < STREAM_WINDOW:
        await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert service.batcher.queue.requests <= STREAM_WINDOW + 1
    call.cancel()
    device.free()


async def test_a_stream_waits_for_room_where_a_single_request_is_refused(
    serve_runner, device, toy_codes
):
    service = await serve_runner(device, max_queue_requests=1, max_batch_rows=3)
    call = service.stub.EncodeStream(requests_of([ROWS] * 6))
    await asyncio.to_thread(device.began.get, timeout=60)
    for _ in range(6):
        device.outcomes.put(lambda payloads: [toy_codes(rows) for rows in payloads])
    got = [codes_of(m.response) async for m in call]
    assert len(got) == 6
    np.testing.assert_array_equal(got[5], toy_codes(ROWS))


async def test_a_client_that_leaves_a_stream_leaves_nothing_queued(serve_runner, device):
    service = await serve_runner(device, max_batch_rows=3)
    call = service.stub.EncodeStream(requests_of([ROWS] * (STREAM_WINDOW + 2)))
    await asyncio.to_thread(device.began.get, timeout=60)
    # One more than it may have in work: admitted, and waiting for its place.
    while service.batcher.queue.requests < STREAM_WINDOW + 1:
        await asyncio.sleep(0)
    call.cancel()
    while service.batcher.queue.requests:
        await asyncio.sleep(0)
    device.free()


async def test_draining_ends_a_stream_after_the_answers_to_all_that_was_read(toy):
    reading = asyncio.Event()

    async def requests():
        async for request in requests_of([ROWS] * 5):
            yield request
        await reading.wait()
        toy.servicer.drain()
        await asyncio.Event().wait()  # a sender that never ends by itself

    answers = []

    async def read():
        async for message in toy.stub.EncodeStream(requests()):
            answers.append(message)
            if len(answers) == 5:
                reading.set()

    code, message, _, _ = await failure(read())
    assert code == grpc.StatusCode.UNAVAILABLE
    assert "message 5 of the stream" in message
    assert len(answers) == 5


@pytest.mark.parametrize("method", ["EncodeStream", "DecodeStream"])
async def test_a_stream_asks_its_call_who_it_is_of_before_it_reads(toy, monkeypatch, method):
    """The call may have ended when a message is read, and gRPC must not be asked of it then."""
    asked = []

    def caller(context, **_settings):
        asked.append(context)
        return "somebody"

    monkeypatch.setattr("semid_server.serving.servicer.caller_of", caller)
    sent = asyncio.Event()

    async def requests():
        await sent.wait()
        for _ in range(3):
            if method == "EncodeStream":
                yield pb.EncodeStreamRequest(request=encode_request(ROWS))
            else:
                yield pb.DecodeStreamRequest(request=decode_request(np.zeros((1, 2), "u2")))

    answers = getattr(toy.stub, method)(requests())
    async with asyncio.timeout(10):
        while not asked:
            await asyncio.sleep(0.01)
        sent.set()
        assert len([answer async for answer in answers]) == 3
    assert len(asked) == 1


async def test_calls_that_have_yet_to_send_their_message_count_among_those_in_progress(
    serve_runner, toy_runner
):
    toy = await serve_runner(toy_runner, max_concurrent_rpcs=2)
    # To gRPC on the other side it is the same method: its caller begins, and takes its time.
    begin = toy.channel.stream_unary(ENCODE, request_serializer=None, response_deserializer=None)
    never = asyncio.Event()

    async def nothing():
        await never.wait()
        yield b""

    async def is_refused():
        call = toy.stub.Encode(encode_request(ROWS))
        if await call.code() is grpc.StatusCode.OK:
            return False
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await call.details() == "2 calls are in progress; this server takes 2"
        return True

    slow = [begin(nothing()) for _ in range(2)]
    async with asyncio.timeout(20):
        while not await is_refused():
            # Whoever is asked about comes first now and then, and one of these is refused instead.
            slow = [begin(nothing()) if call.done() else call for call in slow]
            await asyncio.sleep(0.01)
        slow[0].cancel()
        while await is_refused():
            await asyncio.sleep(0.01)
    slow[1].cancel()


async def test_an_answer_that_is_given_up_before_it_is_waited_for_withdraws_the_request(toy):
    answer = asyncio.get_running_loop().create_future()
    written = toy.servicer._written(SimpleNamespace(), answer)
    written.cancel()
    await asyncio.wait({written})
    await asyncio.sleep(0)
    assert answer.cancelled()


async def test_a_failure_that_nobody_waits_for_any_more_is_no_news(toy, caplog):
    answer = asyncio.get_running_loop().create_future()
    written = toy.servicer._written(SimpleNamespace(), answer)
    written.cancel()
    answer.set_exception(DeadlineExpiredError("too late"))
    await asyncio.wait({written})
    await asyncio.sleep(0)
    del answer, written
    gc.collect()
    assert not caplog.records


async def test_calls_are_counted_by_method_and_code(toy):
    await toy.stub.Encode(encode_request(ROWS))
    await failure(toy.stub.Encode(pb.EncodeRequest()))
    await failure(toy.stub.Encode(encode_request(ROWS, model="other")))
    assert [m async for m in toy.stub.EncodeStream(requests_of([ROWS]))]

    def handled(kind, method, code):
        return toy.metrics.registry.get_sample_value(
            "grpc_server_handled_total",
            {
                "grpc_type": kind,
                "grpc_service": "semid.v1.SemanticIdService",
                "grpc_method": method,
                "grpc_code": code,
            },
        )

    assert handled("unary", "Encode", "OK") == 1
    assert handled("unary", "Encode", "INVALID_ARGUMENT") == 1
    assert handled("unary", "Encode", "NOT_FOUND") == 1
    assert handled("bidi_stream", "EncodeStream", "OK") == 1
    value = toy.metrics.registry.get_sample_value
    assert value("semid_rows_total", {"operation": "encode"}) == 6
    assert value("semid_queue_seconds_count", {"operation": "encode"}) == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [(InvalidInputError("no"), grpc.StatusCode.INVALID_ARGUMENT), (KeyError(), INTERNAL)],
)
async def test_a_failure_is_counted_before_its_caller_hears_of_it(error, code):
    metrics, counted = Metrics(), []

    class Context:
        def invocation_metadata(self): ...

        def set_trailing_metadata(self, metadata): ...

        async def abort(self, told, message, metadata):
            labels = dict(zip(LABELS, ("unary", SERVICE, "Encode", told.name), strict=True))
            value = metrics.registry.get_sample_value("grpc_server_handled_total", labels)
            counted.append((told, value))
            raise grpc.aio.AbortError

    async def fail(request, context):
        raise error

    calls = Calls(SERVICE, metrics)
    calls.serve({"Encode": grpc.unary_unary_rpc_method_handler(fail, bytes, bytes)})
    details = SimpleNamespace(method=ENCODE, invocation_metadata=())
    with pytest.raises(grpc.aio.AbortError):
        await calls.service(details).unary_unary(b"", Context())
    assert counted == [(code, 1)]


NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
TENSORS = st.builds(
    pb.Tensor,
    dtype=st.integers(-1, 9),
    shape=st.lists(
        st.one_of(st.integers(-2, 5), st.sampled_from([4, 1 << 31, 1 << 62, -(1 << 63)])),
        max_size=3,
    ),
    data=st.binary(max_size=64),
)
FLOATS = st.floats(width=32)
FLOAT_ROWS = st.builds(pb.FloatRows.Row, values=st.lists(FLOATS, max_size=5))
CODE_ROWS = st.builds(pb.CodeRows.Row, codes=st.lists(st.integers(0, 2**32 - 1), max_size=4))
ENCODES = st.one_of(
    st.builds(pb.EncodeRequest, tensor=TENSORS),
    st.builds(
        pb.EncodeRequest, rows=st.builds(pb.FloatRows, rows=st.lists(FLOAT_ROWS, max_size=4))
    ),
)
MODES = st.integers(-1, 4)
DECODES = st.one_of(
    st.builds(pb.DecodeRequest, mode=MODES, tensor=TENSORS),
    st.builds(
        pb.DecodeRequest,
        mode=MODES,
        rows=st.builds(pb.CodeRows, rows=st.lists(CODE_ROWS, max_size=4)),
    ),
)


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(encodes=st.lists(ENCODES, max_size=30), decodes=st.lists(DECODES, max_size=30))
async def test_no_request_is_answered_with_internal_or_unknown(toy, encodes, decodes):
    calls = [toy.stub.Encode(request) for request in encodes]
    calls += [toy.stub.Decode(request) for request in decodes]
    codes = [await call.code() for call in calls]
    assert not NEVER & set(codes)
    assert await toy.stub.Encode(encode_request(ROWS)).code() == grpc.StatusCode.OK
