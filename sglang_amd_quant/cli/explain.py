"""`amd-mx explain`: which kernel a GEMM gets, and why."""

from __future__ import annotations

import argparse
import json

from sglang_amd_quant.cli.arguments import device_arch
from sglang_amd_quant.errors import ShapeError
from sglang_amd_quant.runtime.detect import launchable, missing
from sglang_amd_quant.schemes import SCHEMES
from sglang_amd_quant.selection import Selector
from sglang_amd_quant.selection.arch import ARCHES
from sglang_amd_quant.selection.explain import explain
from sglang_amd_quant.selection.problem import ACT_BITS, ACTIVATIONS, OPS, OUT_DTYPES, Epilogue, GemmProblem

DESCRIPTION = """Say which kernel a GEMM gets, its config and source, and why each other candidate was refused.

The plan looks at every kernel that selection knows, published mechanisms included; the line that begins with `here`
says what this installation would really run there. No GPU is needed. N and K are one rank's (see `amd-mx shapes`)."""
EXAMPLE = "amd-mx explain --arch gfx950 --op moe_gate_up --scheme w4a8 --m 64 --n 5760 --k 2880 --experts 128 --top-k 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", required=True, type=device_arch, help=f"one of {', '.join(ARCHES)}, or a member")
    parser.add_argument("--op", required=True, choices=OPS)
    parser.add_argument("--scheme", required=True, choices=list(SCHEMES))
    parser.add_argument("--m", required=True, type=int, help="tokens")
    parser.add_argument("--n", required=True, type=int, help="output elements on one rank (gate_up: gate and up)")
    parser.add_argument("--k", required=True, type=int, help="input elements on one rank")
    parser.add_argument("--experts", type=int, default=1, metavar="E", help="experts of the model (default 1)")
    parser.add_argument("--top-k", type=int, default=1, help="experts a token (default 1)")
    parser.add_argument("--tp", type=int, default=1, help="SGLang's --tp (default 1)")
    parser.add_argument("--ep", type=int, default=1, help="SGLang's --ep: this rank holds E/EP experts (default 1)")
    parser.add_argument("--cu-count", type=int, default=0, help="compute units (default: the arch's usual device)")
    parser.add_argument("--layout", help="layout the weights have (default: what load time would choose)")
    parser.add_argument("--group", type=int, default=0, help="elements per int4 scale (default: as served)")
    parser.add_argument("--act", choices=list(ACT_BITS), default="", help="activation format, if not the scheme's")
    parser.add_argument("--out-dtype", choices=OUT_DTYPES, default="bf16", help="what the op hands on (default bf16)")
    parser.add_argument("--block-m", type=int, default=0, help="BLOCK_M that routing has fixed (default: free)")
    parser.add_argument("--bias", action="store_true", help="the GEMM adds a bias")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="gated activation fused after it (default: none)")
    parser.add_argument("--weighted", action="store_true", help="the routing weight is multiplied in")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.ep < 1 or args.experts % args.ep:
        raise ShapeError(f"{args.experts} experts with EP {args.ep}", "do not divide", "give an --ep that divides them")
    group = args.group or SCHEMES[args.scheme].served_block(args.k)
    problem = GemmProblem(
        args.op, args.scheme, args.arch, args.m, args.n, args.k, args.cu_count, args.experts // args.ep, args.experts,
        args.top_k, args.tp, args.ep, Epilogue(args.bias, args.activation), args.out_dtype, args.layout, group,
        args.act, args.block_m, args.weighted,
    )  # fmt: skip
    here = Selector(available=launchable(args.arch))
    explanation = explain(problem, here=here, lacking=missing(args.arch))
    print(json.dumps(explanation.to_json(), indent=1) if args.json else explanation.text())
    return 0
