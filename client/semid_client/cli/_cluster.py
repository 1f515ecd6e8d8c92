"""The flags that have a cluster of machines compute, and what such an engine does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import click

from semid_client.cli._options import F, option
from semid_client.files import Engine

if TYPE_CHECKING:
    from collections.abc import Callable

    from semid_client.files import OnBadRow, Source, Stages
    from semid_client.files.pipeline import Sink

FLAGS: Final = ("ray_address", "workers", "worker_cpus", "parts", "part_rows")
"""Those of the ray engine alone."""


@runtime_checkable
class Cluster(Engine, Protocol):
    """An engine whose machines read the source themselves."""

    def fill(
        self,
        source: Source,
        work: Sink,
        *,
        on_bad_row: OnBadRow,
        restart: bool,
        stages: Stages,
    ) -> None:
        """Bring all rows of the source, from where the work is, into it."""


def cluster_options(env: str) -> Callable[[F], F]:
    """Add them to a command, which hands its flags to `cluster_of`."""

    def add(command: F) -> F:
        for flag in (
            option(
                "--part-rows",
                env=env,
                type=click.IntRange(1),
                help="With --engine ray: rows that a node writes at once, at least, and that a "
                "killed command repeats. Default: 131072.",
            ),
            option(
                "--parts",
                env=env,
                metavar="FOLDER",
                help="With --engine ray: path or URL of a folder that all nodes and this machine "
                "see, for OUT.parts, where codes wait until all are there. Default: that of OUT.",
            ),
            option(
                "--worker-cpus",
                env=env,
                type=click.IntRange(1),
                help="With --engine ray: CPUs of an encoder. Default: 1.",
            ),
            option(
                "--workers",
                env=env,
                type=click.IntRange(1),
                help="With --engine ray: encoders at most. Default: one for each GPU of the "
                "cluster; where it has none, for every second CPU.",
            ),
            option(
                "--ray-address",
                env=env,
                metavar="HOST:PORT",
                help="With --engine ray: the cluster; or local, to begin one on this machine. "
                "Default: the one that this machine is part of.",
            ),
            option(
                "--engine",
                env=env,
                type=click.Choice(["local", "ray"]),
                default="local",
                show_default=True,
                help="ray: with --checkpoint, as a Ray Data job on a cluster, from Parquet files "
                "that all nodes see. The output is the same. Needs 'semid[ray,server]'.",
            ),
        ):
            command = flag(command)
        return command

    return add


def cluster_of(flags: dict[str, Any]) -> dict[str, Any] | None:
    """Take the cluster's flags out of a command's; None if it is not to be one.

    Raises
    ------
    click.UsageError
        A flag of the ray engine is given to another.
    """
    given = {name: value for name in FLAGS if (value := flags.pop(name)) is not None}
    if flags.pop("engine") == "ray":
        if "ray_address" in given:
            given["address"] = given.pop("ray_address")
        return given
    for name in given:
        raise click.UsageError(f"--{name.replace('_', '-')} is a flag of --engine ray.")
    return None
