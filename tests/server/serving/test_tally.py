"""Counters and histograms of our own show what those of the library would."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from semid_server.serving.tally import Counts, Tallies

BOUNDS = (0.1, 1.0, 2.5, 10.0)
OBSERVED = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.one_of(st.sampled_from(BOUNDS), st.integers(0, 20), st.floats(0, 20)),
    )
)


@settings(deadline=None)
@given(observed=OBSERVED)
def test_the_page_is_that_of_the_librarys_counter(observed):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    told = ("parts_total", "What it is.", ("which", "other"))
    for family in (Counts(*told, registry=ours), Counter(*told, registry=theirs)):
        for which, value in [("a", None), ("b", 1), *observed]:
            child = family.labels(which, "x")
            if value is not None:
                child.inc(value)
        family.labels("b", "x").inc()
    kept = [line for line in generate_latest(theirs).decode().splitlines() if "created" not in line]
    assert generate_latest(ours).decode().splitlines() == kept


@settings(deadline=None)
@given(observed=OBSERVED)
def test_the_page_is_that_of_the_librarys_histogram(observed):
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    told = ("seconds_of_it", "What it is.", ("which", "other"))
    tallies = Tallies(*told, buckets=BOUNDS, registry=ours)
    histogram = Histogram(*told, buckets=BOUNDS, registry=theirs)
    for family in (tallies, histogram):
        for which, value in [("a", None), ("b", None), *observed]:
            child = family.labels(which, "x")
            if value is not None:
                child.observe(value)
    kept = [line for line in generate_latest(theirs).decode().splitlines() if "created" not in line]
    assert generate_latest(ours).decode().splitlines() == kept
