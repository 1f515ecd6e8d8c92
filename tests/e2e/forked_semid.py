"""The `semid` command in forks of one process that has imported it: a start costs nothing.

Not a test: `conftest.py` starts it for commands that are to fail. Each line of its input is a JSON
object: ``arguments``, ``env``, ``cwd``, and the files ``stdout`` and ``stderr`` to write to. It
answers with the command's exit status, as `subprocess` has it.
"""

from __future__ import annotations

import json
import os
import sys

import semid_client.cli
import semid_server.cli.serve
import semid_server.serving.server  # noqa: F401 - what `semid serve` imports when it is called


def become(command) -> None:
    """Be the command: its own output, folder, environment and arguments."""
    for number, name in ((0, os.devnull), (1, command["stdout"]), (2, command["stderr"])):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    sys.argv = ["semid", *command["arguments"]]
    semid_client.cli.main()


def main() -> None:
    while line := sys.stdin.readline():
        command = json.loads(line)
        pid = os.fork()
        if not pid:
            become(command)
            return
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)  # noqa: T201 - read by the test


if __name__ == "__main__":
    main()
