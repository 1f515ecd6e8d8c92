"""Paths that lead to no checkpoint: each is told what it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from semid_server.checkpoint import inspect_checkpoint, load_checkpoint, save_checkpoint
from semid_server.errors import MalformedCheckpointError


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


@pytest.mark.parametrize("read", [load_checkpoint, inspect_checkpoint])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "no file and no folder there"),
        (folder, "a folder without config.json"),
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
