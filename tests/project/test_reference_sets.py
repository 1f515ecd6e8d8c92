"""The recorded data is what its README says, and `reference_set` hands it over whole."""

import numpy as np


def test_every_set_has_codes_for_every_embedding(reference_set):
    rows = len(reference_set.embeddings)
    assert rows == reference_set.info["n_items"]
    assert reference_set.codes.shape == (rows, reference_set.info["n_layers"])
    assert reference_set.vanishing.shape == (rows,)
    assert reference_set.vanishing.sum() == reference_set.info.get(
        "rows_with_a_vanishing_residual", 0
    )


def test_every_code_is_of_its_codebook(reference_set):
    assert reference_set.codes.min() >= 0
    assert reference_set.codes.max() < reference_set.info["codebook_width"]


def test_every_set_has_reconstructions_of_its_first_rows(reference_set):
    rows, width = reference_set.reconstruction.shape
    assert rows in {256, len(reference_set.embeddings)}
    assert width == reference_set.embeddings.shape[1]
    assert reference_set.reconstruction.dtype == np.float32


def test_shared_arrays_cannot_be_written(reference_set):
    for name in ("embeddings", "codes", "reconstruction"):
        assert not getattr(reference_set, name).flags.writeable
