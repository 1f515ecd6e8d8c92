"""`semid serve` whose reloads never end: they compute in torch for ever, and so may the first load.

Not a test: started by `test_faults.py` as a process of its own, with the arguments of `semid
serve`.
"""

from __future__ import annotations

import os

import torch

from semid_server.cli.serve import serve
from semid_server.serving import server


class NeverTwice:
    """Makes what runs the batches, but once."""

    made = "SEMID_TEST_NEVER" in os.environ

    def __call__(self, *args, **settings):
        if self.made:
            print("loading", flush=True)  # noqa: T201 - the test waits for it
            matrix = torch.eye(64)
            while True:
                matrix = torch.tanh(matrix @ matrix)
        self.made = True
        return server.Backend(*args, **settings)


# In the children of --processes too, which import this file.
server.Server.__init__.__kwdefaults__["make_backend"] = NeverTwice()

if __name__ == "__main__":
    serve()
