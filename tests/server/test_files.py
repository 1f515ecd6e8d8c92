"""Files are read as they are, and what is none is named, and not waited for."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from semid_server.files import read_file


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "file").write_bytes(b"\0\xff\n")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link") == b"\0\xff\n"


def listen(path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkdir, "folder"),
        (os.mkfifo, "pipe"),
        (listen, "socket"),
        (lambda path: path.symlink_to("/dev/null"), "device"),
    ],
    ids=["folder", "pipe", "socket", "device"],
)
def test_what_is_no_regular_file_is_named_and_not_waited_for(tmp_path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    make(Path("other"))
    with pytest.raises(OSError, match=f"not a regular file but a {kind}: 'other'"):
        read_file(Path("other"))


def test_a_pipe_that_takes_the_place_of_a_file_while_it_is_opened_is_not_waited_for(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_bytes(b"x")
    really_stat = Path.stat

    def stat(path, **others):
        status = really_stat(path, **others)
        path.unlink()
        os.mkfifo(path)
        return status

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(OSError, match="not a regular file but a pipe"):
        read_file(tmp_path / "file")
