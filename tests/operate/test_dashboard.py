"""The dashboard: well-formed, and every query of every panel answered from a real server."""

from __future__ import annotations

import copy
import json
import re

import live
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

# Grafana has four scrapes; a busy machine may miss some of them.
RATE_INTERVAL = "30s"

SUBJECTS = {
    "traffic": "grpc_server_handled_total",
    "errors": "semid:error_ratio:rate1h",
    "time in the queue": "semid_queue_seconds_bucket",
    "time on the device": "semid_device_seconds_bucket",
    "time in all": "grpc_server_handling_seconds_bucket",
    "shape of batches": "semid_batch_rows_sum",
    "queue": "semid_queue_requests",
    "refusals": "semid_refused_requests_total",
    "device memory": "semid_device_memory_used_bytes",
    "device utilisation": "semid_device_utilization_ratio",
    "proofs": "semid_proved_rows_total",
    "wrong codes": "semid_verify_mismatches_total",
    "perplexity": "semid_code_perplexity",
    "dead codes": "semid_dead_codes",
    "quantisation error": "semid_quantization_error_ratio",
    "versions": "semid_model_info",
}


def _unknown(given, known, path="") -> list[str]:
    """Return what the schema's own types did not keep of a document."""
    if isinstance(given, dict):
        return [
            line
            for key, value in given.items()
            for line in (
                _unknown(value, known[key], f"{path}.{key}") if key in known else [f"{path}.{key}"]
            )
        ]
    if isinstance(given, list):
        return [
            line
            for index, (one, other) in enumerate(zip(given, known, strict=True))
            for line in _unknown(one, other, f"{path}[{index}]")
        ]
    return [] if given == known else [f"{path}: {given!r}"]


def _read_and_written(document):
    register_default_plugins()
    return json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(document)))


def test_grafanas_own_types_know_all_that_is_in_it(dashboard):
    assert _unknown(dashboard, _read_and_written(dashboard)) == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ((), "ttle"),
        (("panels", 1, "fieldConfig", "defaults"), "unitt"),
        (("panels", 1, "targets", 0), "exprr"),
        (("templating", "list", 1), "mult"),
    ],
)
def test_a_misspelt_name_would_be_noticed(dashboard, path, name):
    document = copy.deepcopy(dashboard)
    place = document
    for step in path:
        place = place[step]
    place[name] = 1
    (found,) = _unknown(document, _read_and_written(document))
    assert found.endswith(f".{name}")


def test_panels_have_ids_and_places_of_their_own(dashboard):
    panels = dashboard["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "two panels overlap"
    assert max(x for x, _ in cells) < 24, "wider than the grid"


def test_every_panel_has_a_title_a_unit_and_names_for_its_lines(dashboard):
    for panel in dashboard["panels"]:
        assert panel["title"]
        if panel["type"] in {"stat", "timeseries"}:
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        if panel["type"] == "timeseries":
            assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_a_lone_point_is_drawn_and_a_gap_is_left_open(dashboard):
    """One error in a day is one point between two gaps; without points nobody would see it."""
    for panel in dashboard["panels"]:
        if panel["type"] == "timeseries":
            custom = panel["fieldConfig"]["defaults"]["custom"]
            assert (custom["showPoints"], custom["spanNulls"]) == ("auto", False), panel["title"]


def test_lines_of_unlike_size_share_no_linear_scale(dashboard):
    """Rows that are not proved at once are few beside the others, and must be seen."""
    (panel,) = (panel for panel in dashboard["panels"] if "semid_proved_rows_total" in str(panel))
    custom = panel["fieldConfig"]["defaults"]["custom"]
    assert custom["scaleDistribution"]["type"] == "log"
    assert "stacking" not in custom


def test_every_query_asks_the_source_that_is_chosen(dashboard):
    for panel in dashboard["panels"]:
        asked = [panel, *panel.get("targets", ())] if panel["type"] != "row" else []
        assert all(one["datasource"]["uid"] == "${datasource}" for one in asked), panel["title"]


def test_a_fleet_a_replica_and_a_model_can_be_chosen(dashboard):
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert names == {"datasource", "instance", "model", "operation"}
    text = json.dumps(dashboard["panels"])
    assert all(f"${name}" in text or f"${{{name}}}" in text for name in names)


def test_rates_leave_their_window_to_grafana(dashboard):
    windows = {
        (panel["title"], window)
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        for window in re.findall(r"\[(.+?)\]", target["expr"])
    }
    assert {window for _, window in windows} - {"$__rate_interval"} == {"1h"}
    assert {title for title, window in windows if window == "1h"} == {"New versions loaded"}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_it_shows(dashboard, subject):
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    assert any(re.search(rf"\b{SUBJECTS[subject]}\b", expression) for expression in expressions)


# --- against a real server ------------------------------------------------------------------


def test_every_query_of_every_panel_returns_data(prometheus, dashboard):
    """What a GPU's driver would say comes from a stand-in: see replica_with_device.py.

    tests/gpu/test_operate_gpu.py scrapes the same metrics of a real one.
    """
    queries = live.queries(dashboard, rate_interval=RATE_INTERVAL)
    assert prometheus.silent([expression for _, _, expression in queries]) == []


def test_the_choices_of_its_variables_are_there(prometheus, dashboard, replicas):
    found = {}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(
                r"label_values\((.+), (\w+)\)", variable["query"]["query"]
            ).groups()
            series = prometheus.get("series", **{"match[]": selector})
            found[variable["name"]] = {one[label] for one in series}
    assert found == {"instance": {one.metrics for one in replicas}, "model": {"movies"}}
