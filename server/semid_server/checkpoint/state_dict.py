"""What a GRID state dict says of its model: shapes, networks and switches."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import torch

from semid_server.checkpoint.fingerprint import linear_keys
from semid_server.errors import MalformedCheckpointError
from semid_server.model import Activation, ModelKind, ModelSpec
from semid_server.model.spec import BATCH_NORM_EPS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from semid_server.checkpoint.contents import Overrides

_WRAPPERS = re.compile(r"^(?:module\.|model\.)*(?=quantization_layer|encoder\.|decoder\.|norm)")
"""Put before every name by data-parallel training and by modules that hold the model."""

_WRAPPED = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""Put anywhere into names by torch.compile, sharded training, checkpointing and DeepSpeed."""

_CENTROIDS = re.compile(r"^(?P<holder>(?:.+\.)?)quantization_layer_list\.\d+\.centroids$")

_FOR_TRAINING = re.compile(
    r"^(quantization_layer_list\.\d+\.(initializer|distance_function|loss_function)\."
    r"|quantization_layer\.)"
)
"""Of the initialiser, the loss and the template of the layers: no part of inference."""

_OF_THE_MODEL = re.compile(r"^(quantization_layer_list|encoder|decoder|normalization_layer)\.")

_OF_A_LAYER = re.compile(r"^quantization_layer_list\.\d+\.(?!centroids$)")

_COUNT = "normalization_layer.0.num_batches_tracked"

_LINEAR_WEIGHT = re.compile(r"^(encoder|decoder)\.model\.\d+\.weight$")

_LONGEST_SHOWN = 60
"""Characters of a value that a message repeats."""


class ModelTensors(NamedTuple):
    """The tensors of a state dict that inference needs, under GRID's own names."""

    state: dict[str, Tensor]
    notes: list[str]
    ignored: list[str]


def model_tensors(path: Path, raw: Mapping[object, object]) -> ModelTensors:
    """Take the model's tensors out of a state dict, in float32 and under GRID's names.

    Raises
    ------
    MalformedCheckpointError
        It holds something else than numbers, or no codebooks.
    """
    state: dict[str, Tensor] = {}
    notes: list[str] = []
    ignored: list[str] = []
    for key, name in _names(path, raw).items():
        value = raw[key]
        if _FOR_TRAINING.match(name):
            continue
        if not _OF_THE_MODEL.match(name) or _is_statistic(name, value):
            ignored.append(str(key))
            continue
        if name in state:
            raise MalformedCheckpointError(path, f"state dict holds {name} twice, once as {key}")
        state[name] = _numbers(path, name, value, notes)
    if "normalization_layer.0.running_mean" in state:
        # Old and converted files lack it, and inference has no use for it.
        state.setdefault(_COUNT, torch.zeros((), dtype=torch.int64))
    if not any(name.startswith("quantization_layer_list.") for name in state):
        raise MalformedCheckpointError(
            path,
            "its state dict has no quantization_layer_list.0.centroids: not a checkpoint of a "
            f"ResidualQuantization. It holds {', '.join(map(str, list(raw)[:3])) or 'nothing'}",
        )
    return ModelTensors(state, notes, ignored)


def _names(path: Path, raw: Mapping[object, object]) -> dict[object, str]:
    """Name of each tensor in the model, whatever held the model when it was saved."""
    names = {key: _WRAPPERS.sub("", _WRAPPED.sub("", str(key))) for key in raw}
    found = [match for name in names.values() if (match := _CENTROIDS.match(name))]
    holders = sorted({match["holder"] for match in found})
    if not holders or "" in holders:
        return names
    if len(holders) > 1:
        raise MalformedCheckpointError(
            path, f"its state dict holds several quantisers, under {', '.join(holders)}: keep one"
        )
    (holder,) = holders
    for key, name in names.items():
        if not name.startswith(holder) and _OF_THE_MODEL.match(name):
            raise MalformedCheckpointError(
                path, f"{key} lies outside of {holder}, which holds the codebooks: is it a part?"
            )
    return {key: name.removeprefix(holder) for key, name in names.items()}


def _is_statistic(name: str, value: object) -> bool:
    """Whether it is a count or a flag that a layer keeps of its training: no map, nothing wide."""
    if not _OF_A_LAYER.match(name):
        return False
    return isinstance(value, torch.Tensor) and value.ndim <= 1


def shown(value: object) -> str:
    """Text of a value from a file for a message of one line."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN and "\n" not in text else type(value).__name__


def residuals_said(recorded: object, overrides: Overrides, notes: list[str]) -> object:
    """Return what is said of ``normalize_residuals``: by the user, or else by the file."""
    asked = overrides.normalize_residuals
    if asked is None:
        return recorded
    if recorded is not None and recorded is not asked:
        notes.append(
            f"normalize_residuals: {asked}, as was asked for; the file records {shown(recorded)}"
        )
    return asked


def _numbers(path: Path, name: str, value: object, notes: list[str]) -> Tensor:
    if not isinstance(value, torch.Tensor):
        raise MalformedCheckpointError(
            path, f"{name} is of type {type(value).__name__}; expected a tensor"
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise MalformedCheckpointError(
            path,
            f"{name} has shape {tuple(value.shape)} but only {value.untyped_storage().nbytes()} "
            "bytes of numbers; a row that stands for many is not a codebook",
        )
    value = value.detach()
    if name.endswith("num_batches_tracked"):
        return value.to(torch.int64).clone()
    single = value.to(torch.float32).contiguous()
    if not torch.equal(single.double(), value.double()) and bool(torch.isfinite(value).all()):
        notes.append(f"{name} is stored as {value.dtype} and was rounded to float32")
    return single.clone()


def read_spec(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    kind: ModelKind,
    normalize_residuals: bool,
    overrides: Overrides,
    notes: list[str],
) -> ModelSpec:
    """Shape of the model that these tensors belong to; what was assumed is added to ``notes``.

    Raises
    ------
    MalformedCheckpointError
        Shapes do not fit each other, tensors are missing or left over, or only the user can
        say what the file does not.
    """
    widths, embedding_dim = _codebooks(path, state)
    encoder = _network(path, state, "encoder")
    decoder = _network(path, state, "decoder")
    input_dim = encoder[0] if encoder else embedding_dim
    for what, found, expected, why in [
        ("the encoder's last linear gives", encoder[-1] if encoder else embedding_dim,
         embedding_dim, "centroids have"),
        ("the decoder's first linear takes", decoder[0] if decoder else embedding_dim,
         embedding_dim, "centroids have"),
        ("the decoder's last linear gives", decoder[-1] if decoder else input_dim,
         input_dim, "embeddings have"),
    ]:  # fmt: skip
        if found != expected:
            raise MalformedCheckpointError(path, f"{what} {found} numbers, but {why} {expected}")
    if encoder and not decoder:
        raise MalformedCheckpointError(
            path, "it has an encoder but no decoder.model.0.weight: codes could not be decoded"
        )
    batch_norm = "normalization_layer.0.weight" in state
    spec = ModelSpec(
        kind=kind,
        input_dim=input_dim,
        codebook_widths=widths,
        embedding_dim=embedding_dim,
        normalize_residuals=normalize_residuals,
        encoder_hidden_dims=tuple(encoder[1:-1]) if encoder else None,
        decoder_hidden_dims=tuple(decoder[1:-1]) if decoder else None,
        activation=_activation(encoder, decoder, overrides, notes),
        batch_norm=batch_norm,
        batch_norm_eps=_batch_norm_eps(batch_norm, overrides, notes),
        normalize_input=_normalize_input(path, bool(encoder), batch_norm, overrides, notes),
    )
    check_shapes(path, spec, state, source="the other tensors")
    return spec


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in the state dict of `build_model(spec)`, in its order."""
    shapes: dict[str, tuple[int, ...]] = {}
    if spec.batch_norm:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"normalization_layer.0.{part}"] = (spec.input_dim,)
        shapes["normalization_layer.0.num_batches_tracked"] = ()
    ends = {
        "encoder": (spec.encoder_hidden_dims, spec.input_dim, spec.embedding_dim),
        "decoder": (spec.decoder_hidden_dims, spec.embedding_dim, spec.input_dim),
    }
    for network, (hidden, first, last) in ends.items():
        dims = (first, *(hidden or ()), last)
        for index, key in enumerate(linear_keys(network, hidden)):
            shapes[f"{key}.weight"] = (dims[index + 1], dims[index])
            shapes[f"{key}.bias"] = (dims[index + 1],)
    for layer, width in enumerate(spec.codebook_widths):
        shapes[f"quantization_layer_list.{layer}.centroids"] = (width, spec.embedding_dim)
    return shapes


def check_shapes(path: Path, spec: ModelSpec, state: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse a missing tensor, one too many, or one whose shape the spec does not expect."""
    shapes = expected_shapes(spec)
    for name, shape in shapes.items():
        if name not in state:
            raise MalformedCheckpointError(
                path, f"{name} is missing; expected of shape {shape}, by {source}"
            )
        if tuple(state[name].shape) != shape:
            raise MalformedCheckpointError(
                path,
                f"{name} has shape {tuple(state[name].shape)}; expected {shape}, by {source}",
            )
    extra = sorted(set(state) - set(shapes))
    if extra and _OF_A_LAYER.match(extra[0]):
        raise MalformedCheckpointError(
            path,
            f"{extra[0]}, of shape {tuple(state[extra[0]].shape)}, has no place in this model: "
            "centroids alone decide the codes of its layers",
        )
    if extra:
        raise MalformedCheckpointError(
            path,
            f"{extra[0]} has no place in this model ({spec.kind}, {spec.n_layers} "
            "layers); a network's linears are model.0, model.2, model.5, model.8 and so on",
        )


def _codebooks(path: Path, state: Mapping[str, Tensor]) -> tuple[tuple[int, ...], int]:
    codebooks: list[Tensor] = []
    while (name := f"quantization_layer_list.{len(codebooks)}.centroids") in state:
        codebook = state[name]
        if codebook.ndim != 2 or 0 in codebook.shape:  # noqa: PLR2004 (rows and columns)
            raise MalformedCheckpointError(
                path, f"{name} has shape {tuple(codebook.shape)}; expected (K, E), both at least 1"
            )
        codebooks.append(codebook)
        if codebook.shape[1] != codebooks[0].shape[1]:
            raise MalformedCheckpointError(
                path,
                f"{name} has centroids of {codebook.shape[1]} numbers, but those of layer 0 "
                f"have {codebooks[0].shape[1]}",
            )
    if not codebooks:
        raise MalformedCheckpointError(
            path, "quantization_layer_list.0.centroids is missing, though other layers are there"
        )
    return tuple(codebook.shape[0] for codebook in codebooks), codebooks[0].shape[1]


def _network(path: Path, state: Mapping[str, Tensor], network: str) -> list[int]:
    """Widths of an MLP from its input to its output; empty where there is no such network."""
    weights = [n for n in state if _LINEAR_WEIGHT.match(n) and n.startswith(f"{network}.")]
    dims: list[int] = []
    for key in linear_keys(network, (0,) * (len(weights) - 1) if weights else None):
        weight = state.get(f"{key}.weight")
        if weight is None or weight.ndim != 2 or 0 in weight.shape:  # noqa: PLR2004 (out, in)
            raise MalformedCheckpointError(
                path,
                f"{key}.weight is {'missing' if weight is None else tuple(weight.shape)}; expected "
                f"(out, in), as the {network} has {len(weights)} linears",
            )
        if dims and weight.shape[1] != dims[-1]:
            raise MalformedCheckpointError(
                path,
                f"{key}.weight takes {weight.shape[1]} numbers, but the linear before it gives "
                f"{dims[-1]}",
            )
        dims += [weight.shape[0]] if dims else [weight.shape[1], weight.shape[0]]
    return dims


def _activation(
    encoder: list[int], decoder: list[int], overrides: Overrides, notes: list[str]
) -> Activation:
    if overrides.activation is not None:
        return overrides.activation
    if max(len(encoder), len(decoder)) > 2:  # noqa: PLR2004 (one linear has two ends)
        notes.append(
            "activation of the MLPs: relu, as GRID configures it; the file does not record it "
            "(--activation says otherwise)"
        )
    return Activation.RELU


def _batch_norm_eps(batch_norm: bool, overrides: Overrides, notes: list[str]) -> float:  # noqa: FBT001 (a fact about the file)
    if overrides.batch_norm_eps is not None:
        return overrides.batch_norm_eps
    if batch_norm:
        notes.append(
            f"epsilon of the batch norm: {BATCH_NORM_EPS}, torch's default; the file does not "
            "record it (--batch-norm-eps says otherwise)"
        )
    return BATCH_NORM_EPS


def _normalize_input(
    path: Path,
    encoder: bool,  # noqa: FBT001 (a fact about the file)
    batch_norm: bool,  # noqa: FBT001 (a fact about the file)
    overrides: Overrides,
    notes: list[str],
) -> bool:
    if overrides.normalize_input is not None:
        return overrides.normalize_input
    if encoder != batch_norm:
        has, lacks = ("an encoder", "batch norm") if encoder else ("a batch norm", "encoder")
        raise MalformedCheckpointError(
            path,
            f"it has {has} but no {lacks}, which none of GRID's configurations has, and it does "
            "not record whether rows are brought to length 1 first: say "
            "--normalize-input or --no-normalize-input",
        )
    if encoder:
        notes.append(
            "rows are brought to length 1 after the batch norm, as GRID configures it; the file "
            "does not record it (--no-normalize-input says otherwise)"
        )
    return encoder
