"""The fingerprint of a model: equal exactly where two models give the same arithmetic.

FORMAT.md describes the bytes that are digested; a change to them is a new version.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from semid_server.model import Calibration, ModelSpec

_VERSION = b"semid fingerprint 1\n"


def fingerprint(spec: ModelSpec, state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the canonical codebooks and of all that changes their meaning.

    The same whatever the type in which the numbers are stored, the format of the file, the
    model's name, its kind and its calibration.

    Parameters
    ----------
    spec : ModelSpec
        Shape of the model.
    state : mapping of str to Tensor
        Its state dict, on any device, of any floating type.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(_VERSION)

    def number(name: str, value: float) -> None:
        add(name, np.float64(value))

    def add(name: str, values: np.ndarray | np.float64) -> None:
        digest.update(_record(name, values))

    def tensor(name: str, key: str) -> None:
        add(name, state[key].detach().double().cpu().numpy())

    def network(name: str, hidden_dims: tuple[int, ...] | None) -> None:
        for index, key in enumerate(linear_keys(name, hidden_dims)):
            tensor(f"{name}.{index}.weight", f"{key}.weight")
            tensor(f"{name}.{index}.bias", f"{key}.bias")

    number("normalize_residuals", spec.normalize_residuals)
    number("normalize_input", spec.normalize_input)
    if spec.batch_norm:
        number("batch_norm.eps", spec.batch_norm_eps)
        for part in ("weight", "bias", "running_mean", "running_var"):
            tensor(f"batch_norm.{part}", f"normalization_layer.0.{part}")
    if spec.encoder_hidden_dims or spec.decoder_hidden_dims:
        number(f"activation.{spec.activation}", 1)
    network("encoder", spec.encoder_hidden_dims)
    for layer in range(spec.n_layers):
        tensor(f"codebook.{layer}", f"quantization_layer_list.{layer}.centroids")
    network("decoder", spec.decoder_hidden_dims)
    return digest.hexdigest()


def calibration_fingerprint(calibration: Calibration | None) -> str:
    """SHA-256 of the recorded norms, whatever the type in which they are stored.

    Parameters
    ----------
    calibration : Calibration or None
        What calibrated decoding works with.

    Returns
    -------
    str
        64 hexadecimal digits; empty without a calibration.
    """
    if calibration is None:
        return ""
    digest = hashlib.sha256(_VERSION)
    digest.update(_record("input_norm", np.float64(calibration.input_norm)))
    for layer, norms in enumerate(calibration.residual_norms):
        digest.update(_record(f"residual_norms.{layer}", norms.detach().double().cpu().numpy()))
    return digest.hexdigest()


def _record(name: str, values: np.ndarray | np.float64) -> bytes:
    # + 0.0 turns -0.0 into 0.0: the two are equal in every distance.
    canonical = np.asarray(values, dtype="<f8") + 0.0
    head = struct.pack("<Q", len(name)) + name.encode("ascii")
    head += struct.pack(f"<{1 + canonical.ndim}Q", canonical.ndim, *canonical.shape)
    return head + canonical.astype("<f8").tobytes()


def linear_keys(network: str, hidden_dims: tuple[int, ...] | None) -> list[str]:
    """Keys of the linear maps of an MLP: ``model.0``, then every third place from ``model.2``.

    Between two linears lie the activation and, after all but the first, the dropout; both are
    modules of the sequence without parameters.
    """
    if hidden_dims is None:
        return []
    return [f"{network}.model.{max(0, 3 * i - 1)}" for i in range(len(hidden_dims) + 1)]
