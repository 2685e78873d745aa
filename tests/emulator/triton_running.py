"""What the tests of Triton kernels share: launching, bf16, tolerances."""

import torch
from emulator import CodeObject, launch

ARCHES = ("gfx950", "gfx942", "gfx1100", "gfx1151")
EPS = 2.0**-24  # unit roundoff of fp32


def run(compiled, grid, args, **options):
    """Launch a Triton kernel; the two trailing arguments are Triton's scratch pointers, which these kernels ignore."""
    code = CodeObject(compiled.hsaco)
    kernel = code.kernel(compiled.name)
    block = (compiled.num_warps * kernel.wave_size,)
    explicit = sum(not a.kind.startswith("hidden") for a in kernel.arguments)
    args = [*args, *[None] * (explicit - len(args))]
    return launch(code, kernel.name, grid, block, args, lds_bytes=compiled.lds_bytes, **options)


def bf16_bits(x):
    return torch.tensor(x, dtype=torch.float32).to(torch.bfloat16).view(torch.uint16).numpy()


def bf16_values(bits):
    return torch.tensor(bits).view(torch.bfloat16).double().numpy()
