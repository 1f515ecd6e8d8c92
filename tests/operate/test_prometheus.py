"""The rules: right by Prometheus' own tools, alive against a real server, each with its runbook."""

from __future__ import annotations

import math
import re
import subprocess
import time

import live
import pytest
import yaml

COMPARISON = re.compile(r"\s(?:[<>]=?|[!=]=)\s+[\d.]+(?:\s*\*\s*[\d.]+)?\s*$")
SEVERITIES = {"page", "ticket"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "alerts.yaml"),
        ("check", "config", "prometheus.yaml"),
        ("test", "rules", "alerts_test.yaml"),
        ("test", "rules", "drift_test.yaml"),
    ],
    ids=" ".join,
)
def test_prometheus_own_tool_agrees(promtool, docker, arguments):
    ran = subprocess.run(
        [promtool, *arguments],
        check=False,
        cwd=docker / "prometheus",
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_is_tested_firing_and_not_firing(docker, alerts):
    seen = set()
    for name in ("alerts_test.yaml", "drift_test.yaml"):
        for test in yaml.safe_load((docker / "prometheus" / name).read_text())["tests"]:
            for case in test["alert_rule_test"]:
                seen.add((case["alertname"], bool(case.get("exp_alerts"))))
    assert seen == {(rule["alert"], fires) for rule in alerts for fires in (True, False)}


def test_every_alert_says_how_grave_it_is_and_where_its_runbook_is(alerts):
    for rule in alerts:
        name = rule["alert"]
        assert rule["labels"]["severity"] in SEVERITIES, name
        assert rule["annotations"]["summary"], name
        assert rule["annotations"]["runbook_url"] == f"README.md#{name.lower()}"


def test_every_alert_has_its_paragraph_in_the_runbook_and_the_reverse(alerts):
    readme = (live.ROOT / "README.md").read_text()
    runbook = readme.split("\n### Runbook\n")[1].split("\n## ")[0]
    told = dict(re.findall(r"^#### (\w+)\n\n(.+?)\n(?=\n|$)", runbook, re.MULTILINE | re.DOTALL))
    assert list(told) == [rule["alert"] for rule in alerts]
    for name, paragraph in told.items():
        assert len(paragraph.split()) > 20, f"{name}: what is to be done?"


# --- against a real server ------------------------------------------------------------------


def _sides(expression: str) -> list[str]:
    """Return what an alert compares: each side of each of its conditions, without numbers."""
    conditions = re.split(r"\n\s*and\s", expression.strip())
    bare = [COMPARISON.sub("", condition) for condition in conditions]
    assert bare != conditions, f"no comparison in {expression}"
    return bare


def test_what_an_alert_compares_is_told_without_the_comparison():
    assert _sides("a > 14.4 * 0.001\nand b < 2\n") == ["a", "b"]
    assert _sides("(sum(a) or vector(0)) < 1") == ["(sum(a) or vector(0))"]


def test_every_expression_of_every_rule_returns_data(prometheus, rules):
    expressions = []
    for rule in rules:
        expressions += _sides(rule["expr"]) if "alert" in rule else [rule["expr"]]
    assert prometheus.silent(expressions) == []


def _health(prometheus) -> dict[str, str]:
    groups = prometheus.get("rules")["groups"]
    return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}


def test_prometheus_evaluates_every_rule_without_an_error(prometheus, rules):
    until = time.monotonic() + live.PATIENCE
    while "unknown" in (health := _health(prometheus)).values():  # until each had its turn
        assert time.monotonic() < until, health
        time.sleep(0.2)
    assert health == {rule.get("alert") or rule["record"]: "ok" for rule in rules}


def test_a_number_that_is_none_is_no_data(prometheus):
    assert prometheus.values("vector(0) / 0") == []
    assert prometheus.values("vector(1)") == [1]
    assert math.isfinite(prometheus.values('count(up{job="semid"})')[0])
