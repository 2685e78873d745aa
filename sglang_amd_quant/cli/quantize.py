"""`amd-mx quantize`: a bf16 checkpoint folder in, an MX or int4 one out."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from sglang_amd_quant.cli.arguments import whole
from sglang_amd_quant.errors import RecipeError
from sglang_amd_quant.recipe import Recipe
from sglang_amd_quant.schemes import DEFAULT_SCALE_MODE, INT4_GROUPS, SCHEMES, ScaleMode

DESCRIPTION = """Convert a Hugging Face checkpoint (bf16, fp16 or fp32 safetensors, dense or MoE) to MX formats or int4,
shard by shard: little memory is needed, and a killed run goes on where it stopped when the command is repeated. DST
appears only when it is whole; SGLang with this package serves it without any flag. Router, embeddings, lm_head, norms
and encoders of images and sound stay as they are."""
EXAMPLE = """amd-mx quantize Qwen3-30B-A3B Qwen3-30B-A3B-W4A8 --scheme w4a8
amd-mx quantize Llama-3.1-8B Llama-3.1-8B-int4 --scheme int4_w4a16 --tp 8"""

KEEP = "keep"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if not match or not Decimal(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write like 5GB or 800MB")
    return int(Decimal(match[1]) * _UNITS[match[2]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--scheme",
        choices=[*SCHEMES, KEEP],
        help=f"one scheme for all layers; {KEEP}: rewrite a quantized SRC of another format in ours, bit for bit",
    )
    what.add_argument(
        "--recipe", type=Path, metavar="FILE", help='JSON: {"default": SCHEME, "rules": {PATTERN: SCHEME}}'
    )
    defaults = ", ".join(f"{mode} for {element}" for element, mode in DEFAULT_SCALE_MODE.items())
    parser.add_argument(
        "--scale-mode", choices=list(ScaleMode), help=f"how block scales are rounded (default: {defaults})"
    )
    parser.add_argument(
        "--group",
        type=int,
        choices=INT4_GROUPS,
        help="elements of K that share an int4 scale (default: the recipe's, else the largest that divides every K)",
    )
    parser.add_argument(
        "--tp",
        type=whole,
        default=1,
        help="SGLang's --tp that DST is for: blocks and groups must divide each rank's K (default: 1)",
    )
    parser.add_argument("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="(default: 5GB)")
    parser.add_argument("--force", action="store_true", help="replace DST, or a partial one begun with other arguments")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from sglang_amd_quant.checkpoints.convert import keep_job, quantize_job
    from sglang_amd_quant.checkpoints.folder import Folder

    source = Folder.open(args.source)
    if args.scheme == KEEP:
        for option, given in (("--scale-mode", args.scale_mode), ("--group", args.group), ("--tp", args.tp > 1)):
            if given:
                raise RecipeError(option, f"--scheme {KEEP} quantizes nothing", "drop one of the two")
        job = keep_job(source, args.target, args.max_shard_size)
    else:
        recipe = Recipe.uniform(args.scheme) if args.scheme else Recipe.load(args.recipe)
        if args.group:
            if "int4" not in recipe.weights:
                raise RecipeError(f"--group {args.group}", f"{recipe.source} makes no int4", "drop one of the two")
            recipe = replace(recipe, group=args.group)
        if args.scale_mode and recipe.weights == {"int4"}:
            raise RecipeError("--scale-mode", f"{recipe.source} makes int4 alone, which has no modes", "drop it")
        modes = dict.fromkeys(DEFAULT_SCALE_MODE, ScaleMode(args.scale_mode)) if args.scale_mode else DEFAULT_SCALE_MODE
        job = quantize_job(source, args.target, recipe, modes, args.max_shard_size, args.tp)
    with tqdm(total=job.source_bytes, unit="B", unit_scale=True, desc=args.target.name) as bar:
        job.execute(bar.update, args.force)
    in_doubt = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", m) for m in job.plan.in_doubt}) if job.plan else []
    summary = {
        "target": str(args.target),
        "source_bytes": job.source_bytes,
        "bytes": job.output_bytes,
        "shards": len(job.shards),
        "quantized_tensors": dict(job.plan.quantized) if job.plan else {},
        "int4_group": job.plan.int4_group if job.plan else None,
        "kept_in_doubt": in_doubt,
    }
    print(json.dumps(summary, indent=2) if args.json else _text(summary))
    return 0


def _text(summary: Mapping[str, object]) -> str:
    group = summary["int4_group"]
    made = ", ".join(f"{count} {scheme}" for scheme, count in _items(summary["quantized_tensors"]))
    lines = [
        f"{summary['target']}: {_gb(summary['source_bytes'])} -> {_gb(summary['bytes'])} in {summary['shards']} shards"
        + (f"; quantized: {made}" if made else "")
        + (f", in groups of {group}" if group else "")
    ]
    doubt = summary["kept_in_doubt"]
    if isinstance(doubt, list) and doubt:
        lines.append("kept as they are, for want of knowing that SGLang runs them as linear layers (a rule that names")
        lines.append("a matrix quantizes it): " + ", ".join(doubt))
    return "\n".join(lines)


def _items(counts: object) -> list[tuple[str, int]]:
    return list(counts.items()) if isinstance(counts, dict) else []


def _gb(size: object) -> str:
    return f"{int(str(size)) / 1e9:.2f} GB"
