"""From rows to codes: the reference arithmetic, and faster paths proved to give its codes."""

from semid_server.encoding.factory import make_encoder
from semid_server.encoding.protocol import EncodeCounts, Encoder
from semid_server.encoding.reference import ReferenceEncoder

__all__ = ["EncodeCounts", "Encoder", "ReferenceEncoder", "make_encoder"]
