"""The decode GEMM on a Hopper GPU: random shapes and plans against fp64 of the same operands, and its limits."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch
from op_layers import MX
from sglang_amd_quant.kernels.hip.manifest import find

from bench.decode_ours import launch
from bench.decode_problem import RELATIVE_ERROR, Problem, Reference, bound, pack
from sglang_amd_quant import formats
from sglang_amd_quant.formats import group_words
from sglang_amd_quant.ops.hip import carry
from sglang_amd_quant.ops.reference import ActQuant
from sglang_amd_quant.runtime.decode_gemm import Epilogue, decode_gemm
from sglang_amd_quant.runtime.decode_plans import entry_point, plans, prepared_bytes
from sglang_amd_quant.runtime.device import gpu
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.tensor import MxTensor

SHAPES_A_SCHEME = 200


@pytest.fixture
def device(arch, needs):
    """The GPU with the kernels of a scheme loaded: `device(scheme)`."""
    if arch != "sm_90":
        pytest.skip(f"plans of this file are sm_90's, not {arch}'s")
    needs("hip_decode_e4m3")

    def loaded(scheme):
        gpu(0).load(*(e.name for e in find(f"decode_{scheme}_m8", "sm_90")[0].entry_points))
        return gpu(0)

    return loaded


@pytest.mark.parametrize("scheme", MX)
def test_random_shapes_and_plans(device, scheme):
    """`bound` (bench/decode_problem.py) derives the bounds."""
    gpu, dice = device(scheme), random.Random(11)
    for seed in range(SHAPES_A_SCHEME):
        m, n = dice.choice((1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 130)), dice.randint(1, 3000)
        k = 32 * dice.choice((1, 2, 3, dice.randint(4, 40), dice.randint(41, 256)))
        problem = Problem(scheme, k, n, seed, sets=1)
        found = plans(scheme, m, n, k, gpu.cu_count)
        reference = Reference(problem, m, seed)
        for plan in (found[0], dice.choice(found)):
            assert reference.check(partial(launch, gpu, problem, 0, plan=plan), plan) < 1e-3


@pytest.mark.parametrize("scheme", ["w4a8", "mxfp4", "mxfp8", "w4a16"])
def test_waves_that_have_all_of_k(device, scheme):
    """Alone, or of blocks that are pairs. Any N, so that the last pair has rows for one block, or not even those in
    common; K of a chunk, and of many."""
    gpu, dice = device(scheme), random.Random(7)
    for seed in range(60):
        m, n = dice.choice((9, 16, 17, 32, 33, 64, 65, 130)), dice.randint(1, 6000)
        k = 32 * dice.choice((1, 2, 3, dice.randint(4, 256)))
        found = [p for p in plans(scheme, m, n, k, gpu.cu_count) if p.paired or p.own_rows]
        problem = Problem(scheme, k, n, seed, sets=1)
        reference = Reference(problem, m, seed)
        for plan in dice.sample(found, min(3, len(found))):
            assert reference.check(partial(launch, gpu, problem, 0, plan=plan), plan) < 1e-3


def check_rounded(gpu, problem, reference, plan):
    """bf16 with nothing fused behind goes a way of its own: the same sums, rounded, in rows that lie apart."""
    m, n = reference.want.shape
    exact = torch.full((m, n), torch.nan, device="cuda")
    around = torch.full((m, n + 24), torch.nan, dtype=torch.bfloat16, device="cuda")
    for y in (exact, around[:, 8 : 8 + n]):
        launch(gpu, problem, 0, reference.x, y, plan)
    assert torch.equal(around[:, 8 : 8 + n], exact.bfloat16())
    assert around[:, :8].isnan().all()
    assert around[:, 8 + n :].isnan().all()


@pytest.mark.parametrize("scheme", ["w4a8", "mxfp4", "mxfp8"])
def test_every_entry_point(device, scheme):
    """Those that plans of a few random shapes launch: all there are."""
    gpu, dice, seen = device(scheme), random.Random(13), set()
    for seed, m in enumerate((1, 8, 13, 16, 30, 32, 50, 64) * 2):
        n, k = dice.choice(((dice.randint(1, 2000), 32 * dice.randint(1, 64)), (dice.randint(1, 6000), 8192)))
        problem = Problem(scheme, k, n, seed, sets=1)
        reference, by_name = Reference(problem, m, seed), defaultdict(list)
        for plan in plans(scheme, m, n, k, gpu.cu_count):
            by_name[entry_point(scheme, plan)].append(plan)
        for found in by_name.values():
            plan = dice.choice(found)
            assert reference.check(partial(launch, gpu, problem, 0, plan=plan), plan) < 1e-3
            check_rounded(gpu, problem, reference, plan)
        seen |= by_name.keys()
    names = {e.name for e in find(f"decode_{scheme}_m8", "sm_90")[0].entry_points}
    assert seen == names - {f"prepare_{scheme}"}


@pytest.mark.parametrize(("scheme", "m"), [("w4a8", 1), ("w4a16", 16), ("mxfp8", 64)])
def test_weights_beyond_two_gibibytes(device, scheme, m):
    """Rows whose byte offsets are no int32 give what the same rows give at the beginning."""
    gpu, n, k = device(scheme), 1024, 8192
    small = Problem(scheme, k, n, 3, sets=1)
    reference = Reference(small, m, 3)
    plan = plans(scheme, m, n, k, gpu.cu_count)[0]
    assert reference.check(partial(launch, gpu, small, 0, plan=plan), plan) < 1e-3
    copies = 2**31 // small.bytes + 2
    big = Problem(scheme, 32, 16, 3, sets=1)
    big.n, big.k = n * copies, k
    big.packed = [tuple(None if t is None else t.flatten().repeat(copies) for t in small.packed[0])]
    if plan.one_group:
        share = max(1, plan.share)
        plan = replace(plan, groups=-(-big.n // (plan.waves_n * 16 * share)) * share)
    y = torch.full((m, big.n), torch.nan, device="cuda")
    launch(gpu, big, 0, reference.x, y, plan)
    parts = y.view(m, copies, n)
    assert torch.equal(parts, parts[:, :1].expand_as(parts))
    assert ((parts[:, -1].double() - reference.want).abs() <= reference.bound).all()


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("scheme", ["w4a8", "mxfp8"])
def test_nan_scales_make_their_rows_nan(device, scheme, m):
    gpu, n, k = device(scheme), 130, 1056
    problem = Problem(scheme, k, n, 5, sets=1)
    problem.weights[0].scales[77, 3] = 255
    problem.packed = [pack(problem.weights[0])]
    x, _ = problem.activations(m, 1)
    y = torch.empty(m, n, device="cuda")
    for plan in plans(scheme, m, n, k, gpu.cu_count)[:8]:
        y.fill_(7)
        launch(gpu, problem, 0, x, y, plan)
        assert y[:, 77].isnan().all()
        assert y[:, torch.arange(n) != 77].isfinite().all()


def test_the_same_bits_each_time(device):
    for scheme, m, is_it in (
        ("w4a8", 1, lambda _: True),
        ("mxfp8", 16, lambda _: True),
        ("w4a16", 64, lambda _: True),
        ("w4a8", 64, lambda plan: plan.paired),
        ("mxfp8", 64, lambda plan: plan.own_rows),
    ):
        gpu, problem = device(scheme), Problem(scheme, 6144, 2304, 1, sets=1)
        x, _ = problem.activations(m, 1)
        first, again = torch.empty(2, m, 2304, device="cuda")
        plan = next(p for p in plans(scheme, m, 2304, 6144, gpu.cu_count) if is_it(p))
        launch(gpu, problem, 0, x, first, plan)
        for _ in range(20):
            launch(gpu, problem, 0, x, again.fill_(0), replace(plan), overlap=False)
            assert torch.equal(first, again)


def every_way(scheme, m, n, k, cu_count, activated=False):
    """A plan that quantizes x in every block; where a launch does, also one that holds x and one that streams it; of
    each, one with weights that are there before x, and one without; one of waves that have all of K of their rows, and
    one of paired blocks."""
    found = reversed(plans(scheme, m, n, k, cu_count, activated))
    ways = {(min(p.share, 1), p.early, p.own_rows, p.paired): p for p in found}
    return list(ways.values())


@pytest.mark.parametrize("m", [32, 64])
def test_sums_that_travel_as_halves_hold_the_largest_codes(device, m):
    """1536 products of 448 by 448 in each of eight blocks rise to 18816 times 2^14; of both signs."""
    gpu, n, k = device("mxfp8"), 256, 12288
    problem = Problem("mxfp8", k, n, 5, sets=1)
    w = problem.weights[0]
    w.data.view(torch.uint8).fill_(0x7E)[1::2] = 0xFE
    w.scales.fill_(127)
    problem.packed = [pack(w)]
    x = torch.full((m, k), 448.0, device="cuda").bfloat16()
    exact, values = x.double(), problem.values(0).double()
    found = [p for p in plans("mxfp8", m, n, k, gpu.cu_count) if p.early]
    assert found
    for plan in found:
        y = torch.empty(m, n, device="cuda")
        launch(gpu, problem, 0, x, y, plan)
        error = (y - exact @ values.T).abs()
        assert (error <= bound(problem, exact, values)).all()  # of one sign, so all that is cut off adds up
        assert torch.equal(y[:, 1::2], -y[:, ::2])


@pytest.mark.parametrize("m", [5, 17, 64])
@pytest.mark.parametrize("scheme", ["w4a8", "mxfp4"])
def test_activations_of_every_size(device, scheme, m):
    """Subnormal scales, blocks of zeros, single large values: rounding in pairs, and what it leaves to floats."""
    gpu, n, k = device(scheme), 400, 1056
    problem = Problem(scheme, k, n, 5, sets=1)
    w = problem.values(0).double()
    for exponent in (-118, -100, -60, 0, 60, 90):
        x = (torch.randn(m, k, device="cuda") * 2.0**exponent).bfloat16()
        x[:, 64:96] = 0
        x[3, 100] *= 2.0**20
        exact = formats.fake_quantize_mx(x.float(), problem.scheme.act).double()
        allowed = bound(problem, exact, w) + k * 2.0**-149
        for plan in every_way(scheme, m, n, k, gpu.cu_count):
            y = torch.full((m, n), torch.nan, device="cuda")
            launch(gpu, problem, 0, x, y, plan)
            assert ((y.double() - exact @ w.T).abs() <= allowed).all(), (exponent, plan)
    x[2, 5] = torch.nan
    for plan in every_way(scheme, m, n, k, gpu.cu_count):
        launch(gpu, problem, 0, x, y, plan)
        assert y[2].isnan().all()
        assert y[[0, 1, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("scheme", ["w4a8", "mxfp8", "w4a16"])
def test_a_prepared_x_has_the_same_epilogue(device, scheme, activation, dtype):
    """bf16 with nothing to add goes a way of its own; rows of 404 results are not 16-byte aligned."""
    gpu, m, n, k = device(scheme), 37, 400 if activation else 404, 1056
    problem = Problem(scheme, k, n, 5, sets=1)
    x = problem.activations(m, 1)[0] / 16  # gates times ups are within a half's range
    results = []
    columns = n // 2 if activation else n
    bias, residual = torch.randn(n, device="cuda").bfloat16(), torch.randn(m, columns, device="cuda").bfloat16()
    residual = None if dtype == torch.bfloat16 else residual
    for plan in every_way(scheme, m, n, k, gpu.cu_count, activation is not None):
        y = torch.full((m, columns), torch.nan, dtype=dtype, device="cuda")
        room = torch.empty(prepared_bytes(scheme, plan, m, k), dtype=torch.uint8, device="cuda")
        for description in decode_gemm(
            x, *problem.packed[0], y, scheme=scheme, n=n, cu_count=gpu.cu_count, carry=carry(ActQuant(problem.scheme)),
            epilogue=Epilogue(bias, residual, activation), plan=plan, prepared=room,
        ):  # fmt: skip
            gpu.launch(description, torch.cuda.current_stream().cuda_stream)
        results.append(y.float())
    # Each may be off by RELATIVE_ERROR, a gate times its up by the errors of both, and bf16 by half of 2^-8.
    allowed = 4 * RELATIVE_ERROR + (2.0**-8 if dtype == torch.bfloat16 else 0)
    for result in results[1:]:
        assert (results[0] - result).norm() <= allowed * results[0].norm()


INT4 = [f"int4_w4a16{act}_g{group}" for act in ("", "_fp16") for group in (32, 64, 128)]


def int4_weights(scheme, shape, seed):
    """Random codes, scales of 2^-15 to 2^0 with any fraction, and zero points, on the GPU."""
    group, made = int(scheme.rpartition("_g")[2]), torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=made)
    groups = (*shape[:-1], shape[-1] // group)
    scales = (1 + torch.rand(groups, generator=made)) * torch.randint(-15, 0, groups, generator=made).exp2()
    zeros = torch.randint(0, 16, groups, dtype=torch.uint8, generator=made)
    words = group_words(scales.to(torch.float16 if seed % 3 == 0 else torch.bfloat16), zeros if seed % 2 else None)
    return MxTensor.canonical(data, words, replace(SCHEMES["int4_w4a16"], block=group)).to("cuda")


def run_int4(gpu, scheme, w, x, y, plan):
    """y = x w^T on the GPU."""
    packed = w.to_layout("mma_int4+tile_group")
    room = torch.empty(prepared_bytes(scheme, plan, *x.shape), dtype=torch.uint8, device="cuda")
    for description in decode_gemm(
        x, packed.data, packed.scales, None, y, scheme=scheme, n=w.n, cu_count=gpu.cu_count, plan=plan, prepared=room
    ):
        gpu.launch(description, torch.cuda.current_stream().cuda_stream)
    return y


def int4_bound(x, w):
    """What fp32 may lose: K products and a few partial sums, each rounded or truncated once, and two more roundings
    for each group's sum, to which scale and factor are applied."""
    k = x.shape[-1]
    return (k + 2 * k // 32 + 64) * 2.0**-23 * torch.einsum("mk,...nk->...mn", x.double().abs(), w.abs()) + 2.0**-60


@pytest.mark.parametrize("scheme", INT4)
def test_int4_random_shapes_and_plans(device, scheme):
    gpu, dice = device(scheme), random.Random(scheme)
    dtype = torch.float16 if "fp16" in scheme else torch.bfloat16
    for seed in range(SHAPES_A_SCHEME // 2):
        group = int(scheme.rpartition("_g")[2])
        m, n, k = dice.randint(1, 8), dice.randint(1, 3000), group * dice.randint(1, 8192 // group)
        if seed % 4:
            m = dice.choice((9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130))
        w, x = int4_weights(scheme, (n, k), seed), torch.randn(m, k, device="cuda").to(dtype)
        values, found = w.dequantize(torch.float64), plans(scheme, m, n, k, gpu.cu_count)
        for plan in (found[0], dice.choice(found)):
            y = run_int4(gpu, scheme, w, x, torch.full((m, n), torch.nan, device="cuda"), plan=plan)
            error = (y.double() - x.double() @ values.T).abs()
            assert (error <= int4_bound(x, values)).all(), (m, n, k, plan)


@pytest.mark.parametrize("m", [3, 16, 40])
@pytest.mark.parametrize("scheme", INT4)
def test_int4_nan(device, scheme, m):
    """A NaN scale makes its column of y NaN, a NaN of x its row, and nothing else: nor does what shared memory held
    before, where K ends within a tile."""
    gpu, k = device(scheme), 1152 if "128" in scheme else 1056 if "32" in scheme else 1088
    w, x = int4_weights(scheme, (130, k), 1), torch.randn(m, k, device="cuda")
    w.scales[77, -1] = 0x7FC00003
    x[1, 40] = torch.nan
    x = x.to(torch.float16 if "fp16" in scheme else torch.bfloat16)
    expected = torch.zeros(m, 130, dtype=torch.bool, device="cuda")
    expected[1], expected[:, 77] = True, True
    found = plans(scheme, m, 130, k, gpu.cu_count)
    for plan in (*found[:8], *every_way(scheme, m, 130, k, gpu.cu_count)):
        y = run_int4(gpu, scheme, w, x, torch.full((m, 130), 7.0, device="cuda"), plan=plan)
        assert torch.equal(y.isnan(), expected), plan
