"""Plain files of torch: their numbers are checked against their tensors."""

from __future__ import annotations

import pytest
import torch

from semid_server.checkpoint import Overrides, load_checkpoint
from semid_server.errors import DegenerateModelError, MalformedCheckpointError
from semid_server.model import ModelKind


@pytest.fixture
def plain(tmp_path, rq_kmeans_spec, make_model):
    """Write a plain file with the changes asked for, and give its path."""

    def write(state=None, **changes):
        file = {
            "model_state_dict": dict(make_model(rq_kmeans_spec).state_dict()),
            "num_hierarchies": 2,
            "codebook_width": 3,
            "embedding_dim": 4,
        }
        file["model_state_dict"].update(state or {})
        file.update(changes)
        path = tmp_path / "quantizer.pt"
        torch.save(file, path)
        return path

    return write


def test_a_plain_file_loads_and_says_what_it_assumes(plain, rq_kmeans_spec):
    loaded = load_checkpoint(plain())
    assert loaded.format == "torch-state-dict"
    assert loaded.spec == rq_kmeans_spec
    assert loaded.name == "quantizer"
    assert "normalize_residuals: True" in " ".join(loaded.notes)
    assert "kind: rq-kmeans" in " ".join(loaded.notes)


def test_the_format_does_not_change_the_fingerprint(plain, lightning):
    assert load_checkpoint(plain()).fingerprint == load_checkpoint(lightning()).fingerprint


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("place", ["beside the tensors", "as Lightning has it"])
def test_a_recorded_normalisation_of_residuals_is_believed(plain, recorded, place):
    changes = {"normalize_residuals": recorded}
    if place == "as Lightning has it":
        changes = {"hyper_parameters": changes}
    loaded = load_checkpoint(plain(**changes))
    assert loaded.spec.normalize_residuals is recorded
    assert "normalize_residuals" not in " ".join(loaded.notes)
    asked = Overrides(normalize_residuals=not recorded)
    overridden = load_checkpoint(plain(**changes), overrides=asked)
    assert overridden.spec.normalize_residuals is not recorded
    assert f"the file records {recorded}" in " ".join(overridden.notes)


@pytest.mark.parametrize("recorded", ["no", 1, torch.ones(2)])
def test_a_normalisation_that_is_neither_true_nor_false_is_refused(plain, recorded):
    with pytest.raises(MalformedCheckpointError, match="expected true or false"):
        load_checkpoint(plain(normalize_residuals=recorded))


def test_its_assumptions_can_be_overridden(plain):
    overrides = Overrides(normalize_residuals=False, kind=ModelKind.R_VQ)
    loaded = load_checkpoint(plain(), overrides=overrides)
    assert loaded.spec.normalize_residuals is False
    assert loaded.spec.kind is ModelKind.R_VQ
    assert loaded.notes == ()


def test_an_rq_vae_is_assumed_not_to_normalise_residuals(tmp_path, make_model, rq_vae_spec):
    torch.save({"model_state_dict": make_model(rq_vae_spec).state_dict()}, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded.spec == rq_vae_spec
    assert "normalize_residuals: False" in " ".join(loaded.notes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hierarchies", 3, "num_hierarchies is 3, but the tensors say 2"),
        ("codebook_width", 256, "codebook_width is 256, but the tensors say 3"),
        ("embedding_dim", 5, "embedding_dim is 5, but the tensors say 4"),
        ("embedding_dim", "4", "embedding_dim is '4', but"),
        ("model_state_dict", [], "model_state_dict is a list"),
    ],
)
def test_a_number_that_disagrees_with_the_tensors_is_refused_with_both(plain, key, value, message):
    with pytest.raises(MalformedCheckpointError, match=message):
        load_checkpoint(plain(**{key: value}))


def test_layers_of_different_widths_disagree_with_any_one_width(plain):
    path = plain({"quantization_layer_list.1.centroids": torch.rand(5, 4)})
    with pytest.raises(MalformedCheckpointError, match=r"one number, .* have \(3, 5\)"):
        load_checkpoint(path)


def test_layers_that_are_one_tensor_are_refused(plain):
    shared = torch.rand(3, 4)
    names = ["quantization_layer.centroids"] + [
        f"quantization_layer_list.{layer}.centroids" for layer in range(2)
    ]
    path = plain(dict.fromkeys(names, shared))
    with pytest.raises(DegenerateModelError, match="layers 0 and 1 share one codebook"):
        load_checkpoint(path)
    loaded = load_checkpoint(path, overrides=Overrides(allow_degenerate=True))
    assert "share one codebook" in loaded.warnings[0]


def test_the_template_of_the_layers_is_no_part_of_the_model(plain):
    path = plain({"quantization_layer.centroids": torch.zeros(3, 4)})
    assert load_checkpoint(path).warnings == ()


def test_a_bare_state_dict_loads_too(tmp_path, make_model, rq_kmeans_spec):
    torch.save(make_model(rq_kmeans_spec).state_dict(), tmp_path / "weights.pth")
    assert load_checkpoint(tmp_path / "weights.pth").spec == rq_kmeans_spec


def test_the_state_of_an_rq_vae_before_training_is_refused_as_uninitialised(reference_dir):
    with pytest.raises(DegenerateModelError, match=r"layer 0: .* never initialised"):
        load_checkpoint(reference_dir / "digits_rqvae" / "initial.pt")
