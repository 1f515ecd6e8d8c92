"""The project's deployment files as read, and one watched fleet for every test that asks for it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import live
import pytest
import yaml

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def docker() -> Path:
    """The folder `docker`."""
    return live.DOCKER


@pytest.fixture(scope="session")
def dashboard(docker) -> dict:
    return json.loads((docker / "grafana/semid.json").read_text())


@pytest.fixture(scope="session")
def rules(docker) -> list[dict]:
    """Every rule of alerts.yaml, records and alerts."""
    groups = yaml.safe_load((docker / "prometheus/alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="session")
def alerts(rules) -> list[dict]:
    return [rule for rule in rules if "alert" in rule]


@pytest.fixture(scope="session")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool on the PATH (Debian: prometheus); tests/run.sh fetches it")
    return found


@pytest.fixture(scope="package")
def watched(tmp_path_factory):
    """Two replicas under load, and the Prometheus that watches them."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus on the PATH (Debian: prometheus); tests/run.sh fetches it")
    with live.watched_fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


@pytest.fixture(scope="package")
def prometheus(watched):
    return watched[0]


@pytest.fixture(scope="package")
def replicas(watched):
    return watched[1]
