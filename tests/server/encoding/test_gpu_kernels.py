"""Each kernel of the GPU path is its torch twin, run by Triton's interpreter or on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import encode_cases as cases
import pytest
import torch

from semid_server.encoding import ReferenceEncoder, tensor_cores
from semid_server.encoding.plan import Plan

gpu = pytest.importorskip("semid_server.encoding.gpu", reason="needs Triton")
kernels = gpu.kernels
twins = pytest.importorskip("semid_server.encoding.gpu_twins")

PADDING = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = {
    "few features": lambda: cases.random_model(2, [5, 4]),
    "normalised": lambda: cases.random_model(20, [33, 5, 70]),
    "raw residuals": lambda: cases.random_model(37, [9, 64, 3, 20], normalize=False),
}


@dataclass
class Ran:
    """What each kernel wrote, of rows some of which lie beyond the number that there are."""

    rounded: torch.Tensor
    facts: torch.Tensor
    products: torch.Tensor
    codes: torch.Tensor
    levels: torch.Tensor
    work: object
    counts: torch.Tensor
    proved_codes: torch.Tensor | None = None
    proved: torch.Tensor | None = None

    @classmethod
    def of(cls, tables, rows, *, offsets=None, finish=True):
        """All kernels on ``rows``, and on padding behind them."""
        call = gpu.Rows.of(rows.to(DEVICE))
        n, room, plan = len(rows), len(rows) + PADDING, tables.plan
        call = replace(call, n=room)
        rounded = torch.full(
            (room, tables.columns.shape[1]), 7.0, dtype=torch.float16, device=DEVICE
        )
        facts = torch.zeros(room, 4, dtype=torch.float64, device=DEVICE)
        gpu.round_rows(call, rounded, facts)
        if offsets is not None:
            facts[:n, 3] = offsets(facts[:n, 0])
        products = rounded.float() @ tables.columns.float().T
        codes = torch.full((room, plan.n_layers), 77, dtype=torch.uint8, device=DEVICE)
        levels = torch.full((room,), -1, dtype=torch.int32, device=DEVICE)
        work = gpu.Work.of(room, DEVICE)
        counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        ran = cls(rounded, facts, products, codes, levels, work, counts)
        chain = {"codes": codes, "levels": levels, "work": work}
        gpu.prove(call, products, facts, tables, **chain, has_offset=offsets is not None)
        ran.proved_codes = codes[:n].clone().long()
        ran.proved = levels[:n] == kernels.FAST.value
        ran.proved[work.waiting[: int(work.progress[0])].long()] = False
        gpu.decide(call, products, facts, tables, **chain, has_offset=offsets is not None)
        if finish:
            gpu.finish(call, tables, codes=codes, counts=counts, work=work, resolve=True)
        assert (codes[n:] == 77).all()
        assert (levels[n:] == -1).all()
        assert not rounded[n:].any()
        return ran


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """Model, spec, tables, and rows of which some are hard."""
    model, spec = MODELS[request.param]()
    tables = gpu.Tables.of(Plan.of(spec, model.state_dict(), DEVICE))
    generator = torch.Generator().manual_seed(1)
    rows = torch.cat(
        [
            cases.near_ties(model, spec, 3, dtype=torch.float32),
            cases.hard_rows(model, spec)[::10],
            torch.randn(15, spec.input_dim, generator=generator),
        ]
    )
    return model, spec, tables, rows, Ran.of(tables, rows)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_rounding_is_that_of_its_twin(dtype):
    model, spec = MODELS["normalised"]()
    rows = cases.hard_rows(model, spec)[::4].to(dtype)
    rows = rows[rows.isfinite().all(dim=1)].to(DEVICE)
    rounded = torch.full((len(rows), 32), 7.0, dtype=torch.float16, device=DEVICE)
    facts = torch.zeros(len(rows), 4, dtype=torch.float64, device=DEVICE)
    gpu.round_rows(gpu.Rows.of(rows), rounded, facts)
    twin_rounded, twin_facts = twins.round_rows(rows, 32)
    assert torch.equal(rounded, twin_rounded)
    torch.testing.assert_close(facts[:, 0], twin_facts[:, 0], rtol=1e-14, atol=0)
    fits = twin_facts[:, 2] > 0
    assert torch.equal(facts[fits, 1], twin_facts[fits, 1])
    least = twin_facts[:, 2] * (1 - 1e-12)
    assert (facts[:, 2] >= least).all()
    assert (facts[fits, 2] <= 1.01 * least[fits] + 2.0**-44 * facts[fits, 0]).all()


def test_what_is_proved_is_what_its_twin_proves(case):
    _, _, tables, rows, ran = case
    n = len(rows)
    twin_codes, twin_proved = twins.prove(ran.products[:n], ran.facts[:n], tables)
    # the twin has its bounds in float64: a row may stand on the edge
    assert (ran.proved == twin_proved).float().mean() > 0.9
    both = ran.proved & twin_proved
    assert both.any()
    assert torch.equal(ran.proved_codes[both], twin_codes[both])


def test_what_is_decided_is_what_its_twin_decides(case):
    _, _, tables, rows, ran = case
    n = len(rows)
    twin_codes, twin_decided = twins.decide(rows.to(DEVICE), ran.facts[:n], tables)
    below = ran.levels[:n] < kernels.REFERENCE.value
    both = below & twin_decided
    assert both.any()
    assert torch.equal(ran.codes[:n][both].long(), twin_codes[both])
    # candidates are fewer for the kernel than for the twin, which looks at all
    assert (below | ~twin_decided).all()


def test_every_row_is_left_to_one_kernel_at_the_most_once(case):
    _, _, _, rows, ran = case
    waiting, undecided, by_float64 = ran.work.progress.tolist()
    waited = ran.work.waiting[:waiting].tolist()
    left = ran.work.undecided[:undecided].tolist()
    assert sorted(set(waited)) == sorted(waited)
    assert sorted(left) == (ran.levels == kernels.REFERENCE.value).nonzero()[:, 0].tolist()
    assert by_float64 == int((ran.levels == kernels.FLOAT64.value).sum())
    assert ran.counts.tolist() == [len(rows) - by_float64 - undecided, by_float64, undecided]


def test_all_kernels_together_give_the_codes_of_the_reference(case):
    model, spec, _, rows, ran = case
    want = ReferenceEncoder(model, spec, device=torch.device("cpu")).encode(rows)
    assert torch.equal(ran.codes[: len(rows)].cpu().long(), want.long())
    assert (ran.counts > 0).all()


def test_rows_that_nothing_decides_get_the_reference_arithmetic(case):
    model, spec, tables, rows, _ = case
    call = replace(gpu.Rows.of(rows[:8].to(DEVICE)), n=10)
    codes = torch.full((10, spec.n_layers), 77, dtype=torch.uint8, device=DEVICE)
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    work = gpu.Work.of(10, DEVICE)
    work.progress[1] = 8
    work.undecided[:8] = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    gpu.finish(call, tables, codes=codes, counts=counts, work=work, resolve=True)
    want = ReferenceEncoder(model, spec, device=torch.device("cpu")).encode(rows[:8])
    assert torch.equal(codes[:8].cpu().long(), want.long())
    assert (codes[8:] == 77).all()  # padding
    assert counts.tolist() == [0, 0, 8]


def test_a_centroid_much_shorter_than_the_others_has_a_margin_that_covers_its_rounding():
    # so short that float16, scaled for the longest one, hardly holds it
    generator = torch.Generator().manual_seed(5)
    long = torch.randn(6, 20, generator=generator)
    centroids = torch.cat([long, 1e-8 * torch.randn(3, 20, generator=generator), long[:1] * 0])
    model, spec = cases.model_of([centroids, torch.zeros(1, 20)])
    tables = gpu.Tables.of(Plan.of(spec, model.state_dict(), DEVICE))
    padded = tables.columns[:10, :20].double() * tables.steps[0]
    errors = (tables.plan.centroids[:10].double() - padded).norm(dim=1)
    lengths = tables.plan.lengths.double()
    spreads = errors + tensor_cores.allowed(20) * lengths[:10]
    assert (spreads / lengths[:10])[6:9].min() > 2 * (spreads / lengths[:10])[:6].max()
    margins = tables.margins.double()
    assert (tables.rates[0] * margins[:10] >= spreads).all()
    assert (margins >= lengths).all()
    assert tables.rates[1] > 0
    rows = torch.cat([centroids + 0.1 * torch.randn(10, 20, generator=generator), centroids])
    ran = Ran.of(tables, rows)
    want = ReferenceEncoder(model, spec, device=torch.device("cpu")).encode(rows)
    assert torch.equal(ran.codes[:20].cpu().long(), want.long())


def test_features_that_a_network_made_carry_their_error_into_the_certificate():
    model, spec = MODELS["raw residuals"]()
    tables = gpu.Tables.of(Plan.of(spec, model.state_dict(), DEVICE))
    rows = torch.randn(20, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def offsets(lengths):
        # the last ten are so uncertain that hardly anything can be decided
        return torch.cat([torch.full_like(lengths[:10], 1e-13), 0.009 * lengths[10:]])

    ran = Ran.of(tables, rows, offsets=offsets, finish=False)
    want = ReferenceEncoder(model, spec, device=torch.device("cpu")).encode(rows)
    assert (ran.levels[:10] < kernels.REFERENCE.value).all()
    assert torch.equal(ran.codes[:10].cpu().long(), want[:10].long())
    assert (ran.levels[10:20] == kernels.REFERENCE.value).sum() >= 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_rows_are_widened_exactly_and_padding_is_zero(dtype):
    rows = torch.randn(5, 37, generator=torch.Generator().manual_seed(3)).to(dtype).to(DEVICE)
    wide = torch.full((7, 37), 9.0, dtype=torch.float64, device=DEVICE)
    gpu.widen(replace(gpu.Rows.of(rows), n=7), wide)
    assert torch.equal(wide[:5], rows.double())
    assert not wide[5:].any()


def test_rows_that_begin_where_the_kernels_cannot_read_them_are_copied():
    memory = torch.arange(24.0, device=DEVICE)
    assert gpu.aligned(memory) is memory
    moved = gpu.aligned(memory[1:])
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, memory[1:])
