"""What a kernel choice must know of each architecture. Facts only, each with its source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Arch:
    """One architecture family, as legality and heuristics see it.

    Attributes:
        name: what packs and rules call it.
        device: the part that `cu_count` is of.
        wave: lanes of a wave (a warp on NVIDIA).
        lds_bytes: LDS (shared memory) one workgroup may have; 0 where there is none.
        cu_count: compute units (SMs) of `device`; 0 = not known. Other parts of a family differ: MI350P has 128.
        scaled_mma: matrix unit takes e8m0 scales (`v_mfma_scale_f32_16x16x128_f8f6f4`, `v_wmma_scale_...`).
        fp8: `ocp` (e4m3fn), `fnuz` (e4m3fnuz), or empty where no instruction reads fp8.
        async_copy: Triton copies global to LDS asynchronously and pads what it copies (aiter #3580).
        xcds: dies that workgroups are dealt to in turn.
    """

    name: str
    device: str
    wave: int
    lds_bytes: int
    cu_count: int
    scaled_mma: bool = False
    fp8: str = ""
    async_copy: bool = False
    xcds: int = 1


# LDS of gfx1250, gfx950 and gfx942: aiter #3580 `pick_gemm_num_stages`; of gfx11: RDNA3 ISA guide; of sm_90: CUDA C++
# programming guide, 227 KiB a block. CUs: data sheets of the devices named.
ARCHES: dict[str, Arch] = {
    a.name: a
    for a in (
        Arch("gfx950", "MI355X", 64, 163_840, 256, scaled_mma=True, fp8="ocp", async_copy=True, xcds=8),
        Arch("gfx942", "MI300X", 64, 65_536, 304, fp8="fnuz", xcds=8),
        Arch("gfx1250", "gfx1250", 32, 327_680, 0, scaled_mma=True, fp8="ocp", async_copy=True),
        Arch("gfx11", "gfx1151", 32, 65_536, 40),
        Arch("sm_90", "H200", 32, 232_448, 132, fp8="ocp"),
        Arch("cpu", "any", 1, 0, 0),
    )
}

_FAMILY = ((re.compile(r"gfx11\d\d"), "gfx11"), (re.compile(r"sm_90a"), "sm_90"))


@lru_cache(maxsize=256)
def canonical(name: str) -> str:
    """The family name of what a driver reports: `gfx1151` and `gfx942:sramecc+:xnack-` are `gfx11` and `gfx942`.

    A name that no family has comes back as it is: such a device has no kernels here, which is no error.
    """
    name = name.partition(":")[0]
    return next((family for pattern, family in _FAMILY if pattern.fullmatch(name)), name)


def member(here: str, family: str) -> str:
    """The architecture to make something for: `here`, as the driver names it, if it is of the family; else that."""
    return here if canonical(here) == family else family
