"""Tiny random models of six architectures with a locally trained tokenizer, in seconds and without a network.

    python -m examples.tiny_models OUT [--only llama gpt-oss ...]

They say nonsense, but load, shard and compute like the big ones: for tests, and for trying a flag or a recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.hf_model import declare_torchvision_ops
from sglang_amd_quant.cli.ending import exit_code

VOCAB = 512
HIDDEN = 256
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>"

WEIGHT_STD = 0.08
"""Of all linear weights: layers then change the residual stream about as much as the embedding made it, so that token
ids hang on every layer."""
LM_HEAD_STD = 0.25
"""Logits then spread over about +-4, like a trained model's, and greedy ids rarely hang on rounding."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "num_experts": 8}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", COMMON),
    "qwen3": ("Qwen3", COMMON),
    "qwen3-moe": ("Qwen3Moe", COMMON | EXPERTS | {"norm_topk_prob": True}),
    "mixtral": ("Mixtral", COMMON | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128}),
    "glm4-moe": (
        "Glm4Moe",
        COMMON
        | {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 4.0},
    ),
    "gpt-oss": (
        "GptOss",
        COMMON
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128, "sliding_window": 32}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
}
"""Name -> (prefix of transformers' classes, config)."""


def make_tokenizer(out: Path) -> None:
    """Write a byte-level BPE of at most `VOCAB` tokens, trained on this file, to the directory `out`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[end, "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_model(name: str, out: Path) -> Path:
    """Write the model to the directory `out / name` and return that. The same name gives the same weights."""
    declare_torchvision_ops()
    import torch
    import transformers

    prefix, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**settings))
    for key, weight in model.named_parameters():
        _fill(key, weight)
    model.bfloat16().save_pretrained(out / name)
    make_tokenizer(out / name)
    return out / name


def _fill(name: str, weight: Any) -> None:
    std = {"lm_head.weight": LM_HEAD_STD, "model.embed_tokens.weight": 1.0}.get(name, WEIGHT_STD)
    is_norm = "norm" in name
    weight.data.normal_(mean=1.0 if is_norm else 0.0, std=0.1 if is_norm else std)


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 0, or 2 if a model could not be written."""
    parser = argparse.ArgumentParser(prog="python -m examples.tiny_models", description="Tiny random models.")
    parser.add_argument("out", type=Path, help="directory to write them under")
    parser.add_argument("--only", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    args = parser.parse_args(argv)
    return exit_code("tiny_models", lambda: _run(args.out, args.only))


def _run(out: Path, names: list[str]) -> int:
    out.mkdir(parents=True, exist_ok=True)  # tells what is wrong before transformers is imported
    for name in names:
        print(make_model(name, out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
