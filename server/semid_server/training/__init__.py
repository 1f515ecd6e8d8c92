"""Fitting the quantiser: the loop and its state, refinement, calibration, report."""
