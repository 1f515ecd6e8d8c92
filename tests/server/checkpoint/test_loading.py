"""Paths that lead to no checkpoint: each is told what it is."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semid_server.checkpoint import inspect_checkpoint, load_checkpoint, save_checkpoint
from semid_server.errors import CheckpointError, MalformedCheckpointError


def missing(path):
    pass


def folder(path):
    path.mkdir()


def empty(path):
    path.write_bytes(b"")


def array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def text(path):
    path.write_text("hello, world")


def tensor(path):
    torch.save(torch.zeros(3), path)


def weights_of_something_else(path):
    torch.save({"conv1.weight": torch.zeros(3)}, path)


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("read", [load_checkpoint, inspect_checkpoint])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "no file and no folder there"),
        (folder, "a folder without config.json"),
        (pipe, "not a regular file but a pipe"),
        (device, "not a regular file but a device"),
        (empty, "an empty file"),
        (array, "a NumPy array"),
        (text, "not a checkpoint"),
        (tensor, "holds a Tensor; expected"),
        (weights_of_something_else, r"It holds conv1\.weight"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, make, message, read):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(MalformedCheckpointError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_of_a_folder_is_named_and_not_waited_for(
    tmp_path, spec, model, file
):
    save_checkpoint(tmp_path / "a", model=model, spec=spec, name="a")
    (tmp_path / "a" / file).unlink()
    os.mkfifo(tmp_path / "a" / file)
    with pytest.raises(MalformedCheckpointError, match=f"{file}: .* not a regular file but a pipe"):
        load_checkpoint(tmp_path / "a")


def test_links_to_files_are_followed_as_kubernetes_mounts_them(tmp_path, spec, model):
    save_checkpoint(tmp_path / "..data_1", model=model, spec=spec, name="a")
    (tmp_path / "..data").symlink_to("..data_1")
    (tmp_path / "mounted").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "mounted" / file).symlink_to(f"../..data/{file}")
    assert load_checkpoint(tmp_path / "mounted").spec == spec


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_one_file_of_a_folder_points_to_the_folder(tmp_path, spec, model, file):
    save_checkpoint(tmp_path / "a", model=model, spec=spec, name="a")
    with pytest.raises(MalformedCheckpointError, match="name the folder"):
        load_checkpoint(tmp_path / "a" / file)


def test_a_path_may_be_given_as_text(lightning):
    assert load_checkpoint(str(lightning())).format == "grid-lightning"


def test_every_format_gives_a_round_trip_through_the_native_one(tmp_path, reference_set):
    original = load_checkpoint(reference_set.checkpoint)
    save_checkpoint(tmp_path / "a", model=original.model, spec=original.spec, name=original.name)
    copy = load_checkpoint(tmp_path / "a")
    assert copy.fingerprint == original.fingerprint
    assert copy.spec == original.spec
    rows = torch.tensor(reference_set.embeddings[:50])
    assert torch.equal(copy.model.predict_step(rows).codes, original.model.predict_step(rows).codes)


WEIGHT = "quantization_layer_list.1.centroids"
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.text(max_size=2),
    st.lists(st.integers(0, 1), max_size=3),
    st.just({}),
    st.builds(torch.nn.MSELoss),
    st.builds(torch.zeros, st.lists(st.integers(0, 4), max_size=3)),
    st.builds(torch.rand, st.sampled_from([(3, 4), (3, 2), (1, 4)])),
)
PLACES = st.sampled_from(
    [
        ("state_dict",),
        ("state_dict", WEIGHT),
        ("state_dict", "encoder.model.0.weight"),
        ("state_dict", "encoder.model.2.weight"),
        ("state_dict", "normalization_layer.0.weight"),
        ("state_dict", "normalization_layer.0.num_batches_tracked"),
        ("hyper_parameters",),
        ("hyper_parameters", "n_layers"),
        ("hyper_parameters", "normalize_residuals"),
        ("hyper_parameters", "train_layer_wise"),
        ("optimizer_states",),
        ("layers_initialized",),
        ("current_layer",),
        ("model_state_dict",),
        ("num_hierarchies",),
        ("codebook_width",),
        ("embedding_dim",),
    ]
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(changes=st.dictionaries(PLACES, VALUES, min_size=1, max_size=2), plain=st.booleans())
def test_a_file_with_anything_in_any_place_loads_or_is_refused(
    lightning, tmp_path, spec, changes, plain
):
    file = torch.load(lightning(spec), weights_only=True)
    if plain:
        file["model_state_dict"] = file.pop("state_dict")
    for (key, *inner), value in sorted(changes.items()):
        if not inner:
            file[key] = value
        elif isinstance(file.get(key), dict):
            file[key][inner[0]] = value
    torch.save(file, tmp_path / "changed.pt")
    try:
        loaded = load_checkpoint(tmp_path / "changed.pt")
    except CheckpointError as error:
        assert error.problem  # noqa: PT017 (it may be raised, and it may not)
    else:
        assert loaded.model.predict_step(torch.rand(1, loaded.spec.input_dim)).codes.shape[0] == 1
