"""`semid demo`: a real server, 3,201 real embeddings through the client, and what comes back."""

from __future__ import annotations

import csv
import http.client
import importlib.resources
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from semid_client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SEMID = (sys.executable, "-m", "semid_client")
"""The `semid` command of this environment, whatever the shell's PATH holds."""

SERVE = ("serve", "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0")

MARGIN = 9

STOP_SECONDS = 40.0
"""Longer than the server's own grace: what outlives it hangs."""

FEATURED = ("The Lord of the Rings: The Two Towers", "Shrek", "The Matrix", "Jurassic Park")
"""Movies with relatives in the data."""

SHOWN_RELATIVES = 4

METRICS = (
    "grpc_server_handled_total",
    "semid_rows_total",
    "semid_batch_rows_sum",
    "semid_batch_rows_count",
    "semid_device_seconds_sum",
)

PREFERRED_LABELS = ('"Encode"', '"EncodeStream"', '"encode"')
"""The lines worth a place on the screen are those of encoding."""


@dataclass(frozen=True, slots=True)
class Movies:
    """The movies and their embeddings, row by row.

    Attributes
    ----------
    embeddings : float32 (3201, 384)
        Sentence embeddings of length 1.
    titles, genres : list of str
        Empty where unknown.
    """

    embeddings: np.ndarray[Any, np.dtype[np.float32]]
    titles: list[str]
    genres: list[str]


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A `semid serve` that said where it listens."""

    process: subprocess.Popen[str]
    target: str
    metrics: str
    said: tuple[str, ...]
    startup_seconds: float


@click.command()
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Serve this checkpoint instead of the demo's own. It must take 384 numbers a row.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Device of the server: auto, cpu, cuda or cuda:N.",
)
def demo(checkpoint: Path | None, device: str) -> None:
    """Start a server, encode 3,201 movies through the client, and show what comes back.

    Nothing is left behind: the server listens on free ports of this machine alone and is
    stopped, as an operator would stop it, at the end or by Ctrl-C.
    """
    with ExitStack() as stack:
        data = stack.enter_context(
            importlib.resources.as_file(importlib.resources.files(__package__) / "demo_data")
        )
        movies = _load_movies(data)
        click.secho(
            f"semid {version('semid')}: {len(movies.titles):,} movies, "
            "from embeddings to semantic IDs and back",
            bold=True,
        )
        arguments = [*SERVE, *(() if device == "auto" else ("--device", device)), "--checkpoint"]
        click.echo()
        _say(
            "Server",
            f"$ semid {' '.join(arguments)} {checkpoint or 'checkpoints/movies-3x256'}",
            "(the first start in an environment compiles its kernels, which takes some seconds)",
        )
        try:
            with _running([*arguments, str(checkpoint or data / "checkpoint")]) as server:
                _say("", *server.said, f"ready after {server.startup_seconds:.1f} s")
                with Client(server.target) as client:
                    _show_everything(client, movies)
                _show_metrics(server.metrics)
                _stop(server)
        except KeyboardInterrupt:
            click.echo("\nInterrupted; the server is stopped.", err=True)
            sys.exit(128 + signal.SIGINT)


def _load_movies(data: Path) -> Movies:
    with (data / "movies.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return Movies(
        embeddings=np.load(data / "movies.npy"),
        titles=[row["title"] for row in rows],
        genres=[row["genre"] for row in rows],
    )


@contextmanager
def _running(arguments: Sequence[str]) -> Iterator[RunningServer]:
    """Start the server, wait until it serves, and see to it that it is gone afterwards."""
    began = time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(  # noqa: S603 - the command is semid's own
            [*SEMID, *arguments], stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            yield _wait_until_serving(process, began)
        except _ServerEndedError as error:
            log.seek(0)
            raise click.ClickException(f"{error}: {log.read().strip()}") from None
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


class _ServerEndedError(Exception):
    """The server ended before it served."""


def _wait_until_serving(process: subprocess.Popen[str], began: float) -> RunningServer:
    """Read what the server says until it says that it serves."""
    said: list[str] = []
    metrics = ""
    for line in process.stdout or ():
        said.append(line.rstrip())
        what, _, where = said[-1].rpartition(" on ")
        if what == "semid: metrics":
            metrics = where
        elif what.startswith("semid: serving "):
            return RunningServer(process, where, metrics, tuple(said), time.monotonic() - began)
    raise _ServerEndedError(f"the server ended with status {process.wait()} before it served")


def _say(name: str, *lines: str) -> None:
    """Print a name in the margin, and lines beside it."""
    for index, line in enumerate(lines):
        margin = f"{name if index == 0 else '':<{MARGIN}}" if line else ""
        click.echo(f"{click.style(margin, fg='cyan', bold=True)}{line}")


def _section(name: str, *lines: str) -> None:
    """Say something after an empty line."""
    click.echo()
    _say(name, *lines)


def _show_everything(client: Client, movies: Movies) -> None:
    """Encode, compare, decode; one section each."""
    client.wait_ready()
    model = client.model()
    widths = [layer.codebook_width for layer in model.layers]
    _section(
        "Model",
        f"{model.name}: {model.input_dim} numbers in, {len(widths)} codes out "
        f"(codebooks of {', '.join(map(str, widths))} centroids)",
        f"fingerprint {model.fingerprint}",
    )

    client.encode(movies.embeddings)  # the first call also opens connections and warms caches
    began = time.perf_counter()
    codes = client.encode(movies.embeddings)
    seconds = time.perf_counter() - began
    rows, dim = movies.embeddings.shape
    _section(
        "Encode",
        f"{rows:,} x {dim} {movies.embeddings.dtype} ({_megabytes(movies.embeddings.nbytes)}) -> "
        f"{codes.shape[0]:,} x {codes.shape[1]} {codes.dtype} ({_megabytes(codes.nbytes)}) "
        f"in {seconds * 1000:.0f} ms",
        f"{rows / seconds:,.0f} rows/s, {_megabytes(movies.embeddings.nbytes / seconds)}/s of "
        f"embeddings, by one caller, the second time; both on this machine ({os.cpu_count()} "
        f"cores, {platform.machine()})",
    )
    _section("IDs", "movies, and those that share all their codes but the last", "")
    _say("", *_relatives(codes, movies))

    decoded = client.decode(codes)
    similarity = _cosine(decoded, movies)
    nearest = np.argmax(decoded @ movies.embeddings.T, axis=1)
    _section(
        "Decode",
        f"{codes.shape[1]} codes ({codes.itemsize * codes.shape[1]} bytes) give back {dim} numbers "
        f"({movies.embeddings.itemsize * dim:,} bytes)",
        f"cosine similarity to the original: median {np.median(similarity):.3f}, "
        f"from {similarity.min():.3f} to {similarity.max():.3f}; after 1 to {len(widths)} codes, "
        "median "
        + ", ".join(
            f"{np.median(_cosine(client.decode(codes[:, :n]), movies)):.3f}"
            for n in range(1, len(widths) + 1)
        ),
        f"the movie nearest to the reconstruction is the movie itself for "
        f"{(nearest == np.arange(rows)).sum():,} of {rows:,}; of those above:",
        *(
            f"{title} -> {movies.titles[nearest[row]]}"
            for title, row in ((title, movies.titles.index(title)) for title in FEATURED)
        ),
    )


def _relatives(codes: np.ndarray[Any, Any], movies: Movies) -> Iterator[str]:
    """Yield a few movies with their IDs, each above those that share all codes but the last."""
    shared = codes.shape[1] - 1
    for title in FEATURED:
        row = movies.titles.index(title)
        prefix = codes[row, :shared]
        group = np.flatnonzero((codes[:, :shared] == prefix).all(axis=1))
        others = group[group != row]
        # Nearest first: the reader sees what the prefix holds together.
        nearness = movies.embeddings[others] @ movies.embeddings[row]
        others = others[np.argsort(-nearness, kind="stable")]
        yield click.style(_movie_line(codes[row], title, movies.genres[row]), bold=True)
        for other in others[:SHOWN_RELATIVES]:
            yield _movie_line(codes[other], movies.titles[other], movies.genres[other])
        if len(others) > SHOWN_RELATIVES:
            more = len(others) - SHOWN_RELATIVES
            yield f"{'-'.join(map(str, prefix))}-*    and {more} more"


def _movie_line(codes: np.ndarray[Any, Any], title: str, genre: str) -> str:
    return f"{'-'.join(map(str, codes)):<12}{title}{f' ({genre})' if genre else ''}"


def _cosine(
    reconstruction: np.ndarray[Any, np.dtype[np.float32]], movies: Movies
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Cosine similarity ``(n,)`` of each reconstruction to its original."""
    lengths = np.linalg.norm(reconstruction, axis=1) * np.linalg.norm(movies.embeddings, axis=1)
    similarity: np.ndarray[Any, np.dtype[np.float32]] = (
        np.einsum("nd,nd->n", reconstruction, movies.embeddings) / lengths
    )
    return similarity


def _show_metrics(address: str) -> None:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
    finally:
        connection.close()
    lines = [
        line
        for line in page.splitlines()
        if line.startswith(METRICS)
        and any(label in line for label in PREFERRED_LABELS)
        and not line.endswith(" 0.0")
    ]
    _section("Metrics", f"http://{address}/metrics", *lines)


def _stop(server: RunningServer) -> None:
    server.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    try:
        status = server.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise click.ClickException(
            f"the server did not end within {STOP_SECONDS:.0f} s of SIGTERM"
        ) from None
    _section(
        "Stop",
        f"SIGTERM: drained and ended with status {status} after {time.monotonic() - began:.1f} s",
    )
    if status != 0:
        raise click.ClickException(f"the server ended with status {status}; expected 0")


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"  # noqa: PLR2004 - units
