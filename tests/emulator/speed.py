"""Speed of the emulator: `python tests/emulator/speed.py [--json]`.

Prints, per workload, wave-instructions executed, seconds of CPU (one thread) with every check and counter on and with
all off, and the rates. The figures of README.md come from here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import triton_corpus as corpus
from assembling import compile_hip
from emulator import Checks, CodeObject, launch

REPEATS = 40  # the best of them: other work on the machine makes single runs vary by two

GEMV = """
typedef __attribute__((ext_vector_type(4))) unsigned U4;
typedef __attribute__((ext_vector_type(2))) float F2;
extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(256, 256)))
void gemv(const U4 *w, const float *x, float *y, int n, int k) {  // y[n] = w[n, k] (bf16) x[k]
  const int lane = __builtin_amdgcn_workitem_id_x() & 63, wave = __builtin_amdgcn_workitem_id_x() / 64;
  const int row = 4 * __builtin_amdgcn_workgroup_id_x() + wave;
  F2 sum = {0, 0};
  for (int at = lane; at < k / 8; at += 64) {
    const U4 q = w[(long)row * (k / 8) + at];
    for (int j = 0; j < 4; j++) {
      const F2 v = {__builtin_bit_cast(float, q[j] << 16), __builtin_bit_cast(float, q[j] & 0xffff0000u)};
      const F2 u = {x[8 * at + 2 * j], x[8 * at + 2 * j + 1]};
      sum = __builtin_elementwise_fma(v, u, sum);
    }
  }
  float total = sum.x + sum.y;
  for (int step = 32; step; step /= 2)
    total += __builtin_bit_cast(float, __builtin_amdgcn_ds_bpermute(4 * (lane ^ step), __builtin_bit_cast(int, total)));
  if (lane == 0) y[row] = total;
}
"""


def gemm_mxfp8():
    """16 x 2048 x 2048 MXFP8 by Triton for gfx950: v_mfma_scale_f32_16x16x128_f8f6f4."""
    m, n, k = 16, 2048, 2048
    pointers = {"a": "*fp8e4nv", "b": "*fp8e4nv", "c": "*fp32", "sa": "*u8", "sb": "*u8"}
    compiled = corpus.compile_kernel(
        corpus.gemm_scaled,
        "gfx950",
        pointers | {"M": "i32", "N": "i32", "K": "i32"},
        {"BM": 16, "BN": 64, "BK": 256, "AF": "e4m3", "BF": "e4m3"},
        divisible=("a", "b", "c", "sa", "sb", "N", "K"),
        matrix_instr_nonkdim=16,
    )
    rng = np.random.default_rng(0)
    data = [rng.integers(0, 120, shape, dtype=np.uint8) for shape in ((m, k), (n, k))]
    scales = [np.full((rows, k // 32), 127, np.uint8) for rows in (m, n)]
    args = [*data, np.zeros((m, n), np.float32), *scales, m, n, k, None, None]
    return CodeObject(compiled.hsaco), compiled.name, (1, n // 64), 256, args, compiled.lds_bytes


def softmax():
    """64 rows of 1024 by Triton for gfx942."""
    compiled = corpus.compile_kernel(corpus.softmax, "gfx942", {"x": "*fp32", "y": "*fp32", "n": "i32"}, {"B": 1024})
    x = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    args = [x, np.zeros_like(x), 1024, None, None]
    return CodeObject(compiled.hsaco), compiled.name, (64,), 256, args, compiled.lds_bytes


def gemv():
    """1 x 1024 x 4096 bf16 by clang for gfx942."""
    n, k = 1024, 4096
    w = np.random.default_rng(0).integers(0, 1 << 15, (n, k)).astype(np.uint16)
    args = [w, np.ones(k, np.float32), np.zeros(n, np.float32), n, k]
    return compile_hip(GEMV, "gfx942"), "gemv", (n // 4,), 256, args, 0


def measure(workload) -> dict:
    code, name, grid, threads, args, lds = workload()
    result = {"workload": workload.__name__, "what": workload.__doc__.strip()}
    for label, checks, record in (("all checks", Checks.ALL, True), ("no checks", Checks.NONE, False)):
        seconds = []
        for _ in range(REPEATS + 1):  # the first decodes the kernel
            start = time.process_time()
            counters = launch(code, name, grid, (threads,), args, lds_bytes=lds, checks=checks, record=record)
            seconds.append(time.process_time() - start)
        best = min(seconds[1:])
        result["wave_instructions"] = counters.wave_instructions
        result[label] = {"seconds": round(best, 4), "M/s": round(counters.wave_instructions / best / 1e6, 2)}
        result["first launch, seconds"] = round(max(result.get("first launch, seconds", 0), seconds[0]), 4)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    results = [measure(workload) for workload in (gemm_mxfp8, gemv, softmax)]
    if parser.parse_args().json:
        print(json.dumps(results, indent=1))
        return 0
    print(
        f"{'workload':12} {'instructions':>12} {'first s':>8} {'all checks s':>13} {'M/s':>6} {'none s':>8} {'M/s':>6}"
    )
    for r in results:
        on, off = r["all checks"], r["no checks"]
        print(
            f"{r['workload']:12} {r['wave_instructions']:12} {r['first launch, seconds']:8.3f} {on['seconds']:13.4f} "
            f"{on['M/s']:6.2f} {off['seconds']:8.4f} {off['M/s']:6.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
