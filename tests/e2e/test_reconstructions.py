"""Decode gives back what the original decoded, and what the first codes alone mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from running import run_server

from semid.v1 import semid_pb2 as pb
from semid_client import Client, FailedPreconditionError
from semid_server.checkpoint import load_checkpoint, save_checkpoint
from semid_server.model import Calibration

WITHOUT_DECODER = (
    *("digits_rkmeans", "digits_rkmeans_raw_residuals", "digits_rvq"),
    *("movies_rkmeans", "movies_rkmeans_64"),
)
"""Models whose reconstruction is a sum of centroids."""


@pytest.fixture
def set_client(set_server):
    with Client(set_server.target) as client:
        yield client


def test_reconstructions_are_the_recorded_ones(reference_set, set_client):
    recorded = reference_set.reconstruction
    decoded = set_client.decode(reference_set.codes[: len(recorded)])
    assert decoded.dtype == np.float32
    if reference_set.name not in WITHOUT_DECODER:
        # The original ran its decoder in float32; semid runs it in float64 and rounds once.
        np.testing.assert_allclose(decoded, recorded, rtol=0, atol=2e-6)
    else:
        np.testing.assert_array_equal(decoded, recorded)


@pytest.mark.parametrize("reference_set", WITHOUT_DECODER, indirect=True)
def test_the_first_codes_decode_to_the_sum_of_their_centroids(reference_set, set_client):
    state = load_checkpoint(reference_set.checkpoint).model.state_dict()
    codes = reference_set.codes[:100]
    total = np.zeros((len(codes), reference_set.embeddings.shape[1]), np.float32)
    for layer in range(reference_set.n_layers):
        total += state[f"quantization_layer_list.{layer}.centroids"].numpy()[codes[:, layer]]
        np.testing.assert_array_equal(set_client.decode(codes[:, : layer + 1]), total)


@pytest.mark.parametrize("reference_set", ["digits_rkmeans_raw_residuals"], indirect=True)
def test_without_normalisation_more_codes_come_nearer(reference_set, set_client):
    errors = [
        np.square(set_client.decode(reference_set.codes[:, :n]) - reference_set.embeddings).mean()
        for n in range(1, reference_set.n_layers + 1)
    ]
    assert errors == sorted(errors, reverse=True)


def test_a_row_decodes_alone_as_in_a_batch(reference_set, set_client):
    together = set_client.decode(reference_set.codes[:100])
    alone = np.stack([set_client.decode(row) for row in reference_set.codes[:100]])
    np.testing.assert_array_equal(alone, together)


def test_the_scale_of_the_input_needs_a_calibration(reference_set, set_client):
    modes = set_client.model().decode_modes
    if reference_set.info["normalize_residuals"]:
        assert list(modes) == ["sum"]
        with pytest.raises(FailedPreconditionError, match="residual norms"):
            set_client.decode(reference_set.codes[:2], mode="calibrated")
    else:
        # Nothing was divided out, so the sum is on that scale already.
        np.testing.assert_array_equal(
            set_client.decode(reference_set.codes[:50], mode="calibrated"),
            set_client.decode(reference_set.codes[:50]),
        )


def test_a_stream_decodes_each_message_in_order(reference_set, set_server, set_client):
    codes = reference_set.codes[:200].astype("u1")
    messages = (
        pb.DecodeStreamRequest(
            request=pb.DecodeRequest(
                tensor=pb.Tensor(
                    dtype=pb.DATA_TYPE_UINT8,
                    shape=[1 + start % 3, codes.shape[1]],
                    data=codes[start : start + 1 + start % 3].tobytes(),
                )
            )
        )
        for start in range(150)
    )
    together = set_client.decode(codes)
    with set_server.stub() as stub:
        for start, answer in enumerate(stub.DecodeStream(messages)):
            tensor = answer.response.tensor
            decoded = np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)
            np.testing.assert_array_equal(decoded, together[start : start + 1 + start % 3])


def test_codes_written_out_decode_as_bytes_do(reference_set, set_server, set_client):
    codes = reference_set.codes[:5]
    rows = pb.CodeRows(rows=[pb.CodeRows.Row(codes=row) for row in codes])
    with set_server.stub() as stub:
        answer = stub.Decode(pb.DecodeRequest(rows=rows))
    decoded = np.array([list(row.values) for row in answer.rows.rows], np.float32)
    np.testing.assert_array_equal(decoded, set_client.decode(codes))


@pytest.mark.slow  # it starts two servers
def test_answers_on_the_scale_of_the_input_tell_by_what_norms(tmp_path, request):
    source = load_checkpoint(request.config.rootpath / "checkpoints/movies")
    codes = np.zeros((3, source.spec.n_layers), np.uint8)
    found = set()
    for factor in (1.0, 10.0):
        norms = Calibration(
            factor, tuple(torch.full((width,), factor) for width in source.spec.codebook_widths)
        )
        folder = tmp_path / str(factor)
        save_checkpoint(
            folder, model=source.model, spec=source.spec, name="movies", calibration=norms
        )
        with (
            run_server(folder, log=tmp_path / "serve.log") as server,
            Client(server.target) as client,
        ):
            info = client.model()
            found.add((info.fingerprint, info.calibration))
            rows = pb.CodeRows(rows=[pb.CodeRows.Row(codes=row) for row in codes.tolist()])
            tensor = pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=codes.shape, data=codes.tobytes())
            with server.stub() as stub:
                for form in ({"rows": rows}, {"tensor": tensor}):
                    plain = stub.Decode(pb.DecodeRequest(**form))
                    scaled = stub.Decode(pb.DecodeRequest(mode=pb.DECODE_MODE_CALIBRATED, **form))
                    assert (plain.calibration, scaled.calibration) == ("", info.calibration)
                    assert scaled.WhichOneof("reconstructions") == next(iter(form))
    assert len({fingerprint for fingerprint, _ in found}) == 1
    assert len({calibration for _, calibration in found}) == 2
    assert "" not in {calibration for _, calibration in found}
