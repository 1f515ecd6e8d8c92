"""Shared memory: read where it was proved to be the caller's, and let go of when the call ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import signal
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semid.v1 import semid_pb2 as pb
from semid_server.errors import (
    DeviceError,
    InvalidInputError,
    MessageTooLargeError,
    SegmentNotFoundError,
    SemidError,
    SharedMemoryFullError,
    SharedMemoryRefusedError,
)
from semid_server.serving import wire
from semid_server.serving.batcher import Runner
from semid_server.serving.fill import BLOCK_BYTES, read_finite
from semid_server.serving.shared_memory import FOLDER, Bounds, Segment, SharedMemory, SharedRows
from semid_server.serving.types import HOST_TYPES

PROOF = b"proof of 16 byte"
KIB = 1024


@pytest.fixture
def folder():
    """A folder of tmpfs, as the real one is, that no server sweeps."""
    path = FOLDER / f"test-{secrets.token_hex(8)}"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture
def make_file(folder):
    """Return a function that makes a file to share, and returns its name and its descriptor."""
    with contextlib.ExitStack() as stack:

        def make(content=PROOF, *, name=None):
            name = name or f"semid-{secrets.token_hex(16)}"
            fd = os.open(folder / name, os.O_CREAT | os.O_RDWR, 0o600)
            stack.callback(os.close, fd)
            os.pwrite(fd, content, 0)
            return name, fd

        yield make


@pytest.fixture
def memory(folder):
    return SharedMemory(Bounds(64 * KIB, 16), folder=folder)


def open_files():
    """How many descriptors of this process are of files in such folders."""
    count = 0
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the others
            count += str(fd.readlink()).startswith(f"{FOLDER}/test-")
    return count


def test_what_is_shared_is_found_by_its_handle_until_the_sharing_ends(memory, make_file):
    name, fd = make_file()
    with memory.shared(name, KIB, PROOF, "peer") as segment:
        os.pwrite(fd, b"written after it was shared", 100)
        found = bytearray(27)
        assert memory.find(segment.handle).read(memoryview(found), 100) == 27
        assert found == b"written after it was shared"
        assert (memory.nbytes, memory.segments) == (KIB, 1)
    with pytest.raises(SegmentNotFoundError, match=segment.handle):
        memory.find(segment.handle)
    assert (memory.nbytes, memory.segments) == (0, 0)


def test_the_name_is_gone_once_it_is_shared(memory, make_file, folder):
    name, _ = make_file()
    with memory.shared(name, KIB, PROOF, "peer"):
        assert not list(folder.iterdir())
        with pytest.raises(SharedMemoryRefusedError), memory.shared(name, KIB, PROOF, "peer"):
            pass


def test_a_request_that_was_admitted_can_still_be_read_and_then_the_file_is_closed(
    memory, make_file
):
    name, fd = make_file()
    os.pwrite(fd, b"abcd", 16)
    before = open_files()
    with memory.shared(name, KIB, PROOF, "peer") as segment:
        rows, others = (SharedRows(segment, 16, (1, 1), 4) for _ in range(2))
        rows.need()
        others.need()
    others.release()
    assert open_files() == before + 1
    found = bytearray(4)
    rows.read(memoryview(found), 0)
    assert found == b"abcd"
    rows.release()
    assert open_files() == before
    with pytest.raises(SegmentNotFoundError, match="no longer shared"):
        rows.read(memoryview(found), 0)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "semid-",
        "semid-" + "0" * 31,
        "semid-" + "0" * 33,
        "semid-" + "G" * 32,
        "../etc/passwd",
        "semid-" + "0" * 32 + "\n",
        "semid-/" + "0" * 31,
        "semid-" + "\0" * 32,
        "sem.id-" + "0" * 32,
        "semid-" + "٣" * 32,
    ],
)
def test_names_have_one_form(memory, name):
    with pytest.raises(InvalidInputError, match="name:"), memory.shared(name, KIB, PROOF, "peer"):
        pass


@pytest.mark.parametrize("proof", [b"", b"x" * 15, b"x" * 65])
def test_proofs_have_a_length(memory, make_file, proof):
    name, _ = make_file(proof or b"x")
    with (
        pytest.raises(InvalidInputError, match=f"{len(proof)} bytes; expected 16 to 64"),
        memory.shared(name, KIB, proof, "peer"),
    ):
        pass


@pytest.mark.parametrize("size", [-1, 0, 15, -(2**63)])
def test_sizes_are_those_of_a_file_with_its_proof(memory, make_file, size):
    name, _ = make_file()
    with (
        pytest.raises(InvalidInputError, match=f"size_bytes: {size}; expected at least the 16"),
        memory.shared(name, size, PROOF, "peer"),
    ):
        pass


def refusal(memory, name, proof=PROOF):
    before = open_files()
    with (
        pytest.raises(SharedMemoryRefusedError) as refused,
        memory.shared(name, KIB, proof, "peer"),
    ):
        pass
    assert open_files() == before
    assert (memory.nbytes, memory.segments) == (0, 0)
    return str(refused.value)


def test_who_does_not_know_what_the_file_begins_with_gets_nothing_of_it(memory, make_file, folder):
    name, _ = make_file()
    assert "does not begin with the proof" in refusal(memory, name, b"a proof of others")
    assert "does not begin with the proof" in refusal(memory, name, PROOF + b"and more")
    assert (folder / name).exists()  # and nothing was removed


def test_a_link_is_not_followed(memory, make_file, folder):
    name, _ = make_file()
    link = f"semid-{'1' * 32}"
    (folder / link).symlink_to(folder / name)
    assert os.strerror(errno.ELOOP) in refusal(memory, link)


def test_a_file_with_a_second_name_is_refused(memory, make_file, folder):
    name, _ = make_file()
    (folder / "second").hardlink_to(folder / name)
    assert "not a regular file of one name" in refusal(memory, name)


def test_a_fifo_that_nobody_writes_to_is_not_waited_for(memory, folder):
    name = f"semid-{'2' * 32}"
    os.mkfifo(folder / name)
    assert "not a regular file of one name" in refusal(memory, name)


def test_a_folder_is_no_file(memory, folder):
    name = f"semid-{'3' * 32}"
    (folder / name).mkdir()
    try:
        assert "not a regular file of one name" in refusal(memory, name)
    finally:
        (folder / name).rmdir()


def test_a_file_whose_owner_would_have_the_opener_wait_is_refused_at_once(memory, make_file):
    name, fd = make_file()
    told = signal.signal(signal.SIGIO, lambda *_: None)  # how the owner hears of it
    try:
        # A lease makes whoever opens the file wait for its owner, 45 seconds long by default.
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        assert os.strerror(errno.EAGAIN) in refusal(memory, name)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    finally:
        signal.signal(signal.SIGIO, told)


def test_a_file_that_is_not_there_is_said_so(memory):
    said = refusal(memory, f"semid-{'4' * 32}")
    assert os.strerror(errno.ENOENT) in said
    assert "same user" in said


def test_no_bytes_mean_that_nothing_is_shared(folder, make_file):
    memory = SharedMemory(Bounds(0), folder=folder)
    assert not memory.offered
    assert "--shared-memory-bytes" in refusal(memory, make_file()[0])


def test_one_connection_may_have_a_quarter_and_all_together_everything(memory, make_file):
    with contextlib.ExitStack() as stack:

        def share(nbytes, peer):
            stack.enter_context(memory.shared(make_file()[0], nbytes, PROOF, peer))

        share(16 * KIB, "a")
        with pytest.raises(SharedMemoryFullError, match="this connection would share 16400 bytes"):
            share(16, "a")
        for peer in "bcd":
            share(16 * KIB, peer)
        with pytest.raises(SharedMemoryFullError, match="all callers together"):
            share(16, "e")
    with memory.shared(make_file()[0], 16 * KIB, PROOF, "e"):  # what ended counts no more
        pass


def test_files_are_bounded_too(memory, make_file):
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(memory.shared(make_file()[0], 16, PROOF, "a"))
        with (
            pytest.raises(SharedMemoryFullError, match="in 5 files; at most 16384 bytes in 4"),
            memory.shared(make_file()[0], 16, PROOF, "a"),
        ):
            pass


def test_files_of_callers_that_are_gone_are_swept_and_those_of_the_living_stay(
    memory, make_file, folder
):
    _, held = make_file(name=f"semid-{'5' * 32}")
    fcntl.flock(held, fcntl.LOCK_EX)
    make_file(name=f"semid-{'6' * 32}")
    make_file(name="of-others")
    memory.sweep()
    assert sorted(path.name for path in folder.iterdir()) == ["of-others", f"semid-{'5' * 32}"]


# -- reading ---------------------------------------------------------------------------------


@pytest.fixture
def segment(make_file):
    """A segment to write to, without a server."""
    with contextlib.ExitStack() as stack:

        def make(content: bytes) -> tuple[SharedRows, int]:
            _, fd = make_file(PROOF + content)
            segment = Segment(os.dup(fd), "handle", KIB)
            stack.callback(segment.end)
            return SharedRows(segment, 16, (1, 1), len(content)), fd

        yield make


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_rows_arrive_bit_by_bit_over_more_than_a_block(segment, dtype):
    count = 2 * BLOCK_BYTES // np.dtype(dtype).itemsize + 7
    source = (np.arange(count) % 1000).astype(dtype)
    rows, _ = segment(source.tobytes())
    target = np.zeros((1, count), dtype)
    assert read_finite(target, rows, dtype)
    assert target.tobytes() == source.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_a_number_that_is_not_finite_is_seen(segment, dtype, value, place):
    source = np.zeros(BLOCK_BYTES // np.dtype(dtype).itemsize + 3, dtype)
    source[place] = value
    rows, _ = segment(source.tobytes())
    assert not read_finite(np.zeros((1, len(source)), dtype), rows, dtype)


def test_a_truncated_file_is_an_error_that_says_where_it_ends(segment):
    rows, fd = segment(bytes(100))
    os.ftruncate(fd, 16 + 50)
    with pytest.raises(InvalidInputError, match="ends at byte 66; 100 bytes were to follow"):
        read_finite(np.zeros((1, 25), np.float32), rows, "float32")


def test_memory_that_fails_is_an_error_of_its_own():
    reader, writer = os.pipe()  # what cannot be read at an offset stands for what cannot be read
    os.close(writer)
    segment = Segment(reader, "handle", KIB)
    rows = SharedRows(segment, 0, (1, 1), 4)
    with pytest.raises(DeviceError, match="cannot be read"):
        rows.read(memoryview(bytearray(4)), 0)
    segment.end()


# -- the service -----------------------------------------------------------------------------


class ReadingModel(Runner):
    """The toy model, which reads what is shared when its batch runs."""

    def __init__(self, toy, before=lambda: None) -> None:
        self._toy, self._before = toy, before

    def run(self, key, payloads):
        self._before()
        answers = []
        for payload in payloads:
            rows = payload
            try:
                if isinstance(payload, SharedRows):
                    rows = np.empty(payload.shape, HOST_TYPES[key.dtype])
                    read_finite(rows, payload, key.dtype)
                answers += self._toy.run(key, [rows])
            except SemidError as error:
                answers.append(error)
        return answers

    def after(self):
        pass


@dataclass
class Caller:
    """A caller's end of what it shares."""

    service: object
    call: object
    handle: str
    fd: int

    def request(self, **fields):
        shared = {"dtype": pb.DATA_TYPE_FLOAT32, "segment": self.handle, "offset": 16} | fields
        return pb.EncodeRequest(shared=pb.SharedTensor(**shared))

    async def refusal(self, **fields):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await self.service.stub.Encode(self.request(**fields))
        return error.value.code(), error.value.details()


@pytest.fixture
async def share(serve_runner, toy_runner, memory, make_file):
    """Return a function that shares 1 KiB, of which ROWS come after the proof."""

    async def share(*, before=lambda: None, size=KIB, **settings):
        runner = ReadingModel(toy_runner, before)
        service = await serve_runner(runner, shared_memory=memory, **settings)
        name, fd = make_file(PROOF + ROWS.tobytes())
        request = pb.ShareMemoryRequest(name=name, size_bytes=size, proof=PROOF)
        call = service.stub.ShareMemory(request)
        return Caller(service, call, (await call.read()).segment, fd)

    return share


ROWS = np.array([[1, 2, 3, 4], [5, 250, 7, 8], [-9, 310, 1, 0]], "<f4")


async def test_no_file_is_kept_open_by_requests_that_were_answered_or_refused(share, memory):
    before = open_files()  # with the caller's own
    caller = await share(max_queue_requests=1)
    await asyncio.gather(
        *(caller.service.stub.Encode(caller.request(shape=[3, 4])) for _ in range(8)),
        return_exceptions=True,
    )
    while open_files() != before + 2:  # a moment after the answers
        await asyncio.sleep(0)
    caller.call.cancel()
    await ended(memory)
    while open_files() != before + 1:
        await asyncio.sleep(0)


async def ended(memory):
    while memory.segments:
        await asyncio.sleep(0)


async def test_embeddings_that_are_shared_are_encoded(share, toy_codes):
    caller = await share()
    answer = await caller.service.stub.Encode(caller.request(shape=[3, 4]))
    assert answer.tensor.data == toy_codes(ROWS).tobytes()
    answer = await caller.service.stub.Encode(caller.request(shape=[1, 4], offset=32))
    assert answer.tensor.data == toy_codes(ROWS[1:2]).tobytes()


async def test_messages_of_a_stream_may_refer_to_what_is_shared(share, toy_codes):
    caller = await share()
    call = caller.service.stub.EncodeStream()
    for row in range(3):
        request = caller.request(shape=[1, 4], offset=16 + 16 * row)
        await call.write(pb.EncodeStreamRequest(request=request))
    await call.done_writing()
    answers = [message.response.tensor.data async for message in call]
    assert b"".join(answers) == toy_codes(ROWS).tobytes()


async def test_no_rows_are_no_codes(share):
    caller = await share()
    answer = await caller.service.stub.Encode(caller.request(shape=[0, 4], offset=KIB))
    assert list(answer.tensor.shape) == [0, 3]


async def test_the_end_of_the_call_ends_the_sharing(share, memory):
    caller = await share()
    assert memory.segments == 1
    caller.call.cancel()
    await ended(memory)
    code, details = await caller.refusal(shape=[3, 4])
    assert code is grpc.StatusCode.NOT_FOUND
    assert caller.handle in details


async def test_a_server_that_drains_ends_the_sharing(share, memory):
    caller = await share()
    caller.service.servicer.drain()
    assert await caller.call.read() is grpc.aio.EOF
    assert await caller.call.code() is grpc.StatusCode.OK
    await ended(memory)


async def test_a_file_that_is_truncated_while_its_request_waits_fails_that_request_alone(
    share, toy_codes
):
    caller = await share(before=lambda: os.ftruncate(caller.fd, 40))
    code, details = await caller.refusal(shape=[3, 4])
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "shared.offset: the shared file ends at byte 40; 48 bytes were to follow" in details
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=ROWS.shape, data=ROWS.tobytes())
    answer = await caller.service.stub.Encode(pb.EncodeRequest(tensor=tensor))
    assert answer.tensor.data == toy_codes(ROWS).tobytes()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"shape": [3]}, "shared.shape: [3] has 1 dimensions; expected [rows, columns]"),
        ({"shape": [-1, 4]}, "shared.shape: [-1, 4] has a negative dimension"),
        ({"shape": [3, 5]}, "shared.shape: rows of 5 numbers; model 'toy' expects 4"),
        ({"shape": [3, 4], "offset": -1}, "shared.offset: -1, and 48 bytes from there"),
        ({"shape": [3, 4], "offset": KIB - 47}, "977, and 48 bytes from there; the memory shared"),
        ({"shape": [3, 4], "offset": 2**63 - 1}, "and 48 bytes from there; the memory shared has"),
        ({"shape": [3, 4], "dtype": pb.DATA_TYPE_UINT8}, "UINT8 is not a type of embeddings"),
        ({"shape": [3, 4], "dtype": 99}, "shared.dtype: 99 is not a type of embeddings"),
    ],
)
async def test_what_does_not_fit_is_said_with_both_values(share, fields, said):
    code, details = await (await share()).refusal(**fields)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert said in details


async def test_more_rows_or_bytes_than_a_batch_holds_are_refused(share):
    bounds = {"max_message_bytes": 128 * KIB, "max_batch_bytes": 128 * KIB}
    caller = await share(**bounds)
    code, details = await caller.refusal(shape=[16385, 4])
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "16385 rows in one request; this server takes at most 10922" in details
    code, details = await caller.refusal(shape=[8193, 4])
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "131088 bytes of embeddings in one request; this server takes at most 131072" in details


async def test_what_cannot_be_shared_has_a_status(share, make_file, memory):
    caller = await share()
    for name, size, code in (
        ("nonsense", KIB, grpc.StatusCode.INVALID_ARGUMENT),
        (f"semid-{'7' * 32}", KIB, grpc.StatusCode.FAILED_PRECONDITION),
        (make_file()[0], 2**62, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ):
        request = pb.ShareMemoryRequest(name=name, size_bytes=size, proof=PROOF)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await caller.service.stub.ShareMemory(request).read()
        assert error.value.code() is code
    assert memory.segments == 1


async def test_the_bounds_are_published(share, serve_runner, toy_runner):
    caller = await share()
    model = (await caller.service.stub.GetModel(pb.GetModelRequest())).model
    assert model.limits.shared_memory == pb.SharedMemoryLimits(
        max_bytes=16 * KIB, max_segments=4, max_rows=16384, max_request_bytes=64 * KIB * KIB
    )
    without = await serve_runner(toy_runner)
    model = (await without.stub.GetModel(pb.GetModelRequest())).model
    assert not model.limits.HasField("shared_memory")


async def test_bytes_are_counted_by_the_way_they_came(share):
    caller = await share()
    await caller.service.stub.Encode(caller.request(shape=[3, 4]))
    tensor = pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[1, 4], data=bytes(16))
    await caller.service.stub.Encode(pb.EncodeRequest(tensor=tensor))
    registry = caller.service.metrics.registry
    for transport, nbytes in (("shared_memory", 48), ("message", 16)):
        labels = {"transport": transport}
        assert registry.get_sample_value("semid_received_bytes_total", labels) == nbytes


INT64 = st.integers(-(2**63), 2**63 - 1) | st.sampled_from(
    [0, 1, 2, 3, 4, 16, KIB, 2**31, 2**32, 2**60, 2**62, 2**63 - 1, -1, -(2**63)]
)


@given(
    shape=st.lists(INT64, max_size=3) | st.tuples(INT64, st.just(4)).map(list),
    offset=INT64,
    dtype=st.integers(0, 9),
    own=st.booleans(),
)
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
    ],  # it is a constant
)
def test_whatever_the_fields_say_nothing_is_read_outside_of_what_is_shared(
    toy_served, shape, offset, dtype, own
):
    memory = SharedMemory(Bounds(64 * KIB))
    fd = os.memfd_create("proof")
    segment = Segment(fd, "mine", KIB)
    memory._segments["mine"] = segment
    request = pb.EncodeRequest(
        shared=pb.SharedTensor(
            dtype=dtype, shape=shape, segment="mine" if own else "other", offset=offset
        )
    )
    try:
        rows, kind = wire.read_shared(request, toy_served, memory, max_rows=100, max_bytes=512)
    except (InvalidInputError, MessageTooLargeError, SegmentNotFoundError):
        return
    finally:
        segment.end()
    assert own
    assert rows.shape == tuple(shape) == (len(rows), 4)
    assert rows.nbytes == len(rows) * 4 * HOST_TYPES[kind].itemsize <= 512
    assert 0 <= offset <= offset + rows.nbytes <= KIB
