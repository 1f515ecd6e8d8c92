"""Every test that the README's table of faults names exists, and is as slow as the table says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _rows():
    section = (ROOT / "README.md").read_text().split("\n## Faults\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def _tests_in(path):
    """Names of the tests that a file defines, and whether each is slow as a whole."""
    return {
        node.name: "pytest.mark.slow" in map(ast.unparse, node.decorator_list)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    }


def test_the_table_is_there():
    assert len(_rows()) > 20


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0])
def test_what_shows_a_fault_is_a_test(row):
    for test in row[-1].split(", "):
        shown_by = re.fullmatch(r"`([\w/]+\.py)::(test_\w+)`( \(slow\))?", test)
        assert shown_by, f"no file::test in {test!r}"
        file, name, slow = shown_by.groups()
        tests = _tests_in(ROOT / "tests" / file)
        assert name in tests, f"{file} has no {name}"
        assert tests[name] == bool(slow), f"{name} is{' not' if slow else ''} slow"


def test_each_row_says_what_happens():
    assert all(len(row) == 4 and row[0] and row[1] for row in _rows())


def test_metrics_and_flags_of_the_table_are_those_of_the_others():
    readme = (ROOT / "README.md").read_text()
    named = {name for row in _rows() for name in re.findall(r"`(semid_\w+|--[\w-]+)`", str(row))}
    tables = readme.replace(readme.split("\n## Faults\n")[1].split("\n## ")[0], "")
    missing = {name for name in named if f"`{name}`" not in tables}
    assert not missing
