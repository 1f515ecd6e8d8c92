"""`semid import`: a foreign checkpoint becomes a folder, and what was assumed is said."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from semid_server.checkpoint import load_checkpoint
from semid_server.cli.import_ import import_
from semid_server.cli.inspect import inspect


@pytest.fixture
def run():
    def invoke(*arguments, **environment):
        return CliRunner().invoke(import_, [str(a) for a in arguments], env=environment)

    return invoke


@pytest.fixture
def ckpt(reference_dir) -> Path:
    return reference_dir / "digits_rqvae" / "model.ckpt"


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


def test_an_imported_checkpoint_is_the_original_under_the_folders_name(run, ckpt, tmp_path):
    result = run(ckpt, "-o", tmp_path / "checkpoints" / "digits")
    assert result.exit_code == 0, result.output
    original, loaded = load_checkpoint(ckpt), load_checkpoint(tmp_path / "checkpoints" / "digits")
    assert loaded.fingerprint == original.fingerprint
    assert loaded.notes == original.notes
    assert loaded.name == "digits"
    assert loaded.fingerprint in only_line(result.stdout)


def test_what_was_assumed_goes_to_the_error_stream(run, ckpt, tmp_path):
    result = run(ckpt, "-o", tmp_path / "a")
    assert all(line.startswith("note: ") for line in result.stderr.splitlines())
    assert "--activation" in result.stderr


def test_provenance_names_the_source_and_its_digest(run, ckpt, tmp_path):
    run(ckpt, "-o", tmp_path / "a")
    provenance = json.loads((tmp_path / "a" / "config.json").read_text())["provenance"]
    assert provenance["source"] == "model.ckpt"
    assert provenance["source_format"] == "grid-lightning"
    assert provenance["source_sha256"] == hashlib.sha256(ckpt.read_bytes()).hexdigest()


def test_the_movies_checkpoint_is_what_import_makes_today(run, reference_dir, tmp_path):
    shipped = Path(__file__).parents[3] / "checkpoints" / "movies"
    run(reference_dir / "movies_rkmeans_64" / "model.ckpt", "-o", tmp_path / "movies")
    made = [json.loads((f / "config.json").read_text()) for f in (shipped, tmp_path / "movies")]
    for config in made:
        assert config["provenance"].pop("written_by").startswith("semid ")
    assert made[0] == made[1]
    tensors = "model.safetensors"
    assert (tmp_path / "movies" / tensors).read_bytes() == (shipped / tensors).read_bytes()
    assert load_checkpoint(shipped).fingerprint in (shipped / "README.md").read_text()


@pytest.mark.parametrize("how", ["flags", "variables"])
def test_every_assumption_can_be_overridden(run, ckpt, tmp_path, how):
    said = {
        "name": "mine",
        "kind": "rq-vae",
        "activation": "gelu",
        "batch_norm_eps": "0.001",
    }
    switches = {"normalize_input": False, "normalize_residuals": True}
    if how == "flags":
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in said.items()]
        flags += [f"--{'' if on else 'no-'}{k.replace('_', '-')}" for k, on in switches.items()]
        result = run(ckpt, "-o", tmp_path / "a", *flags)
    else:
        variables = {**said, **{k: "1" if on else "0" for k, on in switches.items()}}
        variables["output"] = str(tmp_path / "a")
        result = run(ckpt, **{f"SEMID_IMPORT_{k.upper()}": v for k, v in variables.items()})
    assert result.exit_code == 0, result.output
    loaded = load_checkpoint(tmp_path / "a")
    assert loaded.name == "mine"
    assert loaded.spec.kind == "rq-vae"
    assert loaded.spec.activation == "gelu"
    assert loaded.spec.batch_norm_eps == 1e-3
    assert loaded.spec.normalize_input is False
    assert loaded.spec.normalize_residuals is True


def test_a_folder_that_is_there_is_kept_without_force(run, ckpt, tmp_path):
    assert run(ckpt, "-o", tmp_path / "a", "--name", "first").exit_code == 0
    refused = run(ckpt, "-o", tmp_path / "a", "--name", "second")
    assert refused.exit_code == 1
    assert "--force" in only_line(refused.stderr)
    assert load_checkpoint(tmp_path / "a").name == "first"
    assert run(ckpt, "-o", tmp_path / "a", "--name", "second", "--force").exit_code == 0
    assert load_checkpoint(tmp_path / "a").name == "second"


def test_a_malicious_file_is_refused_in_one_sentence_and_nothing_is_made(run, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    torch.save({"state_dict": {}, "hyper_parameters": Attack()}, tmp_path / "bad.ckpt")
    result = run(tmp_path / "bad.ckpt", "-o", tmp_path / "a")
    assert result.exit_code == 1
    assert "system" in only_line(result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.ckpt"]


def test_a_degenerate_model_is_refused_and_imported_only_when_asked(run, reference_dir, tmp_path):
    source = reference_dir / "digits_rqvae" / "initial.pt"
    refused = run(source, "-o", tmp_path / "a")
    assert refused.exit_code == 1
    assert "never initialised" in only_line(refused.stderr)
    assert "--allow-degenerate" in refused.stderr
    allowed = run(source, "-o", tmp_path / "a", "--allow-degenerate")
    assert allowed.exit_code == 0
    assert "warning: layer 0" in allowed.stderr


def test_a_checkpoint_folder_can_be_imported_under_another_name(run, ckpt, tmp_path):
    run(ckpt, "-o", tmp_path / "a")
    assert run(tmp_path / "a", "-o", tmp_path / "b").exit_code == 0
    assert load_checkpoint(tmp_path / "b").name == "b"


def test_an_output_that_cannot_be_written_is_one_sentence(run, ckpt, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(ckpt, "-o", tmp_path / "file" / "a")
    assert result.exit_code == 1
    assert "file" in only_line(result.stderr)


@pytest.mark.parametrize("command", [import_, inspect], ids=["import", "inspect"])
def test_every_option_has_a_variable_and_help(command):
    for option in command.params:
        if option.param_type_name == "option":
            assert str(option.envvar).startswith(f"SEMID_{command.name.upper()}_"), option.name
            assert option.show_envvar, option.name
            assert option.help, option.name


def test_the_commands_are_named_as_they_are_called():
    assert import_.name == "import"
    assert inspect.name == "inspect"
