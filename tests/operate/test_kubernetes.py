"""The manifests: what the schemas allow, and what the server that they start expects."""

from __future__ import annotations

import copy

import kubernetes_validate
import live
import pytest
import yaml
from click.testing import CliRunner

from semid_server.cli.serve import DEFAULTS
from semid_server.cli.serve import serve as serve_command

FOLDER = live.DOCKER / "kubernetes"
VERSION = "1.34"
LAST_WORDS = 2.0
OF_THE_OPERATOR = {"ServiceMonitor", "PrometheusRule"}


def _load(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


RESOURCES = _load("kustomization.yaml")["resources"]


def _check(resource) -> None:
    """Raise unless its schema allows a resource, unknown names included."""
    if resource["kind"] not in OF_THE_OPERATOR:
        kubernetes_validate.validate(resource, VERSION, strict=True)
        return
    # Not above: it takes seconds, and every worker of a run imports every file.
    from cloudcoil.models.prometheus_operator import v1  # noqa: PLC0415 - as just said

    model = getattr(v1, resource["kind"])
    kept = model.model_validate(resource).model_dump(by_alias=True, exclude_unset=True, mode="json")
    assert kept == resource, "the operator's types do not know all of it"


@pytest.fixture(scope="module")
def deployment() -> dict:
    return _load("deployment.yaml")


@pytest.fixture(scope="module")
def pod(deployment) -> dict:
    return deployment["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod) -> dict:
    (only,) = pod["containers"]
    return only


@pytest.mark.parametrize("name", RESOURCES)
def test_the_schema_allows(name):
    _check(_load(name))


@pytest.mark.parametrize("name", RESOURCES)
def test_a_misspelt_name_would_be_noticed(name):
    resource = copy.deepcopy(_load(name))
    resource["spec"]["selectorr"] = {}
    with pytest.raises((kubernetes_validate.ValidationError, AssertionError)):
        _check(resource)


def test_every_manifest_is_deployed():
    assert {*RESOURCES, "kustomization.yaml"} == {path.name for path in FOLDER.glob("*.yaml")}


def test_all_of_them_speak_of_the_same_pods(deployment):
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert _load("service.yaml")["spec"]["selector"] == labels
    assert _load("poddisruptionbudget.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert _load("networkpolicy.yaml")["spec"]["podSelector"]["matchLabels"] == labels
    service = _load("service.yaml")["metadata"]["labels"]
    monitor = _load("servicemonitor.yaml")["spec"]
    assert monitor["selector"]["matchLabels"] == service
    assert service[monitor["jobLabel"]] == "semid", "dashboard and alerts ask for this job"
    target = _load("horizontalpodautoscaler.yaml")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])


def _settings(container) -> dict:
    """What the command makes of the arguments, checkpoint and device apart."""
    args = [arg for arg in container["args"] if not arg.startswith("--checkpoint=")]
    checkpoint = f"--checkpoint={live.CHECKPOINT}"
    context = serve_command.make_context("serve", [checkpoint, *args])
    return context.params


def test_the_server_knows_every_argument(container):
    settings = _settings(container)
    assert settings["device"] == "cuda"
    assert settings["log_format"] == "json"
    refused = CliRunner().invoke(serve_command, [*container["args"], "--gracee=1"])
    assert "No such option" in refused.output, "so an argument that is none would be noticed"


def test_ports_are_those_that_the_server_is_told(container):
    settings = _settings(container)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "grpc": settings["port"],
        "metrics": settings["metrics_port"],
        "admin": settings["admin_port"],
    }
    assert (ports["grpc"], ports["metrics"]) == (DEFAULTS.port, DEFAULTS.metrics_port)
    service = {port["name"]: port for port in _load("service.yaml")["spec"]["ports"]}
    for name, port in service.items():
        assert (port["port"], port["targetPort"]) == (ports[name], name)
    (endpoint,) = _load("servicemonitor.yaml")["spec"]["endpoints"]
    assert endpoint["port"] in service
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == ports["admin"]


def test_pods_reach_all_ports_but_the_one_without_tls_and_tokens(container):
    spec = _load("networkpolicy.yaml")["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    (rule,) = spec["ingress"]
    open_to_pods = {port["port"] for port in rule["ports"]}
    assert open_to_pods == {port["name"] for port in container["ports"]} - {"admin"}


def test_the_name_stands_for_every_replica(deployment):
    assert _load("service.yaml")["spec"]["clusterIP"] == "None"
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_a_replica_is_given_the_time_to_drain(pod, container):
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = pause + _settings(container)["grace"] + LAST_WORDS
    assert pod["terminationGracePeriodSeconds"] > needed


def test_the_autoscaler_looks_at_a_metric_that_there_is(replicas):
    (metric,) = _load("horizontalpodautoscaler.yaml")["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name == "semid_queue_requests"
    assert f"# TYPE {name} gauge\n" in replicas[0].scrape()
    waiting = int(metric["pods"]["target"]["averageValue"])
    assert 0 < waiting < DEFAULTS.max_queue_requests


def test_it_may_do_no_more_than_it_needs(pod, container):
    assert pod["securityContext"]["runAsNonRoot"]
    dockerfile = (live.DOCKER / "Dockerfile").read_text()
    user = pod["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}\n" in dockerfile
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {
        mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]
    }
    assert mounts == {"/checkpoint": True, "/tmp": False}  # noqa: S108 - the image's
    assert pod["enableServiceLinks"] is False, "SEMID_PORT=tcp://... is not for semid"


def test_it_gets_a_gpu_and_spreads_over_nodes_and_zones(pod, container):
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    keys = [constraint["topologyKey"] for constraint in pod["topologySpreadConstraints"]]
    assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]


def test_the_alerts_are_those_of_prometheus():
    written = (FOLDER / "prometheusrule.yaml").read_text()
    alerts = (live.DOCKER / "prometheus/alerts.yaml").read_text()
    indented = "".join(f"  {line}" if line.strip() else line for line in alerts.splitlines(True))
    assert written.partition("\nspec:\n")[2] == indented, "its first lines say how to make it"


def test_without_a_gpu_only_the_device_differs(deployment):
    """The overlay's patch finds what it is about to change, and leaves what the schema allows."""
    overlay = _load("cpu/kustomization.yaml")
    assert overlay["resources"] == [".."]
    (patch,) = overlay["patches"]
    changed = copy.deepcopy(deployment)
    for operation in yaml.safe_load(patch["patch"]):
        *path, last = (
            step.replace("~1", "/") for step in operation["path"].removeprefix("/").split("/")
        )
        place = changed
        for step in path:
            place = place[int(step) if isinstance(place, list) else step]
        last = int(last) if isinstance(place, list) else last
        match operation["op"]:
            case "test":
                assert place[last] == operation["value"]
            case "replace":
                place[last] = operation["value"]
            case "remove":
                del place[last]
    _check(changed)
    assert "gpu" not in yaml.safe_dump(changed)
    (container,) = changed["spec"]["template"]["spec"]["containers"]
    assert _settings(container) == _settings(
        deployment["spec"]["template"]["spec"]["containers"][0]
    ) | {"device": "cpu"}
