"""Files of embeddings and of codes: read in pieces, written whole or not at all."""

from semid_client.files._errors import FileError, NotFiniteError
from semid_client.files.npy import NpyReader
from semid_client.files.outputs import Made, OnBadRow, Unique, check_output, make_output
from semid_client.files.pipeline import Engine, Pipeline, Stages
from semid_client.files.rows import Block, Source, open_rows
from semid_client.files.unique import Convention, Digits, extra_digits
from semid_client.files.work import Progress, Work

__all__ = [
    "Block",
    "Convention",
    "Digits",
    "Engine",
    "FileError",
    "Made",
    "NotFiniteError",
    "NpyReader",
    "OnBadRow",
    "Pipeline",
    "Progress",
    "Source",
    "Stages",
    "Unique",
    "Work",
    "check_output",
    "extra_digits",
    "make_output",
    "open_rows",
]
