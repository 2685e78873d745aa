"""Triton kernels that the emulator is confirmed against, and their ahead-of-time compilation (no GPU, no driver).

A dot product that agrees with numpy for random operands *and* random scales pins the lane layouts of the matrix unit:
a wrong row or column shows at once, and a wrong order along K shows where the two operands are stored differently
(e2m1 against e4m3) or carry one scale per 32 elements of K.
"""

from __future__ import annotations

import atexit
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglang_amd_quant.toolchain.workers import Worker

WAVE = {"gfx950": 64, "gfx942": 64, "gfx1100": 32, "gfx1151": 32}


@triton.jit
def gemm(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c[M, N] = a[M, K] @ b[N, K]^T, accumulated in fp32 (int32 for int8); M % BM == N % BN == K % BK == 0."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), c.dtype.element_ty)
    for k0 in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + (k0 + k)[None, :])
        y = tl.load(b + n[None, :] * K + (k0 + k)[:, None])
        acc = tl.dot(x, y, acc, out_dtype=c.dtype.element_ty)
    tl.store(c + m[:, None] * N + n[None, :], acc)


@triton.jit
def gemm_kn(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """As `gemm`, with b stored [K, N]: the operand that needs a transposing read from LDS."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + (k0 + k)[None, :])
        y = tl.load(b + (k0 + k)[:, None] * N + n[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc)


@triton.jit
def gemm_scaled(
    a, b, c, sa, sb, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, AF: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """c[M, N] = dequant(a[M, K], sa[M, K/32]) @ dequant(b[N, K], sb[N, K/32])^T, MX formats AF and BF; M is masked."""
    A_PACK: tl.constexpr = 2 if AF == "e2m1" else 1
    B_PACK: tl.constexpr = 2 if BF == "e2m1" else 1
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    ka = tl.arange(0, BK // A_PACK)
    kb = tl.arange(0, BK // B_PACK)
    ks = tl.arange(0, BK // 32)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        x = tl.load(a + m[:, None] * (K // A_PACK) + (k0 // A_PACK + ka)[None, :], mask=m[:, None] < M, other=0.0)
        y = tl.load(b + n[None, :] * (K // B_PACK) + (k0 // B_PACK + kb)[:, None])
        s = tl.load(sa + m[:, None] * (K // 32) + (k0 // 32 + ks)[None, :], mask=m[:, None] < M, other=127)
        t = tl.load(sb + n[:, None] * (K // 32) + (k0 // 32 + ks)[None, :])
        acc = tl.dot_scaled(x, s, AF, y, t, BF, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc, mask=m[:, None] < M)


@triton.jit
def gemm_a16w4(a, b, c, sb, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c[M, N] (bf16) = a[M, K] (bf16) @ dequant(b[N, K] e2m1, sb)^T; M is masked."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    kb = tl.arange(0, BK // 2)
    ks = tl.arange(0, BK // 32)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + (k0 + k)[None, :], mask=m[:, None] < M, other=0.0)
        y = tl.load(b + n[None, :] * (K // 2) + (k0 // 2 + kb)[:, None])
        t = tl.load(sb + n[:, None] * (K // 32) + (k0 // 32 + ks)[None, :])
        acc = tl.dot_scaled(x, None, "bf16", y, t, "e2m1", acc)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(tl.bfloat16), mask=m[:, None] < M)


@triton.jit
def softmax(x, y, n, B: tl.constexpr):
    """y[row] = softmax(x[row]), rows of n <= B elements."""
    row = tl.program_id(0)
    o = tl.arange(0, B)
    v = tl.load(x + row * n + o, mask=o < n, other=-float("inf")).to(tl.float32)
    v = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * n + o, (v / tl.sum(v, 0)).to(y.dtype.element_ty), mask=o < n)


@triton.jit
def rmsnorm(x, w, y, n, eps, B: tl.constexpr):
    """y[row] = x[row] / sqrt(mean(x[row]^2) + eps) * w, bf16 in and out."""
    row = tl.program_id(0)
    o = tl.arange(0, B)
    v = tl.load(x + row * n + o, mask=o < n, other=0.0).to(tl.float32)
    s = tl.rsqrt(tl.sum(v * v, 0) / n + eps)
    tl.store(y + row * n + o, (v * s * tl.load(w + o, mask=o < n, other=0.0)).to(tl.bfloat16), mask=o < n)


@triton.jit
def column_sums(x, y, N, BM: tl.constexpr, BN: tl.constexpr):
    """y[N] = sum over BM rows of x[BM, N]: a reduction across waves, hence through LDS."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    tl.store(y + n, tl.sum(tl.load(x + m[:, None] * N + n[None, :]), 0))


@triton.jit
def argmax_cumsum(x, best, total, n, B: tl.constexpr):
    """best[row] = argmax(x[row]); total[row] = cumulative sum of x[row]."""
    row = tl.program_id(0)
    o = tl.arange(0, B)
    v = tl.load(x + row * n + o, mask=o < n, other=-1e30)
    tl.store(best + row, tl.argmax(v, 0))
    tl.store(total + row * n + o, tl.cumsum(tl.where(o < n, v, 0.0), 0), mask=o < n)


@triton.jit
def histogram(x, counts, n, B: tl.constexpr):
    """counts[x[i]] += 1 by global atomics."""
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(counts + tl.load(x + o, mask=o < n, other=0), 1, mask=o < n)


@triton.jit
def cast(x, y, n, B: tl.constexpr):
    """y = x, converted to y's element type."""
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + o, tl.load(x + o, mask=o < n).to(y.dtype.element_ty), mask=o < n)


@triton.jit
def transpose(x, y, N, BM: tl.constexpr, BN: tl.constexpr):
    """y[BN, BM] = x[BM, BN]^T: a layout conversion through LDS."""
    m = tl.arange(0, BM)
    n = tl.arange(0, BN)
    tile = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(y + n[:, None] * BM + m[None, :], tl.trans(tile))


@triton.jit
def layernorm(x, w, b, y, n, eps, B: tl.constexpr):
    """y[row] = (x[row] - mean) / sqrt(var + eps) * w + b, fp32."""
    row = tl.program_id(0)
    o = tl.arange(0, B)
    v = tl.load(x + row * n + o, mask=o < n, other=0.0)
    centred = tl.where(o < n, v - tl.sum(v, 0) / n, 0.0)
    s = 1 / tl.sqrt(tl.sum(centred * centred, 0) / n + eps)
    tl.store(y + row * n + o, centred * s * tl.load(w + o, mask=o < n) + tl.load(b + o, mask=o < n), mask=o < n)


@triton.jit
def logsumexp(x, y, n, B: tl.constexpr):
    """y[row] = log(sum(exp(x[row]))), block by block with a running maximum."""
    row = tl.program_id(0)
    top, total = -float("inf"), 0.0
    for start in range(0, n, B):
        o = start + tl.arange(0, B)
        v = tl.load(x + row * n + o, mask=o < n, other=-float("inf"))
        higher = tl.maximum(top, tl.max(v, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(v - higher), 0)
        top = higher
    tl.store(y + row, top + tl.log(total))


@triton.jit
def silu_mul(x, y, n, B: tl.constexpr):
    """y[row] = silu(x[row, :n]) * x[row, n:], bf16."""
    row = tl.program_id(0)
    o = tl.arange(0, B)
    gate = tl.load(x + row * 2 * n + o, mask=o < n).to(tl.float32)
    up = tl.load(x + row * 2 * n + n + o, mask=o < n).to(tl.float32)
    tl.store(y + row * n + o, (gate * tl.sigmoid(gate) * up).to(tl.bfloat16), mask=o < n)


@triton.jit
def row_extremes(x, top, bottom, N: tl.constexpr, M: tl.constexpr):
    """Maximum of each row and minimum of each column of x[M, N]."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    v = tl.load(x + m[:, None] * N + n[None, :])
    tl.store(top + m, tl.max(v, 1))
    tl.store(bottom + n, tl.min(v, 0))


@triton.jit
def sort_rows(x, y, N: tl.constexpr, M: tl.constexpr):
    """y = x[M, N], each row sorted."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    place = m[:, None] * N + n[None, :]
    tl.store(y + place, tl.sort(tl.load(x + place)))


@triton.jit
def gather_rows(table, rows, y, n, B: tl.constexpr):
    """y[i] = table[rows[i]], n 16-bit elements a row, 64-bit row numbers."""
    i = tl.program_id(0)
    o = tl.arange(0, B)
    tl.store(y + i * n + o, tl.load(table + tl.load(rows + i) * n + o, mask=o < n), mask=o < n)


@triton.jit
def uniform(y, seed, B: tl.constexpr):
    """y = Triton's uniform random numbers: Philox, ten rounds of 32-bit multiplications with both halves."""
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + o, tl.rand(seed, o))


@triton.jit
def integer_math(x, z, y, B: tl.constexpr):
    """Quotients, remainders, products and shifts of type(x); z > 0."""
    o = tl.arange(0, B)
    a, b = tl.load(x + o), tl.load(z + o)
    tl.store(y + o, a // b)
    tl.store(y + B + o, a % b)
    tl.store(y + 2 * B + o, a * b)
    tl.store(y + 3 * B + o, (a << (b & 15)) ^ (a >> (b & 15)))


@triton.jit
def functions(x, y, n, B: tl.constexpr):
    """exp, log, sqrt, sin, cos, erf, 2^x, |x|, floor and a quotient of fp32 x, one row of n each."""
    o = tl.arange(0, B)
    v = tl.load(x + o, mask=o < n, other=1.0)
    tl.store(y + o, tl.exp(v), mask=o < n)
    tl.store(y + n + o, tl.log(tl.abs(v) + 1e-3), mask=o < n)
    tl.store(y + 2 * n + o, tl.sqrt_rn(tl.abs(v)), mask=o < n)
    tl.store(y + 3 * n + o, tl.sin(v), mask=o < n)
    tl.store(y + 4 * n + o, tl.cos(v), mask=o < n)
    tl.store(y + 5 * n + o, tl.erf(v), mask=o < n)
    tl.store(y + 6 * n + o, tl.exp2(v), mask=o < n)
    tl.store(y + 7 * n + o, tl.floor(v), mask=o < n)
    tl.store(y + 8 * n + o, tl.div_rn(v, v * v + 1), mask=o < n)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def running_maximum(x, y, n, B: tl.constexpr):
    """y[i] = max(x[: i + 1])."""
    o = tl.arange(0, B)
    v = tl.load(x + o, mask=o < n, other=-1 << 30)
    tl.store(y + o, tl.associative_scan(v, 0, larger), mask=o < n)


@triton.jit
def rearrange(x, y, B: tl.constexpr):
    """Splits, joins, flips and permutes B bytes: y = flip(interleave(x[1::2], x[::2]).reshape(4, -1).T)."""
    o = tl.arange(0, B)
    even, odd = tl.split(tl.load(x + o).reshape(B // 2, 2))
    mixed = tl.interleave(odd, even).reshape(4, B // 4)
    tl.store(y + o, tl.flip(tl.trans(mixed).reshape(B), 0))


@triton.jit
def quantize(x, codes, scales, n, B: tl.constexpr):
    """bf16 rows to int8 codes and one fp32 scale a 32-block: code = round(x / scale), scale = max|x| / 127."""
    row = tl.program_id(0)
    o = tl.arange(0, B)
    v = tl.load(x + row * n + o, mask=o < n, other=0.0).to(tl.float32).reshape(B // 32, 32)
    scale = tl.maximum(tl.max(tl.abs(v), 1), 1e-20) / 127
    code = tl.floor(v / scale[:, None] + 0.5).to(tl.int8).reshape(B)
    tl.store(codes + row * n + o, code, mask=o < n)
    block = tl.arange(0, B // 32)
    tl.store(scales + row * (n // 32) + block, scale, mask=block < n // 32)


@triton.jit
def extreme_atomics(x, top, bottom, bits, last, n, B: tl.constexpr):
    """Maximum, minimum and union of bits of all x, and one more than the program that came first, by global atomics."""
    o = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + o, mask=o < n, other=0)
    same = tl.zeros((B,), tl.int32)
    tl.atomic_max(top + same, v, mask=o < n)
    tl.atomic_min(bottom + same, v, mask=o < n)
    tl.atomic_or(bits + same, v, mask=o < n)
    tl.atomic_cas(last, 0, tl.program_id(0) + 1)


@triton.jit
def gemm_split_k(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c[M, N] += a[M, K] @ b[N, K]^T, one program a slice of K, added by fp32 atomics; M, N, K tiles fit."""
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + n[None, :] * K + k[:, None])
    tl.atomic_add(c + m[:, None] * N + n[None, :], tl.dot(x, y))


@triton.jit
def gemm_bias_gelu(a, b, bias, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c[M, N] (bf16) = gelu(a[M, K] @ b[N, K]^T + bias), the tanh-free form; eight waves."""
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + (k0 + k)[None, :], mask=m[:, None] < M, other=0.0)
        y = tl.load(b + n[None, :] * K + (k0 + k)[:, None], mask=n[None, :] < N, other=0.0)
        acc = tl.dot(x, y, acc)
    acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    acc = 0.5 * acc * (1 + tl.erf(acc * 0.7071067811865476))
    tl.store(c + m[:, None] * N + n[None, :], acc.to(tl.bfloat16), mask=(m[:, None] < M) & (n[None, :] < N))


@dataclass(frozen=True)
class CompiledKernel:
    """What Triton made of a kernel."""

    name: str
    hsaco: bytes
    assembly: str
    lds_bytes: int
    num_warps: int


_workers: dict[str, Worker] = {}


def compile_kernel(
    kernel: Any,
    arch: str,
    signature: dict[str, str],
    constants: dict[str, Any] | None = None,
    num_warps: int = 4,
    divisible: tuple[str, ...] | None = None,
    **options: Any,
) -> CompiledKernel:
    """Compile one of the kernels above, in a process of the architecture's own (why: toolchain/workers.py).

    `divisible` names the arguments promised to be multiples of 16; by default every pointer.
    """
    worker = _workers.setdefault(arch, Worker())
    call = (kernel.fn.__name__, arch, signature, constants or {}, divisible, {"num_warps": num_warps, **options})
    return worker.result(worker.submit(compile_here, *call))


@atexit.register
def _end_workers() -> None:
    for worker in _workers.values():
        worker.close()


def compile_here(
    kernel: str,
    arch: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...] | None,
    options: dict[str, Any],
) -> CompiledKernel:
    """`compile_kernel`, in this process."""
    if divisible is None:
        divisible = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    names = list(signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(
        globals()[kernel], signature | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=attributes
    )
    made = triton.compile(source, target=GPUTarget("hip", arch, WAVE[arch]), options=options)
    facts = made.metadata
    return CompiledKernel(facts.name, made.asm["hsaco"], made.asm["amdgcn"], facts.shared, facts.num_warps)
