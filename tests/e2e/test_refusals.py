"""A server that cannot start says why in one sentence, and nothing of a bad file runs."""

from __future__ import annotations

import os
import shutil

import pytest
import torch


@pytest.fixture
def checkpoint(reference_dir):
    return reference_dir / "digits_rkmeans/model.ckpt"


FREE = ("--port", 0, "--metrics-port", 0)


def test_a_port_in_use(refused, digits_server, checkpoint):
    port = digits_server.target.rpartition(":")[2]
    told = refused("--checkpoint", checkpoint, "--port", port, "--metrics-port", 0)
    assert port in told
    assert "--port" in told


def test_a_metrics_port_in_use(refused, digits_server, checkpoint):
    port = digits_server.metrics.rpartition(":")[2]
    told = refused("--checkpoint", checkpoint, "--port", 0, "--metrics-port", port)
    assert port in told
    assert "--metrics-port" in told


@pytest.mark.parametrize("processes", [1, 2])
def test_an_admin_port_that_is_the_service_s(refused, checkpoint, processes):
    told = refused(
        *("--checkpoint", checkpoint, "--port", 7000, "--admin-port", 7000, "--metrics-port", 0),
        *("--processes", processes),
    )
    assert "it would share its connections with 127.0.0.1:7000, of --port or --host" in told


def test_a_missing_checkpoint(refused):
    assert "nowhere.ckpt" in refused("--checkpoint", "nowhere.ckpt", *FREE)


def test_no_checkpoint(refused):
    assert "--checkpoint" in refused(*FREE)


def test_a_truncated_checkpoint(refused, checkpoint, tmp_path):
    broken = tmp_path / "truncated.ckpt"
    broken.write_bytes(checkpoint.read_bytes()[:-5000])
    assert "truncated.ckpt" in refused("--checkpoint", broken, *FREE)


def test_a_file_that_is_no_checkpoint(refused, reference_dir):
    told = refused("--checkpoint", reference_dir / "data/movies.tsv", *FREE)
    assert "movies.tsv" in told


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("--checkpoint", tmp_path / "empty", *FREE)


def test_a_flipped_bit(refused, root_checkpoint, tmp_path):
    copy = tmp_path / "movies"
    shutil.copytree(root_checkpoint, copy)
    weights = copy / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-7] ^= 0x10
    weights.write_bytes(damaged)
    told = refused("--checkpoint", copy, *FREE)
    assert "sha256" in told
    assert "movies" in told


@pytest.fixture
def root_checkpoint(request):
    return request.config.rootpath / "checkpoints/movies"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--port", "70000"), "65535"),
        (("--prot", "1"), "--port"),
        (("--device", "tpu"), "tpu"),
        (("--max-batch-rows", "0"), "max-batch-rows"),
        (("--max-batch-bytes", "1000"), "max_batch_bytes"),
        (("--grace", "soon"), "soon"),
        (("--max-stall", "inf"), "max_stall is inf"),
    ],
)
def test_a_bad_flag(refused, checkpoint, arguments, words):
    assert words in refused("--checkpoint", checkpoint, *FREE, *arguments)


def test_a_device_that_is_not_there(refused, checkpoint):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "cuda" in refused("--checkpoint", checkpoint, *FREE, "--device", "cuda")


def test_a_bad_environment_twin(refused, checkpoint):
    told = refused("--checkpoint", checkpoint, *FREE, env={"SEMID_SERVE_GRACE": "soon"})
    assert "soon" in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_batch_rowz = 3", "max_batch_rowz"),
        ("max_batch_rows = ", "TOML"),
        ("max_batch_rows = -1", "-1"),
        ("tls_cert = true", "'tls_cert' to true"),
        ("[limits]\nmax_batch_rows = 1", "limits"),
    ],
)
def test_a_bad_configuration_file(refused, checkpoint, tmp_path, text, words):
    config = tmp_path / "semid.toml"
    config.write_text(text)
    assert words in refused("--checkpoint", checkpoint, *FREE, "--config", config)


class _Malicious:
    """What torch.load of an unknown file would run, were it allowed to."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(refused, checkpoint, tmp_path, name):
    marker = tmp_path / "it-ran"
    contents = torch.load(checkpoint, weights_only=True) if name == "model.ckpt" else {}
    torch.save({**contents, "callbacks": _Malicious(marker)}, tmp_path / name)
    told = refused("--checkpoint", tmp_path / name, *FREE)
    assert name in told
    assert "mkdir" in told
    assert not marker.exists()


def test_layers_that_were_never_initialised(refused, checkpoint, tmp_path):
    contents = torch.load(checkpoint, weights_only=True)
    contents["state_dict"]["quantization_layer_list.1.centroids"].zero_()
    torch.save(contents, tmp_path / "untrained.ckpt")
    told = refused("--checkpoint", tmp_path / "untrained.ckpt", *FREE)
    assert "1" in told
    assert "untrained.ckpt" in told
