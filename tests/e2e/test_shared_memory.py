"""Embeddings handed over in shared memory, between real processes that end as processes do."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import ml_dtypes
import numpy as np
import pytest
import trustme
from waiting import wait_until

from semid.v1 import semid_pb2 as pb
from semid_client import (
    TLS,
    AsyncClient,
    Client,
    ConfigurationError,
    InvalidInputError,
    _shared_memory,
)

FOLDER = Path("/dev/shm")  # noqa: S108 - where it is
ENOUGH = 1 << 20
"""Bytes of embeddings above which they are handed over in memory."""

TYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.dtype(">f4")]


def enough(embeddings, dtype):
    """The rows, again and again until they are enough."""
    rows = embeddings.astype(dtype)
    return np.tile(rows, (-(-ENOUGH // rows.nbytes), 1))


def shared_bytes(server):
    return server.metric("semid_received_bytes_total", transport="shared_memory")


def sent_bytes(server):
    return server.metric("semid_received_bytes_total", transport="message")


@pytest.fixture
def named():
    """Return a function that lists what has a name there since the test began.

    Others on this machine may have something there, too: that stays, or goes as they please.
    """

    def now():
        return {path.name for path in FOLDER.glob("semid-*")}

    before = now()
    return lambda: now() - before


def held_by(server):
    """Files in shared memory that a server process has open."""
    held = []
    for fd in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            held.append(str(fd.readlink()))
    return [name for name in held if name.startswith(str(FOLDER / "semid-"))]


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Clients of these tests never send bytes because a busy machine was slow to share."""
    monkeypatch.setattr(_shared_memory, "PATIENCE", 60.0)


@pytest.fixture
def checkpoint(reference_dir):
    return reference_dir / "digits_rkmeans/model.ckpt"


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).str)
def test_codes_are_those_of_embeddings_that_are_sent(reference_set, set_server, dtype):
    rows = enough(reference_set.embeddings, dtype)
    with (
        Client(set_server.target, shared_memory=False) as sending,
        Client(set_server.target, shared_memory=True) as sharing,
    ):
        sent = sending.encode(rows)
        before = shared_bytes(set_server), sent_bytes(set_server)
        shared = sharing.encode(rows)
        in_place = sharing.allocate(*rows.shape, rows.dtype.newbyteorder("="))
        in_place[:] = rows
        from_there = sharing.encode(in_place)
        part = sharing.encode(in_place[3 : len(rows) // 2])
    assert shared_bytes(set_server) - before[0] >= 2 * rows.nbytes + rows.nbytes // 2 - ENOUGH
    assert sent_bytes(set_server) == before[1]
    assert shared.dtype == sent.dtype
    np.testing.assert_array_equal(shared, sent)
    np.testing.assert_array_equal(from_there, sent)
    np.testing.assert_array_equal(part, sent[3 : len(rows) // 2])


def test_it_is_what_happens_on_its_own_on_one_machine(digits_server, digits):
    rows = enough(digits, np.float32)
    before = shared_bytes(digits_server)
    with Client(digits_server.target) as client:
        client.encode(rows)
        assert shared_bytes(digits_server) - before == rows.nbytes
        client.encode(digits[:100])  # too few to be worth it
    assert shared_bytes(digits_server) - before == rows.nbytes


def test_files_and_asyncio_share_too(digits_server, digits, tmp_path):
    rows = enough(digits, np.float32)
    np.save(tmp_path / "rows.npy", rows)
    codes = {}

    async def encode():
        async with AsyncClient(digits_server.target, shared_memory=True) as client:
            expected = await client.encode(rows)
            source = np.load(tmp_path / "rows.npy", mmap_mode="r")
            await client.encode_into(source, codes.__setitem__)
            in_place = await client.allocate(*rows.shape)
            in_place[:] = rows
            np.testing.assert_array_equal(await client.encode(in_place), expected)
            return expected

    before = shared_bytes(digits_server)
    expected = asyncio.run(encode())
    assert shared_bytes(digits_server) - before == 3 * rows.nbytes
    np.testing.assert_array_equal(
        np.concatenate([codes[start] for start in sorted(codes)]), expected
    )


def test_rows_of_any_layout_are_copied_as_they_mean(digits_server, digits):
    rows = enough(digits, np.float64)
    with Client(digits_server.target, shared_memory=True) as client:
        expected = client.encode(rows)
        np.testing.assert_array_equal(client.encode(np.asfortranarray(rows)), expected)
        np.testing.assert_array_equal(client.encode(rows[::-1]), expected[::-1])


def test_threads_share_at_once(digits_server, digits):
    rows = enough(digits, np.float32)
    with Client(digits_server.target, shared_memory=True) as client, ThreadPoolExecutor(6) as pool:
        expected = client.encode(rows)
        for shift, codes in enumerate(
            pool.map(lambda shift: client.encode(np.roll(rows, shift, axis=0)), range(24))
        ):
            np.testing.assert_array_equal(codes, np.roll(expected, shift, axis=0))


def test_more_calls_at_once_than_one_connection_may_share_wait_or_are_sent(
    serve, checkpoint, digits
):
    rows = enough(digits, np.float32)
    of_two_calls = 2 * ((4 * _shared_memory.SLOT_BYTES) + _shared_memory.HEADER_BYTES)
    server = serve(checkpoint, "--shared-memory-bytes", 4 * of_two_calls)

    def at_once(mode):
        with Client(server.target, shared_memory=mode) as client, ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.encode(rows), range(32)))
            before = shared_bytes(server)
            client.encode(rows)
            assert shared_bytes(server) - before == rows.nbytes, "a lone call is shared as ever"
        return answers

    async def together(mode):
        async with AsyncClient(server.target, shared_memory=mode) as client:
            answers = await asyncio.gather(*(client.encode(rows) for _ in range(32)))
            before = shared_bytes(server)
            await client.encode(rows)
            assert shared_bytes(server) - before == rows.nbytes, "a lone call is shared as ever"
        return answers

    with Client(server.target, shared_memory=False) as client:
        expected = client.encode(rows)
    for run in (at_once, lambda mode: asyncio.run(together(mode))):
        sent = sent_bytes(server)
        for codes in run(True):
            np.testing.assert_array_equal(codes, expected)
        assert sent_bytes(server) == sent
        for codes in run("auto"):
            np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("allocated", [False, True])
def test_a_bad_row_is_named_where_it_is_in_the_array(digits_server, digits, allocated):
    rows = enough(digits, np.float32)
    with Client(digits_server.target, shared_memory=True) as client:
        if allocated:
            rows, source = client.allocate(*rows.shape), rows
            rows[:] = source
        rows[4001, 7] = np.nan
        with pytest.raises(InvalidInputError) as error:
            client.encode(rows)
        assert error.value.row == 4001
        rows[4001, 7] = 0
        client.encode(rows)


def test_nothing_is_left_when_clients_close_and_arrays_go(digits_server, digits, named):
    rows = enough(digits, np.float32)
    # What clients of other tests shared goes a moment after they do.
    wait_until(lambda: digits_server.metric("semid_shared_memory_segments") == 0)
    with Client(digits_server.target, shared_memory=True) as client:
        client.encode(rows)
        array = client.allocate(*rows.shape)
        assert digits_server.metric("semid_shared_memory_segments") == 2
        part = array[:10]
        del array
        assert digits_server.metric("semid_shared_memory_segments") == 2
        del part
        wait_until(lambda: digits_server.metric("semid_shared_memory_segments") == 1)
        wait_until(lambda: len(held_by(digits_server)) == 1)
    wait_until(lambda: digits_server.metric("semid_shared_memory_segments") == 0)
    wait_until(lambda: not held_by(digits_server))
    wait_until(lambda: not named())


CLIENT = """
import sys
import numpy as np
from semid_client import Client

rows = np.load(sys.argv[2])
client = Client(sys.argv[1], shared_memory=True)
array = client.allocate(*rows.shape)
array[:] = rows
print("begun", flush=True)
while True:
    client.encode(rows)
    client.encode(array)
"""


@pytest.fixture
def start_client(digits, tmp_path):
    """Start clients that share memory without end; none outlives the test."""
    np.save(tmp_path / "rows.npy", enough(digits, np.float32))
    with contextlib.ExitStack() as stack:

        def start(server):
            command = [sys.executable, "-c", CLIENT, server.target, tmp_path / "rows.npy"]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout.readline() == b"begun\n"
            return process

        yield start


def test_what_a_killed_client_shared_is_gone(serve, checkpoint, start_client, named):
    server = serve(checkpoint)
    clients = [start_client(server) for _ in range(3)]
    wait_until(lambda: server.metric("semid_shared_memory_segments") == 6)
    wait_until(lambda: not named())  # whoever is killed now leaves no name
    for client in clients:
        client.send_signal(signal.SIGKILL)
        client.wait()
    wait_until(lambda: server.metric("semid_shared_memory_bytes") == 0)
    wait_until(lambda: not held_by(server))
    assert server.metric("semid_shared_memory_segments") == 0
    assert server.stop() == 0


def test_a_server_that_is_told_to_stop_does_not_wait_for_sharing_to_end(serve, checkpoint, digits):
    server = serve(checkpoint, "--grace", 3600)
    with Client(server.target, shared_memory=True) as client:
        client.encode(enough(digits, np.float32))
        assert server.stop() == 0


@pytest.mark.slow  # it starts two servers
def test_a_client_shares_anew_with_a_server_that_was_started_again(
    serve, lasting_port, checkpoint, digits
):
    rows = enough(digits, np.float32)
    port = lasting_port()
    server = serve(checkpoint, "--port", port)
    with Client(server.target, shared_memory=True, timeout=300) as client:
        array = client.allocate(*rows.shape)
        array[:] = rows
        expected = client.encode(rows)
        np.testing.assert_array_equal(client.encode(array), expected)
        server.process.kill()
        server.wait()
        again = serve(checkpoint, "--port", port)
        np.testing.assert_array_equal(client.encode(rows), expected)
        np.testing.assert_array_equal(client.encode(array), expected)
        assert shared_bytes(again) == 2 * rows.nbytes
        assert sent_bytes(again) == 0


@pytest.mark.slow  # it starts two servers
def test_a_long_transfer_goes_on_with_a_server_that_comes_back(
    serve, lasting_port, checkpoint, digits
):
    rows = np.tile(digits, (60, 1))  # several messages
    port = lasting_port()
    server = serve(checkpoint, "--port", port)
    pieces = []
    started = []

    def sink(start, codes):
        pieces.append((start, codes))
        if len(pieces) == 2:
            server.process.kill()
            server.wait()
            started.append(serve(checkpoint, "--port", port))

    with Client(server.target, shared_memory=True) as client:
        client.encode_into(rows, sink, timeout=400)
    assert [start for start, _ in pieces] == sorted({start for start, _ in pieces})
    codes = np.concatenate([codes for _, codes in pieces])
    with Client(started[0].target, shared_memory=False) as client:
        np.testing.assert_array_equal(codes, client.encode(rows))
    assert shared_bytes(started[0]) > 0


def test_each_connection_keeps_to_the_process_that_knows_what_it_shares(serve, checkpoint, digits):
    rows = enough(digits, np.float32)
    server = serve(checkpoint, "--processes", 2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.target, shared_memory=True)) for _ in range(6)]
        expected = clients[0].encode(rows)
        for client in clients:
            for _ in range(3):
                np.testing.assert_array_equal(client.encode(rows), expected)
        assert sent_bytes(server) == 0
        assert shared_bytes(server) == 19 * rows.nbytes
        assert server.metric("semid_shared_memory_segments") == 6


def test_a_server_that_takes_none_is_sent_bytes_and_says_so_once(serve, checkpoint, digits, caplog):
    rows = enough(digits, np.float32)
    server = serve(checkpoint, "--shared-memory-bytes", 0)
    with caplog.at_level(logging.INFO, "semid_client"), Client(server.target) as client:
        first = client.encode(rows)
        array = client.allocate(*rows.shape)
        array[:] = rows
        second = client.encode(array)
        np.testing.assert_array_equal(first, second)
    (said,) = (record.getMessage() for record in caplog.records if "shared" in record.getMessage())
    assert "the server takes none" in said
    with (
        Client(server.target, shared_memory=True) as client,
        pytest.raises(
            ConfigurationError, match=r"shared_memory=True, but .* the server takes none"
        ),
    ):
        client.encode(rows)


@pytest.mark.slow  # its bounds are tested without processes too
def test_more_than_the_server_takes_is_sent_as_bytes(serve, checkpoint, digits):
    rows = enough(digits, np.float32)
    server = serve(checkpoint, "--shared-memory-bytes", 4 * 65 * 1024)
    with Client(server.target) as client:
        array = client.allocate(*rows.shape)
        array[:] = rows
        np.testing.assert_array_equal(client.encode(rows), client.encode(array))
        assert server.metric("semid_shared_memory_segments") == 1  # of slots of 16 KiB
    with (
        Client(server.target, shared_memory=True) as client,
        pytest.raises(ConfigurationError, match=f"more than the {65 * 1024} that"),
    ):
        client.allocate(*rows.shape)


def test_a_token_that_is_not_good_for_sharing_sends_bytes(serve, checkpoint, digits, tmp_path):
    rows = enough(digits, np.float32)
    all_, some = (hashlib.sha256(token).hexdigest() for token in (b"all", b"some"))
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{all_}\n{some} Encode,GetModel\n")
    server = serve(checkpoint, "--token-file", tokens)
    with Client(server.target, token="some") as client:  # noqa: S106 - of this test
        expected = client.encode(rows)
        assert (shared_bytes(server), sent_bytes(server)) == (0, rows.nbytes)
    with Client(server.target, token="all") as client:  # noqa: S106 - of this test
        np.testing.assert_array_equal(client.encode(rows), expected)
        assert shared_bytes(server) == rows.nbytes


@pytest.mark.slow  # TLS is the channel's, whatever the call
def test_sharing_goes_over_tls(serve, checkpoint, digits, tmp_path):
    rows = enough(digits, np.float32)
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key")
    for pem in issued.cert_chain_pems:
        pem.write_to_path(tmp_path / "certificate", append=True)
    server = serve(
        checkpoint, "--tls-cert", tmp_path / "certificate", "--tls-key", tmp_path / "key"
    )
    tls = TLS(root_certificates=authority.cert_pem.bytes())
    with Client(server.target, tls=tls, shared_memory=True) as client:
        client.encode(rows)
        assert shared_bytes(server) == rows.nbytes


def share_by_hand(stub, content, size):
    """Share a file as the contract says, and return its descriptor, handle, and call."""
    name, proof = f"semid-{secrets.token_hex(16)}", secrets.token_bytes(16)
    unshared = FOLDER / f"test-{name}"
    fd = os.open(unshared, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)  # else servers that start meanwhile, of others, would remove it
    os.pwrite(fd, proof + content, 0)
    unshared.rename(FOLDER / name)
    call = stub.ShareMemory(pb.ShareMemoryRequest(name=name, size_bytes=size, proof=proof))
    return fd, next(call).segment, call


def test_a_truncated_file_is_refused_and_the_server_goes_on(digits_server, stub, digits):
    content = digits.tobytes()
    fd, segment, call = share_by_hand(stub, content, 16 + len(content))
    request = pb.EncodeRequest(
        shared=pb.SharedTensor(
            dtype=pb.DATA_TYPE_FLOAT32, shape=digits.shape, segment=segment, offset=16
        )
    )
    with Client(digits_server.target, shared_memory=False) as client:
        expected = client.encode(digits)
    assert stub.Encode(request).tensor.data == expected.tobytes()
    os.ftruncate(fd, 1000)
    with pytest.raises(grpc.RpcError) as error:
        stub.Encode(request)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the shared file ends at byte 1000" in error.value.details()
    call.cancel()
    wait_until(lambda: not held_by(digits_server))
    with pytest.raises(grpc.RpcError) as error:
        stub.Encode(request)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    os.close(fd)
    with Client(digits_server.target) as client:
        np.testing.assert_array_equal(client.encode(digits), expected)


def test_a_file_that_is_cut_and_grown_all_the_time_gives_codes_or_a_refusal(
    digits_server, stub, digits, client
):
    content = digits.tobytes()
    fd, segment, call = share_by_hand(stub, content, 16 + len(content))
    request = pb.EncodeRequest(
        shared=pb.SharedTensor(
            dtype=pb.DATA_TYPE_FLOAT32, shape=digits.shape, segment=segment, offset=16
        )
    )
    calls = []
    for _ in range(300):
        calls.append(stub.Encode.future(request, timeout=300))
        for size in (0, 16 + len(content), 100_000, 16 + len(content)):
            os.ftruncate(fd, size)
        os.pwrite(fd, content, 16)
    codes = {call.code() for call in calls}  # waits for each
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
    call.cancel()
    os.close(fd)
    assert digits_server.process.poll() is None
    assert client.encode(digits).shape == (len(digits), 3)


def test_the_file_of_a_client_that_was_killed_before_it_shared_is_removed(serve, checkpoint):
    left = FOLDER / f"semid-{secrets.token_hex(16)}"
    left.write_bytes(b"proof")
    try:
        serve(checkpoint)
        assert not left.exists()
    finally:
        left.unlink(missing_ok=True)
