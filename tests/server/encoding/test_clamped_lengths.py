"""Rows about as short as the least length that normalisation divides by."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semid_server.encoding import make_encoder
from semid_server.model import ModelKind, ModelSpec, build_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_around_the_least_length_have_the_codes_of_the_reference(dtype):
    rng = np.random.default_rng(3)
    spec = ModelSpec(
        kind=ModelKind.RQ_KMEANS,
        input_dim=8,
        codebook_widths=(1, 16, 300),
        embedding_dim=8,
        normalize_residuals=True,
    )
    model = build_model(spec)
    with torch.no_grad():
        for layer in model.layers:
            layer.centroids.copy_(torch.from_numpy(rng.standard_normal((layer.n_clusters, 8)) / 3))
    rows = rng.standard_normal((4000, 8))
    lengths = 1e-12 * rng.uniform(0.5, 1.5, (4000, 1))
    rows = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True) * lengths).to(dtype)
    device = torch.device("cpu")
    codes = make_encoder(model, spec, device=device).encode(rows)
    expected = make_encoder(model, spec, device=device, reference=True).encode(rows)
    assert torch.equal(codes, expected)
