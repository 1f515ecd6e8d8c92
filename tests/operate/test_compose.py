"""compose.yaml: what the specification allows, and what the files that it mounts expect."""

from __future__ import annotations

import re
from pathlib import Path

import live
import pytest
import yaml
from compose_spec import PyOptions

from semid_server.cli.serve import DEFAULTS
from semid_server.cli.serve import serve as serve_command

LAST_WORDS = 2.0


def _written(docker) -> str:
    """Return the text with variables replaced by their defaults, as compose does first."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (docker / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def services(docker) -> dict:
    composed = PyOptions(apply_merge=True).from_yaml(_written(docker))
    composed.validate()
    return yaml.safe_load(_written(docker))["services"]


def test_it_is_what_the_specification_allows(services):
    assert set(services) == {"semid", "semid-gpu", "prometheus", "grafana"}


def test_a_misspelt_name_would_be_noticed(docker):
    with pytest.raises(ValueError, match="read_onli"):
        PyOptions(apply_merge=True).from_yaml(_written(docker).replace("read_only", "read_onli"))


@pytest.mark.parametrize(("name", "target"), [("semid", "cpu"), ("semid-gpu", "cuda")])
def test_a_server_is_built_from_its_target_and_may_write_nothing_but_tmp(services, name, target):
    service = services[name]
    assert service["build"]["target"] == target
    assert f"AS {target}\n" in (live.ROOT / service["build"]["dockerfile"]).read_text()
    assert service["read_only"]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]  # noqa: S108 - the image's
    assert service["cap_drop"] == ["ALL"]
    (volume,) = service["volumes"]
    assert volume.endswith("/movies:/checkpoint:ro")


def test_a_server_is_given_the_time_to_drain(services):
    assert float(services["semid"]["stop_grace_period"].rstrip("s")) > DEFAULTS.grace + LAST_WORDS


def test_settings_are_flags_of_the_server(services):
    known = {option.envvar for option in serve_command.params}
    assert set(services["semid"]["environment"]) <= known


def test_prometheus_looks_for_the_servers_where_they_are(services, docker):
    config = yaml.safe_load((docker / "prometheus/prometheus.yaml").read_text())
    ((job,), (alias,)) = (
        config["scrape_configs"],
        services["semid"]["networks"]["semid"]["aliases"],
    )
    (found,) = job["dns_sd_configs"]
    assert job["job_name"] == "semid", "dashboard and alerts ask for this job"
    assert (found["names"], found["port"]) == ([alias], DEFAULTS.metrics_port)
    for service in ("semid", "semid-gpu"):
        assert services[service]["networks"]["semid"]["aliases"] == [alias]
    assert (
        f"./prometheus:{_folder_of(services['prometheus'])}:ro" in services["prometheus"]["volumes"]
    )


def _folder_of(service) -> str:
    (flag,) = (word for word in service["command"] if word.startswith("--config.file="))
    return str(Path(flag.partition("=")[2]).parent)


def test_grafana_finds_prometheus_and_the_dashboard(services, docker, dashboard):
    provisioning = docker / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    config = yaml.safe_load((docker / "prometheus/prometheus.yaml").read_text())
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/semid.yaml").read_text())["providers"]
    shown = f"{provider['options']['path']}/semid.json"
    grafana = services["grafana"]
    assert f"./grafana/semid.json:{shown}:ro" in grafana["volumes"]
    assert "./grafana/provisioning:/etc/grafana/provisioning:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == shown
    assert dashboard["uid"] == "semid"


def test_images_of_others_are_named_by_version(services):
    for name in ("prometheus", "grafana"):
        assert re.search(r":v?\d+\.\d+\.\d+$", services[name]["image"]), name
