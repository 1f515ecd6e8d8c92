"""Each kernel of the GPU path is its torch twin, run by Triton's interpreter or on a device."""

from __future__ import annotations

import encode_cases as cases
import pytest
import torch

from semid_server.encoding import ReferenceEncoder
from semid_server.encoding.plan import GREATEST_LENGTH, LEAST_LENGTH, Plan

gpu = pytest.importorskip("semid_server.encoding.gpu", reason="needs Triton")
kernels = gpu.kernels
twins = pytest.importorskip("semid_server.encoding.gpu_twins")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = {
    "few features": lambda: cases.random_model(2, [5, 4]),
    "normalised": lambda: cases.random_model(20, [33, 5, 70]),
    "raw residuals": lambda: cases.random_model(37, [9, 64, 3, 20], normalize=False),
}


def run(tables, rows):
    """All kernels on ``rows``: what each of them wrote."""
    rows = rows.to(DEVICE)
    n, plan = len(rows), tables.plan
    rounded = torch.full((n, tables.columns.shape[1]), 7.0, dtype=torch.float16, device=DEVICE)
    facts = torch.zeros(n, 4, dtype=torch.float64, device=DEVICE)
    gpu.round_rows(rows, rounded, facts)
    products = rounded.float() @ tables.columns.float().T
    codes = torch.full((n, plan.n_layers), -1, dtype=torch.int32, device=DEVICE)
    levels = torch.full((n,), -1, dtype=torch.int32, device=DEVICE)
    waiting = torch.zeros(1 + n, dtype=torch.int32, device=DEVICE)
    chain = {"codes": codes, "levels": levels, "waiting": waiting}
    gpu.prove(products, facts, tables, **chain, has_offset=False)
    proved = codes.clone(), levels.clone(), waiting.clone()
    gpu.decide(rows, products, facts, tables, **chain, has_offset=False)
    decided = codes.clone(), levels.clone()
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    gpu.finish(
        rows,
        levels,
        tables,
        codes=codes,
        counts=counts,
        n_rows=torch.tensor([n], dtype=torch.int32, device=DEVICE),
        resolve=True,
    )
    return rounded, facts, products, proved, decided, codes, counts


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
    return model, spec, tables, rows, run(tables, rows)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_rounding_is_that_of_its_twin(dtype):
    model, spec = MODELS["normalised"]()
    rows = cases.hard_rows(model, spec)[::4].to(dtype)
    rows = rows[rows.isfinite().all(dim=1)].to(DEVICE)
    rounded = torch.full((len(rows), 32), 7.0, dtype=torch.float16, device=DEVICE)
    facts = torch.zeros(len(rows), 4, dtype=torch.float64, device=DEVICE)
    gpu.round_rows(rows, rounded, facts)
    twin_rounded, twin_facts = twins.round_rows(rows, 32)
    assert torch.equal(rounded, twin_rounded)
    torch.testing.assert_close(facts[:, 0], twin_facts[:, 0], rtol=1e-14, atol=0)
    fits = twin_facts[:, 2] > 0
    assert torch.equal(facts[fits, 1], twin_facts[fits, 1])
    least = twin_facts[:, 2] * (1 - 1e-12)
    assert (facts[:, 2] >= least).all()
    assert (facts[fits, 2] <= 1.01 * least[fits] + 2.0**-44 * facts[fits, 0]).all()


def test_what_is_proved_is_what_its_twin_proves(case):
    _, _, tables, _, (_, facts, products, (codes, _, waiting), *_) = case
    twin_codes, twin_proved = twins.prove(products, facts, tables)
    in_range = (facts[:, 0] >= LEAST_LENGTH) & (facts[:, 0] <= GREATEST_LENGTH)
    proved = in_range.clone()
    proved[waiting[1 : 1 + int(waiting[0])].long()] = False
    # the twin has its bounds in float64: a row may stand on the edge
    assert (proved == twin_proved).float().mean() > 0.9
    both = proved & twin_proved
    assert both.any()
    assert torch.equal(codes[both].long(), twin_codes[both])


def test_what_is_decided_is_what_its_twin_decides(case):
    _, _, tables, rows, (_, facts, _, _, (codes, levels), *_) = case
    twin_codes, twin_decided = twins.decide(rows.to(DEVICE), facts, tables)
    below = levels < gpu.kernels.REFERENCE.value
    both = below & twin_decided
    assert both.any()
    assert torch.equal(codes[both].long(), twin_codes[both])
    # candidates are fewer for the kernel than for the twin, which looks at all
    assert (below | ~twin_decided).all()


def test_all_kernels_together_give_the_codes_of_the_reference(case):
    model, spec, _, rows, (*_, codes, counts) = case
    want = ReferenceEncoder(model, spec, device=torch.device("cpu")).encode(rows)
    assert torch.equal(codes.cpu().long(), want.long())
    assert int(counts.sum()) == len(rows)
    assert (counts > 0).all()


def test_a_row_that_nothing_decides_gets_the_reference_arithmetic(case):
    model, spec, tables, rows, _ = case
    rows = rows[:10].to(DEVICE)
    codes = torch.full((len(rows), spec.n_layers), -1, dtype=torch.int32, device=DEVICE)
    levels = torch.full((len(rows),), 2, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    gpu.finish(
        rows,
        levels,
        tables,
        codes=codes,
        counts=counts,
        n_rows=torch.tensor([8], dtype=torch.int32, device=DEVICE),
        resolve=True,
    )
    want = ReferenceEncoder(model, spec, device=torch.device("cpu")).encode(rows.cpu())
    assert torch.equal(codes[:8].cpu().long(), want[:8].long())
    assert (codes[8:] == -1).all()  # padding
    assert counts.tolist() == [0, 0, 8]


def test_features_that_a_network_made_carry_their_error_into_the_certificate():
    model, spec = MODELS["raw residuals"]()
    tables = gpu.Tables.of(Plan.of(spec, model.state_dict(), DEVICE))
    rows = torch.randn(20, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows = rows.to(DEVICE)
    n = len(rows)
    rounded = torch.empty(n, tables.columns.shape[1], dtype=torch.float16, device=DEVICE)
    facts = torch.zeros(n, 4, dtype=torch.float64, device=DEVICE)
    gpu.round_rows(rows, rounded, facts)
    facts[:10, 3] = 1e-13
    facts[10:, 3] = 0.009 * facts[10:, 0]  # so uncertain that hardly anything can be decided
    products = rounded.float() @ tables.columns.float().T
    chain = {
        "codes": torch.zeros(n, 4, dtype=torch.int32, device=DEVICE),
        "levels": torch.zeros(n, dtype=torch.int32, device=DEVICE),
        "waiting": torch.zeros(1 + n, dtype=torch.int32, device=DEVICE),
    }
    gpu.prove(products, facts, tables, **chain, has_offset=True)
    gpu.decide(rows, products, facts, tables, **chain, has_offset=True)
    want = ReferenceEncoder(model, spec, device=torch.device("cpu")).encode(rows.cpu())
    assert (chain["levels"][:10] < 2).all()
    assert torch.equal(chain["codes"][:10].cpu().long(), want[:10].long())
    assert (chain["levels"][10:] == 2).sum() >= 5
