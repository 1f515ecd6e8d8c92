"""`semid train`: a file of embeddings to a checkpoint."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import click
import torch
from torch import distributed
from tqdm import tqdm

from semid_server.checkpoint import examine, save_checkpoint
from semid_server.cli import errors_as_sentences, writing
from semid_server.cli.training_options import (
    WatchedRows,
    column_option,
    device_of,
    option,
    provenance_of,
    refuse_if_taken,
    threads_option,
)
from semid_server.errors import ConfigurationError, DegenerateModelError
from semid_server.model import Activation, ModelKind
from semid_server.training import TrainingRun, TrainingSettings, calibrate, open_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from semid_server.model import ModelSpec
    from semid_server.model.residual_quantization import TrainingStep
    from semid_server.training import Pass, Trainer

_option = partial(option, "train")
_POSITIVE = click.IntRange(min=1)
_DEFAULTS = TrainingSettings()
_STEPS = {ModelKind.RQ_KMEANS: 30, ModelKind.R_VQ: 1000, ModelKind.RQ_VAE: 1000}

INTERRUPTED = 130
"""Exit status of a run that was stopped by SIGINT: 128 + 2, as a shell reports it."""


@click.command(short_help="Train a quantiser on a file of embeddings.")
@click.argument("embeddings", type=click.Path(path_type=Path))
@_option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Checkpoint folder to make; its name becomes the model's. OUTPUT.training beside it holds "
    "log.csv and, until the run is done, the state to go on from.",
)
@_option(
    "--distinct",
    is_flag=True,
    help="The recommended recipe for unique IDs: codebooks are fitted to the whole set (spherical "
    "then plain Lloyd iterations, relocated centroids, equal IDs drawn apart) instead of "
    "mini-batches. Fits a sample of 256 rows a centroid, then goes over the whole up to ten times "
    "a layer. For rq-kmeans.",
)
@_option(
    "--refine",
    type=click.IntRange(min=0),
    default=_DEFAULTS.refine,
    help="Lloyd iterations over the whole set for each layer after the mini-batches, dead "
    "centroids seeded anew. Lowers the error and spreads the codes: try 50 when the set is read "
    "quickly. Not for rq-vae.",
)
@_option(
    "--kind",
    type=click.Choice([kind.value for kind in ModelKind]),
    default=_DEFAULTS.kind.value,
    help="What to train. rq-kmeans needs no gradients and is fastest; rq-vae learns a smaller "
    "space to quantise in.",
)
@_option(
    "--layers",
    type=_POSITIVE,
    default=_DEFAULTS.layers,
    help="Codes in an ID. Another layer multiplies the number of IDs by --codebook-width.",
)
@_option(
    "--codebook-width",
    type=_POSITIVE,
    default=_DEFAULTS.codebook_width,
    help="Centroids of each layer. Up to 256, a code takes one byte.",
)
@_option(
    "--normalize-residuals/--no-normalize-residuals",
    default=_DEFAULTS.normalize_residuals,
    help="Bring residuals to length 1 before every layer: codes follow direction alone. Turn "
    "off when lengths carry meaning. An rq-vae never does.",
)
@_option(
    "--steps",
    type=_POSITIVE,
    default=None,
    help="Mini-batch steps in all; layers that train one after the other share them evenly. More "
    "when the loss in log.csv still falls. Default: 30 for rq-kmeans, else 1000.",
)
@_option(
    "--batch-size",
    type=_POSITIVE,
    default=_DEFAULTS.batch_size,
    help="Rows of a step, shared among processes. Larger is steadier and takes more memory.",
)
@_option(
    "--init-buffer-size",
    type=_POSITIVE,
    default=_DEFAULTS.init_buffer_size,
    help="Rows from which first centroids are drawn, at least --codebook-width. More for "
    "wide codebooks.",
)
@_option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=_DEFAULTS.learning_rate,
    help="Of Adagrad, for r-vq and rq-vae. Lower it when the loss jumps. rq-kmeans needs none.",
)
@_option(
    "--hidden-dims",
    default=",".join(map(str, _DEFAULTS.hidden_dims)),
    help="Widths between input and --embedding-dim of the rq-vae's encoder, comma-separated; the "
    "decoder mirrors them.",
)
@_option(
    "--embedding-dim",
    type=_POSITIVE,
    default=_DEFAULTS.embedding_dim,
    help="Numbers in a centroid of an rq-vae. Fewer compress more and lose more.",
)
@_option(
    "--activation",
    type=click.Choice([activation.value for activation in Activation]),
    default=_DEFAULTS.activation.value,
    help="Between the linear maps of an rq-vae.",
)
@_option(
    "--dropout",
    type=click.FloatRange(0, 1, max_open=True),
    default=_DEFAULTS.dropout,
    help="Share of an rq-vae's hidden numbers set to 0 in training. Raise it on small sets.",
)
@_option(
    "--reconstruction-weight",
    type=click.FloatRange(min=0),
    default=_DEFAULTS.reconstruction_weight,
    help="Weight of an rq-vae's reconstruction error beside the quantisation loss.",
)
@_option(
    "--beta",
    type=click.FloatRange(min=0),
    default=_DEFAULTS.beta,
    help="Weight of the commitment in the loss of r-vq and rq-vae: how strongly an encoder is "
    "drawn to the centroids.",
)
@_option(
    "--seed",
    type=click.IntRange(0, 2**31),
    default=_DEFAULTS.seed,
    help="Fixes every random choice. The result is the same on the same machine with as many "
    "threads.",
)
@column_option("train")
@_option("--name", default=None, help="Name by which the model is served, if not OUTPUT's own.")
@_option(
    "--device",
    default="auto",
    help="auto, cpu, cuda or cuda:i. auto takes the first GPU if there is one. Under torchrun each "
    "process takes the GPU of its rank.",
)
@threads_option("train")
@_option(
    "--save-every",
    type=_POSITIVE,
    default=100,
    help="Steps between two saves of the state; a killed run repeats what came after the last.",
)
@_option(
    "--restart",
    is_flag=True,
    help="Throw away the state of an unfinished run in OUTPUT.training and begin anew.",
)
@_option(
    "--force",
    is_flag=True,
    help="Replace the checkpoint at OUTPUT. The old one stays until the new one is whole.",
)
@_option(
    "--allow-degenerate",
    is_flag=True,
    help="Write a model whose codes mean nothing (uninitialised, collapsed or shared codebooks) "
    "with a warning, to study it. A server refuses it until it is told the same.",
)
@errors_as_sentences()
def train(
    *,
    embeddings: Path,
    output: Path,
    hidden_dims: str,
    column: str | None,
    name: str | None,
    device: str,
    threads: int | None,
    save_every: int,
    restart: bool,
    force: bool,
    allow_degenerate: bool,
    **settings: Any,
) -> None:
    """Train on EMBEDDINGS, an .npy or .parquet file that may be larger than memory.

    A run that was interrupted or killed goes on where it was when the same command is given
    again with the same file, with the same result. Over several GPUs: torchrun --no-python
    --nproc-per-node N semid train ...
    """
    refuse_if_taken(output, force=force)
    built = _settings(settings, hidden_dims)
    if threads is not None:
        torch.set_num_threads(threads)
    rows = open_rows(embeddings, column)
    folder = output.with_name(output.name + ".training")
    with _ranks(device) as (place, first), _Progress(built, show=first) as progress:
        if restart and first:
            shutil.rmtree(folder, ignore_errors=True)
        if distributed.is_initialized():
            distributed.barrier()
        with _interruptible() as should_stop:
            run = TrainingRun(
                built,
                rows,
                folder,
                device=place,
                save_every=save_every,
                on_step=progress.step,
                on_pass=progress.passed,
                should_stop=should_stop,
            )
            if run.resumed and first:
                click.echo(f"going on from {folder} at step {run.trainer.steps}", err=True)
                if run.origin_unknown:
                    click.echo(
                        f"warning: the state in {folder} does not record the file it began on; of "
                        f"{embeddings} only the shape was compared: --restart if it is another",
                        err=True,
                    )
            with writing(folder):
                finished = run.run()
    if not finished:
        click.echo(
            f"stopped at step {run.trainer.steps}, saved in {folder}; the same command goes on",
            err=True,
        )
        sys.exit(INTERRUPTED)
    if not first:
        return
    spec = built.spec(rows.dim)
    _refuse_degenerate(run, spec, output, allowed=allow_degenerate)
    watched = WatchedRows(rows, "calibrating")
    calibration = calibrate(run.model, watched)
    watched.close()
    with writing(output):
        fingerprint = save_checkpoint(
            output,
            model=run.model,
            spec=spec,
            name=name or output.resolve().name,
            calibration=calibration,
            provenance=provenance_of(embeddings, rows, command=_command(), torch=torch.__version__),
            force=force,
        )
    (folder / "state.pt").unlink()
    click.echo(f"{output}: {built.kind}, {built.layers} x {built.codebook_width}, {fingerprint}")


def _refuse_degenerate(run: TrainingRun, spec: ModelSpec, output: Path, *, allowed: bool) -> None:
    """Refuse to write what `load_checkpoint` refuses; where it is allowed, warn.

    Raises
    ------
    DegenerateModelError
        If the model holds NaN or infinity, or its codes mean nothing and that is not allowed.
    """
    health = examine(spec, {name: value.cpu() for name, value in run.model.state_dict().items()})
    if health.damage or (health.problems and not allowed):
        found = "; ".join((*health.damage, *health.problems))
        hint = "" if health.damage else " (to write it all the same: --allow-degenerate)"
        raise DegenerateModelError(
            output, f"not written, and the state stays in {run.folder}: {found}{hint}"
        )
    for problem in health.problems:
        click.echo(f"warning: {problem}", err=True)


def _settings(given: dict[str, Any], hidden_dims: str) -> TrainingSettings:
    kind = ModelKind(given["kind"])
    try:
        widths = tuple(int(width) for width in hidden_dims.split(",") if width.strip())
    except ValueError as error:
        raise ConfigurationError(
            f"hidden-dims is {hidden_dims!r}; expected whole numbers separated by commas"
        ) from error
    given |= {
        "kind": kind,
        "activation": Activation(given["activation"]),
        "hidden_dims": widths,
        "steps": given["steps"] or _STEPS[kind],
    }
    return TrainingSettings(**{field.name: given[field.name] for field in fields(_DEFAULTS)})


def _command() -> str:
    return shlex.join(["semid", *sys.argv[1:]])


@contextmanager
def _ranks(device: str) -> Iterator[tuple[torch.device, bool]]:
    """Join the other processes of a torchrun; gives the device and whether this is the first."""
    if not distributed.is_torchelastic_launched():
        yield device_of(device), True
        return
    place = device_of(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield place, distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


STOPPING: Final = b"\nstops after this step, or this layer; Ctrl-C again ends at once\n"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Take the first SIGINT as a wish to save and stop; a second one ends the process."""
    asked = []

    def ask(_number: int, _frame: object) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, STOPPING)  # print may be what is interrupted

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


class _Progress:
    """A bar with the loss and how codes are used, where there is a terminal to show it on."""

    def __init__(self, settings: TrainingSettings, *, show: bool) -> None:
        self._settings = settings
        self._disable = None if show else True
        self._bar: tqdm[Any] | None = None
        self._stage: tuple[Any, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, trainer: Trainer, step: TrainingStep) -> None:
        """Show a mini-batch step."""
        bar = self._of_stage(("steps",), "training", self._settings.steps)
        bar.update(trainer.counted_steps - bar.n)
        layer = max(trainer.model.current_layer, 0)
        bar.set_postfix(
            layer=layer,
            loss=f"{step.loss.item():.4g}",
            distinct=f"{step.metrics['distinct_ids']:.1%}",
            used=f"{step.metrics[f'coverage_{layer}']:.1%}",
        )

    def passed(self, one: Pass) -> None:
        """Show a pass over the whole set."""
        bar = self._of_stage((one.layer, one.stage), f"layer {one.layer}, {one.stage}", None)
        bar.update()
        bar.set_postfix(error=f"{one.error:.5g}")

    def _of_stage(self, stage: tuple[Any, ...], description: str, total: int | None) -> tqdm[Any]:
        if stage != self._stage or self._bar is None:
            self.__exit__()
            self._bar = tqdm(total=total, desc=description, disable=self._disable)
            self._stage = stage
        return self._bar
