"""From one file to another, through a server or a checkpoint: what the file commands share."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from tqdm import tqdm

from semid_client.cli._cluster import Cluster
from semid_client.cli._engines import check_engine, engine_options, open_engine
from semid_client.cli._options import option
from semid_client.files import (
    FileError,
    Made,
    OnBadRow,
    Pipeline,
    Stages,
    Unique,
    Work,
    make_output,
    open_rows,
)
from semid_client.files.ids import IdSpool, WholeIds, in_order
from semid_client.files.outputs import TOKENS, check_ids, number
from semid_client.files.places import place
from semid_client.files.rows import STDIN, check_apart
from semid_client.files.stream import ArrowOut
from semid_client.files.work import KEPT, SAVE_EVERY, folder_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from semid_client.files import Engine, Progress, Source
    from semid_client.files.pipeline import Sink
    from semid_client.files.places import Place

F = TypeVar("F", bound="Callable[..., Any] | click.Command")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFlags:
    """The flags of `file_options`."""

    source: str
    output: str
    work_dir: Path | None
    column: str | None
    id_column: str | None
    on_bad_row: OnBadRow
    force: bool
    restart: bool
    save_every: float
    as_json: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a command does with the rows of a file.

    Attributes
    ----------
    width, dtype
        Of what is computed.
    compute : callable
        Rows to rows.
    options : dict
        What else the output's bytes depend on.
    unique : "grid", "tiger" or "none"
        The extra digit.
    tokens : str
        Template of tokens.
    column : str
        Name of the output's column.
    """

    width: int
    dtype: np.dtype[Any]
    compute: Callable[[NDArray[Any]], NDArray[Any]]
    options: Mapping[str, Any]
    unique: Unique = "none"
    tokens: str = TOKENS
    column: str = "codes"


def source_options(env: str) -> Callable[[F], F]:
    """Add what names the columns of an input to a command."""

    def add(command: F) -> F:
        command = option(
            "--id-column",
            env=env,
            help="Parquet or Arrow column of the items' ids. Default: id or item_id where there is "
            "one, else rows are counted from 0.",
        )(command)
        return option(
            "--column",
            env=env,
            help="Parquet column, .npz array or tensor to read, where there are several.",
        )(command)

    return add


def json_option(env: str) -> Callable[[F], F]:
    """Add the flag of a summary for programs to a command."""
    return option(
        "--json",
        "as_json",
        env=env,
        is_flag=True,
        help="Print one JSON object as the summary, for programs.",
    )


def file_options(env: str, source: str, output: str) -> Callable[[F], F]:
    """Add the files, and all flags of what computes, to a command."""

    def add(command: F) -> F:
        command = engine_options(command)
        for flag in (
            json_option(env),
            option(
                "--save-every",
                env=env,
                type=click.FloatRange(0),
                default=SAVE_EVERY,
                show_default=True,
                help="Seconds between records of progress: what a killed command repeats at most.",
            ),
            option(
                "--work-dir",
                env=env,
                type=click.Path(path_type=Path, exists=True, file_okay=False, writable=True),
                help="Folder for what is done until OUT is complete, as large as OUT. Default: "
                "beside OUT; where OUT is a URL, the working directory.",
            ),
            option(
                "--restart",
                env=env,
                is_flag=True,
                help="Begin again, without what a killed command has done already.",
            ),
            option("--force", env=env, is_flag=True, help="Replace OUT if it exists already."),
            option(
                "--on-bad-row",
                env=env,
                type=click.Choice(["fail", "skip", "null"]),
                default="fail",
                show_default=True,
                help="A row with NaN, an infinity or missing numbers: end there; leave it out; or "
                "write null. The two latter list each in OUT.bad-rows.jsonl.",
            ),
            source_options(env),
            option(
                *("-o", "--output"),
                env=env,
                required=True,
                metavar="OUT",
                help=f"File or URL to write, {output} by its name. It appears when it is "
                "complete; until then OUT.partial holds what is done, for the same command to go "
                "on with. Or -, an Arrow stream on standard output, which has no such folder.",
            ),
        ):
            command = flag(command)
        return click.argument("source", metavar=source)(command)

    return add


def convert(
    flags: FileFlags,
    what: Literal["embeddings", "codes"],
    plan: Callable[[Engine, Source], Plan],
    engine_flags: dict[str, Any],
) -> None:
    """Make the output of what an engine computes of the rows of a source, in constant memory.

    Raises
    ------
    FileError
        If a file cannot be used. Rows are counted as in the file, from 0.
    SemidClientError
        If the server or the checkpoint cannot be used.
    """
    check_engine(**engine_flags)
    if flags.output == STDIN and sys.stdout.isatty():
        raise click.UsageError("An Arrow stream is no text: redirect standard output.")
    if flags.output != STDIN:
        check_apart(flags.source, _written(flags))
    source = open_rows(flags.source, what, column=flags.column, id_column=flags.id_column)
    with closing(source), _ending_at_the_second_interrupt():
        if flags.output == STDIN:
            _to_stream(flags, source, plan, engine_flags)
        else:
            _to_file(flags, source, plan, engine_flags)


def _written(flags: FileFlags) -> Iterator[Place]:
    """All places that a command writes to, of which a later one must not read any."""
    output = place(flags.output)
    yield output
    if flags.on_bad_row != "fail":
        yield output.sibling(".bad-rows.jsonl")
    folder = folder_of(output, flags.work_dir)
    for name in (f"output{output.suffix}", *sorted(KEPT)):
        yield place(folder / name)


@contextmanager
def _ending_at_the_second_interrupt() -> Iterator[None]:
    """Tidy up after one interrupt, for as long as that takes; at another, let go of everything.

    What is on the disk then is what a kill leaves, which the next command goes on with.
    """

    def interrupted(*_: object) -> None:
        # By the system itself: a handler here would wait until Python comes to call it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # no signal is handled there
        return
    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _to_file(
    flags: FileFlags,
    source: Source,
    plan: Callable[[Engine, Source], Plan],
    engine_flags: dict[str, Any],
) -> None:
    output = place(flags.output)
    if any(output.same_as(found) for found in source.places()):
        raise FileError(flags.output, "is the input too; give the output another name")
    ids_unknown = check_ids(flags.output, source, flags.on_bad_row)
    stream = source.n_rows is None  # begun anew, since it cannot be read again
    work = Work(
        flags.output,
        force=flags.force,
        restart=flags.restart or stream,
        save_every=flags.save_every,
        work_dir=flags.work_dir,
    )
    try:
        with work, closing(open_engine(**engine_flags)) as engine:
            todo = plan(engine, source)
            task = {
                "input": source.identity(),
                "fingerprint": engine.info.fingerprint,
                "column": flags.column,
                "id_column": flags.id_column,
                "on_bad_row": flags.on_bad_row,
                **todo.options,
            }
            progress = work.begin(task, todo.width, todo.dtype)
            if output.local is None and not stream:
                _tell_where(work)
            began = time.monotonic()  # the speed told is that of the work, not of loading a model
            job = _Job(flags, source, engine, todo, progress.rows_in, Stages())
            if not work.published:
                spool = IdSpool.of(source, work.folder)
                # A cluster fills nothing but the work: there the output is what refuses.
                looked_at = ids_unknown and not isinstance(engine, Cluster)
                whole = WholeIds(work, source, flags.output) if looked_at else None

                def keep(ids: Any) -> None:
                    if whole:
                        whole.ids.given = ids
                    if spool:
                        spool.keep(ids)

                job.compute(whole or work, keep if spool else None)
                if spool:
                    spool.close()
                _check_unchanged(source, task["input"])
                _tell_of_ids(flags, source, todo)
                job.finish(work)
            bad_list = str(work.bad_list) if progress.bad_rows else None
            job.tell(progress, bad_list, time.monotonic() - began)
    except BaseException:
        if work.kept and not stream:
            click.echo(
                f"{work.folder}: keeps {work.kept:,} rows, and the same command goes on with them",
                err=True,
            )
        raise


def _check_unchanged(source: Source, before: Any) -> None:
    if source.identity() != before:
        raise FileError(source.path, "has changed while it was read: --restart reads it anew")


def _tell_of_ids(flags: FileFlags, source: Source, todo: Plan) -> None:
    """Say where columns of GRID's file are not the items that their numbers name there."""
    if todo.column == "codes" and place(flags.output).suffix == ".pt" and not in_order(source):
        click.echo(
            f"{flags.output}: column i is row i, whatever its id: the format keeps none, and those "
            f"of {source.path} are not 0, 1, 2, ...",
            err=True,
        )


def _tell_where(work: Work) -> None:
    """Say where the work on an object of a store can be gone on with."""
    click.echo(
        f"{work.output}: goes on with {work.progress.rows_in:,} rows in {work.folder}"
        if work.progress.rows_in
        else f"{work.output}: begins at row 0; what is done is kept in {work.folder}, and the same "
        "command goes on with it where that folder is",
        err=True,
    )


def _to_stream(
    flags: FileFlags,
    source: Source,
    plan: Callable[[Engine, Source], Plan],
    engine_flags: dict[str, Any],
) -> None:
    with closing(open_engine(**engine_flags)) as engine:
        todo = plan(engine, source)
        began = time.monotonic()
        job = _Job(flags, source, engine, todo, 0, Stages())
        sink = ArrowOut(
            sys.stdout.buffer,
            source,
            width=todo.width,
            dtype=todo.dtype,
            column=todo.column,
            null=flags.on_bad_row == "null",
            metadata=job.metadata,
        )
        bad = _Listed(sink)
        job.compute(bad, sink.keep_ids)
        sink.close()
        job.tell(sink.progress, None, time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class _Listed:
    """A stream whose bad rows are listed among the messages, for it has no file beside it."""

    sink: ArrowOut

    @property
    def progress(self) -> Progress:
        return self.sink.progress

    def append(self, n_in: int, rows: NDArray[Any], bad: Mapping[int, str]) -> None:
        for row, problem in bad.items():
            click.echo(json.dumps({"row": row, "problem": problem}), err=True)
        self.sink.append(n_in, rows, bad)


@dataclass(frozen=True, slots=True)
class _Job:
    """One run of a command."""

    flags: FileFlags
    source: Source
    engine: Engine
    plan: Plan
    resumed: int
    stages: Stages

    @property
    def metadata(self) -> dict[str, str]:
        """What an output records of the model."""
        return {
            "semid.fingerprint": self.engine.info.fingerprint,
            "semid.model": self.engine.info.name,
            **({"semid.unique": self.plan.unique} if self.plan.column == "codes" else {}),
        }

    def compute(self, work: Sink, keep_ids: Callable[[Any], None] | None) -> None:
        """Bring all rows of the source into the work, and show how far it is."""
        source, engine, stages = self.source, self.engine, self.stages
        if isinstance(engine, Cluster):  # which shows itself how far it is
            engine.fill(
                source,
                work,
                on_bad_row=self.flags.on_bad_row,
                restart=self.flags.restart,
                stages=stages,
            )
            return
        with tqdm(
            total=source.n_rows,
            initial=work.progress.rows_in,
            unit="row",
            unit_scale=True,
            disable=None,
        ) as bar:
            began = time.monotonic()

            def report(n_rows: int) -> None:
                speed = stages.bytes_read / max(time.monotonic() - began, 1e-9)
                bar.set_postfix_str(
                    f"{tqdm.format_sizeof(speed)}B/s, {stages.bottleneck(engine.stage)}",
                    refresh=False,
                )
                bar.update(n_rows)

            Pipeline(
                source=source,
                work=work,
                engine=engine,
                compute=self.plan.compute,
                on_bad_row=self.flags.on_bad_row,
                report=report,
                row_bytes=self.plan.width * self.plan.dtype.itemsize,
                keep_ids=keep_ids,
                stages=stages,
            ).run()

    def finish(self, work: Work) -> None:
        """Write the output, of rows that are all on the disk."""
        began = time.perf_counter()
        rows_in = work.progress.rows_in
        with (
            closing(work.rows()) as rows,
            # Two or three times through what was computed: numbers, perhaps ids, the output.
            tqdm(total=rows_in, unit="row", unit_scale=True, disable=None, leave=False) as bar,
        ):
            bar.set_description("numbering" if self.plan.unique != "none" else "writing")

            def report(n_rows: int) -> None:
                if bar.n + n_rows > rows_in:
                    bar.reset()
                    bar.set_description("writing")
                bar.update(n_rows)

            def made(digits: Any) -> Made:
                return Made(
                    source=self.source,
                    rows=rows,
                    n_in=rows_in,
                    bad=work.bad_rows(),
                    null=self.flags.on_bad_row == "null",
                    metadata=self.metadata,
                    digits=digits,
                    tokens=self.plan.tokens,
                    column=self.plan.column,
                    report=report,
                )

            output = number(made, self.plan.unique, work.folder)
            path = make_output(self.flags.output, output, work.folder)
        work.publish(path)
        self.stages.writing += time.perf_counter() - began

    def tell(self, progress: Progress, bad_list: str | None, seconds: float) -> None:
        """Print the summary; beside a stream, among the messages."""
        flags, engine, stages = self.flags, self.engine, self.stages
        resumed, aside = self.resumed, self.flags.output == STDIN
        speed = (progress.rows_in - resumed) / seconds
        if flags.as_json:
            summary = {
                "output": flags.output,
                "model": engine.info.name,
                "fingerprint": engine.info.fingerprint,
                "rows": progress.rows_in,
                "rows_written": progress.rows_out,
                "rows_resumed": resumed,
                "bad_rows": progress.bad_rows,
                "bad_rows_list": bad_list,
                "seconds": round(seconds, 3),
                "rows_per_second": round(speed),
                "bytes_per_second": round(stages.bytes_read / seconds),
                "stage_seconds": {
                    "reading": round(stages.reading, 3),
                    engine.stage: round(stages.computing, 3),
                    "writing": round(stages.writing, 3),
                },
                "bottleneck": stages.bottleneck(engine.stage),
            }
            click.echo(json.dumps(summary, indent=2), err=aside)
            return
        went_on = f", {resumed:,} of them by an earlier command" if resumed else ""
        listed = f" listed in {bad_list}" if bad_list else ""
        bad = f", {progress.bad_rows:,} bad ones{listed}" if progress.bad_rows else ""
        rows = f"{progress.rows_in:,} rows"
        if progress.rows_out != progress.rows_in:
            rows += f" read, {progress.rows_out:,} written"
        click.echo(
            f"{flags.output}: {rows} in {seconds:.2f} s "
            f"({speed:,.0f} rows/s){went_on}{bad}, fingerprint {engine.info.fingerprint}",
            err=aside,
        )
