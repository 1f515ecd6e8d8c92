"""`semid serve` with an encoder that fails when the rows say so; everything else is the real thing.

The first number of a row is the order; other rows are encoded as ever. Not a test: started by
`test_faults.py` as a process of its own, with the arguments of `semid serve`.
"""

from __future__ import annotations

import math
import os
import threading

import torch

from semid_server.cli.serve import serve
from semid_server.serving import backend, batcher
from semid_server.serving.pace import Pace

HOLD = 1001.0
"""Say ``held`` on standard output, then wait until somebody opens the gate, a FIFO, for writing."""

NO_MEMORY = 1002.0
"""What CUDA raises when it has no memory for the batch; where the row is alone, too."""

CROWDED = 1003.0
"""The same, but only if there are more than `CROWD` rows."""

CROWD = 5

BUG = 1004.0
"""An error after which the device works."""

LOST = 1005.0
"""An error after which it does nothing more."""

ASSERTED, ASTRAY = 1006.0, 1007.0
"""On a GPU alone: a kernel whose assertion fails, one that writes where there is no memory. What
comes of it, and when, is CUDA's and torch's affair."""

FAULTS = {NO_MEMORY, CROWDED, BUG, LOST, ASSERTED, ASTRAY}

GATE = "SEMID_TEST_GATE"

IN_LOOP = "SEMID_TEST_IN_LOOP"
"""Set, the event loop runs batches itself if the worker rests, and holds only those."""


class FaultyEncoder:
    """An encoder that obeys the rows."""

    held = lost = False

    def __init__(self, encoder) -> None:
        self._encoder = encoder

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def prepare(self, rows):
        """Return what encodes, unless told otherwise."""
        prepared = self._encoder.prepare(rows)

        def encode():
            obey(rows[:, 0].tolist())
            return prepared()

        return encode


def obey(orders):
    """Do what the rows say."""
    in_loop = threading.current_thread() is threading.main_thread()
    if in_loop and FAULTS & set(orders):
        print("in the event loop", flush=True)  # noqa: T201 - read by the test
    if HOLD in orders and (in_loop or IN_LOOP not in os.environ):
        FaultyEncoder.held = True
        print("held", flush=True)  # noqa: T201 - read by the test
        with open(os.environ[GATE]) as gate:  # noqa: PTH123 - it is no file
            gate.read()
    if NO_MEMORY in orders or (CROWDED in orders and len(orders) > CROWD):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 0xSECRET")
    if BUG in orders:
        raise RuntimeError("a bug at 0xSECRET")
    if LOST in orders:
        FaultyEncoder.lost = True
    if FaultyEncoder.lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered at 0xSECRET")
    if ASSERTED in orders or ASTRAY in orders:
        import poison  # noqa: PLC0415 - needs Triton, as torch for CUDA brings it

        poison.fail_assertion() if ASSERTED in orders else poison.write_astray()


def _spoil() -> None:
    make_encoder, device_works = backend.make_encoder, backend.Backend.device_works
    backend.make_encoder = lambda *given, **named: FaultyEncoder(make_encoder(*given, **named))
    backend.Backend.device_works = lambda self: not FaultyEncoder.lost and device_works(self)
    # What holds would hold the event loop, which runs what it knows to be short.
    if IN_LOOP in os.environ:
        batcher.QUICK = batcher.QUICK_AT_MOST = batcher.APART = math.inf
    else:
        backend.are_soon_back = lambda *_given, **_named: False
    observe = Pace.observe

    def observe_unless_held(self, rows, seconds):
        # How long a test holds a batch says nothing of how long others take: the server would
        # refuse calls, and divide them, by how slow the tests are.
        if not FaultyEncoder.held:
            observe(self, rows, seconds)
        FaultyEncoder.held = False

    Pace.observe = observe_unless_held


_spoil()  # in the children of --processes too, which import this file

if __name__ == "__main__":
    serve()
