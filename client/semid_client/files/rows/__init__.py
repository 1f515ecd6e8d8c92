"""Rows of numbers, embeddings or codes, in every format that is read: a module for each.

A source is read block by block, from any row on; how is its format's business.
"""

from semid_client.files.rows.arrow import ArrowStreamRows, ListColumns, rechunked
from semid_client.files.rows.matrices import MatrixRows
from semid_client.files.rows.opening import STDIN, check_apart, open_rows
from semid_client.files.rows.parquet import ParquetRows
from semid_client.files.rows.source import Block, Source, What

__all__ = [
    "STDIN",
    "ArrowStreamRows",
    "Block",
    "ListColumns",
    "MatrixRows",
    "ParquetRows",
    "Source",
    "What",
    "check_apart",
    "open_rows",
    "rechunked",
]
