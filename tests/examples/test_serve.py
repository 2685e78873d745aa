"""`make serve` and `make stop`, and the server object behind them, on a stand-in for SGLang."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from examples import serve
from examples.server import Server, ServerError, free_port, model_info, port_taken, why

ROOT = Path(__file__).parents[2]


def gone(process, seconds=5):
    """Whether a killed process ends in time; nobody may be there to reap it."""
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_serves_asks_and_stops(stub, capsys):
    port = free_port()
    arguments = ["--model", "model", "--scheme", "mxfp4", "--port", str(port)]
    try:
        assert serve.main(arguments) == 0
        text = capsys.readouterr().out
        assert f"starting SGLang: {stub / 'model'} with --quantization amd_mxfp4" in text
        assert "A: What is the capital of France? Paris." in text
        assert re.search(r"decodes \d+\.\d tokens/s", text)
        assert text.endswith(f"stop it with: make stop PORT={port}\n")
        child = psutil.Process(int(re.search(r"child (\d+)", (serve.STATE / f"{port}.log").read_text())[1]))

        assert serve.main(arguments) == 0  # a second call finds it running
        assert "already serving" in capsys.readouterr().out
        assert serve.main(["--model", "model", "--scheme", "w4a8", "--port", str(port)]) == 2
        assert f"port {port}: already serves" in capsys.readouterr().err
    finally:
        assert serve.main(["--stop", "--port", str(port)]) == 0
    assert not port_taken(port)
    assert gone(child)
    assert serve.main(["--stop", "--port", str(port)]) == 1


def test_a_server_that_dies_is_quoted_and_leaves_no_state(stub, capsys):
    shutil.copytree("model", "refused")
    port = free_port()
    assert serve.main(["--model", "refused", "--port", str(port)]) == 2
    assert "did not start (scheme x: unknown, use another)" in capsys.readouterr().err
    assert not serve.state_file(port).exists()


def test_a_port_that_another_program_holds(stub, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["--model", "model", "--port", str(port)]) == 2
    assert f"port {port}: taken by another program" in capsys.readouterr().err


def test_a_port_that_another_sglang_holds(stub, capsys):
    server = Server.start("model", Path("other.log")).wait()
    try:
        assert model_info(server.port) == {"model_path": "model"}
        assert serve.main(["--model", "model", "--port", str(server.port)]) == 2
        assert "taken by another SGLang server (model)" in capsys.readouterr().err
    finally:
        server.stop()
    server.stop()  # twice does nothing


def test_a_port_that_is_taken_before_the_server_binds_it(stub):
    server = Server.start("model", Path("beaten.log")).wait()
    with server.log.open("a") as log:  # as uvicorn says it, of a server that goes on
        log.write(
            "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use\n"
        )
    server.answers = lambda: False
    with pytest.raises(ServerError, match=rf"port {server.port}: another program has taken it meanwhile"):
        server.wait()
    assert server.process.poll() is not None


def test_free_ports_are_given_to_no_connection():
    assert all(10000 <= free_port() < 20000 for _ in range(50))


def test_a_server_that_is_not_ready_in_time(stub):
    server = Server.start("model", Path("late.log"))
    with pytest.raises(ServerError, match=r"not ready after 0 s"):
        server.wait(timeout=0)
    assert server.process.poll() is not None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--scheme", "fp3"], "scheme 'fp3': unknown; use one of mxfp4, mxfp8, w4a8, w4a16"),
        (["--model", "./nowhere"], "model ./nowhere: no directory with a config.json"),
        (["--model", "sglang"], "model sglang: no directory with a config.json"),
    ],
)
def test_refused_in_one_line(stub, capsys, arguments, reason):
    assert serve.main([*arguments, "--port", str(free_port())]) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error
    assert "\n" not in error


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_ports_that_are_none(capsys, port):
    with pytest.raises(SystemExit):
        serve.main(["--port", port])
    assert f"{port!r}: write a port from 1 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("a\nsglang_amd_quant.errors.ShapeError: layer x: K=33\nValueError: later", "layer x: K=33"),
        ("Traceback\nRuntimeError: first\nOSError: last\nbye", "OSError: last"),
        ("launch_server.py: error: argument --foo: no", "error: argument --foo: no"),
        ("only words", "only words"),
        ("", "the log is empty"),
    ],
)
def test_why(log, line):
    assert why(log) == line


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (["serve", "MODEL=/m", "SCHEME=w4a8", "PORT=31000"], "examples.serve --port 31000 --model /m --scheme w4a8"),
        (["stop", "PORT=31000"], "examples.serve --stop --port 31000"),
    ],
    ids=["serve", "stop"],
)
def test_make_passes_its_variables_on(target, wanted):
    done = subprocess.run(["make", "-n", *target], cwd=ROOT, capture_output=True, text=True, check=True)
    assert wanted in done.stdout
