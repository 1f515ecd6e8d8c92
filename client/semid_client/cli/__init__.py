"""The ``semid`` command. Its needs beyond the base install are checked here, and nowhere else."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Run the command; in a base install, say what it needs and end with status 1."""
    missing = [name for name in ("click", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"the semid command needs {' and '.join(missing)}: pip install 'semid[cli]'")
    try:
        from semid_client.cli.root import root  # noqa: PLC0415 -- needs click

        root()
    except KeyboardInterrupt:  # while modules were still being imported
        sys.exit(130)
