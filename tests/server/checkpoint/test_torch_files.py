"""Pickles of strangers: read as data, whatever they would rather do."""

from __future__ import annotations

import builtins
import copy
import functools
import io
import os
import pathlib
import pickle
import struct
import subprocess
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semid_server.checkpoint import load_checkpoint
from semid_server.checkpoint.torch_files import InertObject, read_torch_file
from semid_server.errors import CheckpointError, MalformedCheckpointError, UnsafeCheckpointError


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class Command:
    """A class of this module: an attacker's own, with a method that unpickling calls."""

    def __setstate__(self, state):
        os.system(state["command"])  # noqa: S605 (the attack)

    def __getstate__(self):
        return {"command": "true"}


@pytest.fixture
def canary(tmp_path):
    """A file that every attack here would make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


ATTACKS = {
    "posix.system": lambda canary: Calls(os.system, f"touch {canary}"),
    "builtins.eval": lambda canary: Calls(eval, f"open({str(canary)!r}, 'w')"),
    "builtins.exec": lambda canary: Calls(exec, f"open({str(canary)!r}, 'w')"),
    "subprocess.Popen": lambda canary: Calls(subprocess.Popen, ["touch", str(canary)]),
    "io.open": lambda canary: Calls(builtins.open, str(canary), "w"),
    "torch.hub.load": lambda canary: Calls(torch.hub.load, str(canary)),
    "torch.save": lambda canary: Calls(torch.save, 1, str(canary)),
    "posix.mkdir": lambda canary: functools.partial(os.mkdir, str(canary)),
    "builtins.getattr": lambda canary: Calls(getattr, pathlib.Path(canary), "touch"),
    "builtins.bytearray": lambda canary: Calls(bytearray, 1 << 40),
    "Command": lambda canary: Command(),
}
PLACES = {
    "at the top": lambda attack: attack,
    "in the hyper-parameters": lambda attack: {
        "state_dict": {},
        "hyper_parameters": {"loss": [attack]},
    },
    "in an optimizer state": lambda attack: {
        "state_dict": {},
        "optimizer_states": [{"state": {0: {"step": attack}}}],
    },
    "among the weights": lambda attack: {
        "model_state_dict": OrderedDict({"quantization_layer_list.0.centroids": attack})
    },
    "as the state of a harmless object": lambda attack: Calls(
        OrderedDict, state={"metadata": attack}
    ),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_that_would_run_something_is_refused_by_name(
    tmp_path, canary, name, place, legacy
):
    path = tmp_path / "model.ckpt"
    attack = PLACES[place](ATTACKS[name](canary))
    torch.save(attack, path, _use_new_zipfile_serialization=not legacy)
    last = name.rsplit(".", 1)[-1]
    with pytest.raises(UnsafeCheckpointError, match=rf"asks for .*\b{last}\b.* nothing of it was"):
        load_checkpoint(path)


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_of_any_protocol_is_refused_by_name(tmp_path, canary, protocol):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Calls(os.system, f"touch {canary}"), protocol=protocol))
    with pytest.raises(UnsafeCheckpointError, match=r"asks for (posix|nt)\.system"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (b"(S'touch CANARY'\nios\nsystem\n.", "os.system"),  # INST
        (b"(cos\nsystem\nS'touch CANARY'\no.", "os.system"),  # OBJ
        (b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch CANARY\x85\x81.", "os.system"),  # NEWOBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch CANARY\x85R.", "os.system"),
        (b"\x80\x02\x82\x01.", "extension 1 of copyreg"),
        (b"\x80\x02c__builtin__\neval\nU\x01x\x85R.", "asks for builtins.eval"),
    ],
    ids=["INST", "OBJ", "NEWOBJ", "STACK_GLOBAL", "EXT1", "Python 2"],
)
@pytest.mark.parametrize("zipped", [False, True], ids=["bare", "zip"])
def test_every_instruction_that_names_something_is_seen(tmp_path, canary, program, name, zipped):
    program = program.replace(b"CANARY", b"canary")
    path = tmp_path / "model.pt"
    if zipped:
        rewrite_pickle(path, lambda _: program)
    else:
        path.write_bytes(program)
    with pytest.raises(UnsafeCheckpointError, match=name):
        load_checkpoint(path)


def test_two_pickles_in_one_archive_are_refused(tmp_path, canary):
    path = tmp_path / "model.pt"
    torch.save({}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps(Calls(os.system, f"touch {canary}"), 2))
    with pytest.raises(MalformedCheckpointError, match=r"2 data\.pkl"):
        load_checkpoint(path)


def test_calling_what_is_no_function_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    rewrite_pickle(path, lambda _: b"\x80\x02ctorch\nfloat32\n)R.")
    with pytest.raises(CheckpointError, match="TypeError"):
        load_checkpoint(path)


def test_a_name_hidden_from_the_first_look_is_stopped_by_the_second(tmp_path, canary):
    program = (
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x8c\x05torch\x8c\x04Size00"
        b"h\x00h\x01\x93\x8c\x0ctouch canary\x85R."
    )
    path = tmp_path / "model.pt"
    path.write_bytes(program)
    with pytest.raises(UnsafeCheckpointError, match="was stopped"):
        load_checkpoint(path)


def test_building_on_a_plain_container_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    rewrite_pickle(path, lambda _: b"\x80\x02}}b.")
    with pytest.raises(UnsafeCheckpointError, match="more than torch"):
        load_checkpoint(path)


# --- what is let in ------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_what_hyper_parameters_usually_hold_comes_out_inert(tmp_path, legacy):
    weight = torch.nn.Parameter(torch.ones(2))
    path = tmp_path / "model.ckpt"
    objects = {
        "optimizer": functools.partial(torch.optim.SGD, lr=0.5),
        "trained": torch.optim.Adagrad,
        "root": pathlib.PurePosixPath("data"),
    }
    if not legacy:  # which adds the source code of modules, and is refused with them
        objects |= {"loss": torch.nn.MSELoss(), "activation": torch.nn.ReLU()}
    kept = {
        "numbers": {"a": 1, "b": [2.5, None, True], 3: ("x", {4})},
        "weight": weight,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "size": torch.Size([2, 3]),
    }
    torch.save({**objects, **kept}, path, _use_new_zipfile_serialization=not legacy)
    read = read_torch_file(path)
    for name in objects:
        assert read[name] is InertObject or type(read[name]) is InertObject, name
    assert read["numbers"] == kept["numbers"]
    assert torch.equal(read["weight"], weight)
    assert torch.equal(read["half"], kept["half"])
    assert read["size"] == kept["size"]


def test_the_allow_list_is_taken_back_after_reading(tmp_path):
    before = set(torch.serialization.get_safe_globals())  # a list in no order
    torch.save({"loss": torch.nn.MSELoss()}, tmp_path / "a.pt")
    read_torch_file(tmp_path / "a.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError, match="MSELoss"):
        torch.load(tmp_path / "a.pt", weights_only=True)


@pytest.mark.parametrize("location", ["cuda:0", "cuda:7", "mps", "xpu:1"])
def test_tensors_saved_on_a_device_that_is_not_here_load_onto_the_cpu(tmp_path, location):
    path = tmp_path / "model.pt"

    def from_device(program: bytes) -> bytes:
        tag = location.encode()
        return program.replace(b"X\x03\x00\x00\x00cpu", b"X" + struct.pack("<I", len(tag)) + tag)

    rewrite_pickle(path, from_device, {"weight": torch.arange(3.0)})
    with zipfile.ZipFile(path) as archive:
        assert location.encode() in archive.read("model/data.pkl")
    weight = read_torch_file(path)["weight"]
    assert weight.device.type == "cpu"
    assert weight.tolist() == [0, 1, 2]


# --- damage --------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_truncated_file_is_refused(tmp_path, legacy, data):
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(50)}, buffer, _use_new_zipfile_serialization=not legacy)
    whole = buffer.getvalue()
    path = tmp_path / "model.pt"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load_checkpoint(path)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_flipped_bit_never_gives_other_numbers(tmp_path, data):
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(50)}, buffer)
    broken = bytearray(buffer.getvalue())
    bit = data.draw(st.integers(0, 8 * len(broken) - 1))
    broken[bit // 8] ^= 1 << bit % 8
    path = tmp_path / "model.pt"
    path.write_bytes(bytes(broken))
    try:
        read = read_torch_file(path)
    except CheckpointError:
        return
    assert list(read) == ["w"]
    assert torch.equal(read["w"], torch.ones(50))


def test_a_flipped_bit_in_the_numbers_is_located(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.full((50,), 1.5)}, path)
    data = path.read_bytes()
    place = data.index(struct.pack("<f", 1.5) * 50)
    path.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    with pytest.raises(MalformedCheckpointError, match=r"member model/data/0 .* CRC-32"):
        load_checkpoint(path)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    prefix=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"c", b"\x93NUMPY"]), data=st.data()
)
def test_random_bytes_are_refused(tmp_path, prefix, data):
    path = tmp_path / "model.pt"
    path.write_bytes(prefix + data.draw(st.binary(max_size=200)))
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load_checkpoint(path)


def test_an_archive_that_is_not_of_torch_is_refused(tmp_path):
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(MalformedCheckpointError, match=r"0 data\.pkl"):
        load_checkpoint(path)


def test_a_torchscript_archive_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({}, 2))
        archive.writestr("model/constants.pkl", pickle.dumps((), 2))
    with pytest.raises(MalformedCheckpointError, match="TorchScript"):
        load_checkpoint(path)


def rewrite_pickle(path, change, contents=None) -> None:
    """Save ``contents``, with its pickle changed."""
    buffer = io.BytesIO()
    torch.save(contents or {}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.namelist():
            data = source.read(member)
            name = f"{path.stem}/{member.split('/', 1)[1]}"
            target.writestr(name, change(data) if name.endswith("data.pkl") else data)


def packed(path, members):
    """Write an archive that is compressed, as torch's own never are."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_an_archive_that_was_compressed_since_is_read(tmp_path):
    torch.save({"weight": torch.rand(100, 100)}, tmp_path / "a.pt")
    path = packed(tmp_path / "packed.pt", members_of(tmp_path / "a.pt"))
    assert torch.equal(
        read_torch_file(path)["weight"], torch.load(tmp_path / "a.pt", weights_only=True)["weight"]
    )


def test_a_small_file_that_unpacks_to_much_is_refused_before_it_does(tmp_path):
    torch.save({"weight": torch.zeros(1 << 20)}, tmp_path / "a.pt")
    path = packed(tmp_path / "packed.pt", members_of(tmp_path / "a.pt"))
    with pytest.raises(MalformedCheckpointError, match=r"unpack to .* more than 8 times as many"):
        read_torch_file(path)


def test_members_that_share_their_bytes_are_counted_each(tmp_path):
    torch.save({"weight": torch.rand(1 << 18)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        (numbers,) = (member for member in archive.infolist() if member.filename.endswith("data/0"))
        for index in range(1, 9):
            again = copy.copy(numbers)
            again.filename = numbers.filename.removesuffix("0") + str(index)
            archive.filelist.append(again)
        archive._didModify = True
    with pytest.raises(MalformedCheckpointError, match="more than 8 times as many"):
        read_torch_file(tmp_path / "a.pt")
