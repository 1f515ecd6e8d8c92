"""Log lines and the requests that they belong to."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from grpc._cython import cygrpc

from semid.v1 import semid_pb2 as pb
from semid_server.serving import logs


@pytest.fixture
def configured():
    """Configure logging, and put it back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield logs.configure
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def written(capfd):
    logging.getLogger().handlers[-1].flush()
    return capfd.readouterr().err


def test_as_json_each_line_is_one_object_with_the_request(configured, capfd):
    configured(level="info", as_json=True)
    request_id = logs.begin_request("abc-1")
    assert str(request_id) == "abc-1"
    logging.getLogger("semid.test").warning("%d rows\nof two lines", 3)
    (line,) = written(capfd).splitlines()
    record = json.loads(line)
    assert record["message"] == "3 rows\nof two lines"
    assert (record["level"], record["logger"]) == ("WARNING", "semid.test")
    assert record["request_id"] == "abc-1"
    assert record.keys() == {"time", "level", "logger", "message", "request_id"}


def test_as_text_a_line_names_its_request(configured, capfd):
    configured(level="info", as_json=False)
    logs.begin_request("abc-1")
    logging.getLogger("semid.test").info("%d rows", 3)
    assert written(capfd).endswith("INFO semid.test: [abc-1] 3 rows\n")


def test_that_callers_leave_while_they_are_answered_is_no_line_of_the_log(configured, capfd):
    configured(level="info", as_json=False)
    for error in (cygrpc.ExecuteBatchError("Failed"), RuntimeError("a fault")):
        logging.getLogger("grpc._cython.cygrpc").error("raised", exc_info=error)
    text = written(capfd)
    assert "ExecuteBatchError" not in text
    assert "RuntimeError: a fault" in text


def test_what_grpc_cannot_read_is_told_now_and_then_and_not_shown(configured, capfd, monkeypatch):
    configured(level="info", as_json=True)
    grpcs = logging.getLogger("grpc._cython.cygrpc")

    def fail_to_read(sent):
        try:
            sent.decode()
        except UnicodeDecodeError:
            grpcs.exception("Invalid encoding on %s", sent)

    for _ in range(3):
        fail_to_read(b"Bearer of-a-token\xff")
    (line,) = written(capfd).splitlines()
    assert json.loads(line)["message"] == "a caller sent metadata that is not UTF-8"
    assert "of-a-token" not in line
    monkeypatch.setattr(logs, "TELL_EVERY", 0)
    configured(level="info", as_json=False)
    for _ in range(2):
        fail_to_read(b"Bearer of-a-token\xff")
    text = written(capfd)
    assert "of-a-token" not in text
    assert "Traceback" not in text


def test_less_severe_lines_are_left_out(configured, capfd):
    configured(level="warning", as_json=False)
    logging.getLogger("semid.test").info("not this")
    assert not written(capfd)


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "a\nb", "%s", b"bytes"])
def test_an_id_that_could_garble_a_log_is_replaced(sent):
    made = logs.begin_request(logs.id_in([("x-request-id", sent)]))
    assert re.fullmatch(r"[0-9a-f]{32}", str(made))
    assert logs.current_request_id() == str(made)


# --- whoever reads ---------------------------------------------------------------------------


@pytest.fixture
def pipe():
    """Both ends of a pipe; what is still open is closed."""
    reader, writer = os.pipe()
    ends = [os.fdopen(reader, "rb", 0), os.fdopen(writer, "wb", 0)]
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def log_into():
    """Return a function that makes a logger, not the root's, that writes to a descriptor."""
    outlets = []

    def make(descriptor):
        outlets.append(logs.Outlet(descriptor))
        logger = logging.Logger("semid.test")  # noqa: LOG001 - one that no other test sees
        logger.addHandler(outlets[-1])
        return logger, outlets[-1]

    yield make
    for outlet in outlets:
        outlet.close()


def test_a_reader_that_is_stuck_holds_nobody_up_and_is_told_what_it_missed(pipe, log_into):
    reader, writer = pipe
    logger, outlet = log_into(writer.fileno())
    text, count = "x" * 100, logs.MAX_WAITING_LINES + 2000
    for _ in range(count):  # 64 KiB fill the pipe, then the queue fills
        logger.info(text)

    def read_to_the_last():
        received = b""
        while not received.endswith(b"the last\n"):
            received += reader.read(65536)
        return received.decode().splitlines()

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read_to_the_last)
        outlet.flush()
        logger.info("the last")
        lines = reading.result()
    notices = [line for line in lines if "were lost" in line]
    lost = sum(int(line.split()[0]) for line in notices)
    assert lost > 0
    assert lines.count(text) == count - lost
    assert len(lines) == lines.count(text) + len(notices) + 1


def test_a_reader_that_has_gone_is_no_error(pipe, log_into, capfd):
    reader, writer = pipe
    reader.close()
    logger, outlet = log_into(writer.fileno())
    for _ in range(10):
        logger.error("nobody reads this")
    outlet.flush()
    assert capfd.readouterr().err == ""


def test_a_disk_with_room_again_gets_the_lines_from_then_on(tmp_path, log_into):
    with open("/dev/full", "wb") as full, (tmp_path / "log").open("wb") as log:  # noqa: PTH123 - a device
        descriptor = os.dup(full.fileno())
        try:
            logger, outlet = log_into(descriptor)
            for _ in range(3):
                logger.error("no room for this")
            outlet.flush()
            os.dup2(log.fileno(), descriptor)
            logger.error("room for this")
            outlet.flush()
        finally:
            os.close(descriptor)
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first.startswith("3 lines before the next were lost")
    assert second == "room for this"


def test_a_line_that_is_cut_short_is_not_gone_on_with(tmp_path, log_into, monkeypatch):
    write, room = os.write, [5, 0]

    def into_little_room(descriptor, text):
        if not room:
            return write(descriptor, text)
        if not (count := room.pop(0)):
            raise OSError(errno.ENOSPC, "no space")
        return write(descriptor, text[:count])

    with (tmp_path / "log").open("wb") as log:
        logger, outlet = log_into(log.fileno())
        monkeypatch.setattr(os, "write", into_little_room)
        for text in ("no room for this", "room for this", "and for this"):
            logger.error(text)
        outlet.flush()
    cut, lost, second, third = (tmp_path / "log").read_text().splitlines()
    assert cut == "no ro"
    assert lost.startswith("1 lines before the next were lost")
    assert (second, third) == ("room for this", "and for this")


def test_all_lines_before_the_end_of_the_process_are_written(tmp_path):
    script = (
        "import logging; from semid_server.serving import logs; "
        "logs.configure(level='info', as_json=False); "
        "[logging.info('line %d', i) for i in range(2000)]"
    )
    with (tmp_path / "log").open("wb") as log:
        subprocess.run([sys.executable, "-c", script], check=True, stderr=log)
    assert len((tmp_path / "log").read_text().splitlines()) == 2000


def test_processes_that_share_a_pipe_do_not_mix_their_lines(pipe):
    reader, writer = pipe
    script = (
        "import sys, logging; from semid_server.serving import logs; "
        "logs.configure(level='info', as_json=True); "
        "[logging.info('%s', sys.argv[1] * 20000) for _ in range(50)]"
    )
    writing = [
        subprocess.Popen([sys.executable, "-c", script, letter], stderr=writer.fileno())
        for letter in "abc"
    ]
    writer.close()
    lines = b"".join(iter(lambda: reader.read(3000), b"")).splitlines()
    assert [process.wait() for process in writing] == [0, 0, 0]
    assert len(lines) == 150
    assert {json.loads(line)["message"] for line in lines} == {letter * 20000 for letter in "abc"}


def test_the_end_of_the_process_does_not_wait_for_a_reader_that_is_stuck(pipe):
    reader, writer = pipe
    script = (
        "import logging; from semid_server.serving import logs; "
        "logs.configure(level='info', as_json=False); "
        "[logging.info('x' * 100) for _ in range(20000)]"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], check=False, stderr=writer.fileno(), timeout=300
    )
    assert ended.returncode == 0
    assert reader.read(100)


async def test_the_callers_id_comes_back_with_success_and_with_failure(toy):
    for request in (pb.GetModelRequest(), pb.GetModelRequest(model="other")):
        call = toy.stub.GetModel(request, metadata=[("x-request-id", "abc-1")])
        await call.code()
        assert dict(await call.trailing_metadata())["x-request-id"] == "abc-1"


async def test_a_call_without_an_id_is_given_one_which_its_lines_carry(toy, caplog):
    caplog.set_level("DEBUG", "semid_server.serving.calls")
    caplog.handler.addFilter(logs._RequestFilter(as_json=True))
    call = toy.stub.GetModel(pb.GetModelRequest(model="other"))
    made = dict(await call.trailing_metadata())["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)
    (record,) = [record for record in caplog.records if "GetModel: NOT_FOUND" in record.message]
    assert record.request_id == made


async def test_an_id_that_was_made_here_is_not_sent_with_success(toy, caplog):
    caplog.set_level("DEBUG", "semid_server.serving.calls")
    caplog.handler.addFilter(logs._RequestFilter(as_json=True))
    call = toy.stub.GetModel(pb.GetModelRequest())
    assert "x-request-id" not in dict(await call.trailing_metadata())
    (record,) = [record for record in caplog.records if "GetModel: OK" in record.message]
    assert re.fullmatch(r"[0-9a-f]{32}", record.request_id)
