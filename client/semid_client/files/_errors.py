"""What can be wrong with a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from semid_client._errors import InvalidInputError, SemidClientError

if TYPE_CHECKING:
    import os


class FileError(SemidClientError):
    """A file that cannot be read or written as asked. The message begins with its path."""

    def __init__(self, path: str | os.PathLike[str], problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"

    @classmethod
    def of(cls, path: str | os.PathLike[str], error: OSError) -> FileError:
        """Say what the system said of the path; raise the result ``from`` the error."""
        return cls(path, error.strerror or str(error))


class NotFiniteError(InvalidInputError):
    """Rows that were to be computed hold NaN or an infinity; which do was not told."""
