"""GRID's own checkpoints: read as what they are, and what they do not say is said aloud."""

from __future__ import annotations

import pytest
import torch

from semid_server.checkpoint import Overrides, load_checkpoint
from semid_server.errors import CheckpointError, DegenerateModelError, MalformedCheckpointError
from semid_server.model import Activation, ModelKind

CENTROIDS = "quantization_layer_list.{}.centroids"
KINDS = {"rkmeans": ModelKind.RQ_KMEANS, "rvq": ModelKind.R_VQ, "rqvae": ModelKind.RQ_VAE}


def mentions(sentences, *words) -> bool:
    return any(all(word in sentence for word in words) for sentence in sentences)


def test_a_reference_checkpoint_loads_with_its_recorded_shape(reference_set):
    loaded = load_checkpoint(reference_set.checkpoint)
    info = reference_set.info
    assert loaded.format == "grid-lightning"
    assert loaded.name == "model"
    assert loaded.spec.kind == KINDS[info["kind"]]
    assert loaded.spec.codebook_widths == (info["codebook_width"],) * info["n_layers"]
    assert loaded.spec.input_dim == info["embedding_dim"]
    assert loaded.spec.normalize_residuals == info["normalize_residuals"]
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"cpu"}


def test_a_reference_checkpoint_gives_the_recorded_codes(reference_set):
    model = load_checkpoint(reference_set.checkpoint).model.double()
    rows = torch.tensor(reference_set.embeddings[:300]).double()
    codes = model.predict_step(rows).codes.numpy()
    certain = ~reference_set.vanishing[:300]
    assert (codes == reference_set.codes[:300])[certain].all()


def test_the_networks_of_an_rq_vae_are_read_from_its_tensors(reference_dir):
    spec = load_checkpoint(reference_dir / "digits_rqvae" / "model.ckpt").spec
    assert spec.encoder_hidden_dims == (128, 64)
    assert spec.decoder_hidden_dims == (64, 128)
    assert spec.embedding_dim == 32
    assert spec.batch_norm
    assert spec.normalize_input
    assert spec.activation is Activation.RELU


def test_the_short_centroids_of_a_starved_model_are_named(reference_dir):
    warnings = load_checkpoint(reference_dir / "movies_rkmeans" / "model.ckpt").warnings
    assert mentions(warnings, "layer 1", "length 0.0144")
    assert mentions(warnings, "layer 2", "length 0.0105")
    assert load_checkpoint(reference_dir / "movies_rkmeans_64" / "model.ckpt").warnings == ()


def test_the_file_may_be_named_anything(lightning, rq_kmeans_spec):
    loaded = load_checkpoint(lightning(filename="epoch=3-step=90.bin"))
    assert loaded.spec == rq_kmeans_spec
    assert loaded.name == "epoch=3-step=90"


# --- what leaves no trace ------------------------------------------------------------------


def test_what_was_assumed_of_an_rq_vae_is_said_with_its_option(lightning, rq_vae_spec):
    loaded = load_checkpoint(lightning(rq_vae_spec))
    assert loaded.spec == rq_vae_spec
    assert mentions(loaded.notes, "relu", "--activation")
    assert mentions(loaded.notes, "length 1 after the batch norm", "--no-normalize-input")
    assert mentions(loaded.notes, "1e-05", "--batch-norm-eps")
    assert len(loaded.notes) == 3


def test_what_is_overridden_is_not_assumed(lightning, rq_vae_spec):
    overrides = Overrides(
        name="mine", activation=Activation.GELU, normalize_input=False, batch_norm_eps=1e-3
    )
    loaded = load_checkpoint(lightning(rq_vae_spec), overrides=overrides)
    assert loaded.spec.activation is Activation.GELU
    assert loaded.spec.normalize_input is False
    assert loaded.spec.batch_norm_eps == 1e-3
    assert loaded.name == "mine"
    assert loaded.notes == ()


@pytest.mark.parametrize(
    ("optimizer_states", "kind"),
    [
        ([{"param_groups": [{"lr": 0.5, "dampening": 0, "nesterov": False}]}], "rq-kmeans"),
        ([{"param_groups": [{"lr": 0.1, "lr_decay": 0}]}], "r-vq"),
        ([], "rq-kmeans"),
        (None, "rq-kmeans"),
    ],
)
def test_the_kind_is_told_from_the_optimizer(lightning, optimizer_states, kind):
    loaded = load_checkpoint(lightning(optimizer_states=optimizer_states))
    assert loaded.spec.kind == kind
    assert mentions(loaded.notes, f"kind: {kind}", "same codes", "--kind")


def test_the_kind_can_be_overridden_and_changes_no_fingerprint(lightning):
    path = lightning()
    loaded = load_checkpoint(path, overrides=Overrides(kind=ModelKind.R_VQ))
    assert loaded.spec.kind is ModelKind.R_VQ
    assert loaded.fingerprint == load_checkpoint(path).fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"without": ["hyper_parameters"]},
        {"hyper_parameters": {"n_layers": 2}},
        {"hyper_parameters": {"normalize_residuals": None}},
        {"hyper_parameters": torch.nn.MSELoss()},
    ],
)
def test_without_a_record_of_residual_normalisation_the_user_is_asked(lightning, changes):
    path = lightning(**changes)
    with pytest.raises(
        MalformedCheckpointError, match="--normalize-residuals or --no-normalize-residuals"
    ):
        load_checkpoint(path)
    for said in (True, False):
        loaded = load_checkpoint(path, overrides=Overrides(normalize_residuals=said))
        assert loaded.spec.normalize_residuals is said


def test_an_override_against_the_record_is_obeyed_and_said(lightning):
    loaded = load_checkpoint(lightning(), overrides=Overrides(normalize_residuals=False))
    assert loaded.spec.normalize_residuals is False
    assert mentions(loaded.notes, "the file records True")


def test_an_encoder_without_batch_norm_is_no_configuration_that_could_be_assumed(
    lightning, rq_vae_spec
):
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    path = lightning(rq_vae_spec, state={f"normalization_layer.0.{p}": None for p in parts})
    with pytest.raises(MalformedCheckpointError, match=r"no batch norm.*--no-normalize-input"):
        load_checkpoint(path)
    for said in (True, False):
        loaded = load_checkpoint(path, overrides=Overrides(normalize_input=said))
        assert loaded.spec.normalize_input is said
        assert not loaded.spec.batch_norm


# --- tensors that are not the model's ------------------------------------------------------


def test_what_belongs_to_the_initialiser_is_dropped(lightning, rq_kmeans_spec):
    extra = "quantization_layer_list.0.initializer.clustering_module.centroids"
    loaded = load_checkpoint(lightning(state={extra: torch.zeros(3, 4)}))
    assert loaded.spec == rq_kmeans_spec
    assert loaded.warnings == ()


def test_what_is_no_part_of_the_quantiser_is_left_out_and_named(lightning):
    loaded = load_checkpoint(lightning(state={"train_loss.total": torch.ones(1)}))
    assert mentions(loaded.warnings, "left out", "train_loss.total")


@pytest.mark.parametrize(
    "name", ["quantization_layer_list.0.cluster_counts", "quantization_layer_list.1.initialized"]
)
def test_what_a_layer_counted_in_training_is_left_out_and_named(lightning, rq_kmeans_spec, name):
    path = lightning(rq_kmeans_spec, filename="plain.ckpt")
    loaded = load_checkpoint(lightning(state={name: torch.ones(3)}))
    assert mentions(loaded.warnings, "left out", name)
    assert loaded.fingerprint == load_checkpoint(path).fingerprint


def test_no_more_than_three_of_many_are_named(lightning):
    others = {f"other.{index}": torch.ones(1) for index in range(5)}
    (warning,) = load_checkpoint(lightning(state=others)).warnings
    assert warning.endswith("other.0, other.1, other.2 and 2 others")


def test_the_count_of_a_batch_norm_need_not_be_there(lightning, rq_vae_spec):
    path = lightning(rq_vae_spec)
    without = lightning(
        rq_vae_spec,
        state={"normalization_layer.0.num_batches_tracked": None},
        filename="without.ckpt",
    )
    assert load_checkpoint(without).fingerprint == load_checkpoint(path).fingerprint


@pytest.mark.parametrize(
    "flags", [torch.tensor([True, True]), [torch.tensor(True), torch.tensor(True)], [1, 1]]
)
def test_flags_of_initialisation_may_be_tensors(lightning, flags):
    assert load_checkpoint(lightning(layers_initialized=flags)).warnings == ()


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "model.", "model._orig_mod."),
        *("_forward_module.", "module._fsdp_wrapped_module.", "quantizer.", "net.student.model."),
    ],
)
def test_the_prefixes_of_wrappers_are_taken_off(lightning, make_model, rq_vae_spec, prefix):
    path = lightning(rq_vae_spec)
    state = make_model(rq_vae_spec).state_dict()
    wrapped = lightning(
        rq_vae_spec,
        filename="wrapped.ckpt",
        state_dict={prefix + name: tensor for name, tensor in state.items()},
    )
    assert load_checkpoint(wrapped).fingerprint == load_checkpoint(path).fingerprint


def test_wrappers_within_a_name_are_taken_out(lightning, make_model, rq_vae_spec):
    path = lightning(rq_vae_spec)
    state = make_model(rq_vae_spec).state_dict()
    wrapped = lightning(
        rq_vae_spec,
        filename="wrapped.ckpt",
        state_dict={
            name.replace("encoder.", "encoder._fsdp_wrapped_module."): tensor
            for name, tensor in state.items()
        },
    )
    assert load_checkpoint(wrapped).fingerprint == load_checkpoint(path).fingerprint


def test_two_quantisers_in_one_file_are_refused_by_name(lightning, make_model, rq_kmeans_spec):
    state = make_model(rq_kmeans_spec).state_dict()
    both = {f"{holder}.{name}": t for holder in ("ema", "live") for name, t in state.items()}
    with pytest.raises(MalformedCheckpointError, match=r"several quantisers, under ema\., live\."):
        load_checkpoint(lightning(state_dict=both))


def test_an_encoder_outside_of_what_holds_the_codebooks_is_not_passed_over(
    lightning, make_model, rq_vae_spec
):
    state = make_model(rq_vae_spec).state_dict()
    apart = {
        name if name.startswith("encoder.") else f"quantizer.{name}": tensor
        for name, tensor in state.items()
    }
    with pytest.raises(MalformedCheckpointError, match=r"encoder.* lies outside of quantizer\."):
        load_checkpoint(lightning(rq_vae_spec, state_dict=apart))


def test_double_precision_is_rounded_and_said(lightning):
    path = lightning(state={CENTROIDS.format(0): torch.rand(3, 4, dtype=torch.float64)})
    assert mentions(load_checkpoint(path).notes, "layer_list.0", "rounded to float32")


def test_half_precision_keeps_its_numbers_and_is_not_worth_a_word(lightning):
    half = torch.rand(3, 4).bfloat16()
    loaded = load_checkpoint(lightning(state={CENTROIDS.format(0): half}))
    assert torch.equal(loaded.model.layers[0].centroids, half.float())
    assert not mentions(loaded.notes, "rounded")


# --- files at odds with themselves ---------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hyper_parameters": {"n_layers": 3, "normalize_residuals": True}}, "n_layers is 3, but"),
        ({"layers_initialized": [True]}, r"layers_initialized is \[True\]"),
        ({"layers_initialized": 1}, "layers_initialized is 1"),
        ({"layers_initialized": "ab"}, "layers_initialized is 'ab'"),
        ({"layers_initialized": [torch.ones(2), True]}, "layers_initialized is "),
        ({"state_dict": []}, "state_dict is a list"),
        ({"state_dict": {}}, "not a checkpoint of a ResidualQuantization"),
        ({"state_dict": {"weight": torch.ones(1)}}, "It holds weight"),
    ],
)
def test_parts_that_disagree_are_named(lightning, changes, message):
    with pytest.raises(MalformedCheckpointError, match=message):
        load_checkpoint(lightning(**changes))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({CENTROIDS.format(0): None}, "0.centroids is missing"),
        ({CENTROIDS.format(1): torch.ones(3, 9)}, "of 9 numbers, .* layer 0 have 2"),
        ({CENTROIDS.format(1): torch.ones(3)}, r"shape \(3,\); expected \(K, E\)"),
        ({CENTROIDS.format(1): torch.ones(0, 2)}, r"shape \(0, 2\); expected \(K, E\)"),
        ({CENTROIDS.format(1): "text"}, "of type str; expected a tensor"),
        ({CENTROIDS.format(1): torch.ones(3, 2).to_sparse()}, "sparse"),
        ({CENTROIDS.format(1): torch.ones(3, 2) * 1j}, "ComplexFloatStorage"),
        ({CENTROIDS.format(1): torch.ones(1).expand(10**6, 10**6)}, "only 4 bytes"),
        ({CENTROIDS.format(3): torch.ones(3, 2)}, "list.3.centroids has no place"),
        ({"encoder.model.2.bias": None}, "encoder.model.2.bias is missing"),
        ({"encoder.model.2.bias": torch.ones(9)}, r"bias has shape \(9,\); expected \(4,\)"),
        ({"encoder.model.2.weight": None}, "encoder.model.2.weight is missing"),
        ({"encoder.model.5.weight": torch.ones(2, 9)}, "takes 9 numbers, .* before it gives 4"),
        ({"encoder.model.5.weight": torch.ones(3, 4)}, "last linear gives 3 .* centroids have 2"),
        ({"decoder.model.0.weight": torch.ones(4, 3)}, "first linear takes 3 .* centroids have 2"),
        ({"decoder.model.5.weight": torch.ones(9, 5)}, "last linear gives 9 .*embeddings have 6"),
        ({"encoder.model.3.weight": torch.ones(2, 2)}, "model.8.weight is missing"),
        ({"encoder.extra": torch.ones(2)}, "encoder.extra has no place"),
        (
            {"quantization_layer_list.0.project_in": torch.ones(2, 2)},
            r"project_in, of shape \(2, 2\), has no place .* centroids alone decide",
        ),
        ({"normalization_layer.0.bias": torch.ones(5)}, r"\(5,\); expected \(6,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(lightning, rq_vae_spec, state, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(lightning(rq_vae_spec, state=state))


def test_an_encoder_without_a_decoder_is_refused(lightning, rq_vae_spec, make_model):
    names = [name for name in make_model(rq_vae_spec).state_dict() if name.startswith("decoder")]
    with pytest.raises(MalformedCheckpointError, match="could not be decoded"):
        load_checkpoint(lightning(rq_vae_spec, state=dict.fromkeys(names)))


# --- training that had not finished --------------------------------------------------------


def test_a_layer_recorded_as_uninitialised_refuses_the_model(lightning):
    path = lightning(layers_initialized=[True, False], current_layer=0)
    with pytest.raises(DegenerateModelError, match=r"layer 1: .* never initialised"):
        load_checkpoint(path)
    loaded = load_checkpoint(path, overrides=Overrides(allow_degenerate=True))
    assert mentions(loaded.warnings, "layer 1", "never initialised")


def test_training_that_stopped_before_the_last_layer_is_warned_of(lightning):
    loaded = load_checkpoint(lightning(current_layer=0))
    assert mentions(loaded.warnings, "at layer 0", "had not finished")


def test_layers_trained_together_stay_at_layer_0_without_a_warning(lightning, rq_vae_spec):
    assert load_checkpoint(lightning(rq_vae_spec, current_layer=0)).warnings == ()


def test_a_file_that_does_not_record_initialisation_is_warned_of(lightning):
    loaded = load_checkpoint(lightning(without=["layers_initialized", "current_layer"]))
    assert mentions(loaded.warnings, "does not record which layers")
