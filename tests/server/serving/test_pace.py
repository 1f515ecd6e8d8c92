"""What is learned of the time that batches take."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semid_server.serving.pace import PROBE_ROWS, Pace


def paced(*batches):
    pace = Pace()
    for rows, seconds in batches:
        pace.observe(rows, seconds)
    return pace


def test_nothing_is_known_beforehand_and_a_first_batch_is_small():
    pace = Pace()
    assert not pace.known
    assert pace.work(100) == pace.predict(100) == 0
    assert pace.rows_within(0.005) == PROBE_ROWS


def test_a_batch_of_a_size_that_ran_is_expected_to_take_as_long():
    pace = paced((1, 0.001), (1000, 0.1))
    assert pace.predict(1) == 0.001
    assert pace.predict(1000) == 0.1
    # Between two sizes, no longer than the larger; beyond all, in proportion.
    assert pace.predict(100) == 0.1
    assert pace.predict(10_000) == pytest.approx(1.0)


def test_work_is_told_at_the_best_rate_there_was():
    assert paced((1, 0.001), (1000, 0.1)).work(50) == pytest.approx(0.005)


def test_the_shortest_time_is_that_of_batches_that_nothing_got_in_the_way_of():
    pace = paced(*[(8, 0.001), (8, 0.03)] * 20)
    assert 0.001 <= pace.times(8)[1] < 0.0011 < pace.predict(8)
    # Unless no batch has taken so little for long.
    for _ in range(100):
        pace.observe(8, 0.03)
    assert pace.times(8)[1] == pytest.approx(0.03)
    assert pace.times(1)[1] == pace.times(8)[1]
    assert Pace().times(8) == (0, 0)


def test_a_new_speed_is_learned():
    pace = paced((100, 1.0), *[(100, 0.01)] * 40)
    assert pace.predict(100) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("before", [0, 1, 20])
def test_one_stall_is_forgotten_with_the_next_batch(before):
    pace = paced(*[(100, 0.01)] * before, (100, 60.0), (100, 0.01))
    assert pace.predict(100) <= 0.04
    assert pace.work(100) <= 0.04


def test_a_lasting_slowness_is_learned():
    pace = paced(*[(100, 0.01)] * 20, *[(100, 60.0)] * 40)
    assert pace.predict(100) == pytest.approx(60.0, rel=0.02)


def test_empty_batches_and_those_without_time_tell_nothing():
    assert not paced((0, 1.0), (10, 0.0)).known


def test_where_the_cost_is_not_of_rows_batches_are_not_made_small():
    # 20 ms whatever the size: turns of 5 ms would each do one row.
    pace = paced((1, 0.02), (64, 0.02), (1024, 0.021))
    assert pace.rows_within(0.005) >= 1024


COSTS = st.tuples(st.floats(1e-6, 1e-2), st.floats(1e-8, 1e-3))


@settings(deadline=None)
@given(cost=COSTS, budget=st.floats(1e-4, 1.0))
def test_turns_grow_to_the_time_they_are_given_and_no_further(cost, budget):
    alone, a_row = cost
    pace = Pace()
    for _ in range(200):
        rows = min(pace.rows_within(budget), 1 << 24)
        taken = alone + rows * a_row
        # The first one is a guess, and a turn of one row cannot be shorter.
        assert (
            not pace.known or rows == 1 or taken <= 2.01 * max(budget, alone + PROBE_ROWS * a_row)
        )
        pace.observe(rows, taken)
    rows = min(pace.rows_within(budget), 1 << 24)
    assert rows == 1 << 24 or alone + (2 * rows + 1) * a_row >= 0.4 * budget
