"""`semid inspect`: what a checkpoint holds, for people and for programs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from semid_server.checkpoint import load_checkpoint
from semid_server.cli.inspect import inspect

KEYS = [
    "path",
    "format",
    "name",
    "fingerprint",
    "kind",
    "input_dim",
    "codebook_widths",
    "embedding_dim",
    "normalize_residuals",
    "encoder_hidden_dims",
    "decoder_hidden_dims",
    "activation",
    "batch_norm",
    "batch_norm_eps",
    "normalize_input",
    "n_layers",
    "calibrated",
    "layers",
    "notes",
    "warnings",
    "problems",
]


def run(*arguments, **environment):
    return CliRunner().invoke(inspect, [str(a) for a in arguments], env=environment)


def test_json_has_the_same_keys_for_every_checkpoint(reference_set):
    result = run(reference_set.checkpoint, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert list(report) == KEYS
    assert report["fingerprint"] == load_checkpoint(reference_set.checkpoint).fingerprint
    assert len(report["layers"]) == report["n_layers"] == reference_set.info["n_layers"]
    for layer in report["layers"]:
        assert layer["norm_min"] <= layer["norm_median"] <= layer["norm_max"]
        assert layer["codebook_width"] == reference_set.info["codebook_width"]


def test_text_says_what_json_says(reference_set):
    report = json.loads(run(reference_set.checkpoint, SEMID_INSPECT_JSON="1").stdout)
    text = run(reference_set.checkpoint).stdout
    for key in ("format", "kind", "fingerprint"):
        assert report[key] in text
    for key in ("notes", "warnings"):
        assert (f"\n{key}\n" in text) == bool(report[key])
        for sentence in report[key]:
            assert f"  - {sentence}\n" in text


def test_columns_of_the_layers_stay_under_their_titles(reference_dir):
    lines = run(reference_dir / "movies_rkmeans" / "model.ckpt").stdout.splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("layer"))
    assert {len(line) for line in lines[head : head + 4]} == {len(lines[head])}


def test_the_networks_of_an_rq_vae_are_shown(reference_dir):
    text = run(reference_dir / "digits_rqvae" / "model.ckpt").stdout
    assert "64-128-64-32, relu" in text
    assert "32-64-128-64, relu" in text
    assert "batch norm (eps 1e-05), then brought to length 1" in text


def test_overrides_are_shown_in_place_of_the_files_silence(reference_dir):
    text = run(reference_dir / "digits_rqvae" / "model.ckpt", "--activation", "tanh").stdout
    assert "64-128-64-32, tanh" in text


@pytest.mark.parametrize("flag", [[], ["--json"]], ids=["text", "json"])
def test_a_degenerate_model_is_described_with_its_problem(reference_dir, flag):
    result = run(reference_dir / "digits_rqvae" / "initial.pt", *flag)
    assert result.exit_code == 0
    assert "problems" in result.stdout
    assert "layer 2: all 16 centroids are zero" in result.stdout


def test_json_stays_json_when_a_model_holds_nan(tmp_path):
    state = {"quantization_layer_list.0.centroids": torch.full((2, 3), float("nan"))}
    torch.save({"model_state_dict": state}, tmp_path / "nan.pt")
    result = run(tmp_path / "nan.pt", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout, parse_constant=pytest.fail)
    assert report["layers"][0]["norm_max"] is None
    assert "6 NaN or infinite" in report["problems"][0]


def test_what_cannot_be_read_is_one_sentence_and_a_failure(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "noise.ckpt").write_bytes(bytes(range(256)))
    (tmp_path / "loop.ckpt").symlink_to("loop.ckpt")
    for name in ("array.npy", "empty.ckpt", "folder", "noise.ckpt", "missing", "loop.ckpt"):
        result = run(tmp_path / name)
        assert result.exit_code == 1, name
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"Error: {tmp_path / name}: ")
