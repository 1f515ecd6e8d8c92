"""`semid train`, `calibrate`, `report` and `export`, as they are called."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import termios
from types import SimpleNamespace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from semid_server.checkpoint import Overrides, load_checkpoint, save_checkpoint
from semid_server.cli.calibrate import calibrate
from semid_server.cli.export import export
from semid_server.cli.import_ import import_
from semid_server.cli.report import report
from semid_server.cli.train import _interruptible, _refuse_degenerate, train
from semid_server.errors import DegenerateModelError
from semid_server.model import DecodeMode, ModelKind, ModelSpec, build_model
from semid_server.training import TrainingRun, TrainingSettings, open_rows

SMALL = ["--layers", "2", "--codebook-width", "8", "--batch-size", "32", "--threads", "1"]
SMALL += ["--init-buffer-size", "64", "--device", "cpu"]


def array(n=200):
    return np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32)


@pytest.fixture
def embeddings(tmp_path):
    np.save(tmp_path / "x.npy", array())
    return tmp_path / "x.npy"


def call(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def trained(embeddings, tmp_path):
    result = call(train, embeddings, "-o", tmp_path / "items", *SMALL, "--steps", 10)
    assert result.exit_code == 0, result.output
    return tmp_path / "items"


@pytest.mark.parametrize("kind", ModelKind)
def test_training_writes_a_calibrated_checkpoint_that_tells_its_origin(kind, embeddings, tmp_path):
    output = tmp_path / "items"
    more = ["--hidden-dims", "12", "--embedding-dim", "4"] if kind is ModelKind.RQ_VAE else []
    result = call(train, embeddings, "-o", output, *SMALL, "--kind", kind, "--steps", 20, *more)
    assert result.exit_code == 0, result.output
    checkpoint = load_checkpoint(output)
    assert checkpoint.name == "items"
    assert checkpoint.spec.kind is kind
    assert checkpoint.spec.codebook_widths == (8, 8)
    assert checkpoint.calibration is not None
    assert checkpoint.fingerprint in result.output
    codes = checkpoint.model.predict_step(torch.from_numpy(array())).codes
    decoded = checkpoint.model.decode(
        codes, mode=DecodeMode.CALIBRATED, calibration=checkpoint.calibration
    )
    assert decoded.shape == (200, 6)
    provenance = json.loads((output / "config.json").read_text())["provenance"]
    assert provenance["embeddings_shape"] == "200 x 6"
    assert "torch" in provenance
    assert (tmp_path / "items.training" / "log.csv").exists()
    assert not (tmp_path / "items.training" / "state.pt").exists()


def test_the_recipe_is_one_flag(embeddings, tmp_path):
    call(train, embeddings, "-o", tmp_path / "plain", *SMALL, "--steps", 10)
    result = call(train, embeddings, "-o", tmp_path / "best", *SMALL, "--distinct")
    assert result.exit_code == 0, result.output
    unique = {
        name: json.loads(call(report, tmp_path / name, embeddings, "--json").output)["unique_items"]
        for name in ("plain", "best")
    }
    assert unique["best"] > unique["plain"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.npy"], "missing.npy: there is no such file"),
        (["x.npy", "--codebook-width", "500"], "init_buffer_size is 64 and codebook_width 500"),
        (["x.npy", "--distinct", "--kind", "rq-vae"], "distinct is for rq-kmeans; kind is rq-vae"),
        (["x.npy", "--hidden-dims", "a,b", "--kind", "rq-vae"], "hidden-dims is 'a,b'"),
        (["x.npy", "--device", "tpu"], "device 'tpu' is not"),
        (["x.npy", "--device", "cuda:99"], "device 'cuda:99' is not there"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(arguments, message, embeddings, tmp_path):
    arguments = [str(tmp_path / arguments[0]), *arguments[1:]]
    result = call(train, arguments[0], "-o", tmp_path / "items", *SMALL, *arguments[1:])
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "items").exists()


LARGE = "row 0 has length 9.33862e+24; expected at most 1e+15"
EQUAL = "all 200 rows are equal"


@pytest.mark.parametrize(
    "more",
    [[], ["--distinct"], ["--no-normalize-residuals"], ["--kind", "r-vq"], ["--kind", "rq-vae"]],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * np.float32(1e25), LARGE),
        (lambda x: x * 0, EQUAL),
        (lambda x: x[:1].repeat(200, axis=0), EQUAL),
    ],
    ids=["large", "zero", "equal"],
)
def test_embeddings_that_no_codes_come_of_are_one_sentence(change, message, more, tmp_path):
    np.save(tmp_path / "x.npy", change(array()))
    result = call(train, tmp_path / "x.npy", "-o", tmp_path / "items", *SMALL, *more)
    assert result.exit_code == 1
    assert f"Error: {tmp_path}/x.npy: {message}" in result.output
    assert not (tmp_path / "items").exists()


@pytest.mark.parametrize("more", [[], ["--allow-degenerate"]], ids=["", "allow-degenerate"])
def test_a_training_that_diverges_is_one_sentence_and_writes_no_model(more, embeddings, tmp_path):
    output = tmp_path / "items"
    result = call(
        *(train, embeddings, "-o", output, *SMALL),
        *("--kind", "r-vq", "--steps", 40, "--learning-rate", "1e38", *more),
    )
    assert result.exit_code == 1
    assert result.output.startswith("Error: training diverged at step ")
    assert len(result.output.splitlines()) == 1
    assert not output.exists()


def test_a_degenerate_model_is_not_written_unless_that_is_allowed(tmp_path, embeddings):
    output, folder = tmp_path / "items", tmp_path / "items.training"
    command = [train, embeddings, "-o", output, *SMALL, "--steps", 1]  # no step for layer 1
    for _ in range(2):
        refused = call(*command)
        assert refused.exit_code == 1
        assert f"Error: {output}: not written, and the state stays in {folder}: " in refused.output
        assert "layer 1: all 8 centroids are zero: this layer was never init" in refused.output
        assert "--allow-degenerate" in refused.output
        assert (folder / "state.pt").exists()
        assert not output.exists()
    allowed = call(*command, "--allow-degenerate")
    assert allowed.exit_code == 0, allowed.output
    assert "warning: layer 1: all 8 centroids are zero" in allowed.stderr
    with pytest.raises(DegenerateModelError):
        load_checkpoint(output)
    assert load_checkpoint(output, overrides=Overrides(allow_degenerate=True)).calibration


def test_a_model_that_holds_no_numbers_is_never_written(tmp_path):
    settings = TrainingSettings(layers=1, codebook_width=8)
    model = settings.build(6)
    model.layers[0].centroids.data.fill_(torch.nan)
    run = SimpleNamespace(model=model, folder=tmp_path)
    with pytest.raises(DegenerateModelError) as caught:
        _refuse_degenerate(run, settings.spec(6), tmp_path / "items", allowed=True)
    assert re.search(r"list\.0\.centroids holds \d+ NaN or infinite numbers", str(caught.value))
    assert "--allow-degenerate" not in str(caught.value)


def test_an_output_that_is_there_is_refused_before_anything_is_computed(trained, embeddings):
    before = (trained / "config.json").read_bytes()
    result = call(train, embeddings, "-o", trained, *SMALL, "--steps", 10, "--seed", 7)
    assert result.exit_code == 1
    assert "exists; give --force" in result.output
    assert (trained / "config.json").read_bytes() == before
    result = call(train, embeddings, "-o", trained, *SMALL, "--steps", 10, "--seed", 7, "--force")
    assert result.exit_code == 0, result.output
    assert (trained / "config.json").read_bytes() != before


@contextlib.contextmanager
def no_file_larger_than(n_bytes):
    """What a full disk is like, for everybody."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (export, ["-o", "new.ckpt"]),
        (import_, ["-o", "new"]),
        (report, ["IN", "--html", "new.html"]),
    ],
    ids=["export", "import", "report"],
)
def test_what_cannot_be_written_is_one_sentence_with_its_name(
    command, output, trained, embeddings, monkeypatch
):
    monkeypatch.chdir(trained.parent)
    arguments = [embeddings if word == "IN" else word for word in output]
    if command is report:  # what it compiles is written as well, where nothing has been yet
        assert call(report, trained, embeddings).exit_code == 0
    with no_file_larger_than(100):
        result = call(command, trained, *arguments)
    assert result.exit_code == 1
    assert re.search(r"^Error: (.*/)?new\S*: File too large\n$", result.stderr, re.MULTILINE)
    assert {path.name for path in trained.parent.iterdir()} == {"x.npy", "items", "items.training"}


def test_a_training_that_cannot_write_is_one_sentence_with_its_folder(
    trained,  # by which all that a training needs has been compiled, and that written
    embeddings,
    tmp_path,
):
    assert trained.exists()
    with no_file_larger_than(100):
        result = call(train, embeddings, "-o", tmp_path / "new", *SMALL, "--steps", 2)
    assert result.exit_code == 1
    assert f"Error: {tmp_path / 'new.training'}: File too large\n" in result.stderr
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_there_is_named(trained, tmp_path):
    for name in ("no/new.ckpt", "x.npy/new.ckpt"):
        result = call(export, trained, "-o", tmp_path / name)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: {tmp_path / name}: No")


def test_every_flag_has_an_environment_twin_and_help():
    for command in (train, calibrate, report, export):
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.envvar.startswith(f"SEMID_{command.name.upper()}_"), parameter.name
                assert parameter.show_envvar
                assert len(parameter.help) > 20


def test_the_first_interrupt_is_a_wish_to_stop_and_then_all_is_as_before(capfd):
    before = signal.getsignal(signal.SIGINT)
    with _interruptible() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        assert "Ctrl-C again ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


INTERRUPTED = """
import os, signal
from semid_server.cli.train import train
from semid_server.training.trainer import Trainer

take, taken = Trainer.step, []

def step(self, batch):
    taken.append(batch)
    if len(taken) == 20:
        os.kill(os.getpid(), signal.SIGINT)
    return take(self, batch)

Trainer.step = step
train()
"""
"""A training that is interrupted in its twentieth step."""


def test_an_interrupted_training_is_saved_and_the_same_command_goes_on(embeddings, tmp_path):
    steps = ["--steps", "60"]
    command = [
        sys.executable,
        "-c",
        INTERRUPTED,
        str(embeddings),
        "-o",
        str(tmp_path / "items"),
        *SMALL,
        *steps,
    ]
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    said = b""
    # An error is how a terminal says that the other side is gone.
    with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # noqa: PTH123 - a descriptor
        while chunk := terminal.read(1024):
            said += chunk
    assert process.wait() == 130, said.decode()
    assert b"training" in said  # the progress bar
    assert b"the same command goes on" in said
    assert not (tmp_path / "items").exists()
    result = call(train, embeddings, "-o", tmp_path / "items", *SMALL, *steps)
    assert result.exit_code == 0, result.output
    assert "going on from" in result.output
    whole = call(train, embeddings, "-o", tmp_path / "whole", *SMALL, *steps)
    assert whole.output.split()[-1] == result.output.split()[-1]


def test_a_state_that_records_no_file_is_gone_on_with_and_a_warning(embeddings, tmp_path):
    folder = tmp_path / "items.training"
    settings = TrainingSettings(
        layers=2, codebook_width=8, batch_size=32, init_buffer_size=64, steps=20
    )
    rows, place = open_rows(embeddings), torch.device("cpu")
    run = TrainingRun(settings, rows, folder, device=place, should_stop=lambda: True)
    assert not run.run()
    state = torch.load(folder / "state.pt", weights_only=True)
    del state["origin"]
    torch.save(state, folder / "state.pt")
    result = call(train, embeddings, "-o", tmp_path / "items", *SMALL, "--steps", 20)
    assert result.exit_code == 0, result.output
    assert "going on from" in result.stderr
    assert "x.npy only the shape was compared: --restart if it is another" in result.stderr


@pytest.mark.slow  # two ranks without torchrun train in `training/test_run.py`
def test_under_torchrun_processes_train_together_and_one_writes(embeddings, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--no-python"]
    semid = [sys.executable, "-c", "from semid_server.cli.train import train; train()"]
    ended = subprocess.run(
        [*torchrun, *semid, embeddings, "-o", tmp_path / "items", *SMALL, "--steps", "20"],
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.decode().count("rq-kmeans") == 1
    assert load_checkpoint(tmp_path / "items").calibration is not None


def test_a_restart_throws_the_unfinished_run_away(embeddings, tmp_path):
    folder = tmp_path / "items.training"
    folder.mkdir()
    (folder / "state.pt").write_bytes(b"no state")
    result = call(train, embeddings, "-o", tmp_path / "items", *SMALL, "--restart")
    assert result.exit_code == 0, result.output


def uncalibrated(path):
    spec = ModelSpec(
        kind=ModelKind.RQ_KMEANS,
        input_dim=6,
        codebook_widths=(8, 8),
        embedding_dim=6,
        normalize_residuals=True,
    )
    model = build_model(spec)
    for layer in model.layers:
        layer.centroids.data = torch.from_numpy(array()[:8] / 3)
        layer.centroids.data[:, 0] += torch.rand(8)
    save_checkpoint(path, model=model, spec=spec, name="items", provenance={"made": "by a test"})
    (path / "README.md").write_text("kept")
    return path


def test_calibrating_adds_norms_and_leaves_all_else(embeddings, tmp_path):
    path = uncalibrated(tmp_path / "items")
    before = load_checkpoint(path)
    result = call(calibrate, path, embeddings)
    assert result.exit_code == 0, result.output
    after = load_checkpoint(path)
    assert before.calibration is None
    lengths = np.linalg.norm(array(), axis=1)
    assert after.calibration.input_norm == pytest.approx(lengths.mean(), rel=1e-5)
    assert (after.fingerprint, after.name) == (before.fingerprint, before.name)
    assert (path / "README.md").read_text() == "kept"
    provenance = json.loads((path / "config.json").read_text())["provenance"]
    assert provenance["made"] == "by a test"
    assert provenance["calibration_embeddings"] == "x.npy"


@pytest.mark.parametrize(("scale", "length"), [(0, "0"), (1e-25, "0"), (1e25, "inf")])
def test_lengths_that_nothing_is_decoded_by_are_refused_and_the_old_ones_stay(
    scale, length, trained, tmp_path
):
    np.save(tmp_path / "bad.npy", array() * np.float32(scale))
    before = (trained / "config.json").read_bytes()
    result = call(calibrate, trained, tmp_path / "bad.npy")
    assert result.exit_code == 1
    assert f"Error: {tmp_path}/bad.npy: the mean length of the 200 rows that" in result.output
    assert f" is {length} in float32; expected a finite number above 0" in result.output
    assert (trained / "config.json").read_bytes() == before


def test_a_file_is_calibrated_into_a_folder(trained, embeddings, tmp_path):
    call(export, trained, "-o", tmp_path / "items.ckpt")
    result = call(calibrate, tmp_path / "items.ckpt", embeddings)
    assert result.exit_code == 1
    assert "name one with --output" in result.output
    result = call(calibrate, tmp_path / "items.ckpt", embeddings, "-o", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert load_checkpoint(tmp_path / "new").calibration is not None


@pytest.mark.parametrize("command", [calibrate, report])
def test_embeddings_of_another_width_are_refused(command, trained, tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((4, 9), np.float32))
    result = call(command, trained, tmp_path / "wide.npy")
    assert result.exit_code == 1
    assert "rows of 9 numbers" in result.output
    assert "takes 6" in result.output


def test_a_report_has_tables_and_a_page_that_stands_alone(trained, embeddings, tmp_path):
    page = tmp_path / "report.html"
    result = call(report, trained, embeddings, "--html", page)
    assert result.exit_code == 0, result.output
    figures = json.loads(call(report, trained, embeddings, "--json").output)
    assert f"{figures['unique_items']} (" in result.output
    codes = load_checkpoint(trained).model.predict_step(torch.from_numpy(array())).codes
    assert figures["distinct_ids"] == len(torch.unique(codes, dim=0))
    assert [one["depth"] for one in figures["depths"]] == [1, 2]
    text = page.read_text()
    assert "http" not in text
    assert "<script" not in text
    drawings = text.split("<svg")[1:]
    assert len(drawings) == 3 + 2
    for drawing in drawings:
        ET.fromstring(  # noqa: S314 - written just above
            "<svg" + drawing.split("</svg>")[0] + "</svg>"
        )
    legends = re.findall(r'<p class="legend">(.+?)</p><svg', text)
    assert len(legends) == 2, "above their plots, where they cover no line"
    assert "sum" in legends[0]
    result = call(report, trained, embeddings, "--html", page)
    assert result.exit_code == 1
    assert "exists" in result.output


def test_a_degenerate_model_is_named_as_such_and_measured_all_the_same(embeddings, tmp_path):
    path = uncalibrated(tmp_path / "items")
    loaded = load_checkpoint(path)
    loaded.model.layers[1].centroids.data.zero_()
    save_checkpoint(path, model=loaded.model, spec=loaded.spec, name="items", force=True)
    result = call(report, path, embeddings)
    assert result.exit_code == 0, result.output
    assert "warning: layer 1" in result.output
    assert " 7  " in result.output  # its dead codes


@pytest.mark.parametrize("reference_set", ["digits_rqvae", "digits_rkmeans"], indirect=True)
def test_an_export_has_the_keys_of_the_original_and_the_same_codes(reference_set, tmp_path):
    result = call(export, reference_set.checkpoint, "-o", tmp_path / "out.ckpt")
    assert result.exit_code == 0, result.output
    original = torch.load(reference_set.checkpoint, map_location="cpu", weights_only=False)
    exported = torch.load(tmp_path / "out.ckpt", map_location="cpu", weights_only=False)
    assert exported.keys() == original.keys()
    parameters = original["hyper_parameters"]
    assert exported["hyper_parameters"].keys() == parameters.keys()
    for name in ("n_layers", "normalize_residuals", "train_layer_wise"):
        assert exported["hyper_parameters"][name] == parameters[name]
    assert exported["layers_initialized"] == original["layers_initialized"]
    assert exported["current_layer"] == original["current_layer"]
    own = {k: v for k, v in original["state_dict"].items() if ".initializer." not in k}
    assert exported["state_dict"].keys() == own.keys()
    assert all(torch.equal(exported["state_dict"][name], value) for name, value in own.items())
    assert (
        load_checkpoint(tmp_path / "out.ckpt").fingerprint
        == load_checkpoint(reference_set.checkpoint).fingerprint
    )
    assert call(export, reference_set.checkpoint, "-o", tmp_path / "out.ckpt").exit_code == 1
