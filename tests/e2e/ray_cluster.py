"""A Ray cluster of several nodes on this machine, in a process of its own.

    python ray_cluster.py NODES CPUS

Prints the address of its head, which computes nothing. A line ``kill`` on standard input kills
the node with most encoders like a power cut would, and tells how many those were; the end of the
input ends the cluster.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

STORE_BYTES = 100 << 20


def encoders(node) -> int:
    """How many of a node's processes encode."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # others end while we look
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            name = (folder / "cmdline").read_bytes()
            found += int(parent) == raylet and name.startswith(b"ray::MapWorker")
    return found


def main() -> None:
    n_nodes, n_cpus = map(int, sys.argv[1:])
    logging.disable(logging.WARNING)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [
            cluster.add_node(num_cpus=n_cpus, object_store_memory=STORE_BYTES)
            for _ in range(n_nodes)
        ]
        print(f"address {cluster.address}", flush=True)  # noqa: T201 - read by the test
        for line in sys.stdin:
            assert line == "kill\n"
            node = max(nodes, key=encoders)
            n_encoders = encoders(node)
            cluster.remove_node(node, allow_graceful=False)
            nodes.remove(node)
            print(f"killed {n_encoders}", flush=True)  # noqa: T201 - the same
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
