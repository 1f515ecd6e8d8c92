"""Rows of numbers in a file, block by block; and how a format says what is wrong with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from semid_client.files._errors import FileError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from semid_client.files.places import Place

What = Literal["embeddings", "codes"]

ID_COLUMNS: Final = ("id", "item_id")
"""Columns that are taken for the ids where none is named."""

ID_ROWS: Final = 1 << 17
"""Ids that are looked through at a time."""

NAMES: Final = 12
"""Names of columns, arrays or tensors that a message has at most."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a source.

    Attributes
    ----------
    start : int
        Index of the first of them in the source.
    rows : array (n, m)
        The numbers; zeros in bad rows.
    bad : dict
        What is wrong with rows that hold no numbers, by index in the source.
    ids : arrow array, optional
        Of a stream, which cannot be read a second time for them.
    """

    start: int
    rows: NDArray[Any]
    bad: dict[int, str] = field(default_factory=dict)
    ids: Any = None


class Source(ABC):
    """Rows of numbers in a file.

    Attributes
    ----------
    path : str
        The file, folder or pattern, as given.
    n_rows : int or None
        How many there are; None for a stream, which does not tell.
    width : int
        Numbers in a row.
    any_width : bool
        Whether there is no row that tells the width, which is then as good as any.
    dtype : numpy.dtype
        Their type.
    extra_digit : bool or None
        Whether the last code of a row is the extra digit, where the file records that.
    metadata : dict
        Fingerprint and name of the model, where the file records them.
    id_name : str or None
        Name of the column of ids, where there is one.
    """

    path: str
    n_rows: int | None
    width: int
    any_width: bool = False
    dtype: np.dtype[Any]
    extra_digit: bool | None = None
    id_name: str | None = None

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}

    @property
    def id_type(self) -> Any:
        """Arrow type of the ids; None if those are the rows' indices."""
        return None

    @abstractmethod
    def blocks(self, start: int, n_rows: int) -> Iterator[Block]:
        """Blocks of at most ``n_rows`` rows, from row ``start`` to the end."""

    @abstractmethod
    def places(self) -> list[Place]:
        """All files that the rows come from."""

    def takes_width(self, width: int) -> bool:
        """Whether rows have that width; where lists vary, take it if some of the first have it."""
        return self.width == width

    def named(self, row: int) -> tuple[str, int]:
        """What a message calls a row: its file, and its index there."""
        return self.path, row

    def reads_on(self, at: int, start: int) -> bool:
        """Whether from row ``at`` to row ``start`` one reads on, or else begins anew there."""
        del at, start
        return False

    def ids(self, n_rows: int) -> Iterator[Any] | None:
        """Ids of all rows, in arrow arrays of ``n_rows`` and a rest; None: the rows' indices."""
        del n_rows
        return None

    def null_id(self) -> int | None:
        """Row of the first id that is null, if one is; the ids are read for that."""
        at = 0
        for ids in self.ids(ID_ROWS) or ():
            if ids.null_count:
                return at + int(ids.is_null().index(True).as_py())
            at += len(ids)
        return None

    def identity(self) -> list[list[Any]]:
        """Name, size and time of each file: what changes when its content does."""
        return [found.identity() for found in self.places()]

    def close(self) -> None:  # noqa: B027 -- most have nothing to close
        """Close what is open."""


def listed(names: list[str]) -> str:
    """Some names in a sentence."""
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return ", ".join(names[:NAMES]) + more or "none"


def the_one(path: str, what: str, names: list[str], asked: str | None) -> str:
    """Return the name asked for, or the only one there is; refuse any other case."""
    if asked is not None and asked in names:
        return asked
    found = listed(names)
    if asked is not None:
        raise FileError(path, f"{asked!r} is not one of its {what}: {found}")
    if len(names) != 1:
        raise FileError(path, f"its {what} are {found}; name the one to read by --column")
    return names[0]


class reading:  # noqa: N801 -- used like a function
    """Let whatever a library says of a file be one sentence that begins with its path."""

    def __init__(self, path: str | os.PathLike[str], kind: str, place: str = "") -> None:
        self._path, self._kind, self._place = path, kind, place

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if error is None or isinstance(error, FileError | GeneratorExit | KeyboardInterrupt):
            return
        if isinstance(error, Exception):
            # Damage makes the libraries raise anything; the first line says what.
            said = next(iter(str(error).splitlines()), "") or type(error).__name__
            place = f"{self._place} " if self._place else ""
            raise FileError(self._path, f"{place}cannot be read as {self._kind}: {said}") from error
