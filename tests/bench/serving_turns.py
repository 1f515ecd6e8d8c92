"""Two or more versions of semid taking turns with the echo: what a change to serving brings.

    python tests/bench/serving_turns.py before=../before now=.
    python tests/bench/serving_turns.py before=../before now=. --kind instant --cases 64:8,1024:1
    python tests/bench/serving_turns.py now=. --device cuda --one-row --cases 1,16

Each version is the path of a checkout, of which proto, server and client are imported, by a name.
Which server goes first changes from round to round, so that what else the machine does falls on all
of them alike; of two runs minutes apart that cannot be said. A ratio is the median of those of the
rounds, each of rates that were measured one after another; beside it the quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from serving import KIB, MOVIES, ROW_BYTES, Bench, Plan, Server, beside, gpu, machine, semid, send

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = ("semid", "instant")
"""`semid serve`; and its serving around a device that takes no time (`serving_servers.py`)."""


def imported_from(checkout: str) -> dict[str, str]:
    """The environment in which semid is that of a checkout."""
    root = Path(checkout).resolve()
    if not (root / "server" / "semid_server").is_dir():
        raise SystemExit(f"{checkout} is no checkout of semid: it has no server/semid_server")
    parts = [str(root / part) for part in ("proto", "server", "client")]
    rest = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*parts, *([rest] if rest else [])])}


@contextlib.contextmanager
def servers(
    bench: Bench, versions: dict[str, dict[str, str]], kinds: list[str], *, one_row: bool
) -> Iterator[list[Server]]:
    """The echo, then each kind of server of each version, in its environment."""
    checkpoint = MOVIES if one_row else bench.made
    with contextlib.ExitStack() as stack:
        found = [bench.echo]
        for name, env in versions.items():
            for kind in kinds:
                label = f"{name} {kind}"
                server = (
                    beside(label, "instant", checkpoint, env=env)
                    if kind == "instant"
                    else semid(label, checkpoint, device=bench.plan.device, env=env)
                )
                found.append(stack.enter_context(server))
        yield found


def take_turns(
    bench: Bench, found: list[Server], body: str, in_flight: int, clients: int
) -> dict[str, list[float]]:
    """Requests a second of each server, by name, round by round."""
    rates: dict[str, list[float]] = {server.name: [] for server in found}
    for turn in range(bench.plan.rounds):
        first = turn % len(found)
        for server in found[first:] + found[:first]:
            load = bench.load(server, body, in_flight=in_flight, warmup=0.1)
            rates[server.name].append(send(load, clients).rate)
    return rates


def report(case: str, rates: dict[str, list[float]]) -> None:
    """Print the rate of each, and its share of the echo's."""
    (limit, of_limit), *others = rates.items()
    print(f"{case:>22}   {limit} {median(of_limit):7.0f}/s", end="")
    for name, found in others:
        shares = [rate / most for rate, most in zip(found, of_limit, strict=True)]
        low, high = np.percentile(shares, [25, 75])
        print(f"   {name} {median(shares):.2f} ({low:.2f} to {high:.2f})", end="")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", metavar="NAME=CHECKOUT")
    parser.add_argument("--kind", choices=KINDS, action="append", help="both by default")
    parser.add_argument("--device", default="cpu", help="where `semid serve` encodes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each load")
    parser.add_argument("--clients", type=int, default=1, help="processes that send")
    parser.add_argument(
        "--one-row", action="store_true", help="one row each of 384 numbers; cases are IN_FLIGHT"
    )
    parser.add_argument("--cases", help="KIB:IN_FLIGHT,...; each by its client process")
    arguments = parser.parse_args()
    parted = [version.partition("=")[::2] for version in arguments.versions]
    versions = {name: imported_from(checkout) for name, checkout in parted}
    kinds = arguments.kind or list(KINDS)
    given = arguments.cases or ("1,4,16" if arguments.one_row else "64:1,64:8,64:32,1024:1,1024:8")
    cases = [tuple(map(int, case.split(":"))) for case in given.split(",")]
    sizes = () if arguments.one_row else tuple({size * KIB for size, _ in cases})
    machine()
    gpu(arguments.device)
    plan = Plan(
        sizes=sizes, rounds=arguments.rounds, seconds=arguments.seconds, device=arguments.device
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as started:
        bench = Bench(plan, Path(folder), None, started)
        found = started.enter_context(servers(bench, versions, kinds, one_row=arguments.one_row))
        for *size, in_flight in cases:
            body = "one-384" if arguments.one_row else f"semid-{size[0] * KIB // ROW_BYTES}"
            case = f"one row, {in_flight}" if arguments.one_row else f"{size[0]} KiB, {in_flight}"
            rates = take_turns(bench, found, body, in_flight, arguments.clients)
            report(f"{case} in flight", rates)


if __name__ == "__main__":
    main()
