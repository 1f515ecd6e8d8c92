"""The check of a device's float16 product tells apart what may be trusted and what may not."""

from __future__ import annotations

import pytest
import torch

from semid_server.encoding import tensor_cores

CPU = torch.device("cpu")


def core(block, extra_bits):
    """A product as BOUNDS.md supposes it: blocks are aligned with their largest term, and cut off.

    ``extra_bits`` are kept below the last place of float32.
    """

    def product(rows, columns):
        total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        for start in range(0, rows.shape[1], block):
            part = slice(start, start + block)
            terms = rows[:, None, part].double() * columns[None, :, part].double()
            terms = torch.cat([total[..., None], terms], dim=-1)
            unit = last_place(terms.abs().amax(dim=-1, keepdim=True)) * 2.0**-extra_bits
            total = (torch.trunc(terms / unit) * unit).sum(dim=-1)
            unit = last_place(total)
            total = torch.trunc(total / unit) * unit
        return total.float()

    return product


def last_place(numbers):
    _, exponent = torch.frexp(numbers)
    return torch.ldexp(torch.ones_like(numbers), exponent - 24)


def loss(dim, product):
    shape = (48, -(-dim // 16) * 16)
    return tensor_cores.worst_loss(shape, dim, (1, 16, 140), device=CPU, product=product)


@pytest.mark.parametrize("dim", [1, 2, 3, 9, 16, 17, 96])
@pytest.mark.parametrize("block", [8, 16])
def test_two_bits_below_the_last_place_are_enough(dim, block):
    assert loss(dim, core(block, 2)) < 0.6


@pytest.mark.parametrize("dim", [32, 96])
@pytest.mark.parametrize("block", [4, 8, 16])
def test_a_product_that_keeps_none_is_found_out(dim, block):
    assert loss(dim, core(block, 0)) > 1.2


def test_one_that_adds_up_in_float16_is_found_out():
    def half(rows, columns):
        return (rows.double() @ columns.double().T).half().float()

    assert loss(96, half) > 10


def test_an_exact_one_loses_nothing_but_its_last_rounding():
    def exact(rows, columns):
        return (rows.double() @ columns.double().T).float()

    assert loss(96, exact) < 0.02
