"""Several models, and new versions of them, while the server serves."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest

from semid.v1 import semid_pb2 as pb
from semid.v1 import semid_pb2_grpc as pb_grpc
from semid_server.errors import ConfigurationError, MalformedCheckpointError
from semid_server.serving import reloading
from semid_server.serving import server as serving
from semid_server.serving.config import ModelSource, ServeConfig
from semid_server.serving.reloading import stamp
from semid_server.serving.server import Server

REQUEST = pb.EncodeRequest(
    tensor=pb.Tensor(dtype=pb.DATA_TYPE_FLOAT32, shape=[1, 4], data=np.ones(4, "f4").tobytes())
)


class Version:
    """A version of a toy model; its codes are its number."""

    def __init__(self, number, served):
        self.number = number
        self.served = replace(served, fingerprint=f"{number:064x}", backend=self)

    quick = False

    def warm_up(self): ...

    def after(self): ...

    def drift(self):
        return []

    def device_use(self):
        return None

    def proved_rows(self):
        return {"fast": 10 * self.number}

    def run(self, key, payloads):
        return [np.full((len(rows), 3), self.number, np.uint16) for rows in payloads]


class Versions:
    """Makes a version 1 of each model, then 2, and so on; or raises what it is told to."""

    def __init__(self, served):
        self.served = served
        self.made = {}
        self.alive = weakref.WeakSet()
        self.error = None

    def __call__(self, source, config, *, on_verified):
        if self.error:
            raise self.error
        name = source.name or source.path.name
        self.made[name] = self.made.get(name, 0) + 1
        version = Version(self.made[name], replace(self.served, name=name))
        self.alive.add(version)
        return version


@pytest.fixture
def versions(toy_served):
    return Versions(toy_served)


@pytest.fixture
async def stub_of():
    channels = []

    def make(address):
        channels.append(grpc.aio.insecure_channel(address))
        return pb_grpc.SemanticIdServiceStub(channels[-1])

    yield make
    for channel in channels:
        await channel.close()


def number_in(response):
    return int(np.frombuffer(response.tensor.data, np.uint16)[0])


async def reloaded(server, result, times=1, model="toy"):
    """Wait until that many attempts to reload have ended so."""
    value = server.server._metrics.registry.get_sample_value
    labels = {"model": model, "result": result}
    while value("semid_model_reloads_total", labels) < times:
        await asyncio.sleep(0)


TWO = (ModelSource(Path("x/toy")), ModelSource(Path("y"), "other"))


async def test_several_models_are_served_and_the_first_is_the_default(
    run_server, versions, stub_of
):
    versions.made["other"] = 6
    server = run_server(versions, models=TWO)
    stub = stub_of(await server.line("serving other, toy on "))
    assert number_in(await stub.Encode(REQUEST)) == 1
    to_other = pb.EncodeRequest(model="other", tensor=REQUEST.tensor)
    assert number_in(await stub.Encode(to_other)) == 7
    listed = await stub.ListModels(pb.ListModelsRequest())
    assert [model.name for model in listed.models] == ["other", "toy"]
    assert listed.default_model == "toy"


async def test_two_models_of_one_name_are_refused(run_server, versions):
    sources = (ModelSource(Path("x/toy")), ModelSource(Path("y/toy")))
    with pytest.raises(ConfigurationError, match=r"called the same \(toy, toy\)"):
        await run_server(versions, models=sources).task


async def test_on_sighup_every_model_is_replaced_by_a_new_version(run_server, versions, stub_of):
    server = run_server(versions, models=TWO)
    stub = stub_of(await server.line("serving other, toy on "))
    before = await stub.Encode(REQUEST)
    os.kill(os.getpid(), signal.SIGHUP)
    await reloaded(server, "ok")
    after = await stub.Encode(REQUEST)
    assert (number_in(before), number_in(after)) == (1, 2)
    assert before.fingerprint != after.fingerprint
    text = await server.metrics()
    info = [line for line in text.splitlines() if line.startswith("semid_model_info{")]
    assert len(info) == len(TWO)
    assert f"{2:064x}" in next(line for line in info if 'model="toy"' in line)
    assert 'semid_proved_rows_total{level="fast",model="toy"} 30.0' in text


async def test_a_stream_ends_on_the_version_that_it_started_on(run_server, versions, stub_of):
    server = run_server(versions, models=TWO[:1])
    stub = stub_of(await server.address())
    call = stub.EncodeStream()
    message = pb.EncodeStreamRequest(request=REQUEST)
    await call.write(message)
    assert number_in((await call.read()).response) == 1
    os.kill(os.getpid(), signal.SIGHUP)
    await reloaded(server, "ok")
    assert number_in(await stub.Encode(REQUEST)) == 2
    await call.write(message)
    assert number_in((await call.read()).response) == 1
    await call.done_writing()
    assert await call.code() == grpc.StatusCode.OK


@pytest.fixture
def uncollected():
    """Python collects no garbage by itself: it would come to that in its own time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
async def test_a_version_that_was_replaced_is_let_go_of(run_server, versions, stub_of, monkeypatch):
    monkeypatch.setattr(serving, "COLLECT_EVERY", 0.01)
    server = run_server(versions, models=TWO[:1])
    stub = stub_of(await server.address())
    for times in (1, 2):
        await stub.Encode(REQUEST)
        os.kill(os.getpid(), signal.SIGHUP)
        await reloaded(server, "ok", times)
    assert number_in(await stub.Encode(REQUEST)) == 3
    async with asyncio.timeout(20):
        while len(versions.alive) > 1:
            await asyncio.sleep(0.01)
    assert number_in(await stub.Encode(REQUEST)) == 3


@pytest.mark.usefixtures("uncollected")
async def test_a_version_that_is_needed_for_long_keeps_no_later_one(
    run_server, versions, stub_of, monkeypatch
):
    monkeypatch.setattr(serving, "COLLECT_EVERY", 0.01)
    server = run_server(versions, models=TWO[:1])
    stub = stub_of(await server.address())
    needed = list(versions.alive)
    os.kill(os.getpid(), signal.SIGHUP)
    await reloaded(server, "ok", 1)
    os.kill(os.getpid(), signal.SIGHUP)
    await reloaded(server, "ok", 2)
    async with asyncio.timeout(20):
        while len(versions.alive) > 2:
            await asyncio.sleep(0.01)
    assert {version.number for version in versions.alive} == {1, 3}
    needed.clear()
    assert number_in(await stub.Encode(REQUEST)) == 3


@pytest.mark.parametrize("error", [MalformedCheckpointError("x", "is cut short"), ValueError("?")])
async def test_a_version_that_cannot_be_used_leaves_the_old_one_in_place(
    run_server, versions, stub_of, caplog, error
):
    server = run_server(versions, models=TWO[:1])
    stub = stub_of(await server.address())
    versions.error = error
    os.kill(os.getpid(), signal.SIGHUP)
    await reloaded(server, "failed")
    assert number_in(await stub.Encode(REQUEST)) == 1
    assert "on as it was" in caplog.text
    versions.error = None
    os.kill(os.getpid(), signal.SIGHUP)
    await reloaded(server, "ok")
    assert number_in(await stub.Encode(REQUEST)) == 2


async def test_a_version_of_another_width_leaves_the_old_one_in_place(
    run_server, versions, stub_of, caplog, toy_served
):
    server = run_server(versions, models=TWO[:1])
    stub = stub_of(await server.address())
    versions.served = replace(toy_served, input_dim=7)
    os.kill(os.getpid(), signal.SIGHUP)
    await reloaded(server, "failed")
    assert number_in(await stub.Encode(REQUEST)) == 1
    told = "takes rows of 7 numbers, the one before takes 4"
    assert told in caplog.text
    assert "toy goes on as it was" in caplog.text


async def test_with_watch_a_changed_file_is_loaded_without_being_told(
    run_server, versions, stub_of, tmp_path
):
    file = tmp_path / "toy"
    file.write_text("1")
    server = run_server(versions, models=(ModelSource(file),), watch=0.01)
    stub = stub_of(await server.address())
    newer = tmp_path / "newer"
    newer.write_text("2")
    newer.replace(file)
    await reloaded(server, "ok")
    assert number_in(await stub.Encode(REQUEST)) == 2


def unreadable():
    error = MalformedCheckpointError("toy", "cannot be read: Permission denied")
    error.__cause__ = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return error


@pytest.mark.parametrize("error", [unreadable(), OSError(errno.EIO, "?"), MemoryError()])
async def test_with_watch_a_version_that_could_not_be_read_is_tried_again_less_and_less_often(
    run_server, versions, tmp_path, caplog, error
):
    file = tmp_path / "toy"
    file.write_text("1")
    server = run_server(versions, models=(ModelSource(file),), watch=0.01)
    await server.address()
    versions.error = error
    (tmp_path / "newer").write_text("2")
    (tmp_path / "newer").replace(file)
    await reloaded(server, "failed", 4)
    versions.error = None  # which leaves no trace in the state of the file
    await reloaded(server, "ok")
    for seconds in (0.01, 0.02, 0.04, 0.08):
        assert f"tried again in {seconds} s" in caplog.text
    await asyncio.sleep(0.2)
    assert versions.made == {"toy": 2}


async def test_with_watch_a_version_that_is_bad_in_itself_is_not_tried_again(
    run_server, versions, tmp_path, caplog
):
    file = tmp_path / "toy"
    file.write_text("1")
    server = run_server(versions, models=(ModelSource(file),), watch=0.01)
    await server.address()
    versions.error = MalformedCheckpointError("toy", "is cut short")
    (tmp_path / "newer").write_text("2")
    (tmp_path / "newer").replace(file)
    await reloaded(server, "failed")
    await asyncio.sleep(0.2)  # a dozen attempts
    assert caplog.text.count("toy: is cut short; toy goes on as it was\n") == 1


async def test_with_watch_a_changed_file_is_loaded_though_no_thread_was_to_be_had_for_a_while(
    run_server, versions, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(reloading, "RECOVERY", 0.01)
    file = tmp_path / "toy"
    file.write_text("1")
    server = run_server(versions, models=(ModelSource(file),), watch=0.01)
    await server.address()
    in_daemon = reloading.in_daemon

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(reloading, "in_daemon", refuse)
    while caplog.text.count("can't start new thread") < 3:
        await asyncio.sleep(0)
    (tmp_path / "newer").write_text("2")
    (tmp_path / "newer").replace(file)
    monkeypatch.setattr(reloading, "in_daemon", in_daemon)
    await reloaded(server, "ok")


async def test_with_watch_files_that_go_and_come_back_while_they_are_read_are_read_again(
    run_server, written, stub_of
):
    written.may_end.set()
    server = run_server(written, models=(ModelSource(written.file),), watch=0.01)
    stub = stub_of(await server.address())
    aside = written.file.with_name("aside")
    written.before = lambda: written.file.rename(aside)
    written.write(3)
    await reloaded(server, "failed")
    aside.rename(written.file)
    await reloaded(server, "ok")
    assert number_in(await stub.Encode(REQUEST)) == 3


def test_no_pause_between_attempts_grows_beyond_a_minute():
    model = reloading._Model(ModelSource(Path("x")), ())
    for _ in range(2000):
        model.put_off(OSError(), (), 1.5)
    assert model.pause == 60
    assert not model.is_due(())
    model.put_off(None, (), 1.5)
    assert model.pause == 0


class WrittenVersions:
    """Makes the version that its file names; reading version 2 lasts until the test says so."""

    def __init__(self, served, folder):
        self._served, self._folder = replace(served, name="toy"), folder
        self.file = folder / "toy"
        self.read = []
        self.may_end = threading.Event()
        self.before = None

    def write(self, number):
        new = self._folder / "new"
        new.write_text(str(number))
        new.replace(self.file)

    def __call__(self, source, config, *, on_verified):
        if self.before is not None:
            before, self.before = self.before, None
            before()
            raise MalformedCheckpointError(source.path, "no file and no folder there")
        number = int(source.path.read_text())
        self.read.append(number)
        if number == 2:
            self.may_end.wait(60)
        return Version(number, self._served)


@pytest.fixture
def written(toy_served, tmp_path):
    made = WrittenVersions(toy_served, tmp_path)
    made.write(1)
    yield made
    made.may_end.set()


async def test_with_watch_a_version_that_is_read_slowly_is_not_put_over_a_newer_one(
    run_server, written, stub_of
):
    server = run_server(written, models=(ModelSource(written.file),), watch=0.01)
    stub = stub_of(await server.address())
    written.write(2)
    os.kill(os.getpid(), signal.SIGHUP)
    while 2 not in written.read:
        await asyncio.sleep(0)
    written.write(3)
    await asyncio.sleep(0.2)  # it is seen meanwhile, and would be read at once
    written.may_end.set()
    await reloaded(server, "ok", 2)
    assert number_in(await stub.Encode(REQUEST)) == 3
    assert written.read == [1, 2, 3]


async def test_with_watch_what_was_read_on_sighup_is_not_read_again(run_server, written):
    server = run_server(written, models=(ModelSource(written.file),), watch=0.01)
    await server.address()
    written.may_end.set()
    written.write(2)
    os.kill(os.getpid(), signal.SIGHUP)
    await reloaded(server, "ok")
    await asyncio.sleep(0.2)  # it is seen meanwhile, and would be read
    assert written.read == [1, 2]


async def test_with_watch_a_disk_that_hangs_holds_up_no_call(
    run_server, versions, stub_of, tmp_path, hanging
):
    file = tmp_path / "toy"
    file.write_text("1")
    server = run_server(versions, models=(ModelSource(hanging.path(file)),), watch=0.01)
    stub = stub_of(await server.address())
    hanging.begin()
    await asyncio.to_thread(hanging.asked.wait, 60)
    assert number_in(await stub.Encode(REQUEST)) == 1
    assert threading.get_ident() not in hanging.who
    (tmp_path / "newer").write_text("2")
    (tmp_path / "newer").replace(file)
    hanging.end()
    await reloaded(server, "ok")
    assert number_in(await stub.Encode(REQUEST)) == 2


@pytest.fixture
def impatient(monkeypatch):
    """A new version waits for another one for a moment only."""
    monkeypatch.setattr(reloading, "SLOW_LOAD", 0.01)


@pytest.mark.usefixtures("impatient")
async def test_on_sighup_a_model_on_a_disk_that_hangs_keeps_no_other_waiting_for_long(
    run_server, versions, stub_of, hanging, caplog
):
    hung = ModelSource(hanging.path("y"), "other")
    server = run_server(versions, models=(hung, TWO[0]))
    stub = stub_of(await server.line("serving other, toy on "))
    hanging.begin()
    to_toy = pb.EncodeRequest(model="toy", tensor=REQUEST.tensor)
    for times in (1, 2):
        os.kill(os.getpid(), signal.SIGHUP)
        await reloaded(server, "ok", times)
        assert number_in(await stub.Encode(to_toy)) == 1 + times
    assert number_in(await stub.Encode(REQUEST)) == 1
    assert threading.get_ident() not in hanging.who
    assert "y: a new version of other has not been loaded within 0.01 s" in caplog.text
    hanging.end()
    await reloaded(server, "ok", model="other")
    assert number_in(await stub.Encode(REQUEST)) >= 2


async def test_on_sighup_new_versions_are_loaded_one_after_another(run_server, toy_served):
    loading, most, made = [], [], []

    def make(source, config, *, on_verified):
        name = source.name or source.path.name
        loading.append(name)
        most.append(len(loading))
        if len(made) >= len(TWO):
            time.sleep(0.05)  # the other one could begin
        loading.remove(name)
        made.append(name)
        return Version(1, replace(toy_served, name=name))

    server = run_server(make, models=TWO)
    await server.line("serving other, toy on ")
    os.kill(os.getpid(), signal.SIGHUP)
    for name in ("toy", "other"):
        await reloaded(server, "ok", model=name)
    assert max(most) == 1


class SlowReload:
    """A server that is told to end while it reads a new version, which lasts for 30 s at most."""

    def __init__(self, versions, **settings):
        self._versions = versions
        self._settings = {"models": TWO[:1], "host": "127.0.0.1", "port": 0, "metrics": False}
        self._settings |= settings
        self._began, self.may_end, self.ended = (threading.Event() for _ in range(3))

    def __call__(self, source, config, *, on_verified):
        if self._versions.made:
            self._began.set()
            self.may_end.wait(30)
            self.ended.set()
        return self._versions(source, config, on_verified=on_verified)

    async def run(self):
        """Return the task of the server, once it has been told to end."""
        serves = asyncio.Event()
        config = ServeConfig(**self._settings)
        server = Server(config, announce=lambda line: serves.set(), make_backend=self)
        running = asyncio.create_task(server.run())
        await serves.wait()
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.to_thread(self._began.wait, 60)
        os.kill(os.getpid(), signal.SIGTERM)
        return running


def test_a_reload_that_hangs_does_not_keep_the_process_from_ending(versions, caplog):
    reload = SlowReload(versions, grace=0.2)

    async def run():
        await (await reload.run())

    asyncio.run(run())  # returns once the threads have ended for which a process waits
    try:
        assert not reload.ended.is_set()
        assert "ended with a new version still being read" in caplog.text
    finally:
        reload.may_end.set()


async def test_a_reload_that_ends_within_the_grace_period_is_waited_for(versions):
    reload = SlowReload(versions, grace=30)
    running = await reload.run()
    await asyncio.wait({running}, timeout=0.5)  # all that it would take else
    assert not running.done()
    reload.may_end.set()
    await running
    assert reload.ended.is_set()


class StaleFolder(type(Path())):
    """A folder on a disk that fails."""

    def stat(self, **_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_files_on_a_disk_that_fails_have_no_stamp():
    assert stamp(StaleFolder("checkpoint")) is None


def test_a_stamp_tells_versions_of_a_folder_apart(tmp_path):
    folder = tmp_path / "checkpoint"
    assert stamp(folder) is None
    folder.mkdir()
    assert stamp(folder) is None  # not written yet
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("1")
    first = stamp(folder)
    assert first is not None
    assert stamp(folder) == first
    replaced = tmp_path / "new"
    replaced.write_text("2")
    replaced.replace(folder / "config.json")
    assert stamp(folder) != first
