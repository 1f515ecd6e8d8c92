"""What every format is read into, and what its reader may be told beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from semid_server.model import Activation, Calibration, ModelKind, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What the user says of a checkpoint, against its own record or in place of one.

    None leaves a matter to the file and, where the file is silent, to GRID's configuration.

    Attributes
    ----------
    name : str or None
        By which the model is served.
    kind : ModelKind or None
        R-VQ and RQ-KMeans write the same tensors.
    normalize_residuals, normalize_input : bool or None
        As in `ModelSpec`.
    activation : Activation or None
        Of the MLPs.
    batch_norm_eps : float or None
        Added to the running variance.
    allow_degenerate : bool
        Load a model whose codes mean nothing, with a warning in place of a refusal.
    """

    name: str | None = None
    kind: ModelKind | None = None
    normalize_residuals: bool | None = None
    normalize_input: bool | None = None
    activation: Activation | None = None
    batch_norm_eps: float | None = None
    allow_degenerate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """A checkpoint as read, before anything is said of its worth.

    Attributes
    ----------
    format : str
        ``semid``, ``grid-lightning`` or ``torch-state-dict``.
    name : str
        By which the model is served.
    spec : ModelSpec
        Consistent with the shapes in ``state``.
    state : dict of str to Tensor
        The state dict of `build_model(spec)`: float32, but for the batch norm's int64 count.
    calibration : Calibration or None
        Residual norms, where the checkpoint has them.
    notes : tuple of str
        What was assumed because the file does not say it.
    warnings : tuple of str
        What the file itself says that should make its user careful.
    problems : tuple of str
        What the file itself says that makes its codes meaningless.
    """

    format: str
    name: str
    spec: ModelSpec
    state: dict[str, Tensor]
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
