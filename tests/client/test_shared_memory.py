"""What is shared, what is sent, and which memory is used again: without a server."""

from __future__ import annotations

import errno
import gc
import logging
import os
from dataclasses import dataclass, field

import numpy as np
import pytest

from semid_client import Client, ClientClosedError, ConfigurationError, DeadlineExceededError
from semid_client._errors import (
    FailedPreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from semid_client._model import Layer, Limits, ModelInfo, SharedMemoryLimits
from semid_client._shared_memory import (
    FOLDER,
    PATIENCE,
    SLOT_BYTES,
    Segment,
    Sharing,
    SharingEndedError,
)
from semid_client._transfer import Decoding, Encoding

LIMITS = SharedMemoryLimits(1 << 26, 4, 1 << 20, 1 << 26)
ROWS = np.arange(1 << 20, dtype=np.float32).reshape(-1, 64)


def info(limits=LIMITS):
    layers = (Layer(256, 64),)
    return ModelInfo(
        *("toy", "f" * 64, "r-vq", 64, layers, True, np.dtype("u1"), ("sum",)),
        Limits(1 << 24, 1 << 14, limits),
    )


@dataclass(eq=False)
class FakeLease:
    handle: str = "handle"
    active: bool = True

    def end(self):
        self.active = False


@dataclass
class FakeServer:
    """Takes whatever is shared, or says why not."""

    leases: list = field(default_factory=list)
    files: list = field(default_factory=list)
    refusal: Exception | None = None
    room: int = 64
    patience: list = field(default_factory=list)

    def open_lease(self, request, timeout):
        self.patience.append(timeout)
        self.files.append(FOLDER / request.name)
        assert self.files[-1].read_bytes() == request.proof
        if self.refusal:
            raise self.refusal
        if sum(lease.active for lease in self.leases) >= self.room:
            raise ResourceExhaustedError("full", details=f"at most {self.room} may be")
        self.leases.append(FakeLease())
        return self.leases[-1]
        yield


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def make_sharing(server):
    def make(mode="auto", target="localhost:1"):
        return Sharing(
            mode, target, slots=2, open_lease=server.open_lease, wait=lambda *waited: waited
        )

    yield make
    assert not [file for file in server.files if file.exists()]


def finish(flow):
    """Run a flow that waits for nothing."""
    with pytest.raises(StopIteration) as done:
        next(flow)
    return done.value.value


def carrier_of(sharing, rows=ROWS, limits=LIMITS):
    return finish(sharing.carrier(Encoding(rows), info(limits), 1.0))


def test_a_segment_is_used_again_by_the_next_transfer_and_not_by_one_at_the_same_time(
    make_sharing, server
):
    sharing = make_sharing()
    first, second = carrier_of(sharing), carrier_of(sharing)
    assert first is not second
    sharing.give_back(first)
    assert carrier_of(sharing) is first
    assert len(server.leases) == 2


def test_a_segment_whose_lease_has_ended_is_not_used_again(make_sharing, server):
    sharing = make_sharing()
    first = carrier_of(sharing)
    sharing.give_back(first)
    server.leases[0].end()
    assert carrier_of(sharing) is not first


def test_a_slot_is_written_to_again_only_when_its_answer_has_come(make_sharing):
    carrier = carrier_of(make_sharing())
    first, second = (carrier.tensor(key, ROWS[:10]).offset for key in (0, 10))
    assert abs(first - second) >= SLOT_BYTES
    assert carrier.tensor(0, ROWS[:10]).offset == first  # sent again
    carrier.done(0)
    assert carrier.tensor(20, ROWS[:10]).offset == first


def test_what_is_in_an_allocated_array_stays_where_it_is(make_sharing):
    sharing = make_sharing()
    array = finish(sharing.allocate(1 << 14, 64, "float32", info(), 1.0))
    array[:] = ROWS
    begin = carrier_of(sharing, array).tensor(0, array).offset
    assert carrier_of(sharing, array[100:]).tensor(0, array[100:]).offset == begin + 100 * 256
    for other in (array[::2], array[:, :32], array.astype(">f4"), ROWS):
        assert carrier_of(sharing, other) is not carrier_of(sharing, array)


def test_an_array_is_shared_until_no_part_of_it_is_in_use(make_sharing, server):
    array = finish(make_sharing().allocate(1 << 14, 64, "float32", info(), 1.0))
    part = array[5:6]
    del array
    gc.collect()
    assert server.leases[0].active
    del part
    gc.collect()
    assert not server.leases[0].active


@pytest.mark.parametrize("target", ["example.com:50051", "10.0.0.7:50051", "dns:///semid:50051"])
def test_nothing_is_shared_with_another_machine_unless_told_to(make_sharing, target):
    assert carrier_of(make_sharing(target=target)) is None
    assert carrier_of(make_sharing(True, target)) is not None


def test_codes_and_few_rows_are_sent(make_sharing, server):
    sharing = make_sharing(True)
    assert finish(sharing.carrier(Decoding(np.zeros((9, 1), int), "sum"), info(), 1.0)) is None
    assert carrier_of(sharing, ROWS[:100]) is None
    assert carrier_of(make_sharing(mode=False)) is None
    assert not server.leases


def test_a_refusal_is_logged_once_and_not_asked_for_again_at_once(make_sharing, server, caplog):
    sharing = make_sharing()
    server.refusal = FailedPreconditionError("of another user")
    with caplog.at_level(logging.INFO, "semid_client"):
        assert carrier_of(sharing) is None
        server.refusal = None
        assert carrier_of(sharing) is None
    (said,) = caplog.messages
    assert "of another user" in said


def test_what_the_server_has_no_room_for_is_sent_and_what_is_shared_stays_in_use(
    make_sharing, server, caplog
):
    sharing = make_sharing()
    server.room = 2
    first, second = carrier_of(sharing), carrier_of(sharing)
    with caplog.at_level(logging.INFO, "semid_client"):
        assert carrier_of(sharing) is None
        assert carrier_of(sharing) is None
        finish(sharing.allocate(1 << 14, 64, "float32", info(), 1.0))[:] = 1  # ordinary memory
    (said,) = caplog.messages
    assert "some embeddings are sent instead: at most 2 may be" in said
    sharing.give_back(first)
    sharing.give_back(second)
    assert carrier_of(sharing) in (first, second)
    server.leases[0].end()
    assert carrier_of(sharing) is not None


def waiting_for_one(sharing):
    """A transfer that must not be sent, at the point where it waits; and what it waits for."""
    flow = sharing.carrier(Encoding(ROWS), info(), 30.0)
    future, seconds = next(flow)
    assert 29 < seconds <= 30
    return flow, future


def test_told_to_share_transfers_wait_in_turn_for_a_segment_that_is_given_back(
    make_sharing, server
):
    sharing = make_sharing(mode=True)
    server.room = 1
    only = carrier_of(sharing)
    first, first_waits = waiting_for_one(sharing)
    second, second_waits = waiting_for_one(sharing)
    sharing.give_back(only)
    assert first_waits.done()
    assert not second_waits.done()
    assert finish(first) is only
    sharing.give_back(only)
    assert finish(second) is only
    sharing.give_back(only)
    sharing.give_back(only)  # it has nothing to give back a second time
    assert carrier_of(sharing) is only
    waiting_for_one(sharing)
    assert len(server.leases) == 1


def test_a_transfer_that_is_cancelled_while_it_waits_keeps_nothing(make_sharing, server):
    sharing = make_sharing(mode=True)
    server.room = 1
    only = carrier_of(sharing)
    flow, _ = waiting_for_one(sharing)
    flow.close()
    sharing.give_back(only)
    assert carrier_of(sharing) is only
    flow, given = waiting_for_one(sharing)
    sharing.give_back(only)
    assert given.done()
    flow.close()
    assert carrier_of(sharing) is only


def test_a_transfer_waits_no_longer_than_it_may_take(make_sharing, server):
    sharing = make_sharing(mode=True)
    server.room = 1
    carrier_of(sharing)
    flow, _ = waiting_for_one(sharing)
    with pytest.raises(DeadlineExceededError, match=r"free within 30 s: at most 1 may be"):
        next(flow)


def test_a_transfer_that_waits_asks_again_when_a_segment_is_lost(make_sharing, server):
    sharing = make_sharing(mode=True)
    server.room = 1
    only = carrier_of(sharing)
    flow, _ = waiting_for_one(sharing)
    sharing.lost(only, SharingEndedError("restarted", can_begin_again=True), again=True)
    assert finish(flow) is not only
    assert len(server.leases) == 2


def test_told_to_share_it_is_an_error_where_nothing_will_come_free(make_sharing, server):
    server.room = 0
    sharing = make_sharing(mode=True)
    with pytest.raises(ConfigurationError, match=r"shared_memory=True, but .* at most 0 may be"):
        next(sharing.carrier(Encoding(ROWS), info(), 1.0))
    with pytest.raises(ConfigurationError, match=r"shared_memory=True, but .* at most 0 may be"):
        next(sharing.allocate(1 << 14, 64, "float32", info(), 1.0))


def test_told_to_share_it_does_not_send(make_sharing, server):
    server.refusal = FailedPreconditionError("of another user")
    flow = make_sharing(mode=True).carrier(Encoding(ROWS), info(), 1.0)
    with pytest.raises(ConfigurationError, match=r"shared_memory=True, but .* of another user"):
        next(flow)


def test_a_slow_server_is_waited_for_as_long_as_the_call_may_take_if_nothing_may_be_sent(
    make_sharing, server
):
    for mode in ("auto", True):
        finish(make_sharing(mode).carrier(Encoding(ROWS), info(), 45.0))
    assert server.patience == [PATIENCE, pytest.approx(45.0, abs=10)]


def test_a_server_that_cannot_be_reached_is_no_reason_to_give_up_sharing(make_sharing, server):
    sharing = make_sharing()
    server.refusal = UnavailableError("starting")
    with pytest.raises(UnavailableError):
        next(sharing.carrier(Encoding(ROWS), info(), 1.0))
    server.refusal = None
    assert carrier_of(sharing) is not None


def test_full_memory_is_an_error_and_no_signal(make_sharing, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sharing = make_sharing()
    carrier = carrier_of(sharing)
    monkeypatch.setattr(Segment, "allocate", full)
    with pytest.raises(SharingEndedError, match=os.strerror(errno.ENOSPC)) as ended:
        carrier.tensor(0, ROWS)
    sharing.lost(carrier, ended.value, again=True)
    assert carrier_of(sharing) is None
    array = finish(make_sharing().allocate(10, 64, "float32", info(), 1.0))
    array[:] = 1  # ordinary memory


def test_other_modes_are_refused():
    with pytest.raises(ConfigurationError, match="shared_memory is 'yes'; expected one of 'auto'"):
        Client("localhost:1", shared_memory="yes")


@pytest.mark.parametrize("call", [
    lambda client: client.encode(ROWS),
    lambda client: client.allocate(1000, 64),
])  # fmt: skip
def test_what_is_shared_is_not_touched_by_a_forked_process(call):
    """It would write over rows that its parent is just having encoded."""
    with Client("localhost:1") as client:
        client._info = info()
        client._pid = os.getppid()
        client._sharing = None
        with pytest.raises(ClientClosedError, match="made before a fork"):
            call(client)
        client._pid, client._sharing = (
            os.getpid(),
            Sharing("auto", "", slots=1, open_lease=None, wait=None),
        )
