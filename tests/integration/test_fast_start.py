"""The fast start of a CPU server: what is hooked, when processes are forked, and that a tokenizer is read once.

Real servers start both ways in tests/serving.
"""

from __future__ import annotations

import gc
import multiprocessing
import pkgutil
from types import SimpleNamespace

import pytest

from sglang_amd_quant.integration import cpu_platform, fast_start


@pytest.fixture
def started(monkeypatch, sglang_context):
    """`started(dp_size=1)`: the start methods and tokenizers that launching schedulers asks for."""
    from sglang.srt import runtime_context
    from sglang.srt.utils.hf_transformers import tokenizer

    def launch(dp_size, skip_tokenizer_init):
        asked = []
        serving = SimpleNamespace(
            skip_tokenizer_init=skip_tokenizer_init,
            tokenizer_path="t",
            tokenizer_mode="auto",
            tokenizer_backend="huggingface",
        )
        monkeypatch.setattr(runtime_context, "get_serving", lambda: serving)
        monkeypatch.setattr(tokenizer, "get_tokenizer", lambda path, **kwargs: asked.append(path))
        monkeypatch.setattr(multiprocessing, "set_start_method", lambda method, force: asked.append(method))
        fast_start._before_launch(object, SimpleNamespace(dp_size=dp_size))
        gc.unfreeze()
        return asked

    return launch


@pytest.mark.parametrize(
    ("dp_size", "skip_tokenizer_init", "asked"),
    [(1, False, ["t", "fork"]), (1, True, ["fork"]), (2, False, [])],
    ids=["reads and forks", "without tokenizer", "data parallel"],
)
def test_what_a_launch_does_first(started, dp_size, skip_tokenizer_init, asked):
    assert started(dp_size, skip_tokenizer_init) == asked


def test_a_tokenizer_is_read_once_for_the_same_arguments(monkeypatch):
    monkeypatch.setattr(fast_start, "_tokenizers", {})
    collecting = []

    def read(*args, **kwargs):
        collecting.append(gc.isenabled())
        return object()

    first = fast_start._read_once(read, "a", mode="auto", revision=None)
    assert fast_start._read_once(read, "a", revision=None, mode="auto") is first
    assert fast_start._read_once(read, "b", mode="auto") is not first
    assert collecting == [False, False]
    with pytest.raises(ZeroDivisionError):
        fast_start._read_once(lambda: 1 / 0)
    assert gc.isenabled()


def test_only_on_request(monkeypatch, sglang_context):
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_amd_quant.integration.cpu_platform_class import AmdMxCpuPlatform

    targets = {fast_start.LAUNCH, fast_start.TOKENIZER}
    hooks = {}
    monkeypatch.setattr(HookRegistry, "register", lambda target, hook, kind: hooks.update({target: hook}))
    monkeypatch.delenv(fast_start.REQUEST, raising=False)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    cpu_platform.activate()
    AmdMxCpuPlatform()
    assert hooks == {}
    assert "TORCHDYNAMO_DISABLE" not in cpu_platform.os.environ
    monkeypatch.setenv(fast_start.REQUEST, "1")
    cpu_platform.activate()
    AmdMxCpuPlatform()
    assert hooks.keys() == targets
    assert cpu_platform.os.environ["TORCHDYNAMO_DISABLE"] == "1"
    assert all(callable(pkgutil.resolve_name(target)) for target in targets)  # SGLang only logs what it does not find
