"""Log lines and the requests that they belong to."""

from __future__ import annotations

import json
import logging
import re

import pytest

from semid.v1 import semid_pb2 as pb
from semid_server.serving import logs


@pytest.fixture
def configured():
    """Configure logging, and put it back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield logs.configure
    root.handlers[:] = handlers
    root.setLevel(level)


def test_as_json_each_line_is_one_object_with_the_request(configured, capsys):
    configured(level="info", as_json=True)
    request_id = logs.begin_request({"x-request-id": "abc-1"})
    assert request_id == "abc-1"
    logging.getLogger("semid.test").warning("%d rows\nof two lines", 3)
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert record["message"] == "3 rows\nof two lines"
    assert (record["level"], record["logger"]) == ("WARNING", "semid.test")
    assert record["request_id"] == "abc-1"
    assert record.keys() == {"time", "level", "logger", "message", "request_id"}


def test_as_text_a_line_names_its_request(configured, capsys):
    configured(level="info", as_json=False)
    logs.begin_request({"x-request-id": "abc-1"})
    logging.getLogger("semid.test").info("%d rows", 3)
    assert capsys.readouterr().err.endswith("INFO semid.test: [abc-1] 3 rows\n")


def test_less_severe_lines_are_left_out(configured, capsys):
    configured(level="warning", as_json=False)
    logging.getLogger("semid.test").info("not this")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "a\nb", "%s", b"bytes"])
def test_an_id_that_could_garble_a_log_is_replaced(sent):
    made = logs.begin_request({"x-request-id": sent})
    assert re.fullmatch(r"[0-9a-f]{32}", made)


async def test_the_callers_id_comes_back_with_success_and_with_failure(toy):
    for request in (pb.GetModelRequest(), pb.GetModelRequest(model="other")):
        call = toy.stub.GetModel(request, metadata=[("x-request-id", "abc-1")])
        await call.code()
        assert dict(await call.trailing_metadata())["x-request-id"] == "abc-1"


async def test_a_call_without_an_id_is_given_one_which_its_lines_carry(toy, caplog):
    caplog.set_level("DEBUG", "semid_server.serving.interceptors")
    caplog.handler.addFilter(logs._RequestFilter(as_json=True))
    call = toy.stub.GetModel(pb.GetModelRequest())
    made = dict(await call.trailing_metadata())["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)
    (record,) = [record for record in caplog.records if "GetModel: OK" in record.message]
    assert record.request_id == made
