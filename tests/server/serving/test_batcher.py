"""What the batcher promises, on a fake device and a fake clock."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semid_server.errors import (
    DeadlineExpiredError,
    DeviceError,
    DeviceLostError,
    InvalidInputError,
    NotServingError,
    OverloadedError,
)
from semid_server.serving import batcher as batching
from semid_server.serving.batcher import (
    ALIKE,
    AMONG_LARGE,
    AWHILE,
    QUICK,
    Batcher,
    BatchLimits,
    QueueState,
    Runner,
)


def admit(batcher, payload, *, key="k", rows=1, nbytes=1, deadline=None):
    return batcher.admit(key, payload, rows=rows, nbytes=nbytes, deadline=deadline)


async def next_batch(device):
    """Wait for the next batch to begin, without blocking the loop."""
    return await asyncio.to_thread(partial(device.began.get, timeout=30))


async def occupy(batcher, device):
    """Have the device work on a first request, so that all that follows queues."""
    future = admit(batcher, "first")
    await next_batch(device)
    return future


async def test_a_lone_request_runs_at_once_and_alone(make_batcher, device):
    batcher = await make_batcher()
    future = admit(batcher, "a")
    assert await next_batch(device) == ("k", ["a"])
    device.free()
    assert await future == ("answer to", "a")


async def test_requests_that_wait_while_the_device_works_share_the_next_batch(make_batcher, device):
    batcher = await make_batcher()
    await occupy(batcher, device)
    futures = [admit(batcher, name) for name in "abc"]
    device.free()
    assert await asyncio.gather(*futures) == [("answer to", name) for name in "abc"]
    assert [payloads for _, payloads in device.batches] == [["first"], ["a", "b", "c"]]


async def test_a_batch_holds_no_more_rows_than_its_limit(make_batcher, device):
    batcher = await make_batcher(max_batch_rows=10)
    await occupy(batcher, device)
    futures = [admit(batcher, name, rows=4) for name in "abc"]
    device.free()
    await asyncio.gather(*futures)
    assert [payloads for _, payloads in device.batches[1:]] == [["a", "b"], ["c"]]


async def test_a_batch_holds_no_more_bytes_than_its_limit(make_batcher, device):
    batcher = await make_batcher(max_batch_bytes=1000)
    await occupy(batcher, device)
    futures = [admit(batcher, name, nbytes=500) for name in "abc"]
    device.free()
    await asyncio.gather(*futures)
    assert [payloads for _, payloads in device.batches[1:]] == [["a", "b"], ["c"]]


async def test_only_requests_of_one_key_share_a_batch_and_the_oldest_goes_first(
    make_batcher, device
):
    batcher = await make_batcher()
    await occupy(batcher, device)
    order = [("x", "a"), ("y", "b"), ("x", "c"), ("z", "d"), ("y", "e")]
    futures = [admit(batcher, name, key=key) for key, name in order]
    device.free()
    await asyncio.gather(*futures)
    assert device.batches[1:] == [("x", ["a", "c"]), ("y", ["b", "e"]), ("z", ["d"])]


async def test_a_small_request_fits_beside_a_large_one_whatever_waits_between_them(
    make_batcher, device
):
    batcher = await make_batcher(max_batch_rows=10)
    await occupy(batcher, device)
    futures = [admit(batcher, name, rows=rows) for name, rows in [("a", 8), ("b", 8), ("c", 2)]]
    device.free()
    await asyncio.gather(*futures)
    assert [payloads for _, payloads in device.batches[1:]] == [["a", "c"], ["b"]]


async def measured(batcher, device, clock, *, rows, seconds):
    """Have the batcher learn that so many rows take so long."""
    future = admit(batcher, "measure", rows=rows)
    await next_batch(device)
    clock.now += seconds
    device.outcomes.put(lambda payloads: payloads)
    await future
    device.batches.clear()


async def test_a_small_request_goes_ahead_of_large_ones_that_would_not_be_done_yet(
    make_batcher, device, clock
):
    batcher = await make_batcher(max_batch_rows=10)
    await measured(batcher, device, clock, rows=10, seconds=1.0)
    await occupy(batcher, device)
    large = [admit(batcher, f"large {number}", rows=10) for number in range(3)]
    clock.now += 0.5
    small = admit(batcher, "small", rows=1)
    device.free()
    await asyncio.gather(small, *large)
    order = [payload for _, payloads in device.batches for payload in payloads]
    assert order == ["first", "small", "large 0", "large 1", "large 2"]


async def test_small_requests_that_keep_coming_do_not_starve_a_large_one(
    make_batcher, device, clock
):
    batcher = await make_batcher(max_batch_rows=10)
    await measured(batcher, device, clock, rows=10, seconds=1.0)
    await occupy(batcher, device)
    early = [admit(batcher, "small", rows=5)]
    large = admit(batcher, "large", rows=10)
    late = []
    for _ in range(20):
        clock.now += 0.25
        late.append(admit(batcher, "small", rows=5))
    device.free()
    await asyncio.gather(large, *early, *late)
    order = [payload for _, payloads in device.batches for payload in payloads]
    # Ahead of it: the one before it, and the one that came within half a second, its own time less
    # theirs.
    assert order.index("large") == len(["first", "small", "small"])


async def test_one_thread_makes_the_runner_and_runs_every_batch(observer):
    threads = set()

    class Device(Runner):
        def __init__(self):
            threads.add(threading.get_ident())

        def run(self, key, payloads):
            threads.add(threading.get_ident())
            return payloads

        def after(self):
            threads.add(threading.get_ident())

    batcher = Batcher(
        limits=BatchLimits(
            max_batch_rows=1, max_batch_bytes=1, max_queue_requests=9, max_queue_bytes=9
        ),
        observer=observer,
    )
    await batcher.start(Device)
    await asyncio.gather(*(admit(batcher, name) for name in "abcdef"))
    batcher.stop()
    assert len(threads) == 1
    assert threads != {threading.get_ident()}


async def test_what_making_the_runner_raises_is_raised_by_start(observer):
    batcher = Batcher(
        limits=BatchLimits(
            max_batch_rows=1, max_batch_bytes=1, max_queue_requests=9, max_queue_bytes=9
        ),
        observer=observer,
    )

    def fail():
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        await batcher.start(fail)


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(
    make_batcher, device, observer
):
    batcher = await make_batcher(max_queue_requests=2)
    await occupy(batcher, device)
    admit(batcher, "a")
    admit(batcher, "b")
    with pytest.raises(OverloadedError, match="2 requests") as caught:
        admit(batcher, "c")
    assert caught.value.retry_after > 0
    assert observer.refusals == ["k"]
    assert batcher.queue.requests == 2


async def test_the_bytes_of_the_queue_are_bounded_too(make_batcher, device):
    batcher = await make_batcher(max_queue_bytes=1000)
    await occupy(batcher, device)
    admit(batcher, "a", nbytes=600)
    with pytest.raises(OverloadedError, match="600 bytes"):
        admit(batcher, "b", nbytes=401)
    admit(batcher, "c", nbytes=400)
    assert batcher.queue.nbytes == 1000


async def test_the_largest_request_fits_an_empty_queue_whatever_its_bound(make_batcher, device):
    batcher = await make_batcher(max_queue_bytes=10, max_batch_bytes=1000)
    device.free()
    assert await admit(batcher, "a", nbytes=1000) == ("answer to", "a")


async def test_a_request_larger_than_a_batch_is_a_bug_and_says_so(make_batcher):
    batcher = await make_batcher(max_batch_rows=10)
    with pytest.raises(ValueError, match="11 rows"):
        admit(batcher, "a", rows=11)


async def test_an_expired_request_is_never_run(make_batcher, device, observer, clock):
    batcher = await make_batcher()
    await occupy(batcher, device)
    late = admit(batcher, "late", deadline=clock.now + 1)
    live = admit(batcher, "live", deadline=clock.now + 3)
    clock.now += 2
    device.free()
    assert await live == ("answer to", "live")
    with pytest.raises(DeadlineExpiredError, match="nothing was computed"):
        await late
    assert [payloads for _, payloads in device.batches] == [["first"], ["live"]]
    assert observer.expiries == ["k"]


async def test_when_all_have_expired_no_batch_runs_and_the_next_request_does(
    make_batcher, device, clock
):
    batcher = await make_batcher()
    await occupy(batcher, device)
    late = [admit(batcher, name, deadline=clock.now + 1) for name in "abc"]
    clock.now += 2
    device.free()
    results = await asyncio.gather(*late, return_exceptions=True)
    assert [type(result) for result in results] == [DeadlineExpiredError] * 3
    assert await admit(batcher, "d") == ("answer to", "d")
    assert [payloads for _, payloads in device.batches] == [["first"], ["d"]]


async def test_a_withdrawn_request_is_never_run_and_gives_its_room_back(
    make_batcher, device, observer
):
    batcher = await make_batcher(max_queue_requests=1)
    await occupy(batcher, device)
    gone = admit(batcher, "gone")
    gone.cancel()
    await asyncio.sleep(0)  # the callback of the cancellation
    assert batcher.queue.requests == 0
    future = admit(batcher, "a")
    device.free()
    assert await future == ("answer to", "a")
    assert [payloads for _, payloads in device.batches] == [["first"], ["a"]]
    assert observer.withdrawals == ["k"]


async def test_a_caller_that_leaves_while_its_batch_runs_disturbs_nobody(make_batcher, device):
    batcher = await make_batcher()
    await occupy(batcher, device)
    leaver, stayer = admit(batcher, "leaver"), admit(batcher, "stayer")
    device.outcomes.put(lambda payloads: [("answer to", payload) for payload in payloads])
    await next_batch(device)
    leaver.cancel()
    device.free()
    assert await stayer == ("answer to", "stayer")


async def test_a_runners_error_for_one_payload_fails_that_request_alone(make_batcher, device):
    batcher = await make_batcher()
    await occupy(batcher, device)
    good, bad = admit(batcher, "good"), admit(batcher, "bad")
    device.outcomes.put(lambda payloads: payloads)
    device.outcomes.put(
        lambda payloads: [
            InvalidInputError("not this one") if payload == "bad" else payload
            for payload in payloads
        ]
    )
    assert await good == "good"
    with pytest.raises(InvalidInputError, match="not this one"):
        await bad


async def test_a_batch_that_fails_fails_its_requests_and_the_next_one_runs(
    make_batcher, device, observer
):
    batcher = await make_batcher()
    first = await occupy(batcher, device)
    device.outcomes.put(RuntimeError("secret path /etc/x"))
    with pytest.raises(DeviceError) as caught:
        await first
    assert "secret" not in str(caught.value)
    device.free()
    assert await admit(batcher, "a") == ("answer to", "a")
    assert [run[-1] for run in observer.runs] == [True, False]


async def test_when_the_device_is_lost_all_are_told_and_nothing_more_is_admitted(
    make_batcher, device
):
    batcher = await make_batcher()
    running = await occupy(batcher, device)
    queued = admit(batcher, "queued")
    lost = asyncio.create_task(batcher.lost())
    device.outcomes.put(DeviceLostError("gone"))
    with pytest.raises(DeviceLostError, match="gone"):
        await running
    with pytest.raises(NotServingError):
        await queued
    assert str(await lost) == "gone"
    with pytest.raises(NotServingError):
        admit(batcher, "late")


async def test_stop_answers_what_is_queued_and_admits_no_more(make_batcher, device):
    batcher = await make_batcher()
    running = await occupy(batcher, device)
    queued = admit(batcher, "queued")
    batcher.stop()
    with pytest.raises(NotServingError, match="before this request was reached"):
        await queued
    with pytest.raises(NotServingError):
        admit(batcher, "late")
    device.free()
    assert await running == ("answer to", "first")
    assert [payloads for _, payloads in device.batches] == [["first"]]


async def test_those_who_wait_for_room_are_admitted_in_the_order_in_which_they_came(
    make_batcher, device
):
    batcher = await make_batcher(max_queue_requests=1, max_batch_rows=1)
    await occupy(batcher, device)
    admit(batcher, "queued")

    async def wait(name):
        future = await batcher.admit_when_room("k", name, rows=1, nbytes=1, deadline=None)
        return await future

    waiting = [asyncio.create_task(wait(name)) for name in "abc"]
    await asyncio.sleep(0)  # all three have found no room
    assert batcher.queue.requests == 1
    device.free()
    await asyncio.gather(*waiting)
    assert [payloads for _, payloads in device.batches] == [
        ["first"],
        ["queued"],
        ["a"],
        ["b"],
        ["c"],
    ]


async def test_one_who_gives_up_waiting_for_room_does_not_block_the_next(make_batcher, device):
    batcher = await make_batcher(max_queue_requests=1, max_batch_rows=1)
    await occupy(batcher, device)
    admit(batcher, "queued")
    first, second = (
        asyncio.create_task(batcher.admit_when_room("k", name, rows=1, nbytes=1, deadline=None))
        for name in "ab"
    )
    await asyncio.sleep(0)
    first.cancel()
    device.free()
    assert await (await second) == ("answer to", "b")


async def test_stop_turns_those_away_who_wait_for_room(make_batcher, device):
    batcher = await make_batcher(max_queue_requests=1)
    await occupy(batcher, device)
    queued = admit(batcher, "queued")
    waiting = asyncio.create_task(
        batcher.admit_when_room("k", "a", rows=1, nbytes=1, deadline=None)
    )
    await asyncio.sleep(0)
    batcher.stop()
    for future in (queued, waiting):
        with pytest.raises(NotServingError):
            await future


async def test_an_observer_that_fails_is_no_callers_business(
    make_batcher, device, observer, caplog
):
    observer.runs = None  # there is nothing to note a batch in
    batcher = await make_batcher()
    device.free()
    for payload in "ab":
        assert await admit(batcher, payload) == ("answer to", payload)
    assert "could not be noted" in caplog.text


async def test_a_worker_that_fails_leaves_nobody_unanswered(make_batcher, device, clock, caplog):
    batcher = await make_batcher()
    running = await occupy(batcher, device)
    queued = admit(batcher, "a")
    clock.now = None  # a bug, as far as the batcher can tell
    device.outcomes.put(lambda payloads: payloads)
    with pytest.raises(DeviceLostError, match="its log says more"):
        await running
    with pytest.raises(NotServingError):
        await queued
    assert "its log says more" in str(await batcher.lost())
    assert "the worker has failed" in caplog.text


async def test_a_batch_that_is_given_up_ends_all_requests_and_nothing_more_is_admitted(
    make_batcher, device
):
    batcher = await make_batcher()
    assert batcher.running is None
    held = await occupy(batcher, device)
    assert batcher.running == 1
    queued = admit(batcher, "a")
    error = DeviceLostError("hangs")
    batcher.give_up(error)
    with pytest.raises(DeviceLostError, match="hangs"):
        await held
    with pytest.raises(NotServingError):
        await queued
    assert await batcher.lost() is error
    with pytest.raises(NotServingError):
        admit(batcher, "b")
    device.free()  # the answer that comes after all finds nobody


async def test_the_observer_is_told_of_rows_waits_and_seconds(
    make_batcher, device, observer, clock
):
    batcher = await make_batcher()
    first = await occupy(batcher, device)
    a = admit(batcher, "a", rows=2)
    clock.now += 1
    b = admit(batcher, "b", rows=3)
    clock.now += 1
    device.free()
    await asyncio.gather(first, a, b)
    assert observer.marks == [(1,), (2, 3)], "of each batch, what it was given at admission"
    assert observer.runs == [
        ("k", 1, (0.0,), 2.0, False),
        ("k", 5, (2.0, 1.0), 0.0, False),
    ]


async def test_what_may_wait_is_done_after_every_batch(make_batcher, device):
    batcher = await make_batcher()
    device.free()
    for name in "ab":
        await admit(batcher, name)
    batcher.stop()
    # The last batch's turn may come after its answer; the first one's has come before the second.
    assert device.afters >= 1


class RecordingDevice(Runner):
    def __init__(self):
        self.batches = []

    def run(self, key, payloads):
        self.batches.append((key, payloads))
        return [(key, payload) for payload in payloads]


REQUESTS = st.lists(
    st.tuples(st.sampled_from("xyz"), st.integers(0, 10), st.integers(0, 100), st.booleans()),
    max_size=40,
)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(requests=REQUESTS)
def test_every_admitted_request_gets_exactly_its_own_answer(requests, observer):
    async def scenario():
        limits = BatchLimits(
            max_batch_rows=10, max_batch_bytes=100, max_queue_requests=10, max_queue_bytes=300
        )
        batcher = Batcher(limits=limits, observer=observer)
        device = await batcher.start(RecordingDevice)
        admitted = {}
        for number, (key, rows, nbytes, leaves) in enumerate(requests):
            payload = (number, rows, nbytes)
            try:
                future = batcher.admit(key, payload, rows=rows, nbytes=nbytes, deadline=None)
            except OverloadedError:
                await asyncio.sleep(0)
                continue
            if leaves:
                future.cancel()
            else:
                admitted[future] = (key, payload)
        answers = await asyncio.gather(*admitted)
        assert answers == list(admitted.values())
        for key, payloads in device.batches:
            assert sum(rows for _, rows, _ in payloads) <= 10
            assert sum(nbytes for _, _, nbytes in payloads) <= 100
            assert {requests[number][0] for number, _, _ in payloads} == {key}
        await asyncio.sleep(0)
        assert batcher.queue == QueueState(0, 0, 0)
        batcher.stop()

    asyncio.run(scenario())


# -- turns ---------------------------------------------------------------------------------------


class Rows(Runner):
    """Answers rows with themselves, each of which takes a hundredth of a second of the clock.

    Payloads are ranges. Held back until it may go on; bad rows are refused, by their place in the
    payload that it was given.
    """

    divisible = True

    quick = False
    sociable = False

    def runs_quickly(self, key):
        return self.quick

    def company_pays(self, key):
        return self.sociable

    def __init__(self, clock, *, bad=()):
        self.clock, self.bad = clock, set(bad)
        self.batches = []
        self.threads = []
        self.may_run = threading.Event()
        self.began = threading.Semaphore(0)

    def run(self, key, payloads):
        self.began.release()
        assert self.may_run.wait(30)
        self.threads.append(threading.get_ident())
        self.batches.append((key, [list(payload) for payload in payloads]))
        self.clock.now += 0.01 * sum(map(len, payloads))
        answers = []
        for payload in payloads:
            wrong = [place for place, row in enumerate(payload) if row in self.bad]
            answers.append(InvalidInputError(f"row {wrong[0]} is bad") if wrong else list(payload))
        return answers

    def part(self, payload, start, stop):
        return payload[start:stop]

    def join(self, answers):
        return [row for answer in answers for row in answer]

    @property
    def sizes(self):
        return [[len(payload) for payload in payloads] for _, payloads in self.batches]


@pytest.fixture
async def make_turns(observer, clock):
    """Return a function that starts a batcher over `Rows`, whose turns have 8 rows; and those."""
    made = []

    async def make(*, bad=(), quick=False, **limits):
        settings = {
            "max_batch_rows": 100,
            "max_batch_bytes": 10_000,
            "max_queue_requests": 100,
            "max_queue_bytes": 10_000,
            "max_batch_seconds": 0.08,
        } | limits
        batcher = Batcher(limits=BatchLimits(**settings), observer=observer, clock=clock)
        rows = Rows(clock, bad=bad)
        rows.quick = quick
        await batcher.start(lambda: rows)
        made.append((batcher, rows))
        # Two batches, from which it knows how long a row takes, and that nothing else does.
        rows.may_run.set()
        for count in (1, 8):
            await ask(batcher, range(count))
        while rows.began.acquire(blocking=False):  # of short turns, each had several
            pass
        rows.may_run.clear()
        rows.batches.clear()
        rows.threads.clear()
        return batcher, rows

    yield make
    for batcher, rows in made:
        batcher.stop()
        rows.may_run.set()


def ask(batcher, rows, *, key="k", deadline=None):
    return batcher.admit(key, rows, rows=len(rows), nbytes=len(rows), deadline=deadline)


async def hold(batcher, rows):
    """Have a first batch begin and wait."""
    first = ask(batcher, range(1))
    await asyncio.to_thread(rows.began.acquire)
    return first


async def test_a_large_request_is_done_in_parts_and_answered_whole(make_turns):
    batcher, rows = await make_turns()
    rows.may_run.set()
    assert await ask(batcher, range(50)) == list(range(50))
    assert rows.sizes == [[8]] * 6 + [[2]]
    assert batcher.queue == QueueState(0, 0, 0)


async def test_small_requests_wait_for_no_more_than_a_turn_of_a_large_one(make_turns):
    batcher, rows = await make_turns()
    first = await hold(batcher, rows)
    large = [ask(batcher, range(60)) for _ in range(3)]
    small = [ask(batcher, range(1)) for _ in range(4)]
    rows.may_run.set()
    await asyncio.gather(first, *large, *small)
    # The large ones came first, and get what is left of the small ones' turn.
    assert rows.sizes[1] == [1, 1, 1, 1, 4]


async def test_turns_are_longer_once_nobody_small_has_come_for_a_while(make_turns, clock):
    batcher, rows = await make_turns()
    rows.may_run.set()
    clock.now += AWHILE + 0.1
    await ask(batcher, range(50))
    assert rows.sizes == [[8 * AMONG_LARGE], [50 - 8 * AMONG_LARGE]]
    # What takes more than half a turn is not small, and what takes less is.
    for count, size in ((5, 8 * AMONG_LARGE), (3, 8)):
        rows.batches.clear()
        await ask(batcher, range(count))
        await ask(batcher, range(50))
        assert rows.sizes[:2] == [[count], [size]]
    clock.now += AWHILE + 0.1
    rows.batches.clear()
    await ask(batcher, range(50))
    assert rows.sizes[0] == [8 * AMONG_LARGE]


async def test_one_that_is_small_ends_long_turns_while_it_waits(make_turns, clock):
    batcher, rows = await make_turns()
    clock.now += AWHILE + 0.1
    large = ask(batcher, range(100))
    await asyncio.to_thread(rows.began.acquire)
    small = ask(batcher, range(1))
    rows.may_run.set()
    await asyncio.gather(large, small)
    assert rows.sizes[:3] == [[8 * AMONG_LARGE], [1, 7], [8]]


async def test_one_that_is_answered_at_once_keeps_turns_short(make_turns, clock):
    batcher, rows = await make_turns(quick=True)
    rows.may_run.set()
    while not batcher._resting:  # the worker has come so far
        await asyncio.sleep(0)
    clock.now += AWHILE + 0.1
    batcher._paces.clear()
    batcher._pace("k").observe(1, QUICK / 2)
    assert batcher.answer_now("k", range(1), rows=1, nbytes=1) == [0]
    assert batcher._turn_seconds() == 0.08


async def test_a_large_request_gets_a_quarter_of_each_turn_however_many_small_ones_wait(
    make_turns,
):
    batcher, rows = await make_turns()
    first = await hold(batcher, rows)
    large = ask(batcher, range(20))
    small = [ask(batcher, range(2)) for _ in range(30)]
    rows.may_run.set()
    await asyncio.gather(first, large, *small)
    # In six turns with three small ones each. What is left of it then is no longer large, and waits
    # for those that came when it did.
    assert rows.sizes[1:] == [[2, 2, 2, 2]] * 9 + [[8]]


async def test_keys_that_wait_take_turns(make_turns):
    batcher, rows = await make_turns(max_batch_rows=8)
    first = await hold(batcher, rows)
    waiting = [ask(batcher, range(8), key=key) for key in "aaabcc"]
    rows.may_run.set()
    await asyncio.gather(first, *waiting)
    assert [key for key, _ in rows.batches[1:]] == ["a", "b", "c", "a", "c", "a"]


async def test_an_error_in_a_later_part_is_told_of_the_whole_and_the_rest_is_not_run(make_turns):
    batcher, rows = await make_turns(bad=[20])
    rows.may_run.set()
    with pytest.raises(InvalidInputError, match="row 20 is bad"):
        await ask(batcher, range(50))
    assert batcher.queue == QueueState(0, 0, 0)
    assert await ask(batcher, range(3)) == [0, 1, 2]
    assert rows.sizes == [[8], [8], [8], [50], [3]]


async def test_a_batch_that_fails_ends_the_large_request_that_was_partly_in_it(make_turns):
    batcher, rows = await make_turns()
    rows.part = None  # not to be called: the parts cannot be made
    rows.may_run.set()
    with pytest.raises(DeviceError):
        await ask(batcher, range(50))
    assert batcher.queue == QueueState(0, 0, 0)
    assert await ask(batcher, range(3)) == [0, 1, 2]


async def test_a_large_request_is_not_starved_where_a_turn_has_few_rows(make_turns):
    batcher, rows = await make_turns(max_batch_seconds=0.02)
    first = await hold(batcher, rows)
    large = ask(batcher, range(10, 16))
    small = [ask(batcher, range(1)) for _ in range(20)]
    rows.may_run.set()
    assert await large == list(range(10, 16))
    await asyncio.gather(first, *small)
    # Until no more than a turn of it is left, which then is ordered as others are.
    turns = [payloads for _, payloads in rows.batches[1:5]]
    assert turns == [[[0], [row]] for row in range(10, 14)]


async def test_no_part_of_a_large_request_is_run_that_cannot_be_done_in_time(
    make_turns, clock, observer
):
    batcher, rows = await make_turns()
    first = await hold(batcher, rows)
    # Admitted, since nothing is ahead of it but what runs; until others come.
    large = ask(batcher, range(60), deadline=clock.now + 0.62)
    small = [ask(batcher, range(2)) for _ in range(3)]
    clock.now += 0.1
    rows.may_run.set()
    await asyncio.gather(first, *small)
    with pytest.raises(DeadlineExpiredError, match="nothing was computed"):
        await large
    assert rows.sizes == [[1], [2, 2, 2]]


async def test_a_large_request_that_is_alone_is_tried_whatever_its_deadline(make_turns, clock):
    batcher, rows = await make_turns()
    first = await hold(batcher, rows)
    large = ask(batcher, range(60), deadline=clock.now + 0.62)
    clock.now += 0.1
    rows.may_run.set()
    await first
    with pytest.raises(DeadlineExpiredError, match="of 60 rows were"):
        await large


async def test_what_is_answered_is_let_go_of_before_more_comes(make_turns):
    class Payload(list):
        """A list that can be referred to weakly."""

    batcher, rows = await make_turns()
    rows.may_run.set()
    payload = Payload([1])
    gone = weakref.ref(payload)
    assert await ask(batcher, payload) == [1]
    del payload
    async with asyncio.timeout(10):
        while gone() is not None:  # until the worker has come to rest
            await asyncio.sleep(0.01)


class _Interrupted:
    """A lock. The first time that it is let go of, something happens at once."""

    def __init__(self, lock, happen):
        self._lock, self._happen = lock, happen

    def __enter__(self):
        return self._lock.__enter__()

    def __exit__(self, *error):
        self._lock.__exit__(*error)
        if (happen := self._happen) is not None:
            self._happen = None
            happen()


async def test_room_that_is_made_while_somebody_begins_to_wait_is_not_missed(make_turns):
    batcher, rows = await make_turns(max_queue_requests=1)
    first = await hold(batcher, rows)
    queued = ask(batcher, range(1))

    def make_room():
        rows.may_run.set()
        assert rows.began.acquire(timeout=30)  # the queue is empty by now

    batcher._lock = _Interrupted(batcher._lock, make_room)
    waits = batcher.admit_when_room("k", range(2), rows=2, nbytes=2, deadline=None)
    future = await asyncio.wait_for(waits, 10)
    assert await asyncio.gather(first, queued, future) == [[0], [0], [0, 1]]


async def test_a_large_request_withdrawn_between_its_parts_gives_its_room_back(
    make_turns, observer
):
    batcher, rows = await make_turns()
    large = ask(batcher, range(50))
    await asyncio.to_thread(rows.began.acquire)
    assert batcher.queue.rows == 42
    large.cancel()
    await asyncio.sleep(0)
    assert batcher.queue == QueueState(0, 0, 0)
    assert observer.withdrawals == ["k"]
    rows.may_run.set()
    assert await ask(batcher, range(2)) == [0, 1]
    assert rows.sizes == [[8], [2]]


async def test_the_wait_of_a_large_request_is_told_once(make_turns, observer):
    batcher, rows = await make_turns()
    observer.runs.clear()
    rows.may_run.set()
    await ask(batcher, range(20))
    assert [(count, len(waits)) for _, count, waits, _, _ in observer.runs] == [
        (8, 1),
        (8, 0),
        (4, 0),
    ]


# -- deadlines -----------------------------------------------------------------------------------


async def test_what_would_expire_in_the_queue_is_refused_at_once_and_told_so(
    make_turns, clock, observer
):
    batcher, rows = await make_turns()
    first = await hold(batcher, rows)
    queued = [ask(batcher, range(8)) for _ in range(10)]  # 0.8 s of work
    with pytest.raises(OverloadedError, match=r"0\.500 s away.* takes about 0\.8") as caught:
        ask(batcher, range(8), deadline=clock.now + 0.5)
    assert caught.value.retry_after == pytest.approx(0.8, abs=0.01)
    assert observer.refusals == ["k"]
    fine = ask(batcher, range(8), deadline=clock.now + 2)
    rows.may_run.set()
    await asyncio.gather(first, fine, *queued)


async def test_a_small_request_is_not_refused_for_large_ones_that_let_it_pass(make_turns, clock):
    batcher, rows = await make_turns()
    first = await hold(batcher, rows)
    large = ask(batcher, range(100))  # a second of work
    small = ask(batcher, range(1), deadline=clock.now + 0.5)
    rows.may_run.set()
    await asyncio.gather(first, large, small)


async def test_what_nothing_is_ahead_of_is_tried_whatever_its_deadline(make_turns, clock):
    batcher, rows = await make_turns()
    rows.may_run.set()
    assert await ask(batcher, range(4), deadline=clock.now + 0.001) == [0, 1, 2, 3]


async def test_what_could_not_be_done_in_time_gives_its_turn_to_others(make_turns, clock, observer):
    batcher, rows = await make_turns()
    first = await hold(batcher, rows)
    queued = ask(batcher, range(4))
    late = ask(batcher, range(4), deadline=clock.now + 0.10)
    clock.now += 0.05  # by something that was not foreseen
    rows.may_run.set()
    with pytest.raises(DeadlineExpiredError, match="nothing was computed"):
        await late
    await asyncio.gather(first, queued)
    assert rows.sizes == [[1], [4]]
    assert observer.expiries == ["k"]


async def test_one_stall_costs_later_requests_with_time_left_nothing(make_turns, clock, observer):
    batcher, rows = await make_turns()
    stalled = await hold(batcher, rows)
    clock.now += 60
    rows.may_run.set()
    await stalled
    await ask(batcher, range(1))
    assert await asyncio.to_thread(rows.began.acquire, timeout=30)
    rows.may_run.clear()
    first = await hold(batcher, rows)
    queued = [ask(batcher, range(1), deadline=clock.now + 1) for _ in range(5)]
    rows.may_run.set()
    assert await asyncio.gather(first, *queued) == [[0]] * 6
    assert observer.refusals == observer.expiries == []


async def test_a_refusal_is_told_before_there_is_a_request(make_turns):
    batcher, rows = await make_turns(max_queue_requests=2)
    first = await hold(batcher, rows)
    assert batcher.refusal() is None
    queued = [ask(batcher, range(1)) for _ in range(2)]
    refusal = batcher.refusal()
    assert isinstance(refusal, OverloadedError)
    with pytest.raises(OverloadedError) as caught:
        ask(batcher, range(1))
    assert str(refusal) == str(caught.value)
    assert refusal.retry_after == caught.value.retry_after
    rows.may_run.set()
    await asyncio.gather(first, *queued)


async def test_what_is_refused_in_one_moment_is_refused_alike(make_turns, clock):
    batcher, rows = await make_turns(max_queue_requests=1)
    first = await hold(batcher, rows)
    queued = ask(batcher, range(1))
    refusal = batcher.refusal()
    clock.now += ALIKE / 2
    assert batcher.refusal() is refusal
    clock.now += ALIKE
    assert batcher.refusal() is not refusal
    rows.may_run.set()
    await asyncio.gather(first, queued)
    assert batcher.refusal() is None, "there is room, however little ago there was none"


# -- short batches -------------------------------------------------------------------------------


class Instant(Rows):
    """`Rows` that take no time worth a thread: a hundred thousandth of a second each."""

    def run(self, key, payloads):
        answers = super().run(key, payloads)
        self.clock.now -= (0.01 - 0.00001) * sum(map(len, payloads))
        return answers


@pytest.fixture
async def quick_of(observer, clock):
    """Return a function that makes a batcher of `Instant` rows that knows how long they take."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(**settings):
            rows = Instant(clock)
            rows.quick = True
            rows.may_run.set()
            batcher = Batcher(
                limits=BatchLimits(
                    max_batch_rows=100,
                    max_batch_bytes=10_000,
                    max_queue_requests=100,
                    max_queue_bytes=10_000,
                    max_batch_seconds=0.005,
                ),
                observer=observer,
                clock=clock,
                **settings,
            )
            await batcher.start(lambda: rows)
            stack.callback(batcher.stop)
            await ask(batcher, range(8))  # of which nothing is known yet
            while not batcher._resting:
                await asyncio.sleep(0)
            return batcher, rows

        yield make


@pytest.fixture
async def quick(quick_of):
    return await quick_of()


async def test_the_loop_runs_short_batches_itself_with_all_that_has_come(quick):
    batcher, rows = quick
    rows.batches.clear()
    rows.threads.clear()
    answers = await asyncio.gather(*(ask(batcher, range(n)) for n in (1, 2, 3)))
    assert answers == [[0], [0, 1], [0, 1, 2]]
    assert rows.sizes == [[1, 2, 3]]
    assert rows.threads == [threading.get_ident()]


async def test_the_worker_runs_what_is_not_short_and_what_comes_meanwhile(quick):
    batcher, rows = quick
    rows.batches.clear()
    rows.threads.clear()
    rows.may_run.clear()
    long = ask(batcher, range(60))
    await asyncio.sleep(0)  # the loop has looked at it
    short = ask(batcher, range(1))
    rows.may_run.set()
    assert await long == list(range(60))
    assert await short == [0]
    assert threading.get_ident() not in rows.threads


async def test_what_fails_in_the_loop_fails_alone(quick):
    batcher, rows = quick
    rows.bad.add(7)
    good, bad = ask(batcher, range(3)), ask(batcher, range(8))
    with pytest.raises(InvalidInputError, match="row 7"):
        await bad
    assert await good == [0, 1, 2]


def answer_now(batcher, rows, *, key="k"):
    return batcher.answer_now(key, rows, rows=len(rows), nbytes=len(rows))


async def test_a_short_request_that_finds_nothing_queued_is_answered_at_once(quick, observer):
    batcher, rows = quick
    rows.batches.clear()
    rows.threads.clear()
    observer.runs.clear()
    assert answer_now(batcher, range(3)) == [0, 1, 2]
    assert rows.sizes == [[3]]
    assert rows.threads == [threading.get_ident()]
    assert [(key, count, waits) for key, count, waits, *_ in observer.runs] == [("k", 3, (0.0,))]
    assert observer.marks[-1] == (observer.admissions,)
    assert batcher.queue == QueueState(0, 0, 0)
    assert batcher.running is None
    assert await ask(batcher, range(2)) == [0, 1]


async def test_what_cannot_be_answered_at_once_is_left_to_be_admitted(quick, make_turns):
    batcher, rows = quick
    rows.batches.clear()
    assert answer_now(batcher, range(60)) is None  # not short
    assert answer_now(batcher, range(1), key="other") is None  # of which nothing is known
    waiting = ask(batcher, range(1))
    assert answer_now(batcher, range(1)) is None  # another one was first
    assert rows.batches == []
    assert await waiting == [0]
    with pytest.raises(ValueError, match="101 rows and 101 bytes exceeds a batch of 100 rows"):
        answer_now(batcher, range(101))
    batcher.stop()
    assert answer_now(batcher, range(1)) is None
    slow, _ = await make_turns(quick=False)
    assert answer_now(slow, range(1)) is None


@pytest.mark.parametrize(
    ("processors", "rows", "gap", "few", "at_once"),
    [
        (4, 30, 0.0005, True, False),  # 0.3 ms of 0.5
        (4, 30, 0.0025, True, True),
        (3, 30, 0.0005, True, True),  # nobody else would be faster
        (4, 14, 0.0002, True, True),  # too short to be handed over
        (4, 14, 0.0002, False, False),  # but there is much to copy
        (4, 7, 0.0002, False, True),
    ],
)
async def test_frequent_requests_are_left_to_a_worker_with_a_processor_to_itself(
    monkeypatch, quick_of, *, processors, rows, gap, few, at_once
):
    monkeypatch.setattr(batching, "FEW_BYTES", rows if few else rows - 1)
    batcher, instant = await quick_of(processors=processors)

    async def come(count, pause):
        for _ in range(count):
            instant.clock.now += pause
            answer = answer_now(batcher, range(rows))
            if answer is None:
                answered = batcher.admit("k", range(rows), rows=rows, nbytes=rows, deadline=None)
                assert await answered == list(range(rows))
                while not batcher._resting:
                    await asyncio.sleep(0)
        return answer is not None

    assert await come(30, gap) == at_once
    assert await come(30, 1.0)  # alone again


@pytest.fixture
async def awaited(quick_of):
    """A batcher whose batches are worth sharing, what runs them, and how many calls are coming."""
    coming = [0]
    batcher, rows = await quick_of(processors=4, coming=lambda: coming[0])
    rows.sociable = True
    rows.batches.clear()
    rows.threads.clear()
    return batcher, rows, coming


async def test_requests_that_come_together_share_a_batch_where_that_pays(awaited):
    batcher, rows, coming = awaited
    coming[0] = batching.COMPANY
    answers = []

    def come(last):
        coming[0] -= 1
        assert answer_now(batcher, range(3)) is None
        answers.append(ask(batcher, range(3)))
        if last > 0:  # a turn of the loop later
            asyncio.get_running_loop().call_soon(come, last - 1)

    assert answer_now(batcher, range(2)) is None
    answers.append(ask(batcher, range(2)))
    asyncio.get_running_loop().call_soon(come, batching.COMPANY - 1)
    while len(answers) <= batching.COMPANY:
        await asyncio.sleep(0)
    assert await asyncio.gather(*answers) == [[0, 1], *[[0, 1, 2]] * batching.COMPANY]
    assert rows.sizes == [[2, *[3] * batching.COMPANY]]
    assert rows.threads == [threading.get_ident()]


@pytest.mark.parametrize(("sociable", "coming"), [(False, 5), (True, batching.COMPANY - 1)])
async def test_a_request_is_answered_at_once_where_company_is_no_use_or_too_little(
    awaited, sociable, coming
):
    batcher, rows, calls = awaited
    rows.sociable, calls[0] = sociable, coming
    assert answer_now(batcher, range(3)) == [0, 1, 2]


async def test_what_is_long_in_coming_is_waited_for_a_few_turns_only(awaited):
    batcher, rows, coming = awaited
    coming[0] = 5
    for _ in range(2):  # the second waits as long as the first did
        assert answer_now(batcher, range(3)) is None
        answer = ask(batcher, range(3))
        for turn in range(batching.PUT_OFF_AT_MOST + 1):
            assert not answer.done(), turn
            await asyncio.sleep(0)
        assert await answer == [0, 1, 2]
    assert rows.sizes == [[3], [3]]


@pytest.mark.parametrize(
    ("requests", "at_most", "by_loop"),
    [
        ([16], 0.0003, False),  # 0.16 ms, for which one request is not worth it
        ([4] * 4, 0.0003, True),  # the same of four
        ([4, 28], 1.0, False),  # 0.32 ms: more than 0.08 for each
        ([4] * 8, 1.0, True),
        ([4] * 8, 0.0003, False),  # too long for the loop, however many share it
    ],
)
async def test_the_loop_runs_longer_batches_if_they_are_shared(
    monkeypatch, quick_of, *, requests, at_most, by_loop
):
    monkeypatch.setattr(batching, "FEW_BYTES", 0)
    monkeypatch.setattr(batching, "APART_AT_MOST", at_most)
    batcher, instant = await quick_of(processors=4)
    for rows in (4, 16, 32):
        batcher._pace("k").observe(rows, rows * 1e-5)
    instant.threads.clear()
    batcher._gap = 0.0002
    answers = [ask(batcher, range(rows)) for rows in requests]
    assert await asyncio.gather(*answers) == [list(range(rows)) for rows in requests]
    assert (instant.threads[0] == threading.get_ident()) == by_loop


async def test_nothing_is_answered_at_once_while_the_worker_works(quick):
    batcher, rows = quick
    rows.may_run.clear()
    long = await hold_long(batcher, rows)
    assert answer_now(batcher, range(1)) is None
    rows.may_run.set()
    assert await long == list(range(60))


async def hold_long(batcher, rows):
    while rows.began.acquire(blocking=False):
        pass
    long = ask(batcher, range(60))
    await asyncio.to_thread(rows.began.acquire)
    return long


async def test_what_fails_at_once_is_told_and_the_next_is_answered(quick, monkeypatch):
    batcher, rows = quick
    rows.bad.add(7)
    with pytest.raises(InvalidInputError, match="row 7"):
        answer_now(batcher, range(8))
    with monkeypatch.context() as broken:
        broken.setattr(rows, "run", lambda _key, _payloads: 1 / 0)
        with pytest.raises(DeviceError, match="while it computed this batch"):
            answer_now(batcher, range(3))
    assert answer_now(batcher, range(3)) == [0, 1, 2]


async def test_a_device_that_is_lost_at_once_is_told_of_and_nothing_more_is_answered(
    quick, monkeypatch
):
    batcher, rows = quick

    def lose(_key, _payloads):
        raise DeviceLostError("gone")

    monkeypatch.setattr(rows, "run", lose)
    with pytest.raises(DeviceLostError, match="gone"):
        answer_now(batcher, range(3))
    assert answer_now(batcher, range(3)) is None
    with pytest.raises(NotServingError):
        ask(batcher, range(3))
    assert str(await batcher.lost()) == "gone"
    assert batcher.running is None


async def learn(batcher, keys):
    """Have the speed of keys be known, and the worker at rest."""
    for key in keys:
        await ask(batcher, range(1), key=key)
    while not batcher._resting:
        await asyncio.sleep(0)


def is_answered_now(batcher, key, count):
    answer = answer_now(batcher, range(count), key=key)
    assert answer is None or answer == list(range(count))
    return answer is not None


ASKED = st.lists(
    st.tuples(st.sampled_from("xyz"), st.integers(0, 60), st.booleans(), st.integers(0, 3)),
    max_size=40,
)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(asked=ASKED, is_quick=st.booleans(), seconds=st.sampled_from([0.001, 0.08, 10.0]))
def test_whatever_is_asked_each_gets_its_own_answer_and_nothing_is_left(
    asked, is_quick, seconds, observer, clock
):
    async def scenario():
        limits = BatchLimits(
            max_batch_rows=60,
            max_batch_bytes=100,
            max_queue_requests=20,
            max_queue_bytes=600,
            max_batch_seconds=seconds,
        )
        batcher = Batcher(limits=limits, observer=observer, clock=clock)
        rows = (Instant if is_quick else Rows)(clock, bad=[59])
        rows.quick = is_quick
        rows.may_run.set()
        await batcher.start(lambda: rows)
        await learn(batcher, "xyz" if is_quick else "")
        futures = {}
        for key, count, leaves, pauses in asked:
            if not leaves and count != 60 and is_answered_now(batcher, key, count):
                continue
            try:
                future = batcher.admit(key, range(count), rows=count, nbytes=count, deadline=None)
            except OverloadedError:
                await asyncio.sleep(0)
                continue
            for _ in range(pauses):
                await asyncio.sleep(0)
            if leaves:
                future.cancel()
            else:
                futures[future] = count
        answers = await asyncio.gather(*futures, return_exceptions=True)
        for answer, count in zip(answers, futures.values(), strict=True):
            if count == 60:
                assert str(answer) == "row 59 is bad"
            else:
                assert answer == list(range(count))
        for _, payloads in rows.batches:
            assert sum(map(len, payloads)) <= 60
        await asyncio.sleep(0)
        assert batcher.queue == QueueState(0, 0, 0)
        batcher.stop()

    asyncio.run(scenario())


def _told(observer):
    """Of each batch: its rows, those answered, whether the device failed."""
    return [
        (rows, answered, failed)
        for (_, rows, _, _, failed), answered in zip(observer.runs, observer.answered, strict=True)
    ]


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (["a", "b"], (5, False)),
        ([InvalidInputError("NaN"), "b"], (3, False)),
        (["a", DeviceError("no memory")], (2, True)),
        ([InvalidInputError("NaN"), DeviceError("no memory")], (0, True)),
    ],
)
async def test_the_observer_is_told_of_rows_that_were_answered_and_whether_the_device_failed(
    make_batcher, device, observer, answers, told
):
    batcher = await make_batcher()
    first = await occupy(batcher, device)
    requests = [admit(batcher, "a", rows=2), admit(batcher, "b", rows=3)]
    device.outcomes.put(lambda payloads: payloads)
    device.outcomes.put(lambda payloads: answers)
    await first
    await asyncio.gather(*requests, return_exceptions=True)
    assert _told(observer) == [(1, 1, False), (5, *told)]


async def test_the_observer_is_told_that_a_batch_which_raises_answers_nothing(
    make_batcher, device, observer
):
    batcher = await make_batcher()
    device.outcomes.put(ValueError())
    with pytest.raises(DeviceError):
        await admit(batcher, "a", rows=2)
    assert _told(observer) == [(2, 0, True)]


@pytest.mark.parametrize(
    ("error", "failed"), [(InvalidInputError("NaN"), False), (DeviceError("no memory"), True)]
)
async def test_the_observer_is_told_the_same_of_what_is_answered_at_once(
    quick, observer, error, failed
):
    batcher, rows = quick
    observer.runs.clear()
    observer.answered.clear()
    rows.run = lambda key, payloads: [error]
    with pytest.raises(type(error)):
        answer_now(batcher, range(3))
    assert _told(observer) == [(3, 0, failed)]
