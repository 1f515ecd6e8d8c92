"""docker/Dockerfile as read: its stages, and the environment that it sets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

DOCKER = Path(__file__).parents[2] / "docker"


class Stage(NamedTuple):
    """One ``FROM`` and what follows it: comments dropped, continued lines joined."""

    base: str
    steps: list[tuple[str, str]]

    def all(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]

    def the(self, instruction: str) -> str:
        (rest,) = self.all(instruction)
        return rest


def _read() -> dict[str, Stage]:
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found[name] = Stage(base, [])
        elif instruction:
            current.steps.append((instruction, rest.strip()))
    return found


STAGES = _read()
RUNTIME = STAGES["runtime"]


def settings(stage: Stage, path: str) -> dict[str, str]:
    pairs = [pair for line in stage.all("ENV") for pair in line.split()]
    return {
        name: value.replace("$PATH", path) for name, value in (pair.split("=", 1) for pair in pairs)
    }
