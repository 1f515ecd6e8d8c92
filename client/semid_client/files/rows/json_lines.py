"""Codes in lines of JSON."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from semid_client.files._errors import FileError
from semid_client.files._extras import need
from semid_client.files.places import Place, place
from semid_client.files.rows.source import Block, Source, reading

if TYPE_CHECKING:
    from collections.abc import Iterator

INT64: Final = range(-(1 << 63), 1 << 63)
UINT64: Final = range(1 << 64)


class JsonLinesCodes(Source):
    """Codes in lines of JSON, as `semid encode` writes them; ``null`` is a bad row.

    There are ids if any line has one, be it ``null``.
    """

    def __init__(self, path: str, column: str | None, id_column: str | None) -> None:
        super().__init__()
        if column not in {None, "codes"}:
            raise FileError(path, f'has its codes in "codes": --column {column} says nothing')
        self.path, self._place, self._id = path, place(path), id_column or "id"
        self.dtype = np.dtype(np.int64)
        self.n_rows, self.width = 0, 0
        self._id_kinds, self._null_id = _IdKinds(path), None
        all_null = True
        for item in self._lines():
            self.n_rows += 1
            self.width = self.width or len(item["codes"] or ())
            all_null &= item["codes"] is None
            if self._id in item:
                self.id_name = self._id
            id_ = item.get(self._id)
            if id_ is not None:
                self._id_kinds.add(self.n_rows, id_)
            elif self._null_id is None:
                self._null_id = self.n_rows - 1
        if not self.width and not all_null:
            raise FileError(path, "holds no codes")
        if self.n_rows and id_column is not None and self.id_name is None:
            raise FileError(path, f"has no {id_column!r} in any of {self.n_rows} lines")
        self.any_width = not self.width
        self.width = self.width or 1

    @property
    def id_type(self) -> Any:
        """The one that holds the ids of all lines."""
        return None if self.id_name is None else self._id_kinds.arrow_type()

    def _lines(self) -> Iterator[dict[str, Any]]:
        with self._place.open() as file:
            for number, line in enumerate(file, 1):
                try:
                    item = json.loads(line)
                    codes = item["codes"]
                except (ValueError, KeyError, TypeError) as error:
                    raise FileError(
                        self.path, f'line {number} is not an object with "codes": {error!r}'
                    ) from error
                if codes is not None and not (
                    isinstance(codes, list) and all(type(code) is int for code in codes)
                ):
                    raise FileError(
                        self.path, f"line {number}: its codes are no list of whole numbers"
                    )
                yield item

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read line by line."""
        lines = islice(self._lines(), start, None)
        at = start
        while some := [item["codes"] for item in islice(lines, n_rows)]:
            bad, held = {}, []
            for index, codes in enumerate(some, at):
                if codes is None or len(codes) != self.width:
                    bad[index] = "is null" if codes is None else f"has {len(codes)} codes"
                    codes = [0] * self.width  # noqa: PLW2901 -- of a bad row
                held.append(codes)
            with reading(self.path, "codes", f"lines {at + 1} to {at + len(some)}"):
                yield Block(at, np.array(held, self.dtype).reshape(len(some), self.width), bad)
            at += len(some)

    def reads_on(self, at: int, start: int) -> bool:
        """Forward."""
        return at <= start

    def ids(self, n_rows: int) -> Iterator[Any] | None:
        """Ids, if any line has one."""
        return None if self.id_name is None else self._ids(n_rows, self.id_type)

    def _ids(self, n_rows: int, kind: Any) -> Iterator[Any]:
        pa, lines, at = need("pyarrow", self.path), self._lines(), 0
        while some := [item.get(self._id) for item in islice(lines, n_rows)]:
            with reading(self.path, "ids", f"lines {at + 1} to {at + len(some)}"):
                yield pa.array(some, kind)
            at += len(some)

    def null_id(self) -> int | None:
        """Known since all lines were gone through."""
        return None if self.id_name is None else self._null_id

    def places(self) -> list[Place]:
        """The one file."""
        return [self._place]


class _IdKinds:
    """What the ids of lines are, seen one after another, for the type that holds them all."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._first: dict[type, tuple[int, Any]] = {}  # line and id, for each type of Python
        self._least = self._most = (0, 0)  # line and whole number

    def add(self, line: int, id_: Any) -> None:
        """Take the id of a line; refuse one that no type holds together with those before it."""
        kind = type(id_)
        if kind not in self._first:
            for other, (before, held) in self._first.items():
                if {kind, other} != {int, float}:
                    raise FileError(
                        self._path,
                        f"line {line}: its id {id_!r} is of another type than {held!r} of line "
                        f"{before}",
                    )
            self._first[kind] = line, id_
        if kind is not int:
            return
        if id_ < self._least[1]:
            self._least = line, id_
        elif id_ > self._most[1]:
            self._most = line, id_
        else:
            return
        if id_ not in INT64 and id_ not in UINT64:
            raise FileError(
                self._path,
                f"line {line}: its id {id_} is out of range; whole numbers run from "
                f"{INT64.start} to {UINT64.stop - 1}",
            )
        if self._least[1] < 0 and self._most[1] not in INT64:
            before, held = self._most if id_ < 0 else self._least
            raise FileError(
                self._path,
                f"line {line}: its id {id_} and {held} of line {before} are of no one type of "
                "whole numbers",
            )

    def arrow_type(self) -> Any:
        """The type; of numbers some of which are whole, float64."""
        pa = need("pyarrow", self._path)
        if float in self._first:
            return pa.float64()
        if int in self._first:
            return pa.int64() if self._most[1] in INT64 else pa.uint64()
        with reading(self._path, "ids"):
            return pa.array([id_ for _, id_ in self._first.values()]).type
