"""The metrics endpoint, and what becomes of more scrapes than it takes."""

from __future__ import annotations

import contextlib
import errno
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter

from semid_server.serving import addresses
from semid_server.serving.addresses import MAX_SCRAPES, open_metrics
from semid_server.serving.config import ModelSource, ServeConfig


@pytest.fixture
def endpoint():
    """The address of an endpoint that shows one counter."""
    registry = CollectorRegistry()
    Counter("asked", "Of a test.", registry=registry)
    config = ServeConfig(models=(ModelSource(Path("none")),), host="127.0.0.1", metrics_port=0)
    server, address = open_metrics(config, registry)
    yield address
    server.shutdown()
    server.server_close()


def scrape(address):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as page:
        return page.read().decode()


def test_scrapes_beyond_the_bound_are_told_so_and_later_ones_are_answered(endpoint):
    host, _, port = endpoint.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_SCRAPES):
            stack.enter_context(socket.create_connection((host, int(port)), 60))
        with pytest.raises((urllib.error.HTTPError, ConnectionResetError)) as caught:
            scrape(endpoint)
        if isinstance(caught.value, urllib.error.HTTPError):
            assert caught.value.code == 503
            caught.value.close()
    until = time.monotonic() + 60
    while True:  # each of the silent ones is heard to have left
        with contextlib.suppress(urllib.error.HTTPError, ConnectionResetError):
            assert "asked_total 0.0" in scrape(endpoint)
            return
        assert time.monotonic() < until


def test_a_scraper_that_dribbles_is_shown_the_door(endpoint, monkeypatch):
    monkeypatch.setattr(addresses, "SCRAPE_LIMIT", 1.0)
    host, _, port = endpoint.rpartition(":")
    with socket.create_connection((host, int(port)), 60) as scraper:
        began = time.monotonic()
        with pytest.raises(ConnectionError):  # noqa: PT012 - whichever of the bytes it is
            while time.monotonic() - began < 30:
                scraper.sendall(b"G")  # far from a second between two bytes
                time.sleep(0.05)
        assert time.monotonic() - began >= 1
    assert "asked_total 0.0" in scrape(endpoint)


def test_a_scrape_for_which_no_file_can_be_opened_is_not_asked_for_without_a_pause(
    endpoint, monkeypatch
):
    pauses = []
    monkeypatch.setattr(addresses, "FULL_PAUSE", 0.01)
    clock = SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic)
    monkeypatch.setattr(addresses, "time", clock)
    accept = addresses.WSGIServer.get_request

    def full(self):
        if len(pauses) == 3:
            return accept(self)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(addresses.WSGIServer, "get_request", full)
    assert "asked_total 0.0" in scrape(endpoint)
    assert pauses == [0.01] * 3
