"""What a launch costs the host: eager microseconds a call of the runtime, beside torch's and Triton's own.

    python -m bench.launch [--json]

Measured on this machine's GPU: wall time of many launches of a small kernel without waiting in between, over their
number; the median of many rounds. A round is shorter than the driver's queue, so no launch waits for the GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

import bench.source_tree  # noqa: F401
from bench.gemv import prepare, weights
from sglang_amd_quant.cli.ending import exit_code
from sglang_amd_quant.ops.hip import current_stream
from sglang_amd_quant.runtime.device import gpu
from sglang_amd_quant.runtime.gemv_mxfp4 import gemv_mxfp4


def host_us(launch: Callable[[], object], calls: int = 400, rounds: int = 51) -> float:
    """Median microseconds of host time a call."""
    times = []
    launch()  # compiles and loads what is not there yet
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            launch()
        times.append((time.perf_counter() - begin) / calls * 1e6)
        torch.cuda.synchronize()
    return statistics.median(times)


def triton_launch() -> Callable[[], object] | None:
    """A launch of a Triton kernel with as many arguments, None without Triton."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def copy(a, b, c, d, e, f, g, h, i, j, k, n, block: tl.constexpr):
        offset = tl.arange(0, block)
        tl.store(b + offset, tl.load(a + offset, mask=offset < n), mask=offset < n)

    a, b = torch.zeros(2, 32, device="cuda")
    return lambda: copy[(1,)](a, b, a, a, a, 1, 2, 3, 4, 5, 6, 32, block=32)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    device = gpu(0)
    prepare(device)
    w, s = weights(16, 64, 0)
    x = torch.randn(1, 64, device="cuda").bfloat16()
    y = torch.empty(1, 16, device="cuda", dtype=torch.bfloat16)
    description = gemv_mxfp4(x, w, s, y, arch=device.arch_name, cu_count=device.cu_count)
    kernel, d = device.kernel(description.kernel), description
    stream = current_stream(0)
    cases: dict[str, Callable[[], object] | None] = {
        "Kernel.launch, arguments packed each time": lambda: kernel.launch(d.grid, d.block, d.lds, stream, d.args),
        "Gpu.launch of a description": lambda: device.launch(description, stream),
        "... and asking torch for its stream": lambda: device.launch(description, current_stream(0)),
        "... and planning and describing it": lambda: device.launch(
            gemv_mxfp4(x, w, s, y, arch=device.arch_name, cu_count=device.cu_count), current_stream(0)
        ),
        "torch: y.add_(0)": lambda: y.add_(0),
        "Triton: 12 arguments": triton_launch(),
    }
    result = {name: host_us(launch) for name, launch in cases.items() if launch is not None}
    if args.json:
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": sys.version.split()[0]}
        print(json.dumps({**facts, "host_us": {n: round(us, 3) for n, us in result.items()}}, indent=1))
        return 0
    for name, us in result.items():
        print(f"{us:7.2f} us  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code("bench.launch", main))
