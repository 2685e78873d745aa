"""Servers forked from one process that has imported SGLang, which otherwise costs each of them 15 s of CPU time.

Run as a program, this module imports SGLang, then reads an order a line (JSON) and answers with a process id. A forked
process does what `python -m sglang.launch_server` does, by running that module, with the arguments, environment and log
of its order; the fast start (docs/serving.md) then forks SGLang's own processes from it.
"""

from __future__ import annotations

import gc
import json
import os
import random
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from examples.server import FAST_START

MODULE = "sglang.launch_server"


class Forked(psutil.Process):
    """A process that its parent reaps, with the methods of a `Popen` that `examples.server.Server` calls."""

    def poll(self) -> int | None:
        return None if self.is_running() else -1


class Preloaded:
    """Launches servers, in place of `examples.server.launch`."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.serving.preloaded"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                cwd=Path(__file__).parents[2],
                env={**FAST_START, **os.environ},
                text=True,
            )

    def __call__(self, command: Sequence[str], log: Path, env: dict[str, str]) -> Forked:
        start = list(command).index(MODULE) + 1
        order = json.dumps({"arguments": command[start:], "log": str(log.resolve()), "env": env})
        assert self.process.stdin
        assert self.process.stdout
        print(order, file=self.process.stdin, flush=True)
        return Forked(int(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()  # it ends with its input


def main() -> None:
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server
    import sglang.srt.models.registry

    sglang.launch_server.load_plugins()
    del sys.modules[MODULE]  # or runpy would warn that it runs a second time
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave no zombies
    for line in sys.stdin:
        order = json.loads(line)
        Path(order["log"]).write_bytes(b"")
        if child := os.fork():
            print(child, flush=True)
        else:
            become(**order)
            return


def become(arguments: list[str], log: str, env: dict[str, str]) -> None:
    """Be `python -m sglang.launch_server ARGUMENTS`, in a session of its own, and end with the process that forked it,
    which ends with the tests, however they end."""
    from sglang.srt.utils import kill_itself_when_parent_died

    kill_itself_when_parent_died()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for file, flags, descriptors in ((os.devnull, os.O_RDONLY, [0]), (log, os.O_WRONLY, [1, 2])):
        opened = os.open(file, flags)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(env)
    random.seed()  # two servers must not choose the same ports
    sys.argv[1:] = arguments
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
