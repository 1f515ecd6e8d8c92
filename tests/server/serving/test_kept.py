"""Versions of models that are kept in memory, and handed from process to process."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch

from semid_server.checkpoint import Overrides, load_checkpoint
from semid_server.serving.kept import Kept, read


def described(checkpoint):
    """All that a server needs of a checkpoint, in a form that can be compared."""
    norms = checkpoint.calibration and [
        checkpoint.calibration.input_norm,
        *(layer.tolist() for layer in checkpoint.calibration.residual_norms),
    ]
    return (
        *(checkpoint.name, checkpoint.fingerprint, checkpoint.spec, norms, checkpoint.path),
        *(checkpoint.notes, checkpoint.warnings),
    )


@pytest.mark.parametrize("overrides", [Overrides(), Overrides(name="other")])
def test_what_was_kept_is_what_was_read(reference_set, overrides):
    path = reference_set.checkpoint
    kept, before = read(path, overrides)
    after = kept.load(path, overrides)
    assert described(after) == described(before)
    state = after.model.state_dict()
    for key, tensor in before.model.state_dict().items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=0)


@pytest.fixture
def path(reference_dir, tmp_path):
    copy = tmp_path / "model.ckpt"
    copy.write_bytes((reference_dir / "digits_rkmeans" / "model.ckpt").read_bytes())
    return copy


def test_it_stays_whatever_becomes_of_its_path(path):
    fingerprint = load_checkpoint(path).fingerprint
    kept, _ = read(path, Overrides())
    path.unlink()
    for _ in range(2):
        assert kept.load(path, Overrides()).fingerprint == fingerprint


def test_nobody_can_change_it(path):
    kept, _ = read(path, Overrides())
    with pytest.raises(PermissionError):
        os.pwrite(kept._descriptor, b"x", 100)
    with pytest.raises(PermissionError):
        os.ftruncate(kept._descriptor, 100)


def test_it_is_handed_on_after_a_message_and_outlives_who_had_it(path):
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        kept, checkpoint = read(path, Overrides())
        kept.send(ours, "a message")
        kept.close()
        assert theirs.recv() == "a message"
        got = Kept.receive(theirs)
        assert not os.get_inheritable(got._descriptor)
        assert got.load(path, Overrides()).fingerprint == checkpoint.fingerprint


def test_who_waits_for_one_hears_of_the_other_ends_end():
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    with theirs, pytest.raises(EOFError):
        Kept.receive(theirs)


def test_it_is_gone_once_nobody_refers_to_it(path):
    kept, _ = read(path, Overrides())
    descriptor = kept._descriptor
    del kept
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
