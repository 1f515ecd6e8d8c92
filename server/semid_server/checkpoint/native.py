"""semid's own format: a folder with ``config.json`` and ``model.safetensors``. See FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import safetensors
import safetensors.torch
import torch

from semid_server.checkpoint.contents import Contents
from semid_server.checkpoint.fingerprint import fingerprint
from semid_server.checkpoint.state_dict import check_shapes, expected_shapes
from semid_server.errors import CheckpointError, ConfigurationError, MalformedCheckpointError
from semid_server.files import read_file
from semid_server.model import Activation, Calibration, ModelKind, ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from enum import StrEnum

    from torch import Tensor

    from semid_server.checkpoint.contents import Overrides
    from semid_server.model import ResidualQuantization

FORMAT = "semid"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
TENSORS_NAME = "model.safetensors"

_CALIBRATION = "calibration."
_DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
}
_WEIGHT_DTYPES = ("float32", "float16", "bfloat16")
"""Types of a weight that float32 holds exactly."""

T = TypeVar("T")


def save_checkpoint(
    path: Path | str,
    *,
    model: ResidualQuantization,
    spec: ModelSpec,
    name: str,
    calibration: Calibration | None = None,
    provenance: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    beside: Path | None = None,
    force: bool = False,
) -> str:
    """Write a model as a folder, whole or not at all, and return its fingerprint.

    The folder is written beside its place under another name, brought to the disk, and
    renamed.

    Parameters
    ----------
    path : Path
        The folder to make.
    model, spec : ResidualQuantization, ModelSpec
        What to save; the model is one of `build_model(spec)`, on any device.
    name : str
        By which the model is served.
    calibration : Calibration, optional
        Residual norms, for the decode mode ``calibrated``.
    provenance : mapping of str to str, optional
        Free text: where the model came from.
    notes, warnings : sequence of str
        What was assumed of the model and what its user should know, to be repeated whenever it
        is loaded.
    beside : Path, optional
        A checkpoint folder; what else lies in it is copied, such as a README.
    force : bool
        Replace a checkpoint that is there.

    Raises
    ------
    CheckpointError
        ``path`` is taken: by anything without ``force``, by something that is not a checkpoint
        with it.
    ValueError
        ``model`` is not of the shape of ``spec``, or ``calibration`` holds what is not a length.
    """
    path = Path(path)
    _refuse_if_taken(path, force=force)
    digest, files = make_native(
        model=model,
        spec=spec,
        name=name,
        calibration=calibration,
        provenance=provenance,
        notes=notes,
        warnings=warnings,
    )
    _write_folder(path, files, beside)
    return digest


def make_native(
    *,
    model: ResidualQuantization,
    spec: ModelSpec,
    name: str,
    calibration: Calibration | None = None,
    provenance: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> tuple[str, dict[str, bytes]]:
    """Return the fingerprint of a model and what its folder's files hold, by name.

    Parameters and errors are those of `save_checkpoint`.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    if shapes != expected_shapes(spec):
        raise ValueError(f"the model has tensors {shapes}; its spec needs {expected_shapes(spec)}")
    digest = fingerprint(spec, state)
    tensors = {**state, **_calibration_tensors(calibration)}
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": name,
        "fingerprint": digest,
        "model": asdict(spec),
        "tensors": {
            key: {
                "dtype": _DTYPES[value.dtype],
                "shape": list(value.shape),
                "sha256": _sha256(value),
            }
            for key, value in tensors.items()
        },
        "notes": list(notes),
        "warnings": list(warnings),
        "provenance": dict(provenance or {}),
    }
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return digest, {CONFIG_NAME: text.encode(), TENSORS_NAME: safetensors.torch.save(tensors)}


def read_native(
    path: Path, overrides: Overrides, *, read: Callable[[Path], bytes] = read_file
) -> Contents:
    """Read a checkpoint folder and check every number in it against its record.

    ``read`` is what returns the bytes of a file in it.

    Raises
    ------
    MalformedCheckpointError
        A file is missing, damaged, of another version, or at odds with the other one.
    ConfigurationError
        ``overrides`` contradict what the checkpoint records.
    """
    config = _read_config(path / CONFIG_NAME, read)
    tensors = _read_tensors(path / TENSORS_NAME, config, read)
    spec: ModelSpec = config["model"]
    _refuse_contradictions(path, spec, overrides)
    stored = {key: value for key, value in tensors.items() if not key.startswith(_CALIBRATION)}
    check_shapes(path / TENSORS_NAME, spec, stored, source="config.json")
    state = {
        key: value.float() if value.is_floating_point() else value for key, value in stored.items()
    }
    actual = fingerprint(spec, state)
    if actual != config["fingerprint"]:
        _malformed(
            path / CONFIG_NAME,
            f"fingerprint is {config['fingerprint']}, but the settings and tensors have {actual}: "
            "one of them was changed",
        )
    return Contents(
        format=FORMAT,
        name=overrides.name or config["name"],
        spec=spec,
        state=state,
        calibration=_read_calibration(path / TENSORS_NAME, spec, tensors),
        notes=tuple(config["notes"]),
        warnings=tuple(config["warnings"]),
    )


def _sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes as they lie in the file: little-endian, row-major."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _malformed(path: Path, problem: str) -> NoReturn:
    raise MalformedCheckpointError(path, problem)


# --- config.json ---------------------------------------------------------------------------


def _read_config(path: Path, read: Callable[[Path], bytes]) -> dict[str, Any]:
    """Parse and check config.json; its ``model`` comes back as a `ModelSpec`."""
    try:
        config = json.loads(
            read(path).decode("utf-8"),
            object_pairs_hook=lambda pairs: _no_repeats(path, pairs),
            parse_constant=lambda word: _malformed(path, f"holds {word}, which is no JSON"),
        )
    except (ValueError, RecursionError) as error:
        raise MalformedCheckpointError(path, f"not readable as JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else config
        _malformed(path, f"format is {found!r}; expected {FORMAT!r}")
    version = _field(path, config, "format_version", int)
    if version != FORMAT_VERSION:
        _malformed(
            path,
            f"format_version is {version}; this semid reads version {FORMAT_VERSION}"
            + (": a newer semid is needed" if version > FORMAT_VERSION else ""),
        )
    _check_fields(path, config)
    config["model"] = _read_spec(path, config["model"])
    return config


def _check_fields(path: Path, config: dict[str, Any]) -> None:
    types: dict[str, type] = {
        "name": str,
        "fingerprint": str,
        "model": dict,
        "tensors": dict,
        "notes": list,
        "warnings": list,
        "provenance": dict,
    }
    _exact_keys(path, config, {"format", "format_version", *types}, "")
    for key, kind in types.items():
        _field(path, config, key, kind)
    if not config["name"]:
        _malformed(path, "name is empty")
    texts = {f"provenance.{key}": value for key, value in config["provenance"].items()}
    for key in ("notes", "warnings"):
        texts |= {f"{key}[{index}]": value for index, value in enumerate(config[key])}
    for place in texts:
        _field(path, texts, place, str)
    for name, record in config["tensors"].items():
        _field(path, config["tensors"], name, dict, "tensors.")
        _exact_keys(path, record, {"dtype", "shape", "sha256"}, f"tensors.{name}.")


def _no_repeats(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            _malformed(path, f"{name} stands there {times} times")
    return dict(pairs)


def _exact_keys(path: Path, found: Mapping[str, Any], keys: set[str], place: str) -> None:
    for key in sorted(keys - found.keys()):
        _malformed(path, f"{place}{key} is missing")
    for key in sorted(found.keys() - keys):
        _malformed(path, f"{place}{key} is not a field of format version {FORMAT_VERSION}")


def _field(path: Path, found: Mapping[str, Any], key: str, kind: type[T], place: str = "") -> T:
    value = found.get(key)
    if type(value) is not kind:  # exactly: True is an instance of int
        _malformed(path, f"{place}{key} is {value!r}; expected a value of type {kind.__name__}")
    return value


def _read_spec(path: Path, found: dict[str, Any]) -> ModelSpec:
    _exact_keys(path, found, set(ModelSpec.__dataclass_fields__), "model.")

    def field(key: str, kind: type[T]) -> T:
        return _field(path, found, key, kind, "model.")

    def member(key: str, kind: type[StrEnum]) -> Any:
        value = field(key, str)
        if value not in list(kind):
            _malformed(path, f"model.{key} is {value!r}; expected one of {', '.join(kind)}")
        return kind(value)

    def widths(key: str) -> tuple[int, ...]:
        for value in field(key, list):
            if type(value) is not int or value < 1:
                _malformed(path, f"model.{key} holds {value!r}; expected whole numbers above 0")
        return tuple(found[key])

    try:
        return ModelSpec(
            kind=member("kind", ModelKind),
            input_dim=field("input_dim", int),
            codebook_widths=widths("codebook_widths"),
            embedding_dim=field("embedding_dim", int),
            normalize_residuals=field("normalize_residuals", bool),
            encoder_hidden_dims=_optional(found, "encoder_hidden_dims", widths),
            decoder_hidden_dims=_optional(found, "decoder_hidden_dims", widths),
            activation=member("activation", Activation),
            batch_norm=field("batch_norm", bool),
            batch_norm_eps=field("batch_norm_eps", float),
            normalize_input=field("normalize_input", bool),
        )
    except ValueError as error:
        raise MalformedCheckpointError(path, f"model: {error}") from error


def _optional(found: Mapping[str, Any], key: str, read: Any) -> Any:
    return None if found[key] is None else read(key)


def _refuse_contradictions(path: Path, spec: ModelSpec, overrides: Overrides) -> None:
    for name in ("kind", "normalize_residuals", "normalize_input", "activation", "batch_norm_eps"):
        wanted, recorded = getattr(overrides, name), getattr(spec, name)
        if wanted is not None and wanted != recorded:
            raise ConfigurationError(
                f"{path}: {name} is recorded as {recorded}, and was overridden with {wanted}; "
                "overrides are for files that do not record it. Import the original file again"
            )


# --- model.safetensors ---------------------------------------------------------------------


def _read_tensors(
    path: Path, config: Mapping[str, Any], read: Callable[[Path], bytes]
) -> dict[str, Tensor]:
    """Read all tensors and compare each with its record in config.json."""
    try:
        tensors = safetensors.torch.load(read(path))
    except FileNotFoundError as error:
        raise MalformedCheckpointError(path, "missing; config.json stands there alone") from error
    except OSError:
        raise
    except Exception as error:  # a damaged header can end in any exception at all
        raise MalformedCheckpointError(
            path, f"truncated or damaged ({type(error).__name__}: {error})"
        ) from error
    records = config["tensors"]
    for name in sorted(records.keys() - tensors.keys()):
        _malformed(path, f"tensor {name} is missing, though config.json lists it")
    for name in sorted(tensors.keys() - records.keys()):
        _malformed(path, f"tensor {name} is not listed in config.json")
    for name, tensor in tensors.items():
        _check_record(path, name, tensor, records[name])
    return tensors


def _check_record(path: Path, name: str, tensor: Tensor, record: Mapping[str, Any]) -> None:
    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype))
    actual = {"dtype": dtype, "shape": list(tensor.shape), "sha256": _sha256(tensor)}
    for what, value in actual.items():
        if value != record[what]:
            _malformed(
                path,
                f"tensor {name} has {what} {value}, but config.json records {record[what]}: one "
                "of the two files was damaged or replaced",
            )
    if not name.startswith(_CALIBRATION):
        allowed = ("int64",) if name.endswith("num_batches_tracked") else _WEIGHT_DTYPES
        if dtype not in allowed:
            _malformed(path, f"tensor {name} is {dtype}; expected {' or '.join(allowed)}")


def _calibration_tensors(calibration: Calibration | None) -> dict[str, Tensor]:
    if calibration is None:
        return {}
    tensors = {
        f"{_CALIBRATION}input_norm": torch.tensor(calibration.input_norm, dtype=torch.float64)
    } | {
        f"{_CALIBRATION}residual_norms.{layer}": norms.detach().cpu().float().contiguous()
        for layer, norms in enumerate(calibration.residual_norms)
    }
    for name, value in tensors.items():
        lengths = _are_lengths(value)
        if not lengths.all():
            raise ValueError(
                f"{name} holds {value[~lengths][0]:.6g}; expected a length, finite and 0 or more"
            )
    return tensors


def _are_lengths(values: Tensor) -> Tensor:
    return torch.isfinite(values) & (values >= 0)


def _read_calibration(
    path: Path, spec: ModelSpec, tensors: Mapping[str, Tensor]
) -> Calibration | None:
    found = {name: value for name, value in tensors.items() if name.startswith(_CALIBRATION)}
    if not found:
        return None
    norms = [f"{_CALIBRATION}residual_norms.{layer}" for layer in range(spec.n_layers)]
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{_CALIBRATION}input_norm": (torch.float64, ()),
        **{
            name: (torch.float32, (width,))
            for name, width in zip(norms, spec.codebook_widths, strict=True)
        },
    }
    for name in sorted(expected.keys() ^ found.keys()):
        _malformed(
            path, f"{name} is {'missing' if name in expected else 'no part of a calibration'}"
        )
    for name, (dtype, shape) in expected.items():
        value = found[name]
        if value.dtype != dtype or tuple(value.shape) != shape:
            _malformed(
                path,
                f"{name} is {value.dtype} {tuple(value.shape)}; expected {dtype} {shape}",
            )
        if not _are_lengths(value).all():
            _malformed(path, f"{name} holds a number that is not a length (negative, NaN or Inf)")
    return Calibration(
        input_norm=float(found[f"{_CALIBRATION}input_norm"]),
        residual_norms=tuple(found[name] for name in norms),
    )


# --- writing -------------------------------------------------------------------------------


def _refuse_if_taken(path: Path, *, force: bool) -> None:
    """Only a checkpoint is ever replaced, and only by ``force``; an empty folder is no loss."""
    is_folder = path.is_dir() and not path.is_symlink()
    if not os.path.lexists(path) or (is_folder and not any(path.iterdir())):
        return
    if not force:
        raise CheckpointError(path, "already there; replace it with --force, or name another path")
    if path.is_symlink():
        raise CheckpointError(path, "a link, which is not replaced: name the folder it leads to")
    if not is_folder or not (path / CONFIG_NAME).is_file():
        raise CheckpointError(
            path, f"not a checkpoint folder ({CONFIG_NAME} is missing), so it is not replaced"
        )


def _write_folder(path: Path, files: Mapping[str, bytes], beside: Path | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    new = path.parent / f".{path.name}.new-{unique}"
    old = path.parent / f".{path.name}.old-{unique}"
    try:
        if beside is None:
            new.mkdir()
        else:
            ours = str(beside)  # its own two files, and not those of such names further down
            shutil.copytree(
                ours, new, symlinks=True, ignore=lambda at, _names: files if at == ours else ()
            )
        for name, data in files.items():
            with (new / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
        _sync_folder(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
