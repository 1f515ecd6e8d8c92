"""Imported before torch: has OpenMP's threads sleep when they have nothing to do.

By default they spin for milliseconds after each parallel step, on the cores that gRPC needs to
bring the next request. OpenMP reads its environment once, as torch loads it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
