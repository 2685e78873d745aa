"""Launches that begin before the one in front of them has ended: Hopper's programmatic dependent launch.

A kernel that takes part reads nothing that launches before it wrote, nor writes anything, until they have ended; from
then on the next one may begin, and wait in its turn. What that gains is the time that a launch takes to arrive: 3 us of
a fused MoE's 20 to 40 for one token. (Letting the next begin before the wait lost: launches pile up.)

So when a kernel begins, all but the one right in front of it have ended, if that one keeps to the rule. A kernel that
knows what the one in front writes may read everything else before it waits: `Overlap.ahead` in `hopper.py`. One that
reads and overwrites nothing of it may do all its work before it waits, beside it; the next begins once both are done.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin_after_previous(OVERLAP: tl.constexpr):
    """Where a kernel that was launched with `overlap` goes on only once all launches before it have ended. One that
    works beside the launch in front of it calls this last."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


def overlap(x: torch.Tensor) -> dict[str, bool]:
    """Arguments of a launch on x's device: `OVERLAP` of the kernel, and Triton's own option; none where it cannot."""
    return {"OVERLAP": True, "launch_pdl": True} if _can(x.device) else {}


@cache
def _can(device: torch.device) -> bool:
    on_cuda = device.type == "cuda" and torch.version.cuda is not None
    return on_cuda and torch.cuda.get_device_capability(device) == (9, 0)
