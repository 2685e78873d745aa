"""An SGLang platform for machines without accelerator, so that the flag is all that is needed there.

Its entry point lies in a distribution of its own (`cpu_platform/`): SGLang skips the plugins of every distribution
that offers a platform other than the one `SGLANG_PLATFORM` names, and `amd_mx` must work on those platforms too.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys

import torch

from sglang_amd_quant.integration import fast_start

ENTRY_POINT = "amd_mx_cpu"
GROUP = "sglang.srt.platforms"
PLATFORM = "sglang_amd_quant.integration.cpu_platform_class.AmdMxCpuPlatform"

logger = logging.getLogger(__name__)


def activate() -> str | None:
    """Offer the CPU platform, or None where an accelerator, another platform or SGLang's own CPU engine serves.

    Called by SGLang in every process. `SGLANG_PLATFORM=amd_mx_cpu` forces it.
    """
    if os.environ.get("SGLANG_PLATFORM") != ENTRY_POINT and not _nothing_else():
        return None
    declare_torchvision_ops()
    if fast_start.requested():
        fast_start.prepare()
    print_once()
    return PLATFORM


def _nothing_else() -> bool:
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or torch.accelerator.is_available():
        return False
    return not any(_activates(ep) for ep in importlib.metadata.entry_points(group=GROUP) if ep.name != ENTRY_POINT)


def _activates(entry_point: importlib.metadata.EntryPoint) -> bool:
    """Whether another platform would step in. SGLang treats one that raises as absent and logs it; so do we."""
    try:
        return entry_point.load()() is not None
    except Exception as error:
        logger.warning("platform %s cannot activate: %s", entry_point.name, error)
        return False


def declare_torchvision_ops() -> None:
    """PyPI's torchvision is a CUDA build whose operators cannot load beside a CPU torch, and importing it then fails.

    SGLang and transformers always import torchvision, and never call these two on a text model: a schema without a
    kernel is enough.
    """
    if torch.version.cuda is not None or torch.version.hip is not None or "torchvision" in sys.modules:
        return
    for op in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, op):
            torch.library.define(f"torchvision::{op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def print_once() -> None:
    """One line in the main process only: schedulers and detokenizers inherit the mark."""
    if os.environ.setdefault("_SGLANG_AMD_MX_CPU_SAID", str(os.getpid())) == str(os.getpid()):
        logger.warning(
            "no accelerator seen by torch: sglang-amd-quant's platform %s serves on the CPU",
            ENTRY_POINT,
        )
