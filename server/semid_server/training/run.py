"""A whole run of training, which can be stopped anywhere and gone on with."""

from __future__ import annotations

import csv
import io
import math
import os
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from semid_server.errors import ConfigurationError
from semid_server.model.ranks import is_first_rank, summed_over_ranks, together
from semid_server.training.codebooks import fit_distinct, refine
from semid_server.training.rows import TrainableRows, batches
from semid_server.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from semid_server.model import ResidualQuantization
    from semid_server.model.residual_quantization import TrainingStep
    from semid_server.training.codebooks import Pass
    from semid_server.training.rows import Rows
    from semid_server.training.settings import TrainingSettings

STATE_NAME = "state.pt"
LOG_NAME = "log.csv"


class TrainingRun:
    """Training by settings, with its log and the state to go on from in a folder.

    A run that finds a state in its folder goes on from there, with the same result as if it had
    never stopped. With `torch.distributed` set up all ranks construct and run it; the first
    writes, and alone fits the codebooks that are fitted to the whole set.

    Parameters
    ----------
    settings : TrainingSettings
        What to do.
    rows : Rows
        The embeddings.
    folder : Path
        Where ``state.pt`` and ``log.csv`` are kept; made if it is not there.
    device : torch.device
        Where the model is trained.
    save_every : int
        Steps between two saves of the state.
    on_step, on_pass : callable
        Called after each mini-batch step and for each pass over the whole set.
    should_stop : callable
        Asked after each step and each layer; once it says yes, the state is saved and `run` ends.

    Attributes
    ----------
    resumed : bool
        Whether a state was found and is gone on with.
    origin_unknown : bool
        Whether that state does not record which file the run began on, as those of earlier versions
        do not: of its embeddings only the shape was compared.

    Raises
    ------
    ConfigurationError
        If the folder holds the state of a run with other settings or embeddings, there are fewer
        rows than centroids, or all rows are equal.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        rows: Rows,
        folder: Path,
        *,
        device: torch.device,
        save_every: int = 100,
        on_step: Callable[[Trainer, TrainingStep], None] = lambda _trainer, _step: None,
        on_pass: Callable[[Pass], None] = lambda _pass: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings = settings
        self.rows = TrainableRows(rows)
        self.folder = folder
        self.device = device
        self.save_every = save_every
        self.on_step = on_step
        self.on_pass = on_pass
        self.should_stop = should_stop
        if rows.n_rows < settings.codebook_width:
            raise ConfigurationError(
                f"{rows.n_rows} rows for a codebook of {settings.codebook_width} centroids: "
                "give at least as many rows, or a smaller codebook_width"
            )
        torch.manual_seed(settings.seed)
        self.model: ResidualQuantization = settings.build(rows.dim).to(device)
        self.trainer = Trainer(self.model, max_steps=settings.steps)
        self.fitted_layers = 0
        self.resumed = self.origin_unknown = False
        folder.mkdir(parents=True, exist_ok=True)
        if self._state_path.exists():
            self._load()
        elif is_first_rank():
            self._log_path.unlink(missing_ok=True)  # of a run that ended before it saved a state
        self._log = _Log(self._log_path, settings.layers) if is_first_rank() else None

    @property
    def _state_path(self) -> Path:
        return self.folder / STATE_NAME

    @property
    def _log_path(self) -> Path:
        return self.folder / LOG_NAME

    def run(self) -> bool:
        """Train to the end and leave the model in evaluation mode; False if stopped before.

        Raises
        ------
        ConfigurationError
            If rows cannot be read, one is too long to be trained on in float32, or training
            diverges; what was saved before stays.
        """
        try:
            finished = (self.settings.distinct or self._take_steps()) and (
                not is_first_rank() or self._fit_codebooks()
            )
        finally:
            if self._log is not None:
                self._log.close()
        self.model.eval()
        return finished

    def _take_steps(self) -> bool:
        ranks = (distributed.get_rank(), distributed.get_world_size()) if together() else (0, 1)
        stream = batches(
            self.rows,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            first=self.trainer.steps,
            rank=ranks[0],
            world_size=ranks[1],
        )
        while not self.trainer.done:
            layer = self.model.current_layer
            step = self.trainer.step(torch.from_numpy(next(stream)).to(self.device))
            self.on_step(self.trainer, step)
            if self._log is not None:
                self._log.step(layer, self.trainer, step)
            lost = _not_finite(self.model, step.metrics)
            stop, diverged = self._on_any_rank(self.should_stop(), lost is not None)
            if diverged:  # which is not saved
                raise self._diverged(layer, lost or "another process's part is not finite")
            if stop or self.trainer.done or self.trainer.steps % self.save_every == 0:
                self._save()
            if stop:
                return self.trainer.done
        return True

    def _fit_codebooks(self) -> bool:
        if self.settings.distinct:
            layers = fit_distinct(
                self.model,
                self.rows,
                first_layer=self.fitted_layers,
                seed=self.settings.seed,
                on_pass=self._passed,
            )
        elif self.settings.refine:
            layers = refine(
                self.model,
                self.rows,
                iterations=self.settings.refine,
                first_layer=self.fitted_layers,
                seed=self.settings.seed,
                on_pass=self._passed,
            )
        else:
            return True
        for layer in layers:
            self.fitted_layers = layer + 1
            self._save()
            if self.should_stop() and self.fitted_layers < self.settings.layers:
                return False
        return True

    def _passed(self, one: Pass) -> None:
        self.on_pass(one)
        if self._log is not None:
            self._log.passed(one)

    def _on_any_rank(self, *here: bool) -> list[bool]:
        # All ranks stop after the same step, though a signal reaches each at its own time.
        ranks = summed_over_ranks(torch.tensor(here, dtype=torch.int64, device=self.device))
        return [count > 0 for count in ranks.tolist()]

    def _diverged(self, layer: int, lost: str) -> ConfigurationError:
        return ConfigurationError(
            f"training diverged at step {self.trainer.steps}, layer {layer}: {lost}; "
            f"{self._saved_before()}. Begin anew by --restart with a learning rate below "
            f"{self.settings.learning_rate:g}, or with embeddings of a smaller scale"
        )

    def _saved_before(self) -> str:
        if not self._state_path.exists():
            return "no earlier step was saved"
        return f"{self._state_path} holds an earlier step"

    def _save(self) -> None:
        if self._log is None:
            return
        state = {
            "settings": self._plain_settings(),
            "rows": [self.rows.n_rows, self.rows.dim],
            "origin": None if self.rows.origin is None else dict(self.rows.origin),
            "trainer": self.trainer.state(),
            "fitted_layers": self.fitted_layers,
            "log_bytes": self._log.flushed_bytes(),
        }
        contents = io.BytesIO()  # torch tells of a full disk as of a bug
        torch.save(state, contents)
        temporary = self._state_path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(contents.getvalue())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._state_path)

    def _load(self) -> None:
        state: dict[str, Any] = torch.load(
            self._state_path, map_location=self.device, weights_only=True
        )
        for name, value in self._plain_settings().items():
            if state["settings"][name] != value:
                raise ConfigurationError(
                    f"{self._state_path}: this run began with {name} {state['settings'][name]}, "
                    f"and is now given {value}: give the same to go on, or --restart to begin anew"
                )
        if state["rows"] != [self.rows.n_rows, self.rows.dim]:
            raise ConfigurationError(
                f"{self._state_path}: this run began on embeddings of shape "
                f"{tuple(state['rows'])}, and is now given {(self.rows.n_rows, self.rows.dim)}: "
                "give the same to go on, or --restart to begin anew"
            )
        self._check_origin(state)
        self.trainer.load_state(state["trainer"])
        self.fitted_layers = state["fitted_layers"]
        self.resumed = True
        if is_first_rank() and self._log_path.exists():
            os.truncate(self._log_path, state["log_bytes"])

    def _check_origin(self, state: dict[str, Any]) -> None:
        if "origin" not in state:
            self.origin_unknown = True
            return
        # The first rank's, which wrote it: other machines may have copies of another time.
        if is_first_rank() and state["origin"] != self.rows.origin:
            raise ConfigurationError(
                f"{self._state_path}: this run began on {_described(state['origin'])}, and is now "
                f"given {_described(self.rows.origin)}: give the same to go on, or --restart to "
                "begin anew"
            )

    def _plain_settings(self) -> dict[str, Any]:
        return {
            name: list(value) if isinstance(value, tuple) else str(value)
            for name, value in asdict(self.settings).items()
        }


def _described(origin: Mapping[str, Any] | None) -> str:
    """Words for the origin of rows."""
    if origin is None:
        return "an array in memory"
    changed = datetime.fromtimestamp(origin["changed_ns"] / 1e9, UTC).isoformat()
    column = f", column {origin['column']!r}" if "column" in origin else ""
    return f"{origin['path']} ({origin['bytes']:,} bytes, last changed {changed}{column})"


def _not_finite(model: ResidualQuantization, metrics: Mapping[str, float]) -> str | None:
    """What of a step is not a finite number, in words; None if all is."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            return f"{name} is {value}"
    weights = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    # The least and the most of each: NaN is both. Asked for at once, as a GPU is waited for.
    extremes = [torch.stack(torch.aminmax(tensor)).double() for tensor in weights.values()]
    for name, found in zip(weights, torch.stack(extremes).tolist(), strict=True):
        for extreme in found:
            if not math.isfinite(extreme):
                return f"{name} holds {extreme}"
    return None


class _Log:
    """The CSV file of a run: a line for each step and each pass, the same in every run."""

    def __init__(self, path: Path, n_layers: int) -> None:
        self._file = path.open("a", newline="", encoding="utf-8")
        fields = ["stage", "layer", "step", "counted_steps", "loss", "distinct_ids"]
        fields += [
            f"{name}_{layer}" for name in ("coverage", "entropy") for layer in range(n_layers)
        ]
        fields += ["first_residual_norm_ratio", "last_residual_norm_ratio", "residual_mse"]
        self._writer = csv.DictWriter(self._file, fields)
        if self._file.tell() == 0:
            self._writer.writeheader()

    def step(self, layer: int, trainer: Trainer, step: TrainingStep) -> None:
        self._writer.writerow(
            {
                "stage": "mini-batch",
                "layer": layer,
                "step": trainer.steps,
                "counted_steps": trainer.counted_steps,
                **step.metrics,
            }
        )

    def passed(self, one: Pass) -> None:
        self._writer.writerow(
            {"stage": one.stage, "layer": one.layer, "step": one.number, "loss": one.error}
        )

    def flushed_bytes(self) -> int:
        self._file.flush()
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
