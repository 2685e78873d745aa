"""No choice is ever illegal: 10,000 random problems per arch, judged by facts written a second time (`judge.py`)."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from sglang_amd_quant.selection import SOURCES, Epilogue, GemmProblem, Selector, kernels, shipped
from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.pack_csv import load_file
from sglang_amd_quant.selection.packs import Packs
from tests.selection.judge import DECODE_LAYOUT, HOPPER_INT4_LAYOUTS, INT4_LAYOUTS, MOE_DECODE_LAYOUT, ON, violations

PROBLEMS = 10_000

SIZES = (32, 64, 96, 128, 192, 256, 360, 384, 512, 736, 768, 1024, 1472, 1536, 2048, 2304, 2880, 3072, 4096, 5760, 6144,
         7168, 9216, 12288, 16384, 28672)  # fmt: skip
SHAPES = ((1024, 7168), (3072, 3072), (1536, 6144), (6144, 768), (2304, 6144), (2048, 4096))
"""Shapes that the random packs are about; most of the problems are of these."""

MS = (1, 2, 3, 4, 8, 16, 17, 24, 32, 64, 100, 256, 1000, 1024, 4096, 8192, 40_000)


SCHEMES = ("mxfp8", "w4a8", "mxfp4", "w4a16", "int4_w4a16")
OPS = ("linear", "moe_gate_up", "moe_down")
KERNELS = [spec for spec in kernels().values() if spec.schemes]


def random_problem(rng: random.Random, arch: str) -> GemmProblem:
    """Mostly what some kernel is for, else anything."""
    spec = rng.choice([spec for spec in KERNELS if arch in spec.archs] or KERNELS)
    usual = rng.random() < 0.85
    op, scheme = (rng.choice(spec.ops), rng.choice(spec.schemes)) if usual else (rng.choice(OPS), rng.choice(SCHEMES))
    int4 = scheme == "int4_w4a16"
    group = rng.choice((32, 64, 128, 128)) if int4 else 32
    n, k = rng.choice(SHAPES) if rng.random() < 0.6 else (rng.choice(SIZES) + rng.randrange(2), rng.choice(SIZES))
    linear = op == "linear"
    e_total = 1 if linear else rng.choice((8, 32, 64, 128, 129, 192, 256, 512))
    ep = 1 if linear else rng.choice((1, 1, 2, 4, 8))
    packed = ("hopper_bf16", "hopper_e4m3", "mma_tile+mma_scale", *DECODE_LAYOUT.values(), *MOE_DECODE_LAYOUT.values())
    others = (
        ("exllama", *INT4_LAYOUTS, *HOPPER_INT4_LAYOUTS, "decode_cdna_int4", "decode_rdna_int4")
        if int4
        else ("cdna4_scale", "cdna4_scale_256", "preshuffle")
    )
    activations = (None,) if n % 2 else (None, "silu", "swigluoai")
    return GemmProblem(
        op, scheme, arch, rng.choice(MS), n, max(group, k // group * group), rng.choice((0, 0, 128)),
        -(-e_total // ep), e_total, 1 if linear else rng.choice((1, 4, 5, 8)), ep, ep,
        Epilogue(rng.random() < 0.3, rng.choice(activations), beta=rng.choice((None, None, 1.0, 0.5))),
        rng.choice(("bf16",) * 7 + ("fp16", "fp32", "mxfp8", "mxfp4")),
        rng.choice((None, None, "strided", rng.choice(others), "hopper_bf16" if int4 else rng.choice(packed))),
        group, {"w4a8": "fp8_static", "mxfp8": "bf16"}.get(scheme, "") if rng.random() < 0.2 else "",
        rng.choice((0,) * 6 + (16, 32, 64, 128)), rng.random() < 0.5,
    )  # fmt: skip


NONSENSE = (0, 1, 7, 24, 96, 2048)


def random_row(rng: random.Random, arch: str) -> dict[str, object]:
    """An entry: for half of its fields as its kernel has them, else wrong, or nonsense."""
    spec = rng.choice(KERNELS)
    right = rng.random() < 0.9
    op, scheme = (rng.choice(spec.ops), rng.choice(spec.schemes)) if right else (rng.choice(OPS), rng.choice(SCHEMES))
    n, k = rng.choice(SHAPES)
    row: dict[str, object] = {"arch": arch, "op": op, "N": n, "K": k, "scheme": scheme}
    row["kernel"] = spec.name if rng.random() < 0.95 else "gone_kernel"
    for name in ("block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages", "nonkdim"):
        if name in spec.space:
            row[name] = rng.choice(spec.space[name])
        if rng.random() < 0.04:
            row[name] = rng.choice(NONSENSE)
    row["layout"] = rng.choice(("", "", "", "strided", "cdna4_scale", "exllama", "preshuffle"))
    row["cu_num"] = rng.choice(("", 256, 128))
    if op == "linear":
        row["M"] = rng.choice(MS)
    else:
        row["E"] = rng.choice(("", 16, 32, 64, 128, 129, 256))
        row["top_k"] = rng.choice(("", 1, 4, 8))
        keyed_by = rng.choice(("M", "M_routed", "block_m"))
        row[keyed_by] = row.get("block_m", 32) if keyed_by == "block_m" else rng.choice(MS)
    return row


@pytest.mark.parametrize("arch", list(ARCHES))
def test_no_choice_is_illegal(arch, write_pack):
    rng = random.Random(f"selection {arch}")
    packs = Packs(load_file(write_pack(f"{arch}.csv", *(random_row(rng, arch) for _ in range(800)))))
    plan, here = Selector(packs), Selector(packs, available=shipped())
    sources = dict.fromkeys(SOURCES, 0)
    for _ in range(PROBLEMS if any(arch in spec.archs for spec in KERNELS) else 1000):  # no kernel, no choice
        problem = random_problem(rng, arch)
        choice = plan(problem)
        assert not violations(problem, choice), (problem, choice)
        sources[choice.source] += 1
    for problem in list(plan._chosen)[:2000]:
        assert here(problem).kernel in shipped()
        assert not violations(problem, here(problem)), problem
    if arch == "gfx950":  # the sample exercises every step of the lookup
        assert min(sources.values()) > 20, sources


def test_choices_do_not_depend_on_the_order_of_equal_work():
    """The same problem gets the same choice whatever was asked before, and from another selector."""
    rng = random.Random(3)
    problems = [random_problem(rng, "gfx950") for _ in range(300)]
    one, two = Selector(), Selector()
    assert [one(p) for p in problems] == [two(p) for p in reversed(problems)][::-1]


def test_every_kernel_is_judged():
    assert set(ON) == {spec.name for spec in KERNELS}


def test_the_judge_sees_what_is_wrong():
    """The judge itself: each field of a legal choice spoilt in turn is found."""
    problem = GemmProblem("moe_gate_up", "w4a8", "gfx950", 64, 3072, 3072, 0, 128, 128, 4, layout="cdna4_scale")
    choice = Selector(Packs([]))(problem)
    assert not violations(problem, choice)
    for spoilt in ({"block_k": 128}, {"block_n": 16}, {"num_warps": 1}, {"num_stages": 4, "block_n": 512}):
        assert violations(problem, replace(choice, config=choice.config._replace(**spoilt))), spoilt
    assert violations(problem, replace(choice, layout="strided"))
    assert violations(replace(problem, block_m=128), choice)
