"""semid's own format: what is written is what is read, bit for bit, or it is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semid_server.checkpoint import (
    Overrides,
    calibration_fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from semid_server.errors import (
    CheckpointError,
    ConfigurationError,
    DegenerateModelError,
    MalformedCheckpointError,
)
from semid_server.model import Activation, Calibration, ModelKind, build_model

CONFIG, TENSORS = "config.json", "model.safetensors"


def calibration_of(spec) -> Calibration:
    return Calibration(
        input_norm=1.5,
        residual_norms=tuple(torch.rand(width) + 0.1 for width in spec.codebook_widths),
    )


@pytest.fixture
def folder(tmp_path, spec, model):
    path = tmp_path / "saved"
    save_checkpoint(
        path,
        model=model,
        spec=spec,
        name="small",
        calibration=calibration_of(spec),
        provenance={"source": "a test"},
        notes=["assumed"],
        warnings=["beware"],
    )
    return path


def edit_config(folder, change) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder, change, *, describe=False) -> None:
    """Change the tensors; with ``describe``, config.json is made to agree with them."""
    tensors = safetensors.torch.load((folder / TENSORS).read_bytes())
    change(tensors)
    (folder / TENSORS).write_bytes(safetensors.torch.save(tensors))
    if describe:

        def record(tensor):
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            return {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "sha256": hashlib.sha256(data).hexdigest(),
            }

        described = {name: record(tensor) for name, tensor in tensors.items()}
        edit_config(folder, lambda config: config.update(tensors=described))


def test_a_saved_model_loads_as_it_was(folder, spec, model):
    loaded = load_checkpoint(folder)
    assert loaded.spec == spec
    assert loaded.name == "small"
    assert loaded.format == "semid"
    assert loaded.path == folder
    assert loaded.notes == ("assumed",)
    assert "beware" in loaded.warnings
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


def test_a_loaded_model_is_ready_to_predict_and_counts_as_initialised(folder, spec):
    loaded = load_checkpoint(folder).model
    assert not loaded.training
    assert all(layer.is_initialized for layer in loaded.layers)
    assert loaded.predict_step(torch.ones(2, spec.input_dim)).codes.shape == (2, 2)


def test_save_returns_the_fingerprint_that_load_finds(tmp_path, spec, model):
    digest = save_checkpoint(tmp_path / "a", model=model, spec=spec, name="a")
    assert load_checkpoint(tmp_path / "a").fingerprint == digest


def test_calibration_comes_back_exactly(tmp_path, spec, model):
    calibration = calibration_of(spec)
    save_checkpoint(tmp_path / "a", model=model, spec=spec, name="a", calibration=calibration)
    loaded = load_checkpoint(tmp_path / "a").calibration
    assert loaded.input_norm == calibration.input_norm
    for ours, theirs in zip(loaded.residual_norms, calibration.residual_norms, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_calibration_that_loading_refuses_is_not_saved(tmp_path, spec, model, value):
    sound = calibration_of(spec)
    norms = sound.residual_norms
    for name, broken in (
        ("input_norm", replace(sound, input_norm=value)),
        (r"residual_norms\.0", replace(sound, residual_norms=(norms[0] * value, *norms[1:]))),
    ):
        with pytest.raises(ValueError, match=rf"calibration\.{name} holds .*; expected a length"):
            save_checkpoint(tmp_path / "a", model=model, spec=spec, name="a", calibration=broken)
        assert not (tmp_path / "a").exists()


def test_a_calibration_has_a_fingerprint_of_its_own(spec):
    calibration = calibration_of(spec)
    norms = calibration.residual_norms
    others = [
        replace(calibration, input_norm=2 * calibration.input_norm),
        replace(calibration, residual_norms=(norms[0] + 1, *norms[1:])),
        replace(calibration, residual_norms=norms[:-1]),
    ]
    found = {calibration_fingerprint(one) for one in (calibration, *others)}
    assert len(found) == 1 + len(others)
    again = Calibration(calibration.input_norm, tuple(norm.double() for norm in norms))
    assert calibration_fingerprint(again) == calibration_fingerprint(calibration)
    assert not calibration_fingerprint(None)


def test_calibration_and_name_are_not_in_the_fingerprint(tmp_path, spec, model, folder):
    plain = save_checkpoint(tmp_path / "plain", model=model, spec=spec, name="other")
    assert plain == load_checkpoint(folder).fingerprint
    assert load_checkpoint(tmp_path / "plain").calibration is None


def test_saving_twice_writes_the_same_bytes(tmp_path, spec, model):
    for name in "ab":
        save_checkpoint(tmp_path / name, model=model, spec=spec, name="x")
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_half_precision_weights_are_read_as_the_numbers_they_are(folder, spec):
    edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {k: v.bfloat16() for k, v in tensors.items() if "centroids" in k}
        ),
        describe=True,
    )
    with pytest.raises(MalformedCheckpointError, match="fingerprint is"):
        load_checkpoint(folder)  # rounding gave another model
    tensors = safetensors.torch.load((folder / TENSORS).read_bytes())
    halved = build_model(spec)
    weights = {k: v for k, v in tensors.items() if not k.startswith("calibration")}
    halved.load_state_dict(weights)
    digest = save_checkpoint(folder.parent / "b", model=halved, spec=spec, name="b")
    edit_config(folder, lambda config: config.update(fingerprint=digest))
    loaded = load_checkpoint(folder)
    assert loaded.fingerprint == digest
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())


# --- damage --------------------------------------------------------------------------------


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_harmless(folder, data):
    before = load_checkpoint(folder)
    path = folder / data.draw(st.sampled_from([CONFIG, TENSORS]))
    sound = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(sound) - 1))
    broken = bytearray(sound)
    broken[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(broken))
    try:
        after = load_checkpoint(folder)
    except MalformedCheckpointError as error:
        assert path.name in str(error)  # noqa: PT017 (it may be raised, and it may not)
    else:
        assert path.name == CONFIG  # no bit of the tensors may go unnoticed
        assert after.fingerprint == before.fingerprint
        assert after.spec.kind == before.spec.kind
        assert after.calibration.input_norm == before.calibration.input_norm
        for name, tensor in before.model.state_dict().items():
            assert torch.equal(after.model.state_dict()[name], tensor)
    finally:
        path.write_bytes(sound)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_truncated_file_is_refused(folder, data):
    path = folder / data.draw(st.sampled_from([CONFIG, TENSORS]))
    sound = path.read_bytes()
    # without its last newline, config.json is still whole
    path.write_bytes(sound[: data.draw(st.integers(0, len(sound) - 2))])
    try:
        with pytest.raises(MalformedCheckpointError, match=path.name):
            load_checkpoint(folder)
    finally:
        path.write_bytes(sound)


def test_a_flipped_weight_is_located(folder):
    path = folder / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(MalformedCheckpointError, match=r"tensor \S+ has sha256 \w+, but config"):
        load_checkpoint(folder)


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(MalformedCheckpointError, match=file):
        load_checkpoint(folder)


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda t: t.pop("quantization_layer_list.1.centroids"))
    with pytest.raises(MalformedCheckpointError, match=r"list\.1\.centroids is missing"):
        load_checkpoint(folder)


def test_a_missing_tensor_is_named_even_if_both_files_agree(folder):
    edit_tensors(folder, lambda t: t.pop("quantization_layer_list.1.centroids"), describe=True)
    with pytest.raises(MalformedCheckpointError, match=r"list\.1\.centroids is missing"):
        load_checkpoint(folder)


def test_an_extra_tensor_is_named(folder):
    edit_tensors(folder, lambda t: t.update(surplus=torch.zeros(2)))
    with pytest.raises(MalformedCheckpointError, match="surplus is not listed"):
        load_checkpoint(folder)


def test_an_extra_tensor_is_named_even_if_both_files_agree(folder):
    edit_tensors(folder, lambda t: t.update(surplus=torch.zeros(2)), describe=True)
    with pytest.raises(MalformedCheckpointError, match="surplus has no place"):
        load_checkpoint(folder)


def test_a_codebook_width_at_odds_with_the_tensors_is_refused_with_both_numbers(folder):
    edit_config(folder, lambda config: config["model"].update(codebook_widths=[3, 5]))
    with pytest.raises(MalformedCheckpointError, match=r"shape \(3, \d\); expected \(5, \d\)"):
        load_checkpoint(folder)


def test_a_wrong_shape_is_refused_with_both_shapes(folder):
    name = "quantization_layer_list.0.centroids"
    edit_tensors(folder, lambda t: t.update({name: t[name].t().contiguous()}))
    with pytest.raises(MalformedCheckpointError, match=r"shape \[\d, 3\], but config.json records"):
        load_checkpoint(folder)


def test_double_precision_weights_are_refused(folder):
    name = "quantization_layer_list.0.centroids"
    edit_tensors(folder, lambda t: t.update({name: t[name].double()}), describe=True)
    with pytest.raises(MalformedCheckpointError, match="is float64; expected float32 or"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "semi"}, "format is 'semi'; expected 'semid'"),
        ({"format_version": 2}, "format_version is 2; this semid reads version 1.*newer"),
        ({"format_version": True}, "format_version is True"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"name": ""}, "name is empty"),
        ({"fingerprint": "0" * 64}, "fingerprint is 0000"),
        ({"surprise": 1}, "surprise is not a field"),
        ({"provenance": {"source": 3}}, "provenance.source is 3"),
        ({"notes": "text"}, "notes is 'text'"),
        ({"tensors": {"a": 1}}, "tensors.a is 1"),
        ({"model": {}}, "model.activation is missing"),
    ],
)
def test_a_wrong_field_of_the_config_is_named(folder, change, message):
    edit_config(folder, lambda config: config.update(change))
    with pytest.raises(MalformedCheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert CONFIG in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "k-means"}, "model.kind is 'k-means'; expected one of rq-kmeans"),
        ({"activation": "ReLU"}, "model.activation is 'ReLU'; expected one of relu"),
        ({"normalize_residuals": 1}, "model.normalize_residuals is 1"),
        ({"codebook_widths": []}, "codebook_widths is empty"),
        ({"codebook_widths": [3, 0]}, "codebook_widths holds 0"),
        ({"codebook_widths": [3, 3.0]}, r"codebook_widths holds 3\.0"),
        ({"input_dim": 0}, "input_dim is 0"),
        ({"n_layers": 2}, "model.n_layers is not a field"),
        ({"batch_norm_eps": 1}, "batch_norm_eps is 1; expected a value of type float"),
    ],
)
def test_a_wrong_field_of_the_model_is_named(folder, change, message):
    edit_config(folder, lambda config: config["model"].update(change))
    with pytest.raises(MalformedCheckpointError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("switch", ["normalize_residuals", "normalize_input"])
def test_a_changed_switch_is_seen_by_the_fingerprint(folder, switch):
    edit_config(folder, lambda c: c["model"].update({switch: not c["model"][switch]}))
    with pytest.raises(MalformedCheckpointError, match=r"fingerprint is .* was changed"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": NaN}', "\xff", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(MalformedCheckpointError, match=CONFIG):
        load_checkpoint(folder)


def test_a_repeated_field_is_refused(folder):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"name"', '"name": "a", "name"', 1))
    with pytest.raises(MalformedCheckpointError, match="name stands there 2 times"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("calibration.input_norm"), "input_norm is missing"),
        (
            lambda t: t.update({"calibration.residual_norms.2": torch.zeros(3)}),
            r"residual_norms\.2 is no part",
        ),
        (
            lambda t: t.update({"calibration.residual_norms.1": torch.zeros(4)}),
            r"\(4,\); expected torch.float32 \(3,\)",
        ),
        (
            lambda t: t.update({"calibration.residual_norms.1": -torch.ones(3)}),
            "not a length",
        ),
    ],
)
def test_a_calibration_at_odds_with_the_model_is_refused(folder, change, message):
    edit_tensors(folder, change, describe=True)
    with pytest.raises(MalformedCheckpointError, match=message):
        load_checkpoint(folder)


# --- overrides -----------------------------------------------------------------------------


def test_the_name_can_be_overridden(folder):
    assert load_checkpoint(folder, overrides=Overrides(name="other")).name == "other"


@pytest.mark.parametrize(
    "overrides",
    [
        Overrides(kind=ModelKind.R_VQ),
        Overrides(activation=Activation.TANH),
        Overrides(batch_norm_eps=0.1),
    ],
)
def test_what_the_checkpoint_records_cannot_be_overridden(folder, overrides):
    with pytest.raises(ConfigurationError, match="is recorded as"):
        load_checkpoint(folder, overrides=overrides)


def test_an_override_that_agrees_with_the_record_is_fine(folder, spec):
    overrides = Overrides(kind=spec.kind, normalize_residuals=spec.normalize_residuals)
    assert load_checkpoint(folder, overrides=overrides).spec == spec


# --- writing -------------------------------------------------------------------------------


def test_a_checkpoint_is_not_overwritten_without_force(folder, spec, model):
    before = (folder / CONFIG).read_bytes()
    with pytest.raises(CheckpointError, match="already there; replace it with --force"):
        save_checkpoint(folder, model=model, spec=spec, name="new")
    assert (folder / CONFIG).read_bytes() == before


def test_force_replaces_a_checkpoint(folder, spec, model):
    save_checkpoint(folder, model=model, spec=spec, name="new", force=True)
    assert load_checkpoint(folder).name == "new"
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_force_does_not_replace_what_is_no_checkpoint(tmp_path, spec, model):
    for precious in (tmp_path / "thesis", tmp_path / "file"):
        if precious.name == "thesis":
            precious.mkdir()
            (precious / "chapter").write_text("1")
        else:
            precious.write_text("2")
        with pytest.raises(CheckpointError, match="not a checkpoint folder"):
            save_checkpoint(precious, model=model, spec=spec, name="new", force=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "1"
    assert (tmp_path / "file").read_text() == "2"


def test_an_empty_folder_may_be_filled_and_parents_are_made(tmp_path, spec, model):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b"):
        save_checkpoint(path, model=model, spec=spec, name="new")
        assert load_checkpoint(path).name == "new"


# In a process of its own: the limit would also hold for the file that the tests' output goes to.
SAVE_WITHOUT_ROOM = """
import resource, sys
from pathlib import Path
from semid_server.checkpoint import load_checkpoint, save_checkpoint

folder = Path(sys.argv[1])
old = load_checkpoint(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # bytes in a file, as on a full disk
save_checkpoint(folder, model=old.model, spec=old.spec, name="new", force=True)
"""


def test_what_lies_beside_a_checkpoint_may_be_taken_along(folder, spec, model):
    (folder / "README.md").write_text("how it was made")
    (folder / "plots").mkdir()
    (folder / "plots" / "config.json").write_text("a")
    (folder / "newest.md").symlink_to("README.md")
    save_checkpoint(folder, model=model, spec=spec, name="b", beside=folder, force=True)
    assert load_checkpoint(folder).name == "b"
    assert (folder / "README.md").read_text() == "how it was made"
    assert (folder / "plots" / "config.json").read_text() == "a"
    assert (folder / "newest.md").is_symlink()


def test_a_link_to_a_checkpoint_is_not_replaced(folder, spec, model):
    link = folder.with_name("link")
    link.symlink_to(folder)
    with pytest.raises(CheckpointError, match="a link, which is not replaced"):
        save_checkpoint(link, model=model, spec=spec, name="b", force=True)
    assert link.is_symlink()


def test_a_failed_write_leaves_nothing_and_keeps_the_old(folder):
    done = subprocess.run(
        [sys.executable, "-c", SAVE_WITHOUT_ROOM, folder],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert load_checkpoint(folder).name == "small"
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_a_model_of_another_shape_than_its_spec_is_not_saved(tmp_path, spec, model):
    wrong = replace(spec, codebook_widths=(3, 4))
    with pytest.raises(ValueError, match="its spec needs"):
        save_checkpoint(tmp_path / "a", model=model, spec=wrong, name="a")
    assert not (tmp_path / "a").exists()


def test_a_degenerate_model_is_saved_but_not_loaded_unless_allowed(tmp_path, spec):
    save_checkpoint(tmp_path / "a", model=build_model(spec), spec=spec, name="a")
    with pytest.raises(DegenerateModelError, match="never initialised"):
        load_checkpoint(tmp_path / "a")
    allowed = load_checkpoint(tmp_path / "a", overrides=Overrides(allow_degenerate=True))
    assert any("never initialised" in warning for warning in allowed.warnings)
