"""A quick start on a CPU: one process imports SGLang and reads the tokenizer, and the others are forked from it.

SGLang spawns its scheduler and its detokenizer, as CUDA demands. Each then imports SGLang, most of what a start costs,
and reads the tokenizer, the scheduler even twice. A CPU needs none of that. But who forks must not have worked with
threads before, which holds for `python -m sglang.launch_server` and not for every program that builds an `Engine`; and
OpenMP reads `OMP_WAIT_POLICY` before the platform can set it. So all this happens on request only (docs/serving.md).
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

REQUEST = "SGLANG_AMD_MX_FAST_START"

LAUNCH = "sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes"
TOKENIZER = "sglang.srt.utils.hf_transformers.tokenizer.get_tokenizer"

logger = logging.getLogger(__name__)

_tokenizers: dict[str, Any] = {}


def requested() -> bool:
    """Whether the environment asks for a quick start."""
    return os.environ.get(REQUEST) == "1"


def prepare() -> None:
    """Called before SGLang defines its functions. On this platform what it compiles runs in eager mode, so tracing them
    would only take seconds at the first requests."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def register() -> None:
    """Register the hooks with SGLang, which applies them when it loads its plugins."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(LAUNCH, _before_launch, HookType.BEFORE)
    HookRegistry.register(TOKENIZER, _read_once, HookType.AROUND)


def _before_launch(engine: type, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Fork what SGLang is about to start. Data parallelism starts schedulers from threads, and still spawns them."""
    if server_args.dp_size > 1:
        return
    from sglang.srt.runtime_context import get_model, get_serving
    from sglang.srt.utils.hf_transformers import tokenizer

    if not get_serving().skip_tokenizer_init:
        tokenizer.get_tokenizer(  # as all processes call it
            get_serving().tokenizer_path,
            tokenizer_mode=get_serving().tokenizer_mode,
            trust_remote_code=get_model().trust_remote_code,
            revision=get_model().revision,
            tokenizer_backend=get_serving().tokenizer_backend,
        )
    logger.info("fast start: forking SGLang's processes")
    gc.freeze()  # what is here stays: collecting it again in every process would also copy its pages
    multiprocessing.set_start_method("fork", force=True)


def _read_once(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The same tokenizer for the same arguments. Its pieces come as a million small objects, all of them to be kept,
    and the garbage collector would walk through them and through all of SGLang again and again."""
    key = repr((args, sorted(kwargs.items())))
    if key not in _tokenizers:
        gc.disable()
        try:
            _tokenizers[key] = original(*args, **kwargs)
        finally:
            gc.enable()
    return _tokenizers[key]
