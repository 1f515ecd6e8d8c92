"""A Ray cluster of several nodes on this machine, in a process of its own.

    python ray_cluster.py NODES CPUS

Prints the address of its head, which computes nothing. A line ``kill`` on standard input kills a
node like a power cut would; the end of the input ends the cluster.
"""

from __future__ import annotations

import logging
import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

STORE_BYTES = 100 << 20


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
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            print("killed", flush=True)  # noqa: T201 - the same
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
