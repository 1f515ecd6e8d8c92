"""New versions of models, while they are served: when they are read, and how often in vain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from semid_server.errors import ConfigurationError, DeviceError, SemidError
from semid_server.serving.disk import in_daemon, patiently

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from semid_server.serving.config import ModelSource

Stamp = tuple[tuple[int, int, int], ...] | None

logger = logging.getLogger(__name__)

SLOW_LOAD = 15.0
"""Seconds for which other new versions wait for one that is being loaded."""

MAX_PAUSE = 60.0
"""Seconds from one attempt to the next, at most, to read a new version that cannot be read."""

RECOVERY = 5.0
"""Seconds until new versions are looked for again after something that nobody foresaw."""

CHECKPOINT_FILES = ("config.json", "model.safetensors")


class Reloads:
    """Has the versions of models replaced when told to, and when their files change.

    Parameters
    ----------
    sources : sequence of ModelSource
        What is served, each by its name.
    stamps : sequence of Stamp
        The state of their files when they were read.
    told : asyncio.Event
        Set when all are to be replaced, changed or not.
    watch : float
        Seconds from one look at the files to the next; 0 for none.
    replace : callable
        Loads what is at the path of a source, and puts it in the place of the version before.
        Whatever it raises is why that cannot be used; the one before goes on.
    count : callable
        Told the name of each model that was to be replaced, and ``ok`` or ``failed``.
    """

    def __init__(
        self,
        sources: Sequence[ModelSource],
        stamps: Sequence[Stamp],
        *,
        told: asyncio.Event,
        watch: float,
        replace: Callable[[ModelSource], Awaitable[None]],
        count: Callable[[str, str], None],
    ) -> None:
        self._models = [_Model(*both) for both in zip(sources, stamps, strict=True)]
        self._told, self._watch, self._load, self._count = told, watch, replace, count
        self._turns = _Turns()

    async def run(self) -> None:
        """Do so until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_go_on(self._tell))
            for model in self._models:
                tasks.create_task(_go_on(self._reload_when_told, model))
                if self._watch:
                    tasks.create_task(_go_on(self._reload_on_change, model))

    async def _tell(self) -> None:
        """Pass on to each model that all are to be reloaded."""
        while True:
            await self._told.wait()
            self._told.clear()
            for model in self._models:
                model.told.set()

    async def _reload_when_told(self, model: _Model) -> None:
        while True:
            await model.told.wait()
            model.told.clear()
            async with model.reloading:
                await self._replace(model)

    async def _reload_on_change(self, model: _Model) -> None:
        seen = model.read
        while True:
            await asyncio.sleep(self._watch)
            now = await patiently(
                in_daemon(stamp, model.source.path),
                where=model.source.path,
                meanwhile=f"no new version of {model.source.name} is seen",
            )
            async with model.reloading:
                # Twice the same: whoever writes the files has finished.
                if now is not None and now == seen and model.is_due(now):
                    await self._replace(model)
            seen = now

    async def _replace(self, model: _Model) -> None:
        """Have a version replaced; the caller holds `_Model.reloading`."""
        source = model.source
        async with self._turns.turn(f"{source.path}: a new version of {source.name}"):
            # Looked at before they are read: what changes from here on is a new version.
            model.read = await in_daemon(stamp, source.path)
            try:
                await self._load(source)
            except Exception as error:
                model.put_off(error, await in_daemon(stamp, source.path), self._watch)
                self._count(str(source.name), "failed")
                again = f"; tried again in {model.pause:g} s" if model.pause else ""
                if isinstance(error, SemidError):
                    logger.error("%s; %s goes on as it was%s", error, source.name, again)  # noqa: TRY400 - no bug
                else:
                    logger.exception(
                        "%s could not be reloaded, and goes on as it was%s", source.name, again
                    )
                return
        model.put_off(None, model.read, 0)
        self._count(str(source.name), "ok")
        logger.info("%s: new version of %s loaded", source.path, source.name)


@dataclass(slots=True, eq=False)
class _Model:
    """One model that is served, while the server serves.

    Attributes
    ----------
    source : ModelSource
        Where its files are, and its name.
    read : Stamp
        The state of the files when they were read last, None if they are to be read in any state.
    pause : float
        Seconds from the last attempt to read them to the next, if their state stays the same: 0 for
        no next one.
    reloading : asyncio.Lock
        Held while they are read: an older version must not be ready after a newer one.
    told : asyncio.Event
        Set when they are to be read, changed or not.
    """

    source: ModelSource
    read: Stamp
    reloading: asyncio.Lock = field(default_factory=asyncio.Lock)
    told: asyncio.Event = field(default_factory=asyncio.Event)
    pause: float = 0.0
    _again: float = math.inf

    def is_due(self, now: Stamp) -> bool:
        """Whether files that are in this state now are to be read."""
        return now != self.read or time.monotonic() >= self._again

    def put_off(self, error: Exception | None, now: Stamp, pause: float) -> None:
        """Note how an attempt ended, and whether there is another while the files stay the same.

        What the files hold is no better the next time. What was in the way of reading them may go
        and leave no trace, and is tried again, after longer and longer.

        Parameters
        ----------
        error : Exception or None
            Why the version could not be used.
        now : Stamp
            The state of the files after the attempt.
        pause : float
            Seconds to the first of further attempts; 0 for none.
        """
        if error is None or not pause or lies_in_the_files(error):
            self.pause, self._again = 0.0, math.inf
        else:
            longest = max(pause, MAX_PAUSE)
            self.pause = min(2 * self.pause, longest) if self.pause else pause
            self._again = time.monotonic() + self.pause
        if now != self.read:  # gone meanwhile, perhaps to come back as they were
            self.read = None


async def _go_on(forever: Callable[..., Awaitable[None]], *args: _Model) -> None:
    """Do what does not end, and again where an error ended it: no thread to be had, say."""
    while True:
        try:
            await forever(*args)
        except Exception:
            logger.exception("new versions are looked for again in %g s", RECOVERY)
            await asyncio.sleep(RECOVERY)


class _Turns:
    """Lets new versions be loaded one after another, so that there need be memory for one alone.

    One that takes long, behind a disk that hangs, say, goes on, and the next one begins.
    """

    def __init__(self) -> None:
        self._free = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def turn(self, what: str) -> AsyncIterator[None]:
        """Wait for a turn and have it; ``what`` begins the log's line about one that takes long."""
        await self._free.acquire()
        has = contextlib.ExitStack()
        has.callback(self._free.release)

        def pass_on() -> None:
            logger.warning(
                "%s has not been loaded within %g s: the one before serves on, and other models' "
                "are read meanwhile",
                *(what, SLOW_LOAD),
            )
            has.close()

        passing = asyncio.get_running_loop().call_later(SLOW_LOAD, pass_on)
        try:
            yield
        finally:
            passing.cancel()
            has.close()


def lies_in_the_files(error: BaseException) -> bool:
    """Whether a version was refused for what its files hold, not because they could not be read."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, OSError):
            return False
        reason = reason.__cause__ or reason.__context__
    return isinstance(error, SemidError) and not isinstance(error, DeviceError)


def check_width(width: int, before: int) -> None:
    """Refuse a new version that takes rows of another width than the one before."""
    if width != before:
        raise ConfigurationError(
            f"the new version takes rows of {width} numbers, the one before takes "
            f"{before}: its callers would be refused, or given rows of another width. "
            "Serve it under another name"
        )


def stamp(path: Path) -> Stamp:
    """Return what tells one version of a checkpoint's files from the next; None if there is none.

    Links are followed, so that a folder that is switched by a link is seen to change.
    """
    try:
        files = [path / name for name in CHECKPOINT_FILES] if path.is_dir() else [path]
        return tuple(
            (status.st_mtime_ns, status.st_size, status.st_ino)
            for status in (file.stat() for file in files)
        )
    # In the middle of being replaced, or gone, or a disk that fails, which even `is_dir` may tell
    # so: the version in memory serves on.
    except OSError:
        return None
