"""One SGLang server as an object: start it in a process group of its own, wait until it answers, stop it cleanly.

`examples.serve` and the serving tests both go through here.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sglang_amd_quant.errors import AmdMxError

HOST = "127.0.0.1"
STOP_TIMEOUT = 20.0
"""Seconds a server gets to finish after SIGTERM before its process group is killed."""

FAST_START = {"SGLANG_AMD_MX_FAST_START": "1", "OMP_WAIT_POLICY": "passive"}
"""What makes a CPU start in a third of the time (docs/serving.md); no other platform looks at it."""

STAGES = (
    ("server_args=", "starting the scheduler"),
    ("Load weight begin", "loading and quantizing weights"),
    ("Load weight end", "allocating the KV cache"),
    ("Application startup complete", "warming up"),
)
"""Text in SGLang's log -> what the server does from there on."""

OUR_ERROR = re.compile(r"sglang_amd_quant\.errors\.\w+: (.+)")
ANY_ERROR = re.compile(r"^(?:\S+: )?((?:[\w.]*(?:Error|Exception|Interrupt)|error): .+)")


BIND_ERROR = "error while attempting to bind on address"


class ServerError(AmdMxError, RuntimeError):
    """A server that did not start, died or does not answer."""


def free_port() -> int:
    """A TCP port that nobody listens on at the moment.

    A server binds it seconds later, so it is none of those that Linux gives to any connection meanwhile (from 32768
    on), nor of those where SGLang looks for its own (from 22000 on).
    """
    for port in random.SystemRandom().sample(range(10000, 20000), 100):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind((HOST, port))
            return port
    raise ServerError("ports 10000 to 19999", "100 of them are taken", "name one")


def port_taken(port: int) -> bool:
    """Whether somebody listens on the port."""
    with socket.socket() as sock:
        return sock.connect_ex((HOST, port)) == 0


def why(log: str) -> str:
    """The one line of a dead server's log that says why: our own error, else the last exception, else the last line."""
    ours = OUR_ERROR.search(log)
    if ours:
        return ours[1]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [match[1] for line in lines if (match := ANY_ERROR.match(line))]
    return (errors or lines or ["the log is empty"])[-1]


def terminate(process: psutil.Process | None) -> None:
    """Ask a server's main process to go, and kill what is left of its process group.

    The main process goes first: it stops the others, while a child that dies alone looks like a crash to SGLang.
    """
    if process is None or not process.is_running():
        return
    group = process.pid  # every server is started as the leader of its own group
    try:
        process.terminate()
        process.wait(STOP_TIMEOUT)
    except psutil.NoSuchProcess:
        pass  # gone between the question and the signal, which is what was wanted
    except psutil.TimeoutExpired:
        process.kill()
    with contextlib.suppress(ProcessLookupError):  # no member of the group is left
        os.killpg(group, signal.SIGKILL)


def launch(command: Sequence[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Run the command with this environment, its output in the log, as the leader of a process group of its own."""
    with log.open("wb") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )


@dataclass
class Server:
    """A running `sglang.launch_server`.

    Attributes:
        port: where it listens, on this machine only.
        log: its standard output and error.
        process: the main process, leader of the group that all its children belong to.
    """

    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls,
        model: str | Path,
        log: Path,
        port: int | None = None,
        flags: Sequence[str] = (),
        env: dict[str, str] | None = None,
        launch: Callable[..., Any] = launch,
    ) -> Server:
        """Launch `python -m sglang.launch_server --model-path MODEL FLAGS...`; returns at once.

        Args:
            model: directory, or name on a model hub.
            log: file for the server's output; replaced.
            port: None picks a free one.
            flags: more arguments, such as `--quantization amd_mxfp4`.
            env: changes to this process's environment.
            launch: what runs the command; the tests have another.
        """
        port = free_port() if port is None else port
        offline = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        command += ["--host", HOST, "--port", str(port), "--sleep-on-idle", *flags]
        log.parent.mkdir(parents=True, exist_ok=True)
        return cls(port, log, launch(command, log, {**FAST_START, **os.environ, **offline, **(env or {})}))

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = 300.0, progress: Callable[[str], None] = lambda stage: None) -> Server:
        """Return once the server answers.

        Args:
            timeout: seconds.
            progress: called twice a second with what the server is doing.

        Raises:
            ServerError: it died, or does not answer in time; the message quotes its log.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError("the server", f"did not start ({why(self.log_text())})", f"see {self.log}")
            text = self.log_text()
            progress(next((stage for mark, stage in reversed(STAGES) if mark in text), "importing SGLang"))
            if "fired up and ready to roll" in text and self.answers():
                return self
            if BIND_ERROR in text:  # after which SGLang goes on without serving anybody
                self.stop()
                raise ServerError(f"port {self.port}", "another program has taken it meanwhile", "name another one")
            time.sleep(0.5)
        last = (self.log_text().splitlines() or ["nothing"])[-1]
        self.stop()
        raise ServerError("the server", f"not ready after {timeout:.0f} s (last said: {last})", f"see {self.log}")

    def answers(self) -> bool:
        """Whether `/model_info` does; `/health` would generate a token each time."""
        return model_info(self.port) is not None

    def post(self, path: str, body: dict[str, Any], timeout: float = 300.0) -> Any:
        """POST JSON, get JSON."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.load(reply)

    def kill(self) -> None:
        """End all its processes at once, with nobody to finish anything, which `stop` gives them seconds for."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Stop it and all its processes; does nothing if it is gone."""
        if self.process.poll() is None:
            terminate(psutil.Process(self.process.pid))
        self.process.wait()


def model_info(port: int) -> dict[str, Any] | None:
    """What the SGLang server on the port says of its model, or None if there is none that answers."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/model_info", timeout=2) as reply:
            return dict(json.load(reply))
    except (OSError, ValueError, urllib.error.URLError):
        return None
