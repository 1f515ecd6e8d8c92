"""The backend on real checkpoints, on the CPU."""

from __future__ import annotations

import contextlib
import os
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from semid_server.errors import ConfigurationError, InvalidInputError
from semid_server.model import ModelKind, ModelSpec
from semid_server.serving.backend import Backend, Buffer, Device, are_soon_back, choose_device
from semid_server.serving.config import ModelSource, ServeConfig
from semid_server.serving.drift import SAMPLED_ROWS
from semid_server.serving.shared_memory import Segment, SharedRows
from semid_server.serving.types import DecodeKey, EncodeKey


class Verifications:
    def __init__(self):
        self.rows = self.mismatches = 0

    def __call__(self, rows, mismatches):
        self.rows += rows
        self.mismatches += mismatches


@pytest.fixture
def verifications():
    return Verifications()


@pytest.fixture
def make_backend(reference_set_named, verifications):
    def make(name="digits_rkmeans", **settings):
        checkpoint = reference_set_named(name).checkpoint
        source = ModelSource(checkpoint)
        config = ServeConfig(models=(source,), device="cpu", **settings)
        return Backend(source, config, on_verified=verifications)

    return make


@pytest.fixture
def digits(reference_set_named):
    return reference_set_named("digits_rkmeans")


def test_each_payload_gets_the_codes_of_its_own_rows(make_backend, digits):
    backend = make_backend()
    cuts = [0, 1, 3, 3, 40, 100]
    payloads = [digits.embeddings[a:b] for a, b in pairwise(cuts)]
    answers = backend.run(EncodeKey(backend.served, "float32"), payloads)
    for answer, (a, b) in zip(answers, pairwise(cuts), strict=True):
        assert answer.dtype == np.uint8
        np.testing.assert_array_equal(answer, digits.codes[a:b])


def test_answers_stay_as_they_are_while_later_batches_run(make_backend, digits):
    backend = make_backend()
    first = backend.run(EncodeKey(backend.served, "float32"), [digits.embeddings[:50]])[0]
    backend.run(EncodeKey(backend.served, "float32"), [digits.embeddings[50:100]])
    np.testing.assert_array_equal(first, digits.codes[:50])


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_a_number_means_the_value_it_holds_whatever_its_type(make_backend, digits, dtype):
    backend = make_backend()
    rows = torch.from_numpy(digits.embeddings[:200].copy())
    narrow = rows.to(getattr(torch, dtype))
    payload = narrow.view(torch.uint16).numpy() if dtype == "bfloat16" else narrow.numpy()
    got = backend.run(EncodeKey(backend.served, dtype), [payload])[0]
    exact = backend.run(EncodeKey(backend.served, "float64"), [narrow.to(torch.float64).numpy()])[0]
    np.testing.assert_array_equal(got, exact)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_a_payload_with_a_number_that_is_none_fails_alone(make_backend, digits, value, dtype):
    backend = make_backend()
    good, bad = digits.embeddings[:5].astype(dtype), digits.embeddings[5:10].astype(dtype)
    bad[3, 7] = value
    answers = backend.run(EncodeKey(backend.served, dtype), [good, bad, good])
    alone = backend.run(EncodeKey(backend.served, dtype), [good])[0]
    np.testing.assert_array_equal(answers[0], alone)
    np.testing.assert_array_equal(answers[2], alone)
    assert isinstance(answers[1], InvalidInputError)
    assert str(answers[1]) == f"embeddings[3]: feature 7 is {value}; expected a finite number"


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ["digits_rkmeans", "digits_rqvae"])
def test_a_payload_alone_has_the_answer_that_it_has_in_a_batch(
    make_backend, digits, share_rows, name, dtype
):
    backend = make_backend(name)
    device = Device()
    key = EncodeKey(backend.served, dtype)
    numbers = torch.from_numpy(digits.embeddings[:60].copy()).to(getattr(torch, dtype))
    rows = (numbers.view(torch.uint16) if dtype == "bfloat16" else numbers).numpy()
    bad = rows[:9].copy()
    bad[5, 3] = 0x7FC0 if dtype == "bfloat16" else np.nan
    short, fd = share_rows(rows[:9])
    os.ftruncate(fd, 100)
    for payload in (rows[:1], rows[:0], rows, bad, rows[7:11], share_rows(rows)[0], short):
        alone = device.run_alone(key, payload)
        device.after()
        (batched,) = make_backend(name).run(key, [payload])
        assert type(alone) is type(batched)
        if isinstance(alone, InvalidInputError):
            assert str(alone) == str(batched)
        else:
            assert alone.dtype == batched.dtype
            np.testing.assert_array_equal(alone, batched)
    assert sum(backend.proved_rows().values()) == 1 + 60 + 4 + 60


def test_numbers_whose_sum_overflows_are_finite_all_the_same(make_backend):
    backend = make_backend()
    rows = np.full((2, 64), np.finfo(np.float32).max, np.float32)
    answer = backend.run(EncodeKey(backend.served, "float32"), [rows])[0]
    assert answer.shape == (2, 3)


def test_decode_gives_what_was_recorded(make_backend, digits):
    backend = make_backend()
    payloads = [digits.codes[:7].astype("u1"), digits.codes[7:30].astype("u1")]
    answers = backend.run(DecodeKey(backend.served, 3, "sum"), payloads)
    np.testing.assert_array_equal(np.concatenate(answers), digits.reconstruction[:30])


def test_raw_residuals_are_on_the_inputs_scale_so_both_modes_can_be_had(make_backend):
    assert make_backend("digits_rkmeans").served.decode_modes == ("sum",)
    backend = make_backend("digits_rkmeans_raw_residuals")
    assert backend.served.decode_modes == ("sum", "calibrated")


def test_a_sample_of_rows_is_verified_after_the_batch(make_backend, digits, verifications):
    backend = make_backend(verify_fraction=1.0)
    backend.warm_up()
    backend.run(EncodeKey(backend.served, "float32"), [digits.embeddings[:20]])
    assert verifications.rows == 0
    backend.after()
    assert (verifications.rows, verifications.mismatches) == (20, 0)
    backend.after()
    assert verifications.rows == 20


def test_a_code_that_differs_from_the_reference_is_counted_and_logged(
    make_backend, digits, verifications, caplog
):
    backend = make_backend(verify_fraction=1.0)
    encoder = backend._encoder

    class Lying:
        def prepare(self, rows):
            def encode():
                codes = encoder.encode(rows).numpy()
                codes[1, 2] += 1
                return codes

            return encode

    backend._encoder = Lying()
    backend.run(EncodeKey(backend.served, "float32"), [digits.embeddings[:20]])
    backend.after()
    assert (verifications.rows, verifications.mismatches) == (20, 1)
    assert "1 of 20 verified rows differ" in caplog.text


@pytest.mark.parametrize(
    ("settings", "device", "processes", "soon"),
    [
        ({}, "cuda", 1, True),
        ({}, "cuda", 2, False),
        ({"normalize_input": True}, "cuda", 1, False),
        ({"batch_norm": True}, "cuda", 1, False),
        ({"encoder_hidden_dims": (8,), "decoder_hidden_dims": (8,)}, "cuda", 1, False),
        ({"normalize_input": True}, "cpu", 2, True),
    ],
)
def test_a_gpu_is_waited_for_by_the_event_loop_only_where_it_is_soon_done(
    settings, device, processes, soon
):
    spec = ModelSpec(
        kind=ModelKind.RQ_VAE,
        input_dim=4,
        codebook_widths=(8,),
        embedding_dim=4,
        normalize_residuals=False,
        **settings,
    )
    assert are_soon_back(spec, torch.device(device), processes=processes) == soon


def test_short_batches_are_the_workers_while_a_version_is_loaded_and_where_rows_are_verified(
    make_backend,
):
    device = Device()
    key = EncodeKey(make_backend().served, "float32")
    assert device.runs_quickly(key)
    device.loading += 1
    assert not device.runs_quickly(key)
    device.loading -= 1
    assert device.runs_quickly(key)
    assert not device.runs_quickly(EncodeKey(make_backend(verify_fraction=0.1).served, "float32"))


def test_company_pays_where_the_device_is_a_gpu(make_backend):
    backend = make_backend()
    key = EncodeKey(backend.served, "float32")
    assert not Device().company_pays(key)
    backend.far = True
    assert Device().company_pays(key)


def test_rows_of_a_batch_that_failed_are_not_looked_at_again(
    make_backend, digits, verifications, monkeypatch
):
    backend = make_backend(verify_fraction=1.0)
    key = EncodeKey(backend.served, "float32")
    backend.run(key, [digits.embeddings[:9]])
    with monkeypatch.context() as broken:
        broken.setattr(Buffer, "encode", Mock(side_effect=RuntimeError("broken")))
        with pytest.raises(RuntimeError, match="broken"):
            backend.run(key, [digits.embeddings[100:109]])
    backend.after()
    assert (verifications.rows, verifications.mismatches) == (0, 0)
    backend.run(key, [digits.embeddings[:9]])
    assert isinstance(
        backend.encode_alone("float32", np.full((9, 64), np.nan, np.float32)), InvalidInputError
    )
    backend.after()
    assert backend.drift() == []


def test_proved_rows_count_what_was_encoded(make_backend, digits):
    backend = make_backend()
    backend.run(EncodeKey(backend.served, "float32"), [digits.embeddings[:20]])
    assert sum(backend.proved_rows().values()) == 20


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "meta", ""])
def test_a_device_that_is_none_is_refused(device):
    with pytest.raises(ConfigurationError, match="not one of auto, cpu, cuda"):
        choose_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of machines without a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigurationError, match="no CUDA device"):
        choose_device("cuda:0")


@pytest.mark.parametrize("name", ["digits_rkmeans", "digits_rkmeans_raw_residuals", "digits_rqvae"])
def test_drift_figures_are_those_of_the_rows_served(make_backend, reference_set_named, name):
    backend = make_backend(name)
    reference = reference_set_named(name)
    assert backend.drift() == []
    backend.run(EncodeKey(backend.served, "float32"), [reference.embeddings[:0]])
    backend.after()
    assert backend.drift() == []
    # As many rows as are sampled: the error is of all of them.
    rows, codes = reference.embeddings[:SAMPLED_ROWS], reference.codes[:SAMPLED_ROWS]
    backend.run(EncodeKey(backend.served, "float32"), [rows])
    backend.after()
    drift = backend.drift()
    assert len(drift) == reference.n_layers
    residual = backend._model.features(torch.tensor(rows)).detach()
    for layer, figures in enumerate(drift):
        used = np.unique(codes[:, layer], return_counts=True)[1] / len(rows)
        assert figures.perplexity == pytest.approx(np.exp(-(used * np.log(used)).sum()))
        assert figures.dead_codes == backend.served.codebook_widths[layer] - len(used)
        if backend.served.normalize_residuals:
            residual = torch.nn.functional.normalize(residual)
        before = residual.square().sum()
        centroids = backend._model.layers[layer].centroids.detach()
        residual = residual - centroids[torch.tensor(codes[:, layer]).long()]
        assert figures.error == pytest.approx(float(residual.square().sum() / before), rel=1e-4)


def test_numbers_beyond_float32_have_an_error_too(make_backend):
    backend = make_backend("digits_rkmeans")
    rows = np.full((SAMPLED_ROWS, 64), 1e39)
    backend.run(EncodeKey(backend.served, "float64"), [rows])
    backend.after()
    assert backend.drift()[0].error > 0.1


@pytest.fixture
def share_rows():
    """Return a function that puts rows into a file, as a caller shares it, and returns both."""
    with contextlib.ExitStack() as stack:

        def share(rows):
            fd = os.memfd_create("shared")
            stack.callback(os.close, fd)
            os.pwrite(fd, rows.tobytes(), 0)
            segment = Segment(os.dup(fd), "handle", rows.nbytes)
            stack.callback(segment.end)
            return SharedRows(segment, 0, rows.shape, rows.nbytes), fd

        yield share


def test_rows_that_are_shared_get_the_codes_of_rows_that_were_sent(
    make_backend, digits, share_rows
):
    backend = make_backend()
    rows = digits.embeddings[:50]
    shared, _ = share_rows(rows)
    key = EncodeKey(backend.served, "float32")
    answers = backend.run(key, [rows[:7], shared, rows[9:20]])
    np.testing.assert_array_equal(
        np.concatenate(answers),
        np.concatenate([digits.codes[s] for s in (np.s_[:7], np.s_[:50], np.s_[9:20])]),
    )


def test_what_is_shared_and_cannot_be_used_fails_alone(make_backend, digits, share_rows):
    backend = make_backend()
    good = digits.embeddings[:5]
    bad = good.copy()
    bad[3, 7] = np.nan
    nan, _ = share_rows(bad)
    short, short_fd = share_rows(good)
    os.ftruncate(short_fd, 100)
    key = EncodeKey(backend.served, "float32")
    first, unread, middle, none, last = backend.run(key, [good, short, good, nan, good])
    for codes in (first, middle, last):
        np.testing.assert_array_equal(codes, digits.codes[:5])
    assert "ends at byte 100; 1280 bytes were to follow byte 0" in str(unread)
    assert str(none) == "embeddings[3]: feature 7 is nan; expected a finite number"
