"""Imported before gRPC: has its core write nothing to standard error.

Any peer can have it write there, a line for each TLS handshake that fails, say: no JSON where ours
are, and once nobody empties the pipe behind it the core's threads wait, and with them every call.
Our own lines (`semid_server.serving.logs`) wait for nobody, and say what an operator has to know.
Set GRPC_VERBOSITY, to ERROR or INFO, to have gRPC's lines all the same.

gRPC reads its environment once, as it is imported, and the `semid` command has imported it with
the client before it knows which command it is. `semid serve` then begins anew in the same process:
half a second, before torch is imported, which takes several.
"""

import contextlib
import os
import sys

if "GRPC_VERBOSITY" not in os.environ:
    os.environ["GRPC_VERBOSITY"] = "NONE"  # for processes that are started from here too
    # Only the command itself: not a test, a benchmark, or another command that imports this.
    if "grpc" in sys.modules and sys.argv[1:2] == ["serve"]:
        with contextlib.suppress(OSError):  # no such interpreter, as in a frozen program: go on
            os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - itself, as it was called
