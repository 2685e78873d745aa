"""Tiny models served on the accelerator give the reference's greedy token ids; tests/serving does it on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.server import Server
from sglang_amd_quant.recipe import Recipe

pytest.importorskip("sglang")

FLAGS = (
    *("--attention-backend", "triton", "--sampling-backend", "pytorch", "--bf16-gemm-backend", "torch"),
    *("--mem-fraction-static", "0.5", "--cuda-graph-max-bs-decode", "4", "--cuda-graph-backend-prefill", "disabled"),
    "--disable-radix-cache",
)
"""What SGLang 0.5.23 runs without FlashInfer."""


@pytest.mark.parametrize(("name", "scheme"), [("gpt-oss", "w4a16"), ("qwen3-moe", "w4a16"), ("qwen3-moe", "w4a8")])
def test_experts(name: str, scheme: str, tmp_path: Path) -> None:
    """Fused MoEs, few rows and many: prompts are prefilled one by one, then decoded."""
    from transformers import AutoTokenizer

    from examples.tiny_models import make_model
    from tests.serving.conftest import PROMPTS, TOKENS
    from tests.serving.test_token_ids import EXPERTS_ONLY, judge

    model = make_model(name, tmp_path)
    if name == "gpt-oss":  # SGLang asks for it; transformers' own class may have none, and clamps at 7 always
        config = model / "config.json"
        # and its decode in Triton attends to one key fewer than a sliding window has: none is reached here
        more = {"swiglu_limit": 7.0, "sliding_window": 128}
        config.write_text(json.dumps(json.loads(config.read_text()) | more))
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    server = Server.start(model, tmp_path / "server.log", flags=["--quantization", f"amd_{scheme}", *FLAGS])
    try:
        server.wait(300)
        outputs = [
            reply["output_ids"]
            for prompt in prompts
            for reply in server.post("/generate", {"input_ids": [prompt], "sampling_params": sampling})
        ]
    except BaseException:
        print("\n".join(server.log_text().splitlines()[-40:]))
        raise
    finally:
        server.kill()
    recipe = Recipe.from_dict(EXPERTS_ONLY) if name == "gpt-oss" else Recipe.uniform(scheme)
    judge(model, recipe, prompts, outputs, f"{name} {scheme} on the accelerator")
