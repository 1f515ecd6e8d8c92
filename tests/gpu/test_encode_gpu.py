"""The GPU's encoder on a real device; `encode_sweep.py` beside this does it at length."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor

import encode_cases as cases
import pytest
import torch

from semid_server.encoding import (
    EncodeCounts,
    ReferenceEncoder,
    make_encoder,
    staging,
    tensor_cores,
)
from semid_server.encoding.staging import RECORDING, Stage
from semid_server.errors import ConfigurationError, InvalidInputError

gpu = pytest.importorskip("semid_server.encoding.gpu", reason="needs Triton")
GpuEncoder = gpu.GpuEncoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("normalize", [True, False])
def test_codes_are_those_of_the_reference_in_any_batch_and_from_either_memory(dtype, normalize):
    model, spec = cases.random_model(96, [256, 33, 70], normalize=normalize)
    rows = torch.cat(
        [
            cases.near_ties(model, spec, 100, dtype=dtype),
            torch.randn(5000, 96).to(dtype),
        ]
    )
    want = ReferenceEncoder(model, spec, device=CPU).encode(rows)
    encoder = make_encoder(model, spec, device=GPU)
    assert torch.equal(encoder.encode(rows.to(GPU)).cpu(), want)
    assert torch.equal(encoder.encode(rows), want)
    assert torch.equal(encoder.encode(rows.pin_memory()), want)
    order = torch.randperm(len(rows))
    assert torch.equal(encoder.encode(rows[order].to(GPU)).cpu(), want[order])
    for size in (1, 2, 16, 17, 255, 256, 257, 1000):
        assert torch.equal(encoder.encode(rows[:size].to(GPU)).cpu(), want[:size])
        assert torch.equal(encoder.encode(rows[:size]), want[:size])
    assert encoder.encode(rows[:0]).shape == (0, 3)


@pytest.mark.parametrize("widths", [[256, 100], [300, 40]])
def test_a_network_before_the_codebooks_keeps_the_promise(widths):
    model, spec = cases.random_network_model(64, (128, 64), 32, widths)
    rows = torch.cat([cases.near_ties(model, spec, 50, dtype=torch.float64), torch.zeros(3, 64)])
    rows = torch.cat([rows, torch.randn(2000, 64, dtype=torch.float64)])
    want = ReferenceEncoder(model, spec, device=CPU).encode(rows)
    encoder = GpuEncoder(model, spec, device=GPU, piece_bytes=1 << 17)
    assert torch.equal(encoder.encode(rows.to(GPU)).cpu(), want)
    assert torch.equal(encoder.encode(rows), want)
    for size in (1, 7, 153, 200):
        assert torch.equal(encoder.encode(rows[:size].to(GPU)).cpu(), want[:size])
        assert torch.equal(encoder.encode(rows[:size]), want[:size])


@pytest.mark.parametrize("piece_bytes", [1, 5000, 1 << 16, 1 << 20])
def test_pieces_of_any_size_bring_the_same_codes(piece_bytes):
    model, spec = cases.random_model(48, [300, 70])
    rows = torch.cat(
        [cases.near_ties(model, spec, 100, dtype=torch.float32), torch.randn(6000, 48)]
    )
    want = ReferenceEncoder(model, spec, device=CPU).encode(rows)
    encoder = GpuEncoder(model, spec, device=GPU, piece_bytes=piece_bytes)
    n = 900 if piece_bytes == 1 else len(rows)
    pinned, on_device = rows.pin_memory(), rows.to(GPU)
    for _ in range(3):
        # batches follow one another without a pause, through the same memory
        few = encoder.encode(on_device[:200])
        assert torch.equal(encoder.encode(pinned[:n]), want[:n])
        assert torch.equal(encoder.encode(rows[: n - 1]), want[: n - 1])
        assert torch.equal(encoder.encode(rows[300:557].half()), other(model, spec, rows[300:557]))
        assert torch.equal(few.cpu(), want[:200])
    assert encoder.encode(on_device[:0]).shape == encoder.encode(rows[:0]).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_may_begin_at_any_address_in_either_memory(dtype):
    model, spec = cases.random_model(13, [30, 20])
    rows = torch.cat(
        [cases.near_ties(model, spec, 50, dtype=dtype), torch.randn(900, 13).to(dtype)]
    )
    want = ReferenceEncoder(model, spec, device=CPU).encode(rows)
    encoder = GpuEncoder(model, spec, device=GPU)
    on_device, pinned = rows.to(GPU), rows.pin_memory()
    for start in range(9):
        for stop in (start + 1, start + 40, start + 256, len(rows)):
            assert torch.equal(encoder.encode(on_device[start:stop]).cpu(), want[start:stop])
            assert torch.equal(encoder.encode(pinned[start:stop]), want[start:stop])
    assert torch.equal(encoder.encode(on_device.T.contiguous().T).cpu(), want)
    assert torch.equal(encoder.encode(pinned.T.contiguous().T[:70]), want[:70])


def test_a_batch_that_fits_no_graph_is_divided_or_padded_and_gets_the_same_codes():
    model, spec = cases.random_model(31, [300, 70])
    encoder = GpuEncoder(model, spec, device=GPU, piece_bytes=1 << 17)
    rows = torch.cat(
        [cases.near_ties(model, spec, 100, dtype=torch.float32), torch.randn(60_000, 31)]
    )
    want = ReferenceEncoder(model, spec, device=CPU).encode(rows)
    few = [n for n in range(300, 9300, 487) if encoder._part(n, torch.float32) == n]
    many = [n for n in range(17_000, 60_000, 4873) if encoder._part(n, torch.float32) < n]
    assert len(few) > 10
    assert len(many) > 3
    for n in [*few, *many, *encoder._sizes[torch.float32][:10]]:
        # other memory each time, that of the last batch among it
        assert torch.equal(encoder.encode(rows[:n].to(GPU)).cpu(), want[:n])
    done = [*few, *many, *(min(n, len(rows)) for n in encoder._sizes[torch.float32][:10])]
    assert encoder.counts().rows == sum(done)


def test_batches_follow_one_another_without_waiting_though_their_rows_are_gone():
    model, spec = cases.random_model(64, [200, 70])
    encoder = GpuEncoder(model, spec, device=GPU)
    rows = torch.randn(40, 3000, 64)
    reference = ReferenceEncoder(model, spec, device=CPU)
    found = [encoder.encode(part.to(GPU)) for part in rows]
    few = [encoder.encode(part[:7].to(GPU)) for part in rows]
    for part, codes, few_codes in zip(rows, found, few, strict=True):
        want = reference.encode(part)
        assert torch.equal(codes.cpu(), want)
        assert torch.equal(few_codes.cpu(), want[:7])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_blocks_that_are_begun_before_others_are_done_have_their_own_codes(dtype, network, pinned):
    if network:
        model, spec = cases.random_network_model(64, (128, 64), 32, [200, 70])
    else:
        model, spec = cases.random_model(64, [200, 70])
    encoder = GpuEncoder(model, spec, device=GPU, piece_bytes=1 << 16)
    reference = ReferenceEncoder(model, spec, device=CPU)
    blocks, waits = [], []
    before = encoder.counts().rows
    for i in range(24):
        # some of one piece, of many, and of so few rows that they are encoded at once
        rows = torch.randn(3000 if i % 5 else 500 if i % 2 else 100, 64).to(dtype)
        if i % 3 == 0:
            rows[i, i], rows[2 * i, 0], rows[-1, 63] = torch.nan, torch.inf, -torch.inf
        blocks.append(rows.pin_memory() if pinned else rows)
        waits.append(encoder.begin(blocks[-1]))
        if i % 7 == 0:  # beside what is under way
            other_rows = torch.randn(700, 64).to(dtype)
            want = reference.encode(other_rows)
            assert torch.equal(encoder.encode(other_rows), want)
            assert torch.equal(encoder.encode(other_rows.to(GPU)).cpu(), want)
            before += 2 * len(want)
        while len(waits) - i % 4 > 3:
            check_screened(waits.pop(0)(), blocks.pop(0), reference)
    for wait, rows in zip(waits, blocks, strict=True):
        check_screened(wait(), rows, reference)
    sizes = [3000 if i % 5 else 500 if i % 2 else 100 for i in range(24)]
    assert encoder.counts().rows - before == sum(sizes)
    assert not encoder.begin(torch.empty(0, 64))().codes.numel()


def check_screened(found, rows, reference):
    """Codes of finite rows are those of the reference, and the others are told."""
    finite = rows.isfinite().all(dim=1)
    assert torch.equal(found.finite, finite)
    assert torch.equal(found.codes[finite], reference.encode(rows[finite]))


@pytest.mark.parametrize("network", [False, True])
def test_graphs_write_to_no_memory_but_their_own(network):
    if network:
        model, spec = cases.random_network_model(48, (32,), 16, [30, 70])
    else:
        model, spec = cases.random_model(48, [30, 70])
    encoder = GpuEncoder(model, spec, device=GPU, piece_bytes=1 << 16)
    rows = torch.randn(3000, 48)
    sizes = (1, 2, 20, 65, 200, 3000)

    def use():
        for n in sizes:
            encoder.encode(rows[:n])
            encoder.encode(rows[:n].to(GPU))

    use()
    # of all sizes, so that some get what is free wherever the encoder was at work
    others = [
        torch.full((size,), 7, dtype=torch.int64, device=GPU)
        for size in (2, 3, 64, 1000, 1 << 14, 1 << 18)
        for _ in range(300)
    ]
    hosts = [torch.full((size,), 7, pin_memory=True) for size in (2, 64, 1000) for _ in range(100)]
    use()
    torch.cuda.synchronize()
    assert all(bool((tensor == 7).all()) for tensor in [*others, *hosts])
    want = ReferenceEncoder(model, spec, device=CPU).encode(rows)
    for n in sizes:
        assert torch.equal(encoder.encode(rows[:n]), want[:n])
        assert torch.equal(encoder.encode(rows[:n].to(GPU)).cpu(), want[:n])


def test_an_interrupt_while_a_graph_is_told_its_rows_is_not_remembered_as_done():
    class Interrupted:
        def __getitem__(self, place):
            raise KeyboardInterrupt

    stage = Stage(1 << 10, 8, GPU)
    stage.point(64, 200)
    call, stage.call = stage.call, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        stage.point(64, 5)
    stage.call = call
    call[1].fill_(5)  # as if it had come through
    stage.point(64, 200)
    assert call.tolist() == [64, 200]


def test_no_two_of_many_living_encoders_have_a_stream_in_common(monkeypatch):
    monkeypatch.setattr(staging, "_SPARE", defaultdict(deque))  # none that other tests have left
    living = [Stage(1 << 10, 8, GPU) for _ in range(50)]  # torch has 32
    streams = {stage.stream.cuda_stream for stage in living}
    assert len(streams) == len(living)
    del living[:25]
    gc.collect()
    living += [Stage(1 << 10, 8, GPU) for _ in range(25)]
    assert len({stage.stream.cuda_stream for stage in living}) == len(living)
    assert {stage.stream.cuda_stream for stage in living} == streams, "those of the dead are used"


def test_what_is_left_of_an_encoder_is_not_collected_while_a_graph_is_recorded():
    model, spec = cases.random_model(24, [40, 30])
    stage, out = Stage(1 << 10, 8, GPU), torch.zeros(3, device=GPU)
    gc.collect()
    gc.disable()  # so that all of it is young
    try:
        encoders = [GpuEncoder(model, spec, device=GPU)]
        encoders[0].encode(torch.randn(3, 24))
        dead = weakref.ref(encoders[0])
    finally:
        gc.enable()

    def queue():
        if torch.cuda.is_current_stream_capturing():
            encoders.clear()
            [[] for _ in range(100_000)]  # time and again a reason to collect
            assert dead() is not None
        out.add_(1)

    graph, _ = stage.recorded(queue)
    assert gc.isenabled()
    gc.collect()
    assert dead() is None
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert out.tolist() == [1, 1, 1]


def test_streams_are_made_by_threads_that_have_not_used_the_device():
    with ThreadPoolExecutor(1) as pool:
        handle = pool.submit(staging._new_stream, GPU).result()
    with torch.cuda.stream(torch.cuda.ExternalStream(handle, GPU)):
        assert torch.ones(3, device=GPU).sum().item() == 3


def test_two_threads_may_use_new_encoders_while_the_device_is_asked_whether_it_works():
    model, spec = cases.random_model(24, [40, 30])
    rows = torch.randn(3000, 24)
    want = ReferenceEncoder(model, spec, device=CPU).encode(rows)
    there = rows.to(GPU)

    def use(_):
        encoder = GpuEncoder(model, spec, device=GPU, piece_bytes=1 << 16)
        return [
            encoder.encode(source[:n]).cpu() for n in (3000, 700, 20) for source in (rows, there)
        ]

    with ThreadPoolExecutor(3) as pool:
        working = pool.submit(lambda: [works() for _ in range(200)])
        found = list(pool.map(use, range(6)))
        assert all(working.result())
    for codes in itertools.chain.from_iterable(found):
        assert torch.equal(codes, want[: len(codes)])


def works():
    with RECORDING:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return True


def test_rows_elsewhere_are_refused_and_those_with_a_gradient_are_read_alone():
    model, spec = cases.random_model(24, [40, 30])
    encoder = GpuEncoder(model, spec, device=GPU)
    with pytest.raises(InvalidInputError, match="on meta; expected cpu or cuda:0"):
        encoder.encode(torch.empty(3, 24, device="meta"))
    rows = torch.randn(30, 24)
    want = ReferenceEncoder(model, spec, device=CPU).encode(rows)
    for source in (rows, rows.to(GPU)):
        codes = encoder.encode(source.clone().requires_grad_())
        assert not codes.requires_grad
        assert torch.equal(codes.cpu(), want)
    assert not any(graph._rows.requires_grad for graph in encoder._host_graphs.values())


@pytest.mark.parametrize("count", [1, 20, 256, 700])
def test_prepared_rows_are_read_anew_beside_other_work(count):
    model, spec = cases.random_model(48, [300, 70])
    rows = torch.cat([cases.near_ties(model, spec, 30, dtype=torch.float32), torch.randn(5000, 48)])
    want = ReferenceEncoder(model, spec, device=CPU).encode(rows)
    encoder = GpuEncoder(model, spec, device=GPU, piece_bytes=1 << 16)
    there, pinned = rows.to(GPU), rows.pin_memory()
    buffer = torch.empty(1000, 48, pin_memory=True)
    few = buffer[:count]
    prepared = encoder.prepare(few)
    for i in range(40):
        # what is queued in the same stage is not waited for, and must not be disturbed
        queued = encoder.encode(there[: 300 + i]) if i % 2 else None
        order = torch.randperm(len(rows))[:count]
        few.copy_(rows[order])
        if i % 3:
            assert torch.equal(encoder.encode(few), want[order])
        assert torch.equal(torch.from_numpy(prepared()), want[order])
        if queued is not None:
            assert torch.equal(queued.cpu(), want[: 300 + i])
        if i % 4 == 0:
            assert torch.equal(encoder.encode(pinned[: 2000 + i]), want[: 2000 + i])


def other(model, spec, rows):
    return ReferenceEncoder(model, spec, device=CPU).encode(rows.half())


def test_rows_from_the_host_are_counted_once_though_pieces_are_padded():
    model, spec = cases.random_model(48, [30, 70])
    encoder = GpuEncoder(model, spec, device=GPU, piece_bytes=1 << 16)
    encoder.warm_up()
    for n in (1, 300, 1000, 5001):
        encoder.encode(torch.randn(n, 48))
    assert encoder.counts().rows == 6302


def test_a_device_that_adds_up_less_exactly_than_assumed_is_refused(monkeypatch):
    def lossy(rows, columns):
        return torch.mm(rows, columns.T, out_dtype=torch.float32) * (1 + 2.0**-12)

    monkeypatch.setattr(gpu, "_product", lossy)
    with pytest.raises(ConfigurationError, match="times the error"):
        GpuEncoder(*cases.random_model(48, [30, 70]), device=GPU)


def test_the_reference_is_the_same_bits_on_the_device():
    model, spec = cases.random_network_model(32, (48,), 24, [40, 30])
    rows = cases.near_ties(model, spec, 50, dtype=torch.float64)
    on_host = ReferenceEncoder(model, spec, device=CPU)
    on_device = ReferenceEncoder(model, spec, device=GPU)
    assert torch.equal(on_host.encode(rows), on_device.encode(rows))
    features = on_host._network.in_order(rows)
    assert torch.equal(features, on_device._network.in_order(rows.to(GPU)).cpu())


def test_every_row_is_counted_once_and_warming_up_counts_none():
    model, spec = cases.random_model(32, [16, 16])
    encoder = make_encoder(model, spec, device=GPU)
    encoder.warm_up()
    assert encoder.counts() == EncodeCounts()
    for n in (1, 3, 300):
        encoder.encode(torch.randn(n, 32))
    assert encoder.counts().rows == 304


@pytest.mark.parametrize("dim", [16, 384, 2048, 8192])
def test_tensor_cores_lose_no_more_than_the_certificate_allows(dim):
    # all terms positive: nothing cancels, and what is cut off adds up
    generator = torch.Generator(GPU).manual_seed(dim)
    a = torch.rand(512, dim, generator=generator, device=GPU).half()
    b = torch.rand(256, dim, generator=generator, device=GPU).half()
    got = torch.mm(a, b.T, out_dtype=torch.float32).double()
    exact = a.double() @ b.double().T
    assert ((got - exact).abs() <= tensor_cores.allowed(dim) * exact).all()


@pytest.mark.parametrize("terms", [16, 32, 64])
def test_tensor_cores_keep_two_bits_below_the_last_place_of_the_largest_term(terms):
    # 1 and many numbers of 2^-25, of which float32 alone would keep none
    a = torch.zeros(64, terms, dtype=torch.float16, device=GPU)
    b = torch.zeros(64, terms, dtype=torch.float16, device=GPU)
    a[:, 0] = b[:, 0] = 1
    a[:, 1:], b[:, 1:] = 2.0**-12, 2.0**-13
    got = torch.mm(a, b.T, out_dtype=torch.float32)[0, 0].item() - 1
    assert got >= ((terms - 1) * 2.0**-25) - (terms // 16) * 2.0**-23
    assert got > 0
