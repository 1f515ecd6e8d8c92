"""Files of embeddings and of codes: read in pieces, written whole or not at all."""

from semid_client.files._errors import FileError
from semid_client.files.npy import NpyReader, NpyWriter

__all__ = ["FileError", "NpyReader", "NpyWriter"]
