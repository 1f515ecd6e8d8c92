"""A run of training: the same result whether or not it was stopped, killed or shared."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from semid_server.errors import ConfigurationError
from semid_server.model import MiniBatchKMeans, ModelKind, build_model
from semid_server.training import ArrayRows, TrainingRun, TrainingSettings, open_rows

CPU = torch.device("cpu")

KMEANS = TrainingSettings(
    layers=2, codebook_width=8, batch_size=32, init_buffer_size=64, steps=10, seed=3
)
SETTINGS = {
    "rq-kmeans": KMEANS,
    "raw residuals": replace(KMEANS, normalize_residuals=False),
    "refined": replace(KMEANS, refine=5),
    "distinct": replace(KMEANS, distinct=True, layers=3, codebook_width=16),
    "r-vq": replace(KMEANS, kind=ModelKind.R_VQ),
    "rq-vae": replace(
        KMEANS, kind=ModelKind.RQ_VAE, hidden_dims=(12,), embedding_dim=4, dropout=0.2
    ),
}


def embeddings():
    return np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)


def start(settings, folder, **others) -> TrainingRun:
    return TrainingRun(settings, ArrayRows(embeddings()), folder, device=CPU, **others)


def finished(settings, folder, **others):
    run = start(settings, folder, **others)
    assert run.run()
    return run


def state(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_model_is_trained_whose_state_fits_its_spec(settings, tmp_path):
    run = finished(settings, tmp_path)
    model = build_model(settings.spec(6))
    model.load_state_dict(run.model.state_dict(), strict=True)
    rows = torch.from_numpy(embeddings())
    assert torch.equal(model.predict_step(rows).codes, run.model.predict_step(rows).codes)
    assert len(torch.unique(model.predict_step(rows).codes, dim=0)) > 20


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_seed_fixes_the_result_and_another_gives_another(settings, tmp_path):
    one = state(finished(settings, tmp_path / "one"))
    again = state(finished(settings, tmp_path / "again"))
    other = state(finished(replace(settings, seed=4), tmp_path / "other"))
    assert same(one, again)
    assert not same(one, other)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("stops", [[3, 9], [11]])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(settings, stops, tmp_path):
    whole = finished(settings, tmp_path / "whole")
    asked = []
    for stop in stops:
        asked.clear()

        def should_stop(stop=stop):
            asked.append(True)
            return len(asked) >= stop

        run = start(settings, tmp_path / "parts", should_stop=should_stop)
        run.run()
    run = start(settings, tmp_path / "parts")
    assert run.resumed
    assert run.run()
    assert same(state(run), state(whole))
    logs = [(tmp_path / part / "log.csv").read_text() for part in ("whole", "parts")]
    assert logs[0] == logs[1]


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from pathlib import Path
import torch
from test_run import SETTINGS, start
torch.set_num_threads({threads})  # they decide how sums are rounded
steps = []
def killed(*_):
    steps.append(1)
    if len(steps) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
start(SETTINGS[{name!r}], Path({folder!r}), on_step=killed, on_pass=killed, save_every=3).run()
"""


@pytest.mark.parametrize(("name", "at"), [("rq-kmeans", 8), ("rq-vae", 8), ("refined", 20)])
def test_a_run_that_was_killed_goes_on_to_the_same_result(name, at, tmp_path):
    folder = tmp_path / "killed"
    here = os.path.dirname(__file__)  # noqa: PTH120 - a string for sys.path
    threads = torch.get_num_threads()
    code = KILLED.format(
        path=[here, *sys.path], threads=threads, name=name, at=at, folder=str(folder)
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    run = start(SETTINGS[name], folder, save_every=3)
    assert run.resumed
    assert run.run()
    whole = finished(SETTINGS[name], tmp_path / "whole", save_every=3)
    assert same(state(run), state(whole))
    assert (folder / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()


def test_the_log_has_a_line_for_each_step_with_its_figures(tmp_path):
    finished(KMEANS, tmp_path)
    with (tmp_path / "log.csv").open() as file:
        lines = list(csv.DictReader(file))
    # Two batches of 32 fill the buffer of 64, for each of two layers.
    assert [int(line["step"]) for line in lines] == list(range(1, 15))
    assert [int(line["layer"]) for line in lines] == [0] * 7 + [1] * 7
    assert [int(line["counted_steps"]) for line in lines] == [
        0,
        0,
        1,
        2,
        3,
        4,
        5,
        5,
        5,
        *range(6, 11),
    ]
    assert all(float(line["loss"]) >= 0 and line["coverage_1"] for line in lines)


def test_refinement_and_the_recipe_are_logged_pass_by_pass(tmp_path):
    finished(SETTINGS["distinct"], tmp_path)
    with (tmp_path / "log.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["stage"] for line in lines if line["step"] == "0"] == [
        *("spherical", "lloyd", "relocate") * 3
    ]
    lloyd = [float(li["loss"]) for li in lines if li["stage"] == "lloyd" and li["layer"] == "0"]
    assert lloyd == sorted(lloyd, reverse=True)


def test_a_run_goes_on_only_with_the_settings_it_began_with(tmp_path):
    finished(KMEANS, tmp_path)
    with pytest.raises(ConfigurationError, match="began with seed 3, and is now given 4"):
        start(replace(KMEANS, seed=4), tmp_path)
    with pytest.raises(ConfigurationError, match=r"shape \(200, 6\), and is now given \(150, 6\)"):
        TrainingRun(KMEANS, ArrayRows(embeddings()[:150]), tmp_path, device=CPU)


def stored(path, array, changed_ns=10**18):
    np.save(path, array)
    os.utime(path, ns=(changed_ns, changed_ns))
    return path


def test_a_run_goes_on_only_with_the_file_it_began_with(tmp_path):
    def begin(path):
        return TrainingRun(KMEANS, open_rows(path), tmp_path / "run", device=CPU)

    path = stored(tmp_path / "x.npy", embeddings())
    for resumed in (False, True):
        run = begin(path)
        assert run.resumed is resumed
        assert run.run()
    size = path.stat().st_size
    began = rf"began on .*x\.npy \({size:,} bytes, last changed 2001-09-09T01:46:40\+00:00\)"
    other = stored(tmp_path / "y.npy", embeddings() + 1)
    with pytest.raises(ConfigurationError, match=began + r", and is now given .*y\.npy \("):
        begin(other)
    stored(path, embeddings() + 1, 2 * 10**18)
    with pytest.raises(ConfigurationError, match=began + r", and is now given .*x\.npy .* 2033-"):
        begin(path)
    with pytest.raises(ConfigurationError, match=began + ", and is now given an array in memory"):
        start(KMEANS, tmp_path / "run")


def test_a_run_goes_on_only_with_the_column_it_began_with(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": embeddings().tolist(), "y": embeddings().tolist()}), path)
    run = TrainingRun(KMEANS, open_rows(path, "x"), tmp_path / "run", device=CPU)
    assert run.run()
    with pytest.raises(ConfigurationError, match=r"column 'x'\), and is now given .*column 'y'\)"):
        TrainingRun(KMEANS, open_rows(path, "y"), tmp_path / "run", device=CPU)


def test_a_state_that_records_no_file_is_gone_on_with_and_told(tmp_path):
    path = stored(tmp_path / "x.npy", embeddings())
    begun = TrainingRun(KMEANS, open_rows(path), tmp_path / "run", device=CPU)
    assert begun.run()
    assert not begun.origin_unknown
    earlier = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    del earlier["origin"]
    torch.save(earlier, tmp_path / "run" / "state.pt")
    again = TrainingRun(KMEANS, open_rows(path), tmp_path / "run", device=CPU)
    assert again.resumed
    assert again.origin_unknown
    assert again.run()


@pytest.mark.parametrize(
    ("name", "rate", "lost"),
    [
        ("r-vq", 1e38, r"\S+\.0\.centroids holds -?inf"),
        ("r-vq", 1e25, "loss is inf"),
        ("rq-vae", 1e30, r"\w+ is (inf|nan)|\S+ holds"),
    ],
)
def test_a_run_that_diverges_says_where_and_keeps_what_was_saved_before(name, rate, lost, tmp_path):
    settings = replace(SETTINGS[name], learning_rate=rate, steps=40)
    with pytest.raises(ConfigurationError) as caught:
        start(settings, tmp_path, save_every=1).run()
    found = re.fullmatch(
        rf"training diverged at step (\d+), layer -?\d+: ({lost}); {tmp_path}/state\.pt holds an "
        rf"earlier step\. .* below {re.escape(f'{rate:g}')}, or .*",
        str(caught.value),
    )
    assert found, caught.value
    saved = torch.load(tmp_path / "state.pt")["trainer"]
    assert saved["steps"] == int(found[1]) - 1
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def test_a_run_that_diverges_before_the_first_save_saves_nothing(tmp_path):
    settings = replace(SETTINGS["r-vq"], learning_rate=1e38)
    with pytest.raises(ConfigurationError, match="no earlier step was saved"):
        start(settings, tmp_path).run()
    assert not (tmp_path / "state.pt").exists()


def test_fewer_rows_than_centroids_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="7 rows for a codebook of 8"):
        TrainingRun(KMEANS, ArrayRows(embeddings()[:7]), tmp_path, device=CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers is 0; expected at least 1"),
        ({"init_buffer_size": 4}, "init_buffer_size is 4 and codebook_width 8"),
        ({"kind": ModelKind.R_VQ, "distinct": True}, "distinct is for rq-kmeans; kind is r-vq"),
        ({"kind": ModelKind.RQ_VAE, "refine": 3}, "refine is 3, but kind is rq-vae"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(KMEANS, **changes)


RANK = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import test_run
test_run.one_of_two_ranks({rank}, Path({folder!r}))
"""


def one_of_two_ranks(rank, folder):
    """What each of two processes does: train each kind, then take one step of k-means."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for name in SHARED:
        run = start(replace(SETTINGS[name], dropout=0.0), folder / name)
        if rank == 1:
            torch.manual_seed(999)  # what this rank would draw must not matter
        assert run.run()
        torch.save(run.model.state_dict(), folder / name / f"{rank}.pt")
    layer = fitted_layer()
    step = layer.model_step(torch.from_numpy(embeddings())[rank::2])
    step.loss.backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    torch.save([layer.centroids.detach(), layer.counts, step.loss.item()], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


SHARED = ("rq-kmeans", "r-vq", "rq-vae", "refined")


def fitted_layer():
    layer = MiniBatchKMeans(8, 6)
    layer.centroids.data = torch.from_numpy(embeddings()[:8])
    layer.is_initialized = True
    return layer


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder in which two processes trained together."""
    folder = tmp_path_factory.mktemp("ranks")
    path = [os.path.dirname(__file__), *sys.path]  # noqa: PTH120 - a string for sys.path
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.format(path=path, rank=rank, folder=str(folder))],
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    said = [rank.communicate()[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_two_ranks_train_one_model(name, two_ranks):
    states = [torch.load(two_ranks / name / f"{rank}.pt") for rank in range(2)]
    if name != "refined":  # which the first rank does alone
        learned = [key for key in states[0] if "running" not in key]
        assert all(torch.equal(states[0][key], states[1][key]) for key in learned)
    model = build_model(SETTINGS[name].spec(6))
    model.load_state_dict(states[0])
    rows = torch.from_numpy(embeddings())
    assert len(torch.unique(model.predict_step(rows).codes, dim=0)) > 20
    assert (two_ranks / name / "log.csv").read_text().count("\n") > 10


def test_two_ranks_take_the_step_that_one_takes_with_all_their_rows(two_ranks):
    layer = fitted_layer()
    step = layer.model_step(torch.from_numpy(embeddings()))
    step.loss.backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    for rank in range(2):
        centroids, counts, loss = torch.load(two_ranks / f"{rank}.pt")
        torch.testing.assert_close(centroids, layer.centroids.detach())
        assert torch.equal(counts, layer.counts)
        assert loss == pytest.approx(step.loss.item(), rel=1e-5)
