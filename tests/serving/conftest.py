"""Real servers: one at a time in each test process, always stopped, their log's last lines shown where a test fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from examples.fetch_gemma import DEFAULT_OUT, fetch
from examples.server import Server, launch
from examples.tiny_models import make_model
from tests.serving.preloaded import Preloaded

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "def add(a, b):\n    return",
    "Water boils at a temperature of",
    "1, 2, 3, 4, 5,",
    "The opposite of hot is",
    "Dear Sir or Madam,\n",
    "In the beginning God created",
)
TOKENS = 32


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.serving)


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M, fetched on first use, by one test process where there are several."""
    DEFAULT_OUT.parent.mkdir(exist_ok=True)
    with FileLock(DEFAULT_OUT.with_suffix(".lock")):
        fetch(DEFAULT_OUT)
    return DEFAULT_OUT.resolve()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("llama")`: folder of a tiny random model, made once."""
    root, made = tmp_path_factory.mktemp("tiny"), {}

    def model(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, root)
        return made[name]

    return model


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preloaded]:
    """What launches servers quickly."""
    forking = Preloaded(tmp_path_factory.mktemp("preloaded") / "log")
    yield forking
    forking.close()


@pytest.fixture
def serve(tmp_path: Path, preloaded: Preloaded) -> Callable[..., Any]:
    """`with serve(model, "--quantization", "amd_mx") as server:`; with `command_line=True` by a new Python."""

    @contextmanager
    def started(
        model: Path, *flags: str, env: dict[str, str] | None = None, command_line: bool = False
    ) -> Iterator[Server]:
        how = launch if command_line else preloaded
        server = Server.start(model, tmp_path / "server.log", flags=flags, env=env, launch=how)
        try:
            yield server.wait()
        except BaseException:
            print("\n".join(server.log_text().splitlines()[-40:]))
            raise
        finally:
            server.kill()

    return started


@pytest.fixture(scope="session")
def prompts() -> Callable[[Path], list[list[int]]]:
    """Token ids of `PROMPTS` by a model's own tokenizer."""

    @cache
    def ids(model: Path) -> list[list[int]]:
        from sglang_amd_quant.integration.cpu_platform import declare_torchvision_ops

        declare_torchvision_ops()
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        return [tokenizer(text).input_ids for text in PROMPTS]

    return ids


@pytest.fixture(scope="session")
def generate() -> Callable[..., list[list[int]]]:
    """Greedy ids after each prompt, `TOKENS` of them. Usually one prompt at a time: how a server batches several is a
    matter of timing, and the batch's size decides the order of fp32 sums. `at_once` sends them all together."""

    def ids(server: Server, prompts: Sequence[Sequence[int]], at_once: bool = False) -> list[list[int]]:
        sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        bodies = [list(prompts)] if at_once else [[p] for p in prompts]
        replies = [server.post("/generate", {"input_ids": body, "sampling_params": sampling}) for body in bodies]
        outputs = [one["output_ids"] for reply in replies for one in reply]
        assert all(len(output) == TOKENS for output in outputs)
        return outputs

    return ids


@pytest.fixture(scope="session")
def clients() -> type[Clients]:
    return Clients


class Clients:
    """Programs that people use with a server."""

    @staticmethod
    def stream_a_chat(server: Server) -> None:
        """The OpenAI client, streaming."""
        import openai

        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        question = [{"role": "user", "content": "Name three colours."}]
        stream = client.chat.completions.create(
            model="default", messages=question, max_tokens=16, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert len(pieces) > 4
        assert "".join(pieces).strip()

    @staticmethod
    def bench_serving(server: Server, model: Path, folder: Path) -> None:
        """SGLang's own load generator, offline."""
        command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--dataset-name", "random-ids"]
        command += ["--host", "127.0.0.1", "--port", str(server.port), "--model", str(model), "--tokenizer", str(model)]
        command += ["--num-prompts", "8", "--random-input-len", "32", "--random-output-len", "16"]
        command += ["--random-range-ratio", "1.0", "--max-concurrency", "4", "--output-file", "bench.jsonl"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        result = json.loads((folder / "bench.jsonl").read_text())
        assert result["completed"] == 8
        assert result["total_output_tokens"] == 8 * 16
