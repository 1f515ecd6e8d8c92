"""Files of `torch.save`, read as data: nothing that a pickle names is imported or called.

A pickle is a program, and the files of strangers are read here, so two walls stand between
it and the interpreter. First every name that the pickle asks for is listed without running
it, and a name outside of the allow-list below refuses the file. Then `torch.load` reads it
with ``weights_only=True``, whose own unpickler only rebuilds tensors and containers; classes
that the allow-list grants beyond those come out as `InertObject`, never as themselves.
"""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import deque
from os import SEEK_END
from typing import IO, TYPE_CHECKING, Any, Self

import torch
from torch import nn, optim

from semid_server.errors import MalformedCheckpointError, UnsafeCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# What tensors and plain containers are made of. torch's unpickler knows more (bytearray(n) or
# an empty tensor of any size, for instance, with which a small file takes all memory).
_REBUILT = frozenset(
    [
        "collections.OrderedDict",
        "builtins.set",
        "_codecs.encode",
        "torch.Size",
        "torch.device",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch.storage.UntypedStorage",
    ]
    + [
        f"torch.{name}Storage"
        for name in (
            *("Double", "Float", "Half", "BFloat16"),
            *("Long", "Int", "Short", "Char", "Byte", "Bool"),
        )
    ]
    + [
        f"torch.{name}"
        for name in (
            *("float64", "float32", "float16", "bfloat16", "bool"),
            *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
        )
    ]
)

# What hyper-parameters and optimizer states hold besides numbers and text. Nothing of it is
# needed to encode, so an inert object takes its place.
_INERT = frozenset(
    [f"torch.nn.modules.loss.{name}" for name in nn.modules.loss.__all__]
    + [f"torch.nn.modules.activation.{name}" for name in nn.modules.activation.__all__]
    + [f"{cls.__module__}.{cls.__qualname__}" for cls in vars(optim).values() if type(cls) is type]
    + [
        "functools.partial",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib._local.PosixPath",
        "numpy.dtype",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",
        "typing.Any",
        "collections.defaultdict",
    ]
    + [f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool")]
)

_ZIP_MAGIC = b"PK\x03\x04"

_UNPACKING = 8
"""How many times its own size an archive may unpack to. torch.save does not compress at all."""

_SMALL = 1 << 20
"""Bytes to which any archive may unpack."""

_LEGACY_PICKLES = 5
"""Pickles that follow each other in a file from before torch 1.6, ahead of the raw numbers."""


class InertObject:
    """Stands where a pickle asks for a class that is not needed: holds nothing, does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """Take the arguments of any constructor and drop them."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Take any state and drop it."""


def read_torch_file(path: Path) -> object:
    """Contents of a file of `torch.save`, its tensors on the CPU wherever they were saved from.

    Parameters
    ----------
    path : Path
        A zip archive of `torch.save`, or its format from before torch 1.6.

    Raises
    ------
    UnsafeCheckpointError
        The pickle names something outside of the allow-list. Nothing of it ran.
    MalformedCheckpointError
        The file is damaged, or is not one of `torch.save`.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC:  # as torch tells the two apart
            names = _names_in_archive(path, file)
        else:
            names = _names_in_legacy_file(path, file)
        refused = sorted(names - _REBUILT - _INERT)
        if refused:
            raise UnsafeCheckpointError(
                path,
                f"its pickle asks for {', '.join(refused)}, which is not needed to rebuild a "
                "model and could run anything; nothing of it was run. If you trust the file, save "
                "its state_dict and its hyper-parameters again without that object",
            )
        file.seek(0)
        return _load_weights_only(path, file)


def _load_weights_only(path: Path, file: IO[bytes]) -> object:
    inert: list[Any] = [(InertObject, name) for name in _INERT]
    try:
        # torch warns of pickle protocols other than its own and of its old storage classes:
        # nothing that the reader of a checkpoint can act on.
        with torch.serialization.safe_globals(inert), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip()
        raise UnsafeCheckpointError(
            path,
            "its pickle does more than torch's weights-only reader allows, and was stopped "
            f"({_first_line(reason)}). What torch.save writes by default, with pickle protocol 2 "
            "and nothing but tensors and plain values, is read",
        ) from error
    except Exception as error:  # a damaged pickle can end in any exception at all
        raise MalformedCheckpointError(
            path, f"damaged: torch cannot read it ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: object) -> str:
    """What torch says first; its advice and its C++ frames follow."""
    return str(error).split("\n", 1)[0]


def _names_in_archive(path: Path, file: IO[bytes]) -> set[str]:
    """Names in the pickle of a zip archive, after a check of sizes and of each member's CRC-32."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
            pickles = [name for name in members if name.endswith("/data.pkl")]
            size = file.seek(0, SEEK_END)
            unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > max(_SMALL, _UNPACKING * size):
                # Before anything is unpacked: a small file could take all memory.
                problem = (
                    f"its {size} bytes unpack to {unpacked}, more than {_UNPACKING} times as many; "
                    "torch.save does not compress"
                )
            elif any(name.endswith("/constants.pkl") for name in members):
                problem = "a TorchScript archive, which is a program; expected a checkpoint"
            elif len(pickles) != 1:
                problem = f"a zip archive with {len(pickles)} data.pkl; one of torch.save has 1"
            elif (member := archive.testzip()) is not None:
                problem = f"damaged: member {member} of the archive fails its CRC-32"
            else:
                with archive.open(pickles[0]) as stream:
                    return set(_names(stream))
    except Exception as error:  # a damaged archive or pickle can end in any exception at all
        raise MalformedCheckpointError(
            path, f"truncated or damaged zip archive ({type(error).__name__}: {error})"
        ) from error
    raise MalformedCheckpointError(path, problem)


def _names_in_legacy_file(path: Path, file: IO[bytes]) -> set[str]:
    """Names in the pickles at the head of a file that is no archive."""
    names: set[str] = set()
    file.seek(0)
    try:
        for _ in range(_LEGACY_PICKLES):
            names.update(_names(file))
    except Exception as error:  # random bytes read as a pickle can end in any exception at all
        if not names:  # else the names seen so far say more than the damage after them
            raise MalformedCheckpointError(
                path,
                "not a checkpoint: neither a folder with config.json nor a whole file of "
                f"torch.save ({error})",
            ) from error
    return names


def _names(stream: IO[bytes]) -> Iterator[str]:
    """Yield each global that a pickle asks for, as ``module.name``, without running it."""
    texts: deque[str] = deque(["?", "?"], maxlen=2)
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield _modern(*str(argument).split(" ", 1))
        elif opcode.name == "STACK_GLOBAL":
            # Its module and name are the texts on the stack: most likely the two last seen. Where
            # they are others, torch's unpickler, which lacks this instruction, stops there.
            yield _modern(*texts)
        elif opcode.name in ("EXT1", "EXT2", "EXT4"):
            yield f"extension {argument} of copyreg"
        elif isinstance(argument, str):
            texts.append(argument)


def _modern(module: str, name: str) -> str:
    """Full name of a global, which protocol 2 writes as Python 2 called it."""
    renamed = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return ".".join(renamed)
