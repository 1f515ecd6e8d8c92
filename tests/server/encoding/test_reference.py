"""The definition of a code is the same bits however it is computed."""

from __future__ import annotations

import math

import encode_cases as cases
import numba
import numpy as np
import pytest
import torch
from torch.nn import functional

from semid_server.encoding import ReferenceEncoder, make_encoder, reference_kernel
from semid_server.encoding.network import _FAST, _IN_ORDER, Network, sqrt
from semid_server.model import Activation

CPU = torch.device("cpu")


def test_reference_sets_have_their_recorded_codes(reference_set, checkpoint_of):
    model, spec = checkpoint_of(reference_set)
    codes = make_encoder(model, spec, device=CPU, reference=True).encode(
        torch.tensor(reference_set.embeddings)
    )
    certain = ~torch.tensor(reference_set.vanishing)
    recorded = torch.tensor(reference_set.codes)
    assert torch.equal(codes.long()[certain], recorded.long()[certain])


def test_the_compiled_loop_and_torch_operations_give_the_same_codes(model_and_spec):
    model, spec = model_and_spec
    reference = ReferenceEncoder(model, spec, device=CPU, threads=1)
    rows = torch.cat(
        [
            cases.hard_rows(model, spec).double(),
            cases.near_ties(model, spec, 20, dtype=torch.float64),
        ]
    )
    residual = rows if reference._network is None else reference._network.in_order(rows)
    assert torch.equal(reference._quantize(residual), reference._quantize_on_cpu(residual))


def test_a_residual_is_the_same_bits_in_both_forms():
    generator = torch.Generator().manual_seed(1)
    residual = torch.randn(50, 37, generator=generator, dtype=torch.float64)
    codebook = torch.randn(37, 19, generator=generator)
    by_torch = residual / sqrt(_sum_in_order(residual))[:, None]
    codes = torch.empty(50, dtype=torch.int64)
    by_kernel = residual.clone()
    reference_kernel.assign(by_kernel.numpy(), codebook.numpy(), True, codes.numpy())
    assert torch.equal(by_kernel, by_torch - codebook.T[codes].double())


def _sum_in_order(rows):
    total = torch.zeros(len(rows), dtype=torch.float64)
    for i in range(rows.shape[1]):
        total = total + rows[:, i] * rows[:, i]
    return total


def test_the_compiled_loop_fuses_no_product_with_a_sum():
    # compiled anew: what comes from numba's cache does not show its instructions
    assign = numba.njit(nogil=True)(reference_kernel.assign.py_func)
    assign(np.ones((1, 4)), np.ones((4, 3), dtype=np.float32), True, np.zeros(1, dtype=np.int64))
    (assembly,) = assign.inspect_asm().values()
    assert "mul" in assembly
    assert "fmadd" not in assembly


@pytest.mark.parametrize("seed", range(3))
def test_square_roots_and_quotients_are_rounded_once(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(5000, generator=generator, dtype=torch.float64) * 10.0 ** (40 * seed)
    y = torch.rand(5000, generator=generator, dtype=torch.float64)
    assert sqrt(x).tolist() == [math.sqrt(value) for value in x.tolist()]
    assert (x / y).tolist() == [a / b for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def test_a_row_is_the_same_alone_and_in_any_batch(model_and_spec):
    model, spec = model_and_spec
    rows = cases.near_ties(model, spec, 30, dtype=torch.float64)
    want = ReferenceEncoder(model, spec, device=CPU, threads=1).encode(rows)
    encoder = ReferenceEncoder(model, spec, device=CPU, threads=2)
    assert torch.equal(torch.cat([encoder.encode(row[None]) for row in rows]), want)
    assert torch.equal(encoder.encode(rows.flip(0)).flip(0), want)


@pytest.mark.parametrize("activation", Activation)
def test_an_activation_in_basic_operations_agrees_with_the_library(activation):
    x = torch.cat(
        [
            torch.linspace(-40, 40, 20001, dtype=torch.float64),
            torch.tensor([0.0, -0.0, 1e-300, -1e-300, 1e-9, 700.0, -700.0, 1e6, -1e6]).double(),
        ]
    )
    difference = (_IN_ORDER[activation](x) - _FAST[activation](x)).abs()
    assert (difference <= 2.0**-48 * (1 + x.abs())).all()


def test_gelu_is_exact_where_its_error_function_is_hard():
    x = torch.tensor([-5.9, -1e-8, 0.3, 1.0, 5.9, 9.0], dtype=torch.float64)
    want = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()]
    assert (
        _IN_ORDER[Activation.GELU](x) - torch.tensor(want, dtype=torch.float64)
    ).abs().max() < 2e-15


@pytest.mark.parametrize("activation", Activation)
def test_library_sums_stay_within_their_bound_in_every_batch(activation):
    # a vector, a few rows and many take other kernels of the library, which add up in other orders
    model, spec = cases.random_network_model(
        96, (200, 130), 40, [30, 20], activation=activation, normalize_input=False
    )
    network = Network.of(spec, model.state_dict(), CPU)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(60, 96, dtype=torch.float64, generator=generator)
    rows[30:] *= 10.0 ** torch.arange(-15.0, 15.0).double()[:, None]
    in_order = network.in_order(rows)
    encoder = make_encoder(model, spec, device=CPU, threads=2)
    want = ReferenceEncoder(model, spec, device=CPU).encode(rows)
    for size in (1, 2, 7, 60):
        parts = rows.split(size)
        fast, error = (torch.cat(found) for found in zip(*map(network.fast, parts), strict=True))
        assert ((fast - in_order).norm(dim=1) <= 2 * error).all()
        assert torch.equal(torch.cat([encoder.encode(part) for part in parts]), want)


def test_the_network_in_order_agrees_with_the_model_and_stays_within_its_bound():
    model, spec = cases.random_network_model(20, (32, 16), 12, [40])
    network = Network.of(spec, model.state_dict(), CPU)
    rows = torch.randn(200, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fast, error = network.fast(rows)
    in_order = network.in_order(rows)
    assert (error < 1e-9).all()
    assert ((fast - in_order).norm(dim=1) <= 2 * error).all()
    with torch.no_grad():
        assert torch.allclose(in_order, model.double().features(rows), rtol=1e-10, atol=1e-10)
    assert functional.relu(in_order).abs().sum() > 0
