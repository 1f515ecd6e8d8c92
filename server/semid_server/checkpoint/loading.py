"""From a path to a model that can be trusted, or to a report on one that cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from semid_server.checkpoint.contents import Contents, Overrides
from semid_server.checkpoint.fingerprint import fingerprint
from semid_server.checkpoint.grid_lightning import read_grid_lightning
from semid_server.checkpoint.health import Health, LayerReport, examine
from semid_server.checkpoint.native import CONFIG_NAME, make_native, read_native
from semid_server.checkpoint.plain_torch import read_plain_torch
from semid_server.checkpoint.torch_files import read_torch_file
from semid_server.errors import DegenerateModelError, MalformedCheckpointError
from semid_server.files import refuse_irregular
from semid_server.model import build_model

if TYPE_CHECKING:
    from semid_server.model import Calibration, ModelSpec, ResidualQuantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model as loaded, and what is known of it.

    Attributes
    ----------
    model : ResidualQuantization
        On the CPU, float32, in evaluation mode.
    spec : ModelSpec
        Its shape and switches.
    fingerprint : str
        64 hexadecimal digits: see `fingerprint`.
    name : str
        By which it is served.
    calibration : Calibration or None
        Residual norms, where the checkpoint has them.
    format : str
        ``semid``, ``grid-lightning`` or ``torch-state-dict``.
    path : Path
        Where it was read.
    notes : tuple of str
        What was assumed because the file does not say it.
    warnings : tuple of str
        What its user should know before relying on its codes.
    """

    model: ResidualQuantization
    spec: ModelSpec
    fingerprint: str
    name: str
    calibration: Calibration | None
    format: str
    path: Path
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A report on a checkpoint, sound or not: the attributes of `Checkpoint`, and these.

    Attributes
    ----------
    layers : tuple of LayerReport
        Figures of each codebook.
    problems : tuple of str
        Why `load_checkpoint` refuses it; empty where it does not.
    """

    spec: ModelSpec
    fingerprint: str
    name: str
    calibrated: bool
    format: str
    path: Path
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...]


def load_checkpoint(path: Path | str, *, overrides: Overrides | None = None) -> Checkpoint:
    """Load a model onto the CPU, wherever it was trained.

    Parameters
    ----------
    path : Path
        A native folder, a GRID ``.ckpt``, or a plain file of `torch.save`; what it is, is seen
        from its contents.
    overrides : Overrides, optional
        What the user says in place of the file.

    Raises
    ------
    MalformedCheckpointError
        Missing, damaged, not a checkpoint, or at odds with itself.
    UnsafeCheckpointError
        A pickle that would run something. Nothing of it ran.
    DegenerateModelError
        Sound, but its codes would mean nothing.
    ConfigurationError
        ``overrides`` contradict what a native checkpoint records.
    """
    path, overrides = Path(path), overrides or Overrides()
    return _build(path, _read(path, overrides), overrides)


def pack_checkpoint(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return a checkpoint, whatever its format was, as the files of semid's own, by name."""
    _, files = make_native(
        model=checkpoint.model,
        spec=checkpoint.spec,
        name=checkpoint.name,
        calibration=checkpoint.calibration,
        notes=checkpoint.notes,
        warnings=checkpoint.warnings,
    )
    return files


def unpack_checkpoint(
    files: Mapping[str, bytes], *, path: Path, overrides: Overrides
) -> Checkpoint:
    """Load what `pack_checkpoint` made; ``path`` and ``overrides`` are those it was loaded with.

    Errors are those of `load_checkpoint`.
    """
    contents = read_native(path, overrides, read=lambda file: files[file.name])
    return _build(path, contents, overrides)


def _build(path: Path, contents: Contents, overrides: Overrides) -> Checkpoint:
    health = examine(contents.spec, contents.state)
    problems = _problems(contents, health)
    if health.damage:
        raise DegenerateModelError(path, "; ".join(problems))
    if problems and not overrides.allow_degenerate:
        raise DegenerateModelError(
            path, "; ".join(problems) + " (to use it all the same: --allow-degenerate)"
        )
    model = build_model(contents.spec)
    model.load_state_dict(contents.state)
    for layer in model.layers:
        layer.is_initialized = True
    return Checkpoint(
        model=model,
        spec=contents.spec,
        fingerprint=fingerprint(contents.spec, contents.state),
        name=contents.name,
        calibration=contents.calibration,
        format=contents.format,
        path=path,
        notes=contents.notes,
        warnings=_once(*problems, *contents.warnings, *health.warnings),
    )


def inspect_checkpoint(path: Path | str, overrides: Overrides | None = None) -> Inspection:
    """Report on a checkpoint, also on one that `load_checkpoint` refuses as degenerate.

    Parameters and errors are those of `load_checkpoint`, but for `DegenerateModelError`.
    """
    path = Path(path)
    contents = _read(path, overrides or Overrides())
    health = examine(contents.spec, contents.state)
    return Inspection(
        spec=contents.spec,
        fingerprint=fingerprint(contents.spec, contents.state),
        name=contents.name,
        calibrated=contents.calibration is not None,
        format=contents.format,
        path=path,
        layers=health.layers,
        notes=contents.notes,
        warnings=_once(*contents.warnings, *health.warnings),
        problems=_problems(contents, health),
    )


def _problems(contents: Contents, health: Health) -> tuple[str, ...]:
    return _once(*health.damage, *contents.problems, *health.problems)


def _once(*sentences: str) -> tuple[str, ...]:
    """Each sentence once: an imported checkpoint also repeats what was found when it was made."""
    return tuple(dict.fromkeys(sentences))


def _read(path: Path, overrides: Overrides) -> Contents:
    try:
        return _read_any(path, overrides)
    except OSError as error:
        file = error.filename or path  # one of a folder's, perhaps
        raise MalformedCheckpointError(file, f"cannot be read: {error.strerror}") from error


def _read_any(path: Path, overrides: Overrides) -> Contents:
    if path.is_dir():
        if not (path / CONFIG_NAME).exists():
            raise MalformedCheckpointError(
                path, f"a folder without {CONFIG_NAME}: not a checkpoint"
            )
        return read_native(path, overrides)
    if not path.exists():
        raise MalformedCheckpointError(path, "no file and no folder there")
    refuse_irregular(path, path.stat())
    _refuse_known_strangers(path)
    file = read_torch_file(path)
    if not isinstance(file, Mapping):
        raise MalformedCheckpointError(
            path, f"holds a {type(file).__name__}; expected a checkpoint or a state dict"
        )
    if "state_dict" in file:
        return read_grid_lightning(path, file, overrides)
    return read_plain_torch(path, file, overrides)


def _refuse_known_strangers(path: Path) -> None:
    """Say of what can be told from its first bytes what it is, rather than what it is not."""
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise MalformedCheckpointError(path, "an empty file")
    if head.startswith(b"\x93NUMPY"):
        raise MalformedCheckpointError(path, "a NumPy array, not a checkpoint")
    if path.name == CONFIG_NAME or head[8:] == b"{":  # safetensors: a length, then JSON
        raise MalformedCheckpointError(
            path, "one file of a checkpoint folder, it seems: name the folder that holds it"
        )
