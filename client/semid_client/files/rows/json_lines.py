"""Codes in lines of JSON."""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from semid_client.files._errors import FileError
from semid_client.files._extras import need
from semid_client.files.places import Place, place
from semid_client.files.rows.source import Block, Source, reading

if TYPE_CHECKING:
    from collections.abc import Iterator


class JsonLinesCodes(Source):
    """Codes in lines of JSON, as `semid encode` writes them; ``null`` is a bad row."""

    def __init__(self, path: str, id_column: str | None) -> None:
        super().__init__()
        self.path, self._place, self._id = path, place(path), id_column or "id"
        self.dtype = np.dtype(np.int64)
        self.n_rows, self.width = 0, 0
        self._first_id: Any = None
        for id_, codes in self._lines():
            if not self.n_rows:
                self._first_id = id_
            self.n_rows += 1
            self.width = self.width or len(codes or ())
        if self.n_rows and not self.width:
            raise FileError(path, "holds no codes")
        self.width = self.width or 1  # of no rows, any

    @property
    def id_type(self) -> Any:
        """As Arrow has that of the first line's."""
        if self._first_id is None:
            return None
        with reading(self.path, "ids"):
            return need("pyarrow", self.path).array([self._first_id]).type

    def _lines(self) -> Iterator[tuple[Any, list[int] | None]]:
        with self._place.open() as file:
            for number, line in enumerate(file, 1):
                try:
                    item = json.loads(line)
                    id_, codes = item.get(self._id), item["codes"]
                except (ValueError, KeyError, AttributeError) as error:
                    raise FileError(
                        self.path, f'line {number} is not an object with "codes": {error!r}'
                    ) from error
                if codes is not None and not (
                    isinstance(codes, list) and all(type(code) is int for code in codes)
                ):
                    raise FileError(
                        self.path, f"line {number}: its codes are no list of whole numbers"
                    )
                yield id_, codes

    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Read line by line."""
        lines = islice(self._lines(), start, None)
        at = start
        while some := list(islice(lines, n_rows)):
            bad, held = {}, []
            for index, (_, codes) in enumerate(some, at):
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
        """Ids, if the first line has one."""
        return None if self.id_type is None else self._ids(n_rows)

    def _ids(self, n_rows: int) -> Iterator[Any]:
        pa, lines = need("pyarrow", self.path), self._lines()
        while some := [id_ for id_, _ in islice(lines, n_rows)]:
            with reading(self.path, "ids"):
                yield pa.array(some, self.id_type)

    def places(self) -> list[Place]:
        """The one file."""
        return [self._place]
