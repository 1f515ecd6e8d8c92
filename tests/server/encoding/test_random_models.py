"""Random models and hard rows against an arithmetic that shares nothing with the package.

`encode_random` makes both, in numpy alone. Few models here; thousands of them by

    pytest -m slow tests/server/encoding/test_random_models.py
"""

from __future__ import annotations

import encode_random as random_cases
import numpy as np
import pytest
import torch

from semid_server.encoding import ReferenceEncoder
from semid_server.encoding.cpu import CpuEncoder, has_integer_product
from semid_server.encoding.plan import Plan
from semid_server.model import Activation, ModelKind, ModelSpec, build_model

CPU = torch.device("cpu")
FEW = range(40)
MANY = range(1000, 5000)
SHARES = 16


def build(case):
    """The package's model of a case, and its rows as a tensor of their type."""
    network = case.network
    dim = case.rows.shape[1]
    widths = tuple(len(table) for table in case.codebooks)
    common = {"input_dim": dim, "codebook_widths": widths, "normalize_residuals": case.normalize}
    state = {
        f"quantization_layer_list.{layer}.centroids": torch.from_numpy(table)
        for layer, table in enumerate(case.codebooks)
    }
    if network is None:
        spec = ModelSpec(kind=ModelKind.RQ_KMEANS, embedding_dim=dim, **common)
    else:
        hidden = tuple(len(weight) for weight in network.weights[:-1])
        spec = ModelSpec(
            kind=ModelKind.RQ_VAE,
            embedding_dim=len(network.weights[-1]),
            encoder_hidden_dims=hidden,
            decoder_hidden_dims=hidden[::-1],
            activation=Activation(network.activation),
            batch_norm=True,
            batch_norm_eps=network.eps,
            normalize_input=network.normalize,
            **common,
        )
        norm = "normalization_layer.0."
        state |= {
            norm + "running_mean": torch.from_numpy(network.mean),
            norm + "running_var": torch.from_numpy(network.variance),
            norm + "weight": torch.from_numpy(network.gain),
            norm + "bias": torch.from_numpy(network.shift),
        }
        for i, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
            place = 0 if i == 0 else 3 * i - 1
            state[f"encoder.model.{place}.weight"] = torch.from_numpy(weight)
            state[f"encoder.model.{place}.bias"] = torch.from_numpy(bias)
    model = build_model(spec)
    model.load_state_dict(model.state_dict() | state)
    return model, spec, torch.from_numpy(case.rows).to(getattr(torch, case.dtype))


def check(got, want, case, how):
    wrong = np.flatnonzero((got.numpy() != want).any(axis=1))
    assert not len(wrong), (
        f"{case.told}, {how}: row {wrong[0]} {case.rows[wrong[0]].tolist()} has codes "
        f"{got[wrong[0]].tolist()}, by the definition {want[wrong[0]].tolist()}"
    )


def check_on_cpu(case):
    model, spec, rows = build(case)
    want = random_cases.codes_of(case)
    reference = ReferenceEncoder(model, spec, device=CPU, threads=1)
    check(reference.encode(rows), want, case, "reference")
    products = [False, True] if has_integer_product() else [False]
    for integer in products:
        encoder = CpuEncoder(model, spec, threads=2, integer_product=integer, share=1)
        how = "int16" if integer else "float32"
        check(encoder.encode(rows), want, case, how)
        alone = torch.cat([encoder.encode(row[None]) for row in rows[::17]])
        check(alone, want[::17], case, f"{how}, row by row")


def check_twins(case):
    gpu = pytest.importorskip("semid_server.encoding.gpu", reason="needs Triton")
    twins = pytest.importorskip("semid_server.encoding.gpu_twins")
    model, spec, rows = build(case)
    plan = Plan.of(spec, model.state_dict(), CPU)
    if not plan.within_range:
        return 0
    tables = gpu.Tables.of(plan)
    want = random_cases.codes_of(case)
    rounded, facts = twins.round_rows(rows, tables.columns.shape[1])
    products = rounded.float() @ tables.columns.float().T
    proved_codes, proved = twins.prove(products, facts, tables)
    check(proved_codes[proved], want[proved.numpy()], case, "proved by the GPU's certificate")
    codes, decided = twins.decide(rows, facts, tables)
    check(codes[decided], want[decided.numpy()], case, "decided by the GPU's float64")
    return int(proved.sum())


def check_on_gpu(case):
    gpu = pytest.importorskip("semid_server.encoding.gpu", reason="needs Triton")
    device = torch.device("cuda", 0)
    model, spec, rows = build(case)
    want = random_cases.codes_of(case)
    encoder = gpu.GpuEncoder(model, spec, device=device, piece_bytes=1 << 14)
    # twice as many rows as there are: beyond what is replayed as a graph
    twice = encoder.encode(torch.cat([rows, rows]).to(device)).cpu()
    check(twice, np.concatenate([want, want]), case, "on the GPU")
    check(encoder.encode(rows[:200].to(device)).cpu(), want[:200], case, "by a graph")
    check(encoder.encode(rows), want, case, "from the host")


@pytest.mark.parametrize("network", [False, True])
def test_few_random_models_have_the_codes_of_the_definition(network):
    for seed in FEW:
        check_on_cpu(random_cases.make(seed, network=network))


def test_rows_whose_squares_overflow_before_a_network_have_the_codes_of_the_definition():
    # by the definition their length is infinite; a library may scale before it squares
    case = random_cases.make(4826, network=True)
    assert case.network.normalize
    assert np.abs(case.rows).max() > 1e155
    check_on_cpu(case)


def test_few_random_models_are_proved_right_by_the_twins_of_the_kernels():
    assert sum(check_twins(random_cases.make(seed)) for seed in FEW) > 500


def test_the_definition_chooses_the_nearest_as_far_as_float64_can_tell():
    for seed in FEW:
        case = random_cases.make(seed)
        assert random_cases.excess(case, random_cases.codes_of(case)).max() < 8, case.told


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("share", range(SHARES))
def test_many_random_models_have_the_codes_of_the_definition(share):
    for seed in MANY[share::SHARES]:
        check_on_cpu(random_cases.make(seed))
        check_on_cpu(random_cases.make(seed, network=True))
        check_twins(random_cases.make(seed))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("network", [False, True])
def test_random_models_have_the_codes_of_the_definition_on_a_device(network):
    for seed in range(150):
        check_on_gpu(random_cases.make(seed, network=network, shape=(17, 3)))
