"""`amd-mx inspect`: what a checkpoint holds, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_amd_quant.checkpoints.survey import Survey

DESCRIPTION = """Say what a checkpoint folder holds: format, scheme by layer group, bits per weight, size; and every
problem found: truncated files, missing or NaN scales, wrong shapes, tensors left over, config and tensors that
contradict one another. Reads headers and scales only, so it is quick on the largest checkpoints. Exit code 1 if there
are problems, 2 if there is no checkpoint to look at."""
EXAMPLE = "amd-mx inspect Qwen3-30B-A3B-W4A8"

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from sglang_amd_quant.checkpoints.survey import survey

    found = survey(
        args.checkpoint, lambda stream, count: tqdm(stream, total=count, unit=" tensors", delay=1, leave=False)
    )
    print(json.dumps(_as_dict(found), indent=2) if args.json else _text(found))
    return 1 if found.problems else 0


def _as_dict(found: Survey) -> dict[str, object]:
    groups = [asdict(group) | {"bits_per_weight": round(group.bits, 3)} for group in found.groups]
    return {
        "path": str(found.path),
        "format": found.format,
        "files": found.files,
        "tensors": found.tensors,
        "bytes": found.nbytes,
        "bits_per_weight": found.bits(),
        "bits_per_quantized_weight": found.bits(quantized_only=True),
        "groups": groups,
        "problems": found.problems,
    }


def _text(found: Survey) -> str:
    mean, quantized = found.bits(), found.bits(quantized_only=True)
    lines = [
        f"{found.path}: {found.format}, {found.nbytes / 1e9:.3f} GB in {found.files} files, {found.tensors} tensors"
        + (f", {mean:.2f} bits per weight" if mean else "")
        + (f" ({quantized:.2f} where quantized)" if quantized else "")
    ]
    rows = [("layers", "scheme", "shape", "count", "bits", "MB")]
    for g in found.groups:
        shape = " x ".join(map(str, g.shape))
        rows.append((g.name, g.scheme, shape, str(g.count), f"{g.bits:.2f}", f"{g.nbytes / 1e6:.1f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    if len(rows) > 1:
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
    lines += [f"problem: {problem}" for problem in found.problems[:_SHOWN]]
    if len(found.problems) > _SHOWN:
        lines.append(f"and {len(found.problems) - _SHOWN} more problems (--json lists them)")
    return "\n".join(lines if found.problems else [*lines, "no problems found"])
