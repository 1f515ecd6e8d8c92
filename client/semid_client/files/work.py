"""Work on an output that a killed command goes on with.

While ``OUT`` is being made there is a folder ``OUT.partial`` beside it:

    rows.npy          what has been computed, row after row; its header is written at the end
    bad-rows.jsonl    rows that were left out, and why
    progress.json     how much of both is sound, and of which task: replaced in one step
    lock              held by the process at work

Rows are on the disk before the progress that counts them, so that whatever a kill leaves behind
the count is cut off. ``OUT`` itself appears by being renamed, and the folder goes after that.

Where ``OUT`` is an object of a store, to which nothing can be added, the folder is in the working
directory or where ``--work-dir`` says, its name tells outputs of one name apart, and ``OUT``
appears by being uploaded. A command that is killed while it uploads makes the same bytes again; if
they are there already, it is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self

import numpy as np
from numpy.lib import format as npy

from semid_client.files._errors import FileError
from semid_client.files.npy import NpyReader
from semid_client.files.places import LocalPlace, place, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from semid_client.files.places import Place

SAVE_EVERY: Final = 1.0
"""Seconds between two records of progress."""


KEPT: Final = frozenset({"lock", "progress.json", "rows.npy", "bad-rows.jsonl"})
"""Files that a command goes on with; the others it makes again, and until then there is room."""


@dataclass(slots=True)
class Progress:
    """What is sound of an output's rows.

    Attributes
    ----------
    task : dict
        Everything that the output's bytes depend on.
    rows_in, rows_out : int
        Rows of the input that are done, and rows that they gave.
    bad_rows, bad_bytes : int
        How many of them are listed as bad, and the length of that list.
    publishing : bool
        Whether what is to be found in the output's place may be this work's.
    finished : list
        Identity of the complete output; empty while there is none.
    """

    task: dict[str, Any]
    rows_in: int = 0
    rows_out: int = 0
    bad_rows: int = 0
    bad_bytes: int = 0
    publishing: bool = False
    finished: list[Any] = field(default_factory=list)


class Work:
    """The work on one output, begun or gone on with. A context manager.

    Leaving it with an error keeps what has been done, if anything has, for the same command to go
    on with.

    Parameters
    ----------
    output : path or str
        The file to be made, or its URL.
    force : bool
        Replace a file of that name.
    restart : bool
        Throw away what an earlier command has done.
    save_every : float
        Seconds between two records of progress.
    work_dir : Path, optional
        Where the folder is. Default: beside the output; of a store's, the working directory.

    Attributes
    ----------
    kept : int
        After an error, the rows of the input that need not be done again.

    Raises
    ------
    FileError
        If the output is taken or cannot be written, or another process works on it.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        *,
        force: bool = False,
        restart: bool = False,
        save_every: float = SAVE_EVERY,
        work_dir: Path | None = None,
    ) -> None:
        self.output, self._force, self._save_every = output, force, save_every
        self._progress: Progress | None = None
        self.kept = 0
        self.place = place(output)
        self.folder = folder_of(self.place, work_dir)
        self._bad_place = self.place.sibling(".bad-rows.jsonl")
        self.bad_list: Path | str = self._bad_place.local or self._bad_place.name
        if self.place.local is not None and self.place.is_folder():
            raise FileError(output, "is a folder; expected a file to write")
        if isinstance(self.place, LocalPlace) and not (
            self.place.local.parent.is_dir() and self.place.target.parent.is_dir()
        ):
            raise FileError(output, "No such file or directory: make the folder first")
        if not self.folder.exists():
            self._check_free()
        with self._naming_output():
            self.folder.mkdir(exist_ok=True)
            self._lock = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise FileError(
                output, "another process is working on it: wait for it, or stop it"
            ) from error
        self._rows: BinaryIO | None = None
        self._bad: BinaryIO | None = None
        self._unsynced: set[BinaryIO] = set()
        try:
            if restart:
                self._clear()
            self._read_progress()
            if not self.published:
                self._check_free()
        except BaseException:
            self._leave(keep=(self.folder / "progress.json").exists())
            raise

    @property
    def progress(self) -> Progress:
        """What has been done so far."""
        assert self._progress is not None  # noqa: S101 -- `begin` comes first
        return self._progress

    @property
    def published(self) -> bool:
        """Whether the output was completed by a command that was killed right after."""
        done = self._progress.finished if self._progress else []
        return bool(done) and done == _identity(self.place)

    def begin(self, task: Mapping[str, Any], columns: int, dtype: np.dtype[Any]) -> Progress:
        """Begin, or go on with, rows of ``columns`` numbers; tell how far the work is.

        Raises
        ------
        FileError
            If what has been done is of another task: the message names what differs.
        """
        plain: dict[str, Any] = json.loads(json.dumps(task))  # as it will be read again
        if self._progress is None:
            self._progress = Progress(plain)
        else:
            self._check_same(plain)
        self._header = {
            "descr": npy.dtype_to_descr(dtype.newbyteorder("<")),
            "fortran_order": False,
        }
        self._columns, self._dtype = columns, dtype.newbyteorder("<")
        with self._naming_output():
            if not self.published:
                self._clear(KEPT)
            self._rows = _open(self.folder / "rows.npy")
            self._bad = _open(self.folder / "bad-rows.jsonl")
            self._write_header()
            at = self._rows.tell()
            self._rows.truncate(at + self.progress.rows_out * columns * dtype.itemsize)
            self._bad.truncate(self.progress.bad_bytes)
            for file in (self._rows, self._bad):
                file.seek(0, os.SEEK_END)
                self._unsynced.add(file)
        self._saved_at = time.monotonic()
        return self.progress

    def append(self, n_in: int, rows: NDArray[Any], bad: Mapping[int, str]) -> None:
        """Add what the next ``n_in`` rows of the input gave; ``bad`` by index in the input."""
        assert self._rows is not None  # noqa: S101 -- `begin` comes first
        assert self._bad is not None  # noqa: S101 -- the same
        if rows.shape[1] != self._columns or rows.dtype.newbyteorder("<") != self._dtype:
            raise ValueError(
                f"rows of {rows.shape[1]} {rows.dtype}; expected {self._columns} {self._dtype}"
            )
        lines = "".join(
            json.dumps({"row": row, "problem": problem}) + "\n" for row, problem in bad.items()
        ).encode()
        with self._naming_output():
            _write(
                self._rows, np.ascontiguousarray(rows, self._dtype).reshape(-1).view(np.uint8).data
            )
            _write(self._bad, memoryview(lines))
        self._unsynced |= {self._rows, self._bad} if lines else {self._rows}
        progress = self.progress
        progress.rows_in += n_in
        progress.rows_out += len(rows)
        progress.bad_rows += len(bad)
        progress.bad_bytes += len(lines)
        if time.monotonic() - self._saved_at >= self._save_every:
            self.save()

    def save(self) -> None:
        """Record the progress: everything up to here survives whatever comes."""
        with self._naming_output():
            for file in self._unsynced:
                os.fsync(file.fileno())
            self._unsynced.clear()
            new = self.folder / "progress.json.new"
            with new.open("w") as out:
                json.dump(asdict(self.progress), out)
                out.flush()
                os.fsync(out.fileno())
            new.replace(self.folder / "progress.json")
            sync_folder(self.folder)
        self._saved_at = time.monotonic()

    def rows(self) -> NpyReader:
        """All rows that were appended, once the last of them was."""
        assert self._rows is not None  # noqa: S101 -- `begin` comes first
        with self._naming_output():
            self._rows.seek(0)
            self._write_header()
        self._unsynced.add(self._rows)
        self.save()
        return NpyReader(self.folder / "rows.npy")

    def bad_rows(self) -> NDArray[np.int64]:
        """Indices in the input of the rows listed as bad, ascending."""
        with (self.folder / "bad-rows.jsonl").open() as lines:
            return np.array([json.loads(line)["row"] for line in lines], np.int64)

    def publish(self, made: Path) -> None:
        """Give the output its name, when ``made``, in this folder, is complete."""
        there = not self._check_free(made)  # once more: the work may have taken hours
        self._publish_bad_rows()
        self.progress.publishing = True
        if not there:
            if self.place.takes(made):
                # Known beforehand: nothing is written between the renaming and the end.
                self.progress.finished = _identity(place(made))
            self.save()
            self.place.put(made)
        finished = _identity(self.place)
        if self.progress.finished != finished:
            self.progress.finished = finished
            self.save()

    def _publish_bad_rows(self) -> None:
        if self.progress.bad_rows:
            copy = self.folder / "bad-rows.jsonl.copy"
            with self._naming_output():
                shutil.copyfile(self.folder / "bad-rows.jsonl", copy)
            self._bad_place.put(copy)
        elif self._bad_place.exists():
            self._bad_place.remove()  # of an output that was here before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        keep = kind is not None and self._progress is not None and self._progress.rows_in > 0
        if keep and self._rows is not None:
            self.kept = self.progress.rows_in
            with contextlib.suppress(FileError):  # on a full disk: the last record stands
                self.save()
        self._leave(keep=keep)

    def _leave(self, *, keep: bool) -> None:
        for file in (self._rows, self._bad):
            if file is not None:
                file.close()
        self._clear(KEPT if keep else frozenset({"lock"}))
        if not keep:
            shutil.rmtree(self.folder)
        self._lock.close()

    def _clear(self, but: frozenset[str] = frozenset({"lock"})) -> None:
        """Remove everything but some; the progress last, which speaks for the rest."""
        last = self.folder / "progress.json"
        for path in self.folder.iterdir():
            if path.name not in but and path != last:
                path.unlink()
        if last.name not in but:
            last.unlink(missing_ok=True)

    def _read_progress(self) -> None:
        path = self.folder / "progress.json"
        if not path.exists():
            return
        try:
            self._progress = Progress(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise FileError(
                path, f"cannot be read ({error}); --restart begins again without it"
            ) from error

    def _check_same(self, task: dict[str, Any]) -> None:
        begun = self.progress.task
        for name in begun | task:
            if begun.get(name) != task.get(name):
                raise FileError(
                    self.folder,
                    f"holds work that was begun with {name} {_short(begun.get(name))}, but now it "
                    f"is {_short(task.get(name))}: repeat the command as it was to go on, or "
                    "begin again by --restart",
                )

    def _check_free(self, made: Path | None = None) -> bool:
        """Refuse an output that is taken; tell whether its place is free for ``made``.

        It is not where an earlier command of this work has put the same there already.
        """
        if self._force or not self.place.exists():
            return True
        if self._progress is not None and self._progress.publishing:
            if made is None:
                return True  # to be seen when it is made
            if self.place.holds(made):
                return False
        raise FileError(self.output, "exists already; --force replaces it")

    def _write_header(self) -> None:
        # numpy leaves room for the number of rows: headers of all lengths are equally long.
        shape = (self.progress.rows_out, self._columns)
        assert self._rows is not None  # noqa: S101 -- opened by `begin`
        npy.write_array_header_1_0(self._rows, self._header | {"shape": shape})

    @contextlib.contextmanager
    def _naming_output(self) -> Iterator[None]:
        """Let an error of the system name the output, or the folder where that is elsewhere."""
        try:
            yield
        except OSError as error:
            beside = self.place.local is not None and self.place.local.parent == self.folder.parent
            raise FileError.of(self.output if beside else self.folder, error) from error


def _open(path: Path) -> BinaryIO:
    """Open for writing, without a buffer: what a write reports is what happened."""
    path.touch()
    return path.open("r+b", buffering=0)


def _write(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def folder_of(output: Place, work_dir: Path | None) -> Path:
    """Where what is done of an output is kept until it is complete."""
    if work_dir is None and output.local is not None:
        return output.local.with_name(f"{output.local.name}.partial")
    whole = output.name if output.local is None else str(output.local.absolute())
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    name = whole.rpartition("/")[2]
    return (work_dir or Path()) / f"{name}.{digest}.partial"


def _identity(output: Place) -> list[Any]:
    if not output.exists():
        return []
    _, size, version = output.identity()
    inode = [output.local.stat().st_ino] if output.local is not None else []
    return [*inode, size, version]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else f"{text[:200]}..."  # noqa: PLR2004 -- a line or two
