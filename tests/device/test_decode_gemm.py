"""The decode GEMM on a Hopper GPU: random shapes and plans against fp64 of the same operands, and its limits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from op_layers import MX

SHAPES_A_SCHEME = 200


@pytest.fixture
def device(arch, needs):
    """The GPU with the kernels of a scheme loaded: `device(scheme)`."""
    if arch != "sm_90":
        pytest.skip(f"plans of this file are sm_90's, not {arch}'s")
    needs("hip_decode")
    from sglang_amd_quant.kernels.hip.manifest import find

    from sglang_amd_quant.runtime.device import gpu

    def loaded(scheme):
        gpu(0).load(*(e.name for e in find(f"decode_{scheme}_m2")[0].entry_points))
        return gpu(0)

    return loaded


@pytest.mark.parametrize("scheme", MX)
def test_random_shapes_and_plans(device, scheme):
    """`Reference` (bench/decode.py) derives the bound: an ulp of the running sum for each of K additions."""
    from bench.decode import Problem, Reference
    from sglang_amd_quant.runtime.decode_gemm import plans

    gpu, dice = device(scheme), random.Random(11)
    for seed in range(SHAPES_A_SCHEME):
        m, n = dice.choice((1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 130)), dice.randint(1, 3000)
        k = 32 * dice.choice((1, 2, 3, dice.randint(4, 40), dice.randint(41, 256)))
        problem = Problem(scheme, k, n, seed, sets=1)
        found = plans(scheme, m, n, k, gpu.cu_count)
        reference = Reference(problem, m, seed)
        for plan in (found[0], dice.choice(found)):
            assert reference.check(gpu, problem, plan) < 1e-3


@pytest.mark.parametrize(("scheme", "m"), [("w4a8", 1), ("w4a16", 16), ("mxfp8", 64)])
def test_weights_beyond_two_gibibytes(device, scheme, m):
    """Rows whose byte offsets are no int32 give what the same rows give at the beginning."""
    from bench.decode import Problem, Reference, launch
    from sglang_amd_quant.runtime.decode_gemm import plans

    gpu, n, k = device(scheme), 1024, 8192
    small = Problem(scheme, k, n, 3, sets=1)
    reference = Reference(small, m, 3)
    plan = plans(scheme, m, n, k, gpu.cu_count)[0]
    assert reference.check(gpu, small, plan) < 1e-3
    copies = 2**31 // small.bytes + 2
    big = Problem(scheme, 32, 16, 3, sets=1)
    big.n, big.k = n * copies, k
    big.packed = [tuple(None if t is None else t.flatten().repeat(copies) for t in small.packed[0])]
    y = torch.full((m, big.n), torch.nan, device="cuda")
    launch(gpu, big, 0, reference.x, y, plan)
    parts = y.view(m, copies, n)
    assert torch.equal(parts, parts[:, :1].expand_as(parts))
    assert ((parts[:, -1].double() - reference.want).abs() <= reference.bound).all()


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("scheme", ["w4a8", "mxfp8"])
def test_nan_scales_make_their_rows_nan(device, scheme, m):
    from bench.decode import Problem, launch
    from sglang_amd_quant.runtime.decode_gemm import plans

    gpu, n, k = device(scheme), 130, 1056
    problem = Problem(scheme, k, n, 5, sets=1)
    problem.scales[0, 77, 3] = 255
    problem.packed = [problem._pack(problem.codes[0], problem.scales[0])]
    x, _ = problem.activations(m, 1)
    y = torch.empty(m, n, device="cuda")
    for plan in plans(scheme, m, n, k, gpu.cu_count)[:8]:
        y.fill_(7)
        launch(gpu, problem, 0, x, y, plan)
        assert y[:, 77].isnan().all()
        assert y[:, torch.arange(n) != 77].isfinite().all()


def test_the_same_bits_each_time(device):
    from bench.decode import Problem, launch
    from sglang_amd_quant.runtime.decode_gemm import plans

    for scheme, m in (("w4a8", 1), ("mxfp8", 16), ("w4a16", 64)):
        gpu, problem = device(scheme), Problem(scheme, 6144, 2304, 1, sets=1)
        x, _ = problem.activations(m, 1)
        first, again = torch.empty(2, m, 2304, device="cuda")
        plan = plans(scheme, m, 2304, 6144, gpu.cu_count)[0]
        launch(gpu, problem, 0, x, first, plan)
        for _ in range(20):
            launch(gpu, problem, 0, x, again.fill_(0), replace(plan), overlap=False)
            assert torch.equal(first, again)
