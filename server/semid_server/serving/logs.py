"""Logs for people or for machines, with the request that a line belongs to.

A call's id is what its caller sent as metadata ``x-request-id``, or one made here. It stands in
every line logged on behalf of that call. It goes back to the caller in the same metadata: the
caller's own always, one made here with an error.

A thread of its own writes the lines. Whoever should read them may be slow, stuck or gone: then
lines are lost, and counted, but no call waits for them.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import random
import re
import stat
import threading
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

from pythonjsonlogger.json import JsonFormatter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

REQUEST_ID_KEY = "x-request-id"

STDERR: Final = 2

MAX_WAITING_LINES: Final = 10_000
"""Lines that wait to be written; further ones are lost."""

LAST_LINES: Final = 1.0
"""Seconds that the end of the process waits for the lines logged before it."""

_request_id: ContextVar[RequestId | None] = ContextVar("request_id", default=None)

# What may stand in a log line unchanged: nobody writes lines of their own through an id.
_PLAIN = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(request)s%(message)s"
_FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s %(request_id)s"


GRPC: Final = "grpc._cython.cygrpc"
"""Where gRPC logs, and what it defines."""

WRITTEN_TO_NOBODY: Final = (GRPC, "ExecuteBatchError")
"""What gRPC raises, and logs with its traceback, where an answer finds its caller gone. It has no
public name."""


TELL_EVERY: Final = 10.0
"""Seconds from one line that tells of text that is not UTF-8 to the next: anybody may send some."""


class RequestId:
    """The id of one call, written out when it is asked for: of most calls nobody asks.

    Parameters
    ----------
    sent : str, optional
        What the caller calls it.

    Attributes
    ----------
    of_caller : bool
        Whether it is the caller's own.
    """

    __slots__ = ("_number", "_sent", "of_caller")

    def __init__(self, sent: str | None = None) -> None:
        self._sent, self.of_caller = sent, sent is not None
        # A name, no secret: an id of the system's own randomness costs several times as much.
        self._number = 0 if self.of_caller else random.getrandbits(128)

    def __str__(self) -> str:
        return f"{self._number:032x}" if self._sent is None else self._sent


class _RequestFilter(logging.Filter):
    """Adds the id of the call that a line belongs to: a field of its own, or how a text begins."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def filter(self, record: logging.LogRecord) -> bool:
        request_id = current_request_id()
        if self._as_json:
            record.__dict__["request_id"] = request_id
        else:
            record.__dict__["request"] = f"[{request_id}] " if request_id else ""
        return True


def _tells_of_us(record: logging.LogRecord) -> bool:
    """Whether a line is more than that a caller left while gRPC wrote its answer."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or (kind.__module__, kind.__name__) != WRITTEN_TO_NOBODY


class _Unreadable(logging.Filter):
    """Has gRPC tell that it was sent text that is not UTF-8, but not what: it may be a secret."""

    def __init__(self) -> None:
        super().__init__()
        self._tell_from = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if record.name != GRPC or not isinstance(error, UnicodeError):
            return True
        if time.monotonic() < self._tell_from:
            return False
        self._tell_from = time.monotonic() + TELL_EVERY
        record.msg, record.args = "a caller sent metadata that is not UTF-8", None
        record.exc_info = record.exc_text = None
        return True


class Outlet(logging.Handler):
    """Writes lines from a thread of its own, so that nobody who logs waits for who reads.

    Parameters
    ----------
    descriptor : int
        Of the file that they go to. Not Python's own stream: a thread that is stuck in one of
        those lets no process end.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: queue.Queue[str | threading.Event | None] = queue.Queue(MAX_WAITING_LINES)
        self._lost = 0
        # Not the handler's own: the library holds that while it waits for the last lines.
        self._counting = threading.Lock()
        # Whether the last line was cut short: the next is to begin a line of its own.
        self._cut = False
        kind = os.fstat(descriptor).st_mode
        self._shared = stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)
        self._writer = threading.Thread(target=self._write_all, name="semid-log", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a line to the thread, or count it as lost."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            with self._counting:
                self._lost += 1
        except Exception:  # noqa: BLE001 - as in every handler of the library: the caller goes on
            self.handleError(record)

    def flush(self) -> None:
        """Wait until what was logged before is written, for at most `LAST_LINES` seconds."""
        written = threading.Event()
        with contextlib.suppress(queue.Full):
            self._lines.put(written, timeout=LAST_LINES)
            written.wait(LAST_LINES)

    def close(self) -> None:
        """Write what is left, for at most `LAST_LINES` seconds, and end the thread."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=LAST_LINES)
            self._writer.join(LAST_LINES)
        super().close()

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            if isinstance(line, threading.Event):
                line.set()
            else:
                self._write(line)

    def _write(self, line: str) -> None:
        lost = self._lost
        text = f"{self.format(_of_lost_lines(lost))}\n{line}\n" if lost else f"{line}\n"
        whole = text.encode(errors="backslashreplace")
        rest = b"\n" + whole if self._cut else whole
        try:
            with self._by_itself():
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                    self._cut = 0 < len(rest) < len(whole)
        except OSError:  # nobody reads any more, or the disk is full
            lost = -1
        if lost:
            with self._counting:
                self._lost -= lost

    @contextlib.contextmanager
    def _by_itself(self) -> Iterator[None]:
        """Let no other process write to the same pipe meanwhile: a long line goes there in parts.

        The lock of a process that ends goes with it.
        """
        if not self._shared:
            yield
            return
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        except OSError:  # of a kind that has no locks: a long line may be mixed with others
            yield
            return
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


def _of_lost_lines(count: int) -> logging.LogRecord:
    fields = {
        "name": __name__,
        "levelno": logging.WARNING,
        "levelname": "WARNING",
        "msg": "%d lines before the next were lost: they came faster than they could be written",
        "args": (count,),
    }
    return logging.makeLogRecord(fields | {"request": "", "request_id": ""})


def configure(*, level: str, as_json: bool) -> None:
    """Log to stderr: lines of text, or one JSON object a line."""
    handler = Outlet(STDERR)
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
    handler.addFilter(_tells_of_us)
    handler.addFilter(_Unreadable())
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())


def id_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """Return the id that a caller sent, if it may stand in a log line."""
    sent = None
    for key, value in metadata or ():
        if key == REQUEST_ID_KEY:
            sent = value  # of several the last
    return sent if isinstance(sent, str) and _PLAIN.fullmatch(sent) else None


def begin_request(sent: str | None) -> RequestId:
    """Return the id of the call that begins, for the lines of this task from now on.

    It is the one that was ``sent``, if one was.
    """
    request_id = RequestId(sent)
    _request_id.set(request_id)
    return request_id


def current_request_id() -> str:
    """Return the id of the call that this task answers; empty outside of calls."""
    request_id = _request_id.get()
    return "" if request_id is None else str(request_id)
