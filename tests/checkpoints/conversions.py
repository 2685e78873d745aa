"""Conversions, run to their ends, and what they leave in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_amd_quant.checkpoints.convert import quantize_job
from sglang_amd_quant.checkpoints.folder import Folder
from sglang_amd_quant.checkpoints.job import Job
from sglang_amd_quant.recipe import Recipe


def silent(_: int) -> None:
    pass


def quantized(source: Path, target: Path, recipe: Recipe, **options: Any) -> Job:
    job = quantize_job(Folder.open(source), target, recipe, **options)
    job.execute(silent)
    return job


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
