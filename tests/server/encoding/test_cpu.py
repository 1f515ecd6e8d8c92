"""The CPU path gives the codes of the reference, whatever the rows and however they come."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import encode_cases as cases
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semid_server.encoding import EncodeCounts, ReferenceEncoder, cpu_kernels, make_encoder
from semid_server.encoding.cpu import CpuEncoder, has_integer_product, loss_of_short_factors
from semid_server.errors import ConfigurationError, InvalidInputError
from semid_server.model import Activation, ModelKind, ModelSpec

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PRODUCTS = [
    pytest.param(
        True,
        id="int16",
        marks=pytest.mark.skipif(not has_integer_product(), reason="needs AVX512-VNNI"),
    ),
    pytest.param(False, id="float32"),
]


def expected(model, spec, rows):
    return ReferenceEncoder(model, spec, device=CPU).encode(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("integer_product", PRODUCTS)
def test_near_ties_have_the_codes_of_the_reference(model_and_spec, dtype, integer_product):
    model, spec = model_and_spec
    encoder = CpuEncoder(model, spec, threads=1, integer_product=integer_product)
    generator = torch.Generator().manual_seed(1)
    rows = torch.cat(
        [
            cases.near_ties(model, spec, 20, dtype=dtype),
            torch.randn(300, spec.input_dim, generator=generator).to(dtype),
        ]
    )
    assert torch.equal(encoder.encode(rows), expected(model, spec, rows))
    assert encoder.counts().rows == len(rows)


@pytest.mark.parametrize("integer_product", PRODUCTS)
def test_hard_rows_have_the_codes_of_the_reference(model_and_spec, integer_product):
    model, spec = model_and_spec
    encoder = CpuEncoder(model, spec, threads=1, integer_product=integer_product)
    rows = cases.hard_rows(model, spec)
    for dtype in (torch.float32, torch.float64):
        typed = rows.to(dtype)
        assert torch.equal(encoder.encode(typed), expected(model, spec, typed))
    wide = rows.double() * 2.0**700
    assert torch.equal(encoder.encode(wide), expected(model, spec, wide))


@pytest.mark.parametrize("integer_product", PRODUCTS)
def test_a_row_has_the_same_codes_alone_in_any_batch_and_on_any_number_of_threads(
    model_and_spec, integer_product
):
    model, spec = model_and_spec
    generator = torch.Generator().manual_seed(2)
    rows = torch.cat(
        [
            cases.near_ties(model, spec, 30, dtype=torch.float32),
            torch.randn(1500, spec.input_dim, generator=generator),
        ]
    )
    want = expected(model, spec, rows)
    order = torch.randperm(len(rows), generator=generator)
    for threads in (1, 2):
        encoder = CpuEncoder(model, spec, threads=threads, integer_product=integer_product, share=1)
        assert torch.equal(encoder.encode(rows), want)
        assert torch.equal(encoder.encode(rows[order]), want[order])
        alone = [encoder.encode(rows[i : i + 1]) for i in range(90)]
        assert torch.equal(torch.cat(alone), want[:90])
        start = 0
        for size in (2, 3, 5, 6, 7, 12, 31, 96, 97, 255, 400):
            part = slice(start, start + size)
            assert torch.equal(encoder.encode(rows[part]), want[part])
            start += size


@pytest.mark.parametrize("integer_product", PRODUCTS)
def test_reference_sets_are_reproduced(reference_set, checkpoint_of, integer_product):
    model, spec = checkpoint_of(reference_set)
    rows = torch.tensor(reference_set.embeddings)
    encoder = CpuEncoder(model, spec, threads=2, integer_product=integer_product, share=1)
    codes = encoder.encode(rows)
    assert torch.equal(codes, expected(model, spec, rows))
    recorded = torch.tensor(reference_set.codes)
    certain = ~torch.tensor(reference_set.vanishing)
    assert torch.equal(codes.long()[certain], recorded.long()[certain])


@pytest.mark.parametrize("integer_product", PRODUCTS)
def test_equal_centroids_give_the_lowest_index(integer_product):
    generator = torch.Generator().manual_seed(3)
    few = torch.randn(4, 10, generator=generator)
    few[2, 3] = 0.0
    other = few.clone()
    other[2, 3] = -0.0  # the same number
    model, spec = cases.model_of([torch.cat([few, other, few]), torch.cat([few, few[:1]])])
    rows = torch.cat([torch.randn(200, 10, generator=generator), few])
    encoder = CpuEncoder(model, spec, threads=1, integer_product=integer_product)
    codes = encoder.encode(rows)
    assert codes.max() < 4
    assert torch.equal(codes, expected(model, spec, rows))


@pytest.mark.parametrize("integer_product", PRODUCTS)
def test_exact_ties_give_the_lowest_index(integer_product):
    # rows half way between centroids of small integers: every arithmetic sees a tie
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    model, spec = cases.model_of([corners, corners / 2], normalize=False)
    rows = torch.tensor([[0.0, 0], [1, 0], [0, 1], [-1, 0], [0, -1], [-0.0, -1]])
    encoder = CpuEncoder(model, spec, threads=1, integer_product=integer_product)
    assert encoder.encode(rows)[:, 0].tolist() == [0, 0, 0, 2, 1, 1]
    assert torch.equal(encoder.encode(rows), expected(model, spec, rows))
    assert encoder.counts().reference == 12


@pytest.mark.parametrize("activation", Activation)
def test_every_activation_of_the_network_keeps_the_promise(activation):
    model, spec = cases.random_network_model(
        12, (24,), 8, [30, 20], activation=activation, normalize_input=False
    )
    generator = torch.Generator().manual_seed(4)
    rows = torch.cat(
        [
            cases.near_ties(model, spec, 15, dtype=torch.float32),
            torch.randn(500, 12, generator=generator),
        ]
    )
    encoder = CpuEncoder(model, spec, threads=1)
    assert torch.equal(encoder.encode(rows), expected(model, spec, rows))
    assert encoder.counts().fast + encoder.counts().float64 > 500


@pytest.mark.parametrize(("dim", "widths"), [(8192, [20, 3]), (6, [8192, 2100])])
def test_wide_shapes_have_the_codes_of_the_reference(dim, widths):
    model, spec = cases.random_model(dim, widths)
    rows = torch.randn(40, dim, generator=torch.Generator().manual_seed(5))
    encoder = make_encoder(model, spec, device=CPU, threads=2)
    assert torch.equal(encoder.encode(rows), expected(model, spec, rows))
    assert encoder.code_dtype == (torch.uint8 if max(widths) <= 256 else torch.uint16)


def test_lengths_far_from_one_are_left_to_the_reference_and_no_others():
    model, spec = cases.random_model(32, [16, 16])
    rows = torch.randn(100, 32, generator=torch.Generator().manual_seed(6))
    encoder = CpuEncoder(model, spec, threads=1)
    encoder.encode(rows)
    assert encoder.counts().reference == 0
    encoder.encode(rows * 1e30)
    assert encoder.counts().reference == 100


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("integer_product", PRODUCTS)
def test_lengths_about_the_limits_have_the_codes_of_the_reference(normalize, integer_product):
    generator = torch.Generator().manual_seed(9)
    exponents = torch.cat([torch.linspace(-45, -20, 300), torch.linspace(35, 45, 100)])
    directions = torch.nn.functional.normalize(torch.randn(400, 16, generator=generator))
    rows = directions * torch.exp2(exponents)[:, None]
    for length in (1.0, 1e-7, 3e-13):
        model, spec = cases.random_model(16, [1, 9, 30], normalize=normalize, length=length)
        encoder = CpuEncoder(model, spec, threads=1, integer_product=integer_product)
        assert torch.equal(encoder.encode(rows), expected(model, spec, rows))


def test_a_codebook_of_extreme_length_is_left_to_the_reference():
    model, spec = cases.random_model(8, [16, 16], length=1e20)
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(7))
    encoder = CpuEncoder(model, spec, threads=1)
    assert torch.equal(encoder.encode(rows), expected(model, spec, rows))
    assert encoder.counts() == EncodeCounts(reference=50)


def test_most_rows_are_proved_by_the_fast_product():
    model, spec = cases.random_model(384, [256, 256, 256])
    rows = torch.randn(500, 384, generator=torch.Generator().manual_seed(8))
    encoder = CpuEncoder(model, spec, threads=1)
    encoder.encode(rows)
    assert encoder.counts().fast > 350
    assert encoder.counts().reference == 0


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("integer_product", PRODUCTS)
def test_rows_that_are_not_numbers_change_no_other_row(normalize, integer_product):
    # the server refuses them; were one to come through, its neighbours must not notice
    model, spec = cases.random_model(20, [30, 300, 7], normalize=normalize)
    rows = torch.randn(60, 20, generator=torch.Generator().manual_seed(10))
    want = expected(model, spec, rows)
    rows[3] = torch.nan
    rows[10, 2] = torch.inf
    rows[20, 1] = -torch.inf
    rows[59, 19] = torch.nan
    encoder = CpuEncoder(model, spec, threads=1, integer_product=integer_product)
    finite = rows.isfinite().all(dim=1)
    assert torch.equal(encoder.encode(rows)[finite], want[finite])


@pytest.mark.parametrize("integer_product", PRODUCTS)
def test_centroids_too_short_for_float32_beside_long_ones_have_the_codes_of_the_reference(
    integer_product,
):
    generator = torch.Generator().manual_seed(11)
    layers = []
    for _ in range(3):
        lengths = 10.0 ** torch.arange(-45.0, 3, 1.5).double()[:, None]
        table = torch.randn(len(lengths), 6, generator=generator, dtype=torch.float64)
        layers.append((lengths * table).float())
    rows = torch.cat([torch.randn(300, 6, generator=generator), layers[0], layers[0] + layers[1]])
    for normalize in (True, False):
        model, spec = cases.model_of(layers, normalize=normalize)
        encoder = CpuEncoder(model, spec, threads=1, integer_product=integer_product)
        assert torch.equal(encoder.encode(rows), expected(model, spec, rows))


@pytest.mark.parametrize("dim", [1, 17, 2048])
def test_a_float32_product_of_short_factors_is_found_out(dim):
    def with_bits(bits):
        def product(rows, columns):
            short = [round_to(numbers, bits) for numbers in (rows, columns)]
            return (short[0].double() @ short[1].double()).float()

        return product

    def round_to(numbers, bits):
        mantissa, exponent = torch.frexp(numbers)
        return torch.ldexp(torch.round(mantissa * 2.0**bits) / 2.0**bits, exponent)

    explained = dim * 2.0**-24
    assert loss_of_short_factors(dim, 3) <= explained
    assert loss_of_short_factors(dim, 3, with_bits(24)) <= explained
    assert loss_of_short_factors(dim, 3, with_bits(11)) > 5 * explained  # TF32
    assert loss_of_short_factors(dim, 3, with_bits(8)) > 5 * explained  # bfloat16


def test_an_encoder_whose_float32_product_rounds_its_factors_is_refused(monkeypatch):
    model, spec = cases.random_model(24, [5, 3])
    CpuEncoder(model, spec, integer_product=False)
    short = partial(loss_of_short_factors, product=lambda a, b: (a // 2**-8 * 2**-8) @ b)
    monkeypatch.setattr("semid_server.encoding.cpu.loss_of_short_factors", short)
    with pytest.raises(ConfigurationError, match="rounds its factors to fewer bits"):
        CpuEncoder(model, spec, integer_product=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 7, 8, 31, 400])
@pytest.mark.parametrize(("n", "width"), [(1, 1), (1, 37), (6, 3), (17, 64)])
def test_products_of_few_rows_are_as_exact_as_float32_explains(n, width, dim, dtype):
    rng = np.random.default_rng(dim)
    rows = rng.standard_normal((n, dim)).astype(dtype)
    columns = rng.standard_normal((dim, width), dtype=np.float32)
    products = np.full((n, width), np.nan, dtype=np.float32)
    cpu_kernels.multiply(rows, columns, products)
    exact = rows.astype(np.float64) @ columns.astype(np.float64)
    terms = np.abs(rows).astype(np.float64) @ np.abs(columns)
    rounded = dim + (dtype is np.float64)  # a row of float64 is rounded first
    assert np.all(np.abs(products - exact) <= rounded * 2.0**-24 * 1.001 * terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_rows_and_many_are_multiplied_apart_and_have_the_codes_of_the_reference(
    monkeypatch, dtype
):
    model, spec = cases.random_model(24, [50, 3])
    monkeypatch.setattr("semid_server.encoding.cpu._FEW_PRODUCTS", 10 * 24 * 53)
    encoder = CpuEncoder(model, spec, threads=1, integer_product=False)
    rows = cases.near_ties(model, spec, 11, dtype=dtype)
    rows[4] = torch.finfo(dtype).max
    want = expected(model, spec, rows)
    few = []

    def noted(rows, columns, products):
        few.append(len(rows))
        multiply(rows, columns, products)

    multiply = cpu_kernels.multiply
    monkeypatch.setattr(cpu_kernels, "multiply", noted)
    for n in range(1, 12):
        for start in range(0, len(rows) - n + 1, n):
            part = slice(start, start + n)
            assert torch.equal(encoder.encode(rows[part]), want[part])
    assert set(few) == set(range(1, 11))


def test_numba_told_of_a_lesser_processor_gets_no_instruction_that_it_lacks(tmp_path):
    # it would end the process
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "from semid_server.encoding.cpu import has_integer_product as f; print(f())",
        ],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "generic"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert told.stdout == "False\n"


def test_an_empty_batch_has_no_codes():
    model, spec = cases.random_model(4, [300, 3])
    for reference in (True, False):
        encoder = make_encoder(model, spec, device=CPU, reference=reference)
        codes = encoder.encode(torch.empty(0, 4))
        assert codes.shape == (0, 2)
        assert codes.dtype == torch.uint16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("network", [False, True])
def test_prepared_rows_have_the_codes_of_what_they_are_when_asked(network, dtype):
    if network:
        model, spec = cases.random_network_model(12, (24,), 8, [30, 20])
    else:
        model, spec = cases.random_model(12, [300, 20])
    generator = torch.Generator().manual_seed(3)
    memory = torch.zeros(700, 12, dtype=dtype)
    for reference in (True, False):
        encoder = make_encoder(model, spec, device=CPU, reference=reference)
        for count in (0, 1, 700):
            prepared = encoder.prepare(memory[:count])
            for _ in range(2):
                memory.copy_(torch.randn(700, 12, generator=generator))
                codes = prepared()
                tensor = encoder.encode(memory[:count])
                assert codes.dtype == tensor.numpy().dtype
                np.testing.assert_array_equal(codes, tensor.numpy())
        assert encoder.counts().rows == 4 * 701
        with pytest.raises(InvalidInputError, match=r"shape \(3, 4\); expected \(n, 12\)"):
            encoder.prepare(memory[:1].view(3, 4))


def test_rows_of_another_shape_or_type_are_refused_with_both_values():
    model, spec = cases.random_model(4, [3, 3])
    encoder = make_encoder(model, spec, device=CPU)
    with pytest.raises(InvalidInputError, match=r"shape \(2, 5\); expected \(n, 4\)"):
        encoder.encode(torch.zeros(2, 5))
    with pytest.raises(InvalidInputError, match=r"dtype torch\.int64"):
        encoder.encode(torch.zeros(2, 4, dtype=torch.int64))


def test_warming_up_counts_no_rows():
    model, spec = cases.random_model(4, [3, 3])
    for reference in (True, False):
        encoder = make_encoder(model, spec, device=CPU, reference=reference)
        encoder.warm_up()
        assert encoder.counts() == EncodeCounts()


@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 20),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_has_the_codes_of_the_reference(  # noqa: PLR0917 - hypothesis fills them in order
    dim, widths, normalize, n, dtype, seed
):
    model, spec = cases.random_model(dim, widths, normalize=normalize, seed=seed)
    rows = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    encoder = make_encoder(model, spec, device=CPU, threads=1)
    assert torch.equal(encoder.encode(rows), expected(model, spec, rows))


def test_gram_tables_that_would_not_fit_leave_the_definition_to_serve():
    # 2 x 100,000 centroids need 40 GB of tables
    spec = ModelSpec(
        kind=ModelKind.RQ_KMEANS,
        input_dim=1,
        codebook_widths=(400_000, 400_000),
        embedding_dim=1,
        normalize_residuals=True,
    )
    model, _ = cases.model_of([torch.randn(400_000, 1), torch.randn(400_000, 1)])
    assert isinstance(make_encoder(model, spec, device=CPU), ReferenceEncoder)
