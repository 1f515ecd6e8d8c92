"""Logs for people or for machines, with the request that a line belongs to.

A call's id is what its caller sent as metadata ``x-request-id``, or one made here; it goes back to
the caller in the same metadata, and stands in every line logged on behalf of that call.
"""

from __future__ import annotations

import logging
import re
import uuid
from contextvars import ContextVar
from typing import TYPE_CHECKING

from pythonjsonlogger.json import JsonFormatter

if TYPE_CHECKING:
    from collections.abc import Mapping

REQUEST_ID_KEY = "x-request-id"

_request_id: ContextVar[str] = ContextVar("request_id", default="")

# What may stand in a log line unchanged: nobody writes lines of their own through an id.
_PLAIN = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(request)s%(message)s"
_FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s %(request_id)s"


class _RequestFilter(logging.Filter):
    """Adds the id of the call that a line belongs to: a field of its own, or how a text begins."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def filter(self, record: logging.LogRecord) -> bool:
        request_id = _request_id.get()
        if self._as_json:
            record.__dict__["request_id"] = request_id
        else:
            record.__dict__["request"] = f"[{request_id}] " if request_id else ""
        return True


def configure(*, level: str, as_json: bool) -> None:
    """Log to stderr: lines of text, or one JSON object a line."""
    handler = logging.StreamHandler()
    if as_json:
        handler.setFormatter(
            JsonFormatter(
                _FIELDS,
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            )
        )
    else:
        handler.setFormatter(logging.Formatter(_TEXT))
    handler.addFilter(_RequestFilter(as_json=as_json))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())


def begin_request(metadata: Mapping[str, str | bytes]) -> str:
    """Return the id of the call that begins, for the lines of this task from now on."""
    sent = metadata.get(REQUEST_ID_KEY, "")
    plain = isinstance(sent, str) and _PLAIN.fullmatch(sent)
    request_id = str(sent) if plain else uuid.uuid4().hex
    _request_id.set(request_id)
    return request_id
