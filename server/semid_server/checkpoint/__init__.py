"""Checkpoints: semid's own format, GRID's, and plain files of torch. FORMAT.md has the bytes."""

from semid_server.checkpoint.contents import Overrides
from semid_server.checkpoint.fingerprint import calibration_fingerprint, fingerprint
from semid_server.checkpoint.health import LayerReport, examine
from semid_server.checkpoint.loading import (
    Checkpoint,
    Inspection,
    inspect_checkpoint,
    load_checkpoint,
    pack_checkpoint,
    unpack_checkpoint,
)
from semid_server.checkpoint.native import save_checkpoint

__all__ = [
    "Checkpoint",
    "Inspection",
    "LayerReport",
    "Overrides",
    "calibration_fingerprint",
    "examine",
    "fingerprint",
    "inspect_checkpoint",
    "load_checkpoint",
    "pack_checkpoint",
    "save_checkpoint",
    "unpack_checkpoint",
]
