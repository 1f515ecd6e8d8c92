"""What makes codes meaningless, in words, with the layer named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from semid_server.checkpoint import (
    Overrides,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from semid_server.checkpoint.health import examine
from semid_server.errors import DegenerateModelError

LAST = "quantization_layer_list.1.centroids"


@pytest.fixture
def examined(make_model, rq_kmeans_spec):
    """Examine a model whose last codebook (3, 4) is the one given."""

    def examine_with(codebook, spec=rq_kmeans_spec):
        state = make_model(spec).state_dict()
        return examine(spec, {**state, LAST: codebook})

    return examine_with


def test_a_sound_model_gives_nothing_to_say(spec, model):
    health = examine(spec, model.state_dict())
    assert (health.damage, health.problems, health.warnings) == ((), (), ())


def test_figures_are_those_of_the_codebook(examined):
    codebook = torch.tensor([[3.0, 4, 0, 0], [0, 0, 0, 1], [0, 0, 2, 0]])
    report = examined(codebook).layers[1]
    assert (report.norm_min, report.norm_median, report.norm_max) == (1, 2, 5)
    assert (report.codebook_width, report.embedding_dim, report.duplicates) == (3, 4, 0)


@pytest.mark.parametrize(
    ("codebook", "words"),
    [
        (torch.zeros(3, 4), "all 3 centroids are zero: this layer was never initialised"),
        (torch.full((3, 4), -0.0), "never initialised"),
        (torch.rand(3, 4) * 1e-8, "about zero"),
        (torch.ones(3, 4), "all 3 centroids are equal .* collapsed"),
        (1 + torch.rand(3, 4) * 1e-7, "all 3 centroids are equal .* collapsed"),
    ],
)
def test_a_codebook_that_says_nothing_is_a_problem(examined, codebook, words):
    health = examined(codebook)
    assert len(health.problems) == 1
    with pytest.raises(AssertionError, match=rf"layer 1: .*{words}"):
        raise AssertionError(health.problems[0])


def test_a_small_scale_is_no_collapse_where_residuals_keep_theirs(make_model, rq_kmeans_spec):
    raw = replace(rq_kmeans_spec, normalize_residuals=False)
    state = {name: tensor * 1e-9 for name, tensor in make_model(raw).state_dict().items()}
    assert examine(raw, state).problems == ()
    problems = examine(rq_kmeans_spec, state).problems
    assert [problem[:7] for problem in problems] == ["layer 0", "layer 1"]
    assert all("where residuals are on the scale of 1)" in problem for problem in problems)


def test_a_layer_is_about_zero_beside_the_longest_centroid_of_its_model(make_model, rq_kmeans_spec):
    raw = replace(rq_kmeans_spec, normalize_residuals=False)
    state = {name: tensor * 1e-9 for name, tensor in make_model(raw).state_dict().items()}
    (problem,) = examine(raw, {**state, LAST: state[LAST] * 1e-8}).problems
    assert problem.startswith("layer 1: all 3 centroids are about zero")


def test_a_single_centroid_has_not_collapsed(examined, rq_kmeans_spec):
    spec = replace(rq_kmeans_spec, codebook_widths=(3, 1))
    state = {
        "quantization_layer_list.0.centroids": torch.rand(3, 4),
        LAST: torch.rand(1, 4),
    }
    assert examine(spec, state).problems == ()


def test_two_layers_with_equal_codebooks_are_a_problem_even_among_more(rq_kmeans_spec):
    spec = replace(rq_kmeans_spec, codebook_widths=(3, 3, 3))
    codebook = torch.rand(3, 4)
    books = [codebook, torch.rand(3, 4), codebook.clone()]
    state = {f"quantization_layer_list.{i}.centroids": book for i, book in enumerate(books)}
    (problem,) = examine(spec, state).problems
    assert problem.startswith("layers 0 and 2 share one codebook")


def test_some_duplicates_are_a_warning_with_their_number(examined):
    codebook = torch.rand(3, 4)
    codebook[2] = codebook[0]
    health = examined(codebook)
    assert health.problems == ()
    assert health.warnings[0].startswith("layer 1: 1 of 3 centroids repeat another")
    assert health.layers[1].duplicates == 1


def test_zeros_of_either_sign_are_duplicates(examined):
    codebook = torch.tensor([[1.0, 0, 0, 0], [1, -0.0, 0, 0], [0, 1, 0, 0]])
    assert examined(codebook).layers[1].duplicates == 1


def test_a_short_centroid_is_an_attractor_only_of_normalised_residuals(examined, rq_kmeans_spec):
    codebook = torch.eye(4)[:3] * torch.tensor([[1.0], [0.01], [1]])
    assert examined(codebook).warnings[0].startswith("layer 1: centroid 1 has length 0.01")
    raw = replace(rq_kmeans_spec, normalize_residuals=False)
    assert examined(codebook, raw).warnings == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_damage_with_their_place(spec, model, value):
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            broken = tensor.clone()
            broken.view(-1)[-1] = value
            (damage,) = examine(spec, {**model.state_dict(), name: broken}).damage
            place = [size - 1 for size in tensor.shape]
            assert damage.startswith(f"{name} holds 1 NaN or infinite")
            assert damage.endswith(f"the first at {place}")


def test_a_negative_variance_is_damage(rq_vae_spec, make_model):
    state = make_model(rq_vae_spec).state_dict()
    name = "normalization_layer.0.running_var"
    (damage,) = examine(rq_vae_spec, {**state, name: -state[name]}).damage
    assert "expected 0 or more" in damage


def test_damage_is_refused_even_where_degenerate_models_are_allowed(
    tmp_path, rq_kmeans_spec, make_model
):
    model = make_model(rq_kmeans_spec)
    with torch.no_grad():
        model.layers[1].centroids[0, 0] = float("nan")
    path = tmp_path / "a"
    save_checkpoint(path, model=model, spec=rq_kmeans_spec, name="a")
    with pytest.raises(DegenerateModelError, match=r"layer_list\.1\.centroids holds 1 NaN"):
        load_checkpoint(path, overrides=Overrides(allow_degenerate=True))
    assert "holds 1 NaN" in inspect_checkpoint(path).problems[0]


def test_an_inspection_reports_what_loading_refuses(lightning):
    path = lightning(state={LAST: torch.zeros(3, 4)})
    with pytest.raises(DegenerateModelError, match="never initialised") as refused:
        load_checkpoint(path)
    inspection = inspect_checkpoint(path)
    (problem,) = inspection.problems
    assert refused.value.problem.startswith(f"{problem} (")
    assert "--allow-degenerate" in refused.value.problem
    assert inspection.layers[1].norm_max == 0


def test_an_inspection_agrees_with_loading(lightning, spec):
    path = lightning(spec)
    loaded, inspection = load_checkpoint(path), inspect_checkpoint(path)
    for name in ("spec", "fingerprint", "name", "format", "path", "notes", "warnings"):
        assert getattr(inspection, name) == getattr(loaded, name)
    assert inspection.problems == ()
    assert not inspection.calibrated
