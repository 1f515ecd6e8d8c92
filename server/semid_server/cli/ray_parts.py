"""Codes that the nodes of a cluster wrote, in any order, on their way into the work of one output.

A part is a Parquet file of some rows: ``row``, its index in the input; ``codes``; and ``problem``,
what is wrong with a bad one. Which part holds a row is read from the parts themselves. So it does
not matter who wrote them, in which order, how often, or in how many attempts: a row has the same
codes every time, and the first part that has it will do. A file without its end, left behind by
whoever was killed while writing it, counts as nothing.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from semid_client.files import FileError
from semid_client.files._extras import need

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from semid_client.files import OnBadRow, Work

FORMAT: Final = 1
"""Of the parts: those of another version of this module are no use."""

READERS: Final = 16
"""Parts that are looked into at once: a store answers slowly, but many at once."""

HELD: Final = 32
"""Parts held in memory: neighbours in the input may be in several."""


def locate(name: str) -> tuple[Any, str]:
    """File system, as Arrow and Ray take it, and path of a path or URL.

    Raises
    ------
    FileError
        If nothing is installed that speaks to the URL's store.
    """
    if "://" not in name:
        return fs.LocalFileSystem(), str(Path(name).absolute())
    fsspec = need("fsspec", name)
    try:
        store, path = fsspec.url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise FileError(name, str(error)) from error
    if "file" in store.protocol:
        return fs.LocalFileSystem(), path
    return fs.PyFileSystem(fs.FSSpecHandler(store)), path


def part_schema(width: int, dtype: np.dtype[Any]) -> pa.Schema:
    """Columns of a part of ``width`` codes a row."""
    lists = pa.list_(pa.from_numpy_dtype(dtype), width)
    return pa.schema([("row", pa.int64()), ("codes", lists), ("problem", pa.string())])


def part_of(rows: NDArray[np.int64], codes: NDArray[Any], problems: Mapping[int, str]) -> pa.Table:
    """Make a table of ``rows`` (n,) with codes (n, L); problems by place in the table."""
    schema = part_schema(codes.shape[1], codes.dtype)
    lists = pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(codes).reshape(-1)), type=schema.field("codes").type
    )
    said = pa.array([problems.get(i) for i in range(len(rows))], pa.string())
    return pa.table([pa.array(rows), lists, said], schema=schema)


@dataclass(frozen=True, slots=True)
class Run:
    """Rows ``start`` to ``stop - 1`` of the input, which are one after the other in a part."""

    start: int
    stop: int
    part: str
    offset: int


class Parts:
    """The parts of one task, in a folder of their own below ``root``.

    Parameters
    ----------
    root : str
        Path or URL of a folder that all nodes of the cluster and this process see.
    task : dict
        Everything that the codes depend on. The folder is named after it.
    """

    def __init__(self, root: str, task: Mapping[str, Any]) -> None:
        self.root = root
        self.filesystem, self._base = locate(root)
        told = json.dumps([FORMAT, task], sort_keys=True).encode()
        self._name = hashlib.sha256(told).hexdigest()[:16]
        self.folder = f"{self._base}/{self._name}"
        self._content = lru_cache(HELD)(self._read)

    def check_alone(self) -> None:
        """Refuse a root that holds parts of another task.

        Raises
        ------
        FileError
            It does, or cannot be read.
        """
        others = [entry.base_name for entry in self._list(self._base)]
        if any(name != self._name for name in others):
            raise FileError(
                self.root,
                "holds codes of another input, model or option, or something else: repeat the "
                "command as it was to go on, begin again by --restart, or name another folder by "
                "--parts",
            )

    def create(self) -> None:
        """Make the folder."""
        with self._naming_root():
            self.filesystem.create_dir(self.folder, recursive=True)

    def remove(self) -> None:
        """Remove all parts, of this task and of others, and the root if nothing else is in it."""
        with self._naming_root():
            for entry in self._list(self._base):
                if entry.type == fs.FileType.Directory and _is_task(entry.base_name):
                    self.filesystem.delete_dir(entry.path)
            if self._exists() and not self._list(self._base):
                self.filesystem.delete_dir(self._base)

    def remove_if_empty(self) -> bool:
        """Remove all, if no part has been written; tell whether that was so."""
        if self._list(self.folder):
            return False
        self.remove()
        return True

    def _exists(self) -> bool:
        return bool(self.filesystem.get_file_info(self._base).type == fs.FileType.Directory)

    def _list(self, folder: str) -> list[Any]:
        selector = fs.FileSelector(folder, allow_not_found=True)
        with self._naming_root():
            return sorted(self.filesystem.get_file_info(selector), key=lambda entry: entry.path)

    def runs(self) -> list[Run]:
        """All that the parts hold, in the order of the rows; of rows held twice, one."""
        paths = [e.path for e in self._list(self.folder) if e.path.endswith(".parquet")]
        with ThreadPoolExecutor(READERS) as pool:
            found = [run for runs in pool.map(self._runs_of, paths) for run in runs]
        return list(_in_order(found))

    def _runs_of(self, path: str) -> list[Run]:
        try:
            with self.filesystem.open_input_file(path) as file:
                rows = pq.read_table(file, columns=["row"])["row"].to_numpy()
        except pa.ArrowInvalid:
            return []  # killed while it was written
        if not len(rows):
            return []
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        offsets = [0, *breaks.tolist(), len(rows)]
        return [Run(int(rows[a]), int(rows[a]) + b - a, path, a) for a, b in pairwise(offsets)]

    def _read(self, path: str) -> tuple[NDArray[Any], dict[int, str]]:
        """Codes (n, L) of a part, and what is wrong with some, by place in it."""
        with self._naming_root(), self.filesystem.open_input_file(path) as file:
            table = pq.read_table(file, columns=["codes", "problem"]).combine_chunks()
        lists = table["codes"].chunk(0)
        codes = lists.flatten().to_numpy().reshape(len(lists), lists.type.list_size)
        said = table["problem"]
        places = np.flatnonzero(said.is_valid().to_numpy()).tolist()
        return codes, {place: said[place].as_py() for place in places}

    def append_to(self, work: Work, runs: Iterable[Run], on_bad_row: OnBadRow) -> None:
        """Bring all rows from where the work is into it. ``runs`` are those of `runs`."""
        for run in runs:
            at = work.progress.rows_in
            if run.stop <= at:
                continue
            codes, problems = self._content(run.part)
            first, last = run.offset + at - run.start, run.offset + run.stop - run.start
            some = codes[first:last]
            bad = {p - first: text for p, text in problems.items() if first <= p < last}
            if on_bad_row == "skip":
                some = np.delete(some, list(bad), axis=0)
            work.append(last - first, some, {at + i: text for i, text in sorted(bad.items())})

    def _naming_root(self) -> Any:
        return _Naming(self.root)


class _Naming:
    """Let an error of the file system name the root."""

    def __init__(self, root: str) -> None:
        self._root = root

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if isinstance(error, OSError):
            raise FileError.of(self._root, error) from error


def _is_task(name: str) -> bool:
    return len(name) == 16 and set(name) <= set("0123456789abcdef")  # noqa: PLR2004 -- as named above


def _in_order(runs: list[Run]) -> Iterator[Run]:
    """Sort, and cut what an earlier run has already."""
    done = 0
    for run in sorted(runs, key=lambda run: (run.start, -run.stop, run.part)):
        if run.stop > done:
            cut = max(0, done - run.start)
            yield Run(run.start + cut, run.stop, run.part, run.offset + cut)
            done = run.stop


def gaps(runs: Iterable[Run], start: int, stop: int) -> list[tuple[int, int]]:
    """Spans of rows from ``start`` to ``stop - 1`` that no run has; runs as `Parts.runs` gives."""
    found = []
    for run in runs:
        if run.start > start:
            found.append((start, min(run.start, stop)))
        start = max(start, run.stop)
        if start >= stop:
            return found
    return [*found, (start, stop)] if start < stop else found
