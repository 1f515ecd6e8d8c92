"""Fitting the quantiser: the loop and its state, refinement, calibration, report."""

from semid_server.training.calibration import calibrate
from semid_server.training.codebooks import Pass, fit_distinct, refine
from semid_server.training.rows import ArrayRows, ParquetRows, Rows, batches, open_rows
from semid_server.training.run import TrainingRun
from semid_server.training.settings import TrainingSettings
from semid_server.training.trainer import Trainer

__all__ = [
    "ArrayRows",
    "ParquetRows",
    "Pass",
    "Rows",
    "Trainer",
    "TrainingRun",
    "TrainingSettings",
    "batches",
    "calibrate",
    "fit_distinct",
    "open_rows",
    "refine",
]
