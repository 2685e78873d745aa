"""Real servers: one at a time, always stopped, their log's last lines shown where a test fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.fetch_gemma import DEFAULT_OUT, fetch
from examples.server import Server
from examples.tiny_models import make_model

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
    """Gemma 3 270M, fetched on first use."""
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


@pytest.fixture
def serve(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`with serve(model, "--quantization", "amd_mx") as server:`"""

    @contextmanager
    def started(model: Path, *flags: str, env: dict[str, str] | None = None) -> Iterator[Server]:
        server = Server.start(model, tmp_path / "server.log", flags=flags, env=env)
        try:
            yield server.wait()
        except BaseException:
            print("\n".join(server.log_text().splitlines()[-40:]))
            raise
        finally:
            server.stop()

    return started


@pytest.fixture(scope="session")
def prompts() -> Callable[[Path], list[list[int]]]:
    """Token ids of `PROMPTS` by a model's own tokenizer."""

    def ids(model: Path) -> list[list[int]]:
        from bench.hf_model import declare_torchvision_ops

        declare_torchvision_ops()
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        return [tokenizer(text).input_ids for text in PROMPTS]

    return ids


@pytest.fixture(scope="session")
def generate() -> Callable[[Server, Sequence[Sequence[int]]], list[list[int]]]:
    """Greedy ids after each prompt, `TOKENS` of them. One prompt at a time: how a server batches several is a matter of
    timing, and the batch's size decides the order of fp32 sums."""

    def ids(server: Server, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        replies = [server.post("/generate", {"input_ids": list(p), "sampling_params": sampling}) for p in prompts]
        outputs = [reply["output_ids"] for reply in replies]
        assert all(len(output) == TOKENS for output in outputs)
        return outputs

    return ids
