"""Fused MoE on this machine's GPU beside its peers: correctness against fp64, then time in CUDA graphs.

    python -m bench.moe [--shapes gpt-oss-120b-tp1,...] [--schemes w4a8,w4a16] [--m 1,16,256] [--tune] [--out FOLDER]

Measured: microseconds, and the read bandwidth that `floor` is taken with: bytes of the active experts' weights and
scales over it. `us` is everything from topk_ids to the combined sum; `gemms` leaves routing out, as the peers' time
does where their routing is another call (`triton_kernels`, `humming`).

Method: a graph launches the MoE once for each of several routings and sets of weights that together exceed the L2
twice; it is replayed, the time between events divided by the launches, the median taken. Ours and the peers see the
same weights, activations and routings. Before that, every stage is compared with fp64 of the same quantized operands
on fresh random inputs, into buffers of NaN; a peer's result with fp64 of the unrounded MoE.
"""

from __future__ import annotations

import bench.source_tree  # noqa: F401

# isort: split
import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import triton
from sglang_amd_quant.kernels.triton.combine import combine, combine_torch
from sglang_amd_quant.kernels.triton.hopper import (
    HopperConfig,
    activations,
    default_configs,
    fused_moe_hopper,
    hopper_gemm,
)
from sglang_amd_quant.kernels.triton.hopper_pack import HopperWeights, pack_hopper
from sglang_amd_quant.kernels.triton.quant_mx import quant_mx_torch
from sglang_amd_quant.kernels.triton.routing import route
from triton.errors import TritonError

from bench.moe_pack import pack_entries
from bench.moe_problem import (
    SHAPES,
    Shape,
    Weights,
    grouped,
    random_routing,
    random_weights,
    relative,
    whole,
)
from bench.moe_tune import candidates, everything, timings, tune
from bench.peers_moe import PEERS
from bench.timing import graph_us, read_bandwidth

# scheme -> (elements of weights and of activations, what the kernel multiplies activations as)
SCHEMES = {
    "w4a16": ("e2m1", None, "bf16"),
    "w4a8": ("e2m1", "e4m3", "e4m3"),
    "w4a8-exact": ("e2m1", "e4m3", "bf16"),
    "mxfp4": ("e2m1", "e2m1", "e4m3"),
    "mxfp8": ("e4m3", "e4m3", "e4m3"),
}

PEER_FAILURES = (
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    AssertionError,
    TritonError,
)
"""What a peer's failure may be: a line of the report, no end of the run."""


class Ours:
    """The Hopper kernels on one set of weights."""

    def __init__(self, shape: Shape, weights: Weights, scheme: str) -> None:
        _, self.element, x_format = SCHEMES[scheme]
        a = shape.activation
        pairs = "interleaved" if a.interleaved else "halves"
        self.shape, self.weights = shape, weights
        self.w13: HopperWeights = pack_hopper(weights.w13, weights.s13, x_format, pairs)
        self.w2: HopperWeights = pack_hopper(weights.w2, weights.s2, x_format)
        self.activation = {"activation": a.kind, "limit": a.limit, "alpha": a.alpha, "beta": a.beta}

    def whole(self, x, ids, topk_weights, configs: tuple[HopperConfig, HopperConfig]) -> torch.Tensor:
        """Everything."""
        return fused_moe_hopper(
            x, ids, topk_weights, self.w13, self.w2, *configs, element=self.element, b13=self.weights.b13,
            b2=self.weights.b2, **self.activation,
        )  # fmt: skip

    def gate_up(self, left, factors, hidden, routing, config: HopperConfig) -> torch.Tensor:
        """The first GEMM."""
        return hopper_gemm(
            left, factors, self.w13, hidden, routing, config, top_k=self.shape.top_k, bias=self.weights.b13,
            **self.activation,
        )  # fmt: skip

    def down(self, left, factors, routed, routing, config: HopperConfig, topk_weights) -> torch.Tensor:
        """The second GEMM."""
        return hopper_gemm(left, factors, self.w2, routed, routing, config, bias=self.weights.b2,
                           row_weights=topk_weights)  # fmt: skip

    def gemms(self, x, ids, topk_weights, configs: tuple[HopperConfig, HopperConfig], routing) -> torch.Tensor:
        """Everything but routing."""
        rows, e, xf = ids.numel(), self.shape.experts, self.w13.x_format
        hidden = torch.empty(rows, self.shape.inter, dtype=x.dtype, device=x.device)
        routed = torch.empty(rows, self.shape.hidden, dtype=x.dtype, device=x.device)
        self.gate_up(*activations(x, self.element, None, xf), hidden, routing, configs[0])
        self.down(*activations(hidden, self.element, None, xf), routed, routing, configs[1], topk_weights)
        return combine(routed, ids, e, torch.empty_like(x))


def check(shape: Shape, scheme: str, m: int, seed: int, config: HopperConfig | None = None) -> dict[str, float]:
    """Relative error of each stage against fp64 of its own operands. Raises AssertionError beyond the bound.

    config: of both GEMMs; None: the default for this M.

    A bf16 result is off by 2^-9 of itself at most, so the norm of all errors is within 2^-9 of the norm; fp32 sums add
    K 2^-24 at the worst. Hopper adds fp8 products in steps of 32 and keeps 13 bits below the largest term of a step: on
    random data some 2^-13 of a typical sum a step, growing as the root of K / 32 steps of either sign, so under 2^-9
    again for K up to 8192; the bound for fp8 is the sum. Activations and combine are exact: equal to their twins. With
    e4m3 weights, packing moves an element by at most 2^-10 of its row's scale, a 2^-18th of the row's largest.
    """
    experts = min(shape.experts, 16)
    small = Shape(experts, min(shape.top_k, experts), shape.hidden, shape.inter, shape.activation, shape.bias,
                  shape.element)  # fmt: skip
    weights = random_weights(small, seed, experts)
    ours = Ours(small, weights, scheme)
    x = torch.randn(m, shape.hidden, device="cuda").bfloat16()
    ids, topk_weights = random_routing(m, small, seed, drop=0.15)
    here = ids.reshape(-1) >= 0
    configs = default_configs(m, small.top_k, experts, ours.w13.x_format, ours.w13.w_format)
    configs = configs if config is None else (config, config)
    routing = route(ids, experts, configs[0].block_m)
    errors, bound = {}, 2.0**-9 * (1.02 if ours.w13.x_format == "bf16" else 2)
    hidden = torch.full((ids.numel(), shape.inter), torch.nan, dtype=x.dtype, device="cuda")
    left, factors = quantized(x, ours, "gate_up input")
    ours.gate_up(left, factors, hidden, routing, configs[0])
    values = left.double() * (1 if factors is None else factors.double()[:, None])
    exact = shape.activation(grouped(values, ids, weights, 0, small.top_k, experts))
    errors["gate_up"] = relative(hidden[here], exact[here])
    assert hidden[~here].isnan().all(), "a dropped row was written"
    hidden[~here] = 0
    routed = torch.full((ids.numel(), shape.hidden), torch.nan, dtype=x.dtype, device="cuda")
    left, factors = quantized(hidden, ours, "down input")
    ours.down(left, factors, routed, routing, configs[1], topk_weights)
    values = left.double() * (1 if factors is None else factors.double()[:, None])
    exact = grouped(values, ids, weights, 1, 1, experts) * topk_weights.double().view(-1, 1)
    errors["down"] = relative(routed[here], exact[here])
    y = combine(routed, ids, experts, torch.full_like(x, torch.nan))
    assert torch.equal(y, combine_torch(routed, ids, experts).to(y.dtype)), "combine differs from its twin"
    errors["whole"] = relative(ours.whole(x, ids, topk_weights, configs), whole(x, ids, topk_weights, weights, small))
    # An activation squeezes or stretches errors of its input by a bounded factor; swiglu and silu by up to 1.1 and 2.
    for stage, factor in (("gate_up", 2), ("down", 1)):
        assert errors[stage] <= bound * factor, (shape, scheme, m, stage, errors[stage], bound)
    return errors


def check_configs(names: list[str], schemes: list[str]) -> int:
    """Every config of the search, whatever it is for, on few tokens and a small layer. Returns the number of checks."""
    done = 0
    for name in names:
        s = SHAPES[name]
        small = Shape(max(8, s.top_k), s.top_k, 416, 224, s.activation, s.bias, s.element)
        for scheme in schemes:
            element, _, x_format = SCHEMES[scheme]
            if element == s.element:
                for config in everything(x_format, element):
                    check(small, scheme, 61, 17, config)
                    done += 1
    return done


def quantized(x: torch.Tensor, ours: Ours, what: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the kernel multiplies, after comparing it bit for bit with the twin."""
    left, factors = activations(x, ours.element, None, ours.w13.x_format)
    if ours.element is not None:
        out = "bf16" if ours.w13.x_format == "bf16" else "row"
        direct = ours.element == "e4m3" and out == "row"
        twin, twin_factors = quant_mx_torch(x, None if direct else ours.element, out)
        assert torch.equal(left.view(torch.uint8), twin.view(torch.uint8)), f"{what} differs from its twin"
        assert factors is None or torch.equal(factors, twin_factors), f"{what}: factors differ from the twin's"
    return left, factors


def measure(
    name: str, schemes: list[str], ms: list[int], peers: list[str], bandwidth: float, tuned: bool
) -> tuple[list[dict], bool]:
    """Time ours in each scheme, and the peers, at each M. Returns the rows, and whether a peer has lost the device."""
    shape, rows = SHAPES[name], []
    weights = random_weights(shape, seed=1)
    problems = {}
    for m in ms:
        ids = [random_routing(m, shape, seed)[0] for seed in range(1)]
        active = ids[0].unique().numel()
        sets = max(3, min(24, -(-(2 << 26) // (active * shape.weight_bytes))))
        problems[m] = (
            torch.randn(m, shape.hidden, device="cuda").bfloat16(),
            [random_routing(m, shape, seed) for seed in range(sets)],
        )

    def add(kernel: str, m: int, us: float, **more: object) -> None:
        routings = problems[m][1]
        active = statistics.mean(i.unique().numel() for i, _ in routings)
        size, rows_ = active * shape.weight_bytes, m * shape.top_k
        row = {
            "shape": name, "kernel": kernel, "M": m, "active": active, "us": us, "TB/s": size / us / 1e6,
            "TFLOP/s": rows_ * shape.flops / us / 1e6, "floor_us": size / bandwidth * 1e6,
            "of_floor": size / bandwidth * 1e6 / us, **more,
        }  # fmt: skip
        rows.append(row)
        print(_line(row), flush=True)

    for scheme in schemes:
        if SCHEMES[scheme][0] != shape.element:  # of another kind of weights
            continue
        ours = Ours(shape, weights, scheme)
        for m in ms:
            x, routings = problems[m]
            configs = default_configs(m, shape.top_k, shape.experts, ours.w13.x_format, ours.w13.w_format)
            if tuned:
                space = candidates(m, shape.top_k, shape.experts, ours.w13.x_format, ours.w13.w_format)
                configs = tune(ours, x, routings, space)
            placed = [route(i, shape.experts, configs[0].block_m) for i, _ in routings]
            both = zip(routings, placed, strict=True)
            gemms = graph_us([partial(ours.gemms, x, i, w, configs, r) for (i, w), r in both])
            us = graph_us([partial(ours.whole, x, i, w, configs) for i, w in routings])
            add(f"ours {scheme}", m, us, gemms=gemms, config13=vars(configs[0]), config2=vars(configs[1]),
                timings=list(timings), x_format=ours.w13.x_format)  # fmt: skip
        torch.cuda.empty_cache()
    exact: dict[int, torch.Tensor] = {}
    for key in peers:
        try:
            peer = PEERS[key](shape, weights)
        except PEER_FAILURES as error:
            print(f"{name}: {PEERS[key].name} left out: {type(error).__name__} {str(error)[:300]}", flush=True)
            continue
        for m in ms:
            x, routings = problems[m]
            try:
                runs = [peer.bind(x, i, w) for i, w in routings]
                error = None
                if m <= 256:
                    if m not in exact:
                        exact[m] = whole(x, *routings[0], weights, shape)
                    error = relative(runs[0](), exact[m])
                add(peer.name, m, graph_us(runs), error=error)
            except PEER_FAILURES as failure:
                print(f"{name} M={m}: {peer.name} failed: {type(failure).__name__} {str(failure)[:300]}", flush=True)
                if _device_is_lost():
                    print("the device is lost to this process: run the rest in another", flush=True)
                    return rows, True
        del peer
        torch.cuda.empty_cache()
    return rows, False


def _device_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _line(r: dict) -> str:
    gemms = f"{r['gemms']:9.1f}" if "gemms" in r else " " * 9
    error = f"  error {r['error']:.1e}" if r.get("error") is not None else ""
    return (
        f"{r['shape']:17} {r['kernel']:29} {r['M']:5} {r['active']:6.1f} {r['us']:9.1f} {gemms} {r['floor_us']:8.1f} "
        f"{100 * r['of_floor']:5.0f} {r['TB/s']:6.2f} {r['TFLOP/s']:6.0f}{error}"
    )


def plot(result: dict, file: Path) -> None:
    """Microseconds over M, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(r["shape"] for r in result["rows"]))
    figure, axes = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 4.2), squeeze=False)
    for axis, name in zip(axes[0], shapes, strict=True):
        rows = [r for r in result["rows"] if r["shape"] == name]
        for kernel in dict.fromkeys(r["kernel"] for r in rows):
            mine = [r for r in rows if r["kernel"] == kernel]
            axis.plot([r["M"] for r in mine], [r["us"] for r in mine], marker="o", label=kernel)
        floor = {r["M"]: r["floor_us"] for r in rows}
        axis.plot(list(floor), list(floor.values()), "k--", label="weights of active experts, read once")
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="us", title=name)
        axis.legend(fontsize=7)
    figure.suptitle(f"{result['device']}, measured {result['date']}")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> int:
    """Check, measure, print. Returns 0, or 1 on a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of " + ", ".join(SHAPES))
    parser.add_argument("--schemes", default="w4a8,w4a16,mxfp8", help="of " + ", ".join(SCHEMES))
    parser.add_argument("--m", default="1,4,16,64,256,1024,8192", help="tokens, comma-separated")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated, or none")
    parser.add_argument("--tune", action="store_true", help="time all configs, and use the fastest")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with fp64")
    parser.add_argument("--date", default="", help="for the report")
    parser.add_argument("--out", type=Path, help="folder for moe.json, moe.png and pack entries")
    args = parser.parse_args()

    names = args.shapes.split(",")
    schemes = [] if args.schemes == "none" else args.schemes.split(",")
    errors = {}
    if not args.no_check:
        for seed, (name, scheme, m) in enumerate((n, s, m) for n in names for s in schemes for m in (1, 5, 61, 300)):
            if SCHEMES[scheme][0] == SHAPES[name].element:
                errors[f"{name} {scheme} M={m}"] = e = check(SHAPES[name], scheme, m, seed)
                print(f"{name} {scheme} M={m}: " + ", ".join(f"{k} {v:.2e}" for k, v in e.items()), flush=True)
        if args.tune:
            print(check_configs(names, schemes), "checks of the configs of the search agree with fp64", flush=True)
    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    result = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "date": args.date, "read_bandwidth_GB_s": bandwidth / 1e9, "errors": errors, "rows": [],
    }  # fmt: skip
    peers = [] if args.peers == "none" else args.peers.split(",")
    print(
        f"{result['device']}, torch {torch.__version__}, triton {triton.__version__}, {bandwidth / 1e9:.0f} GB/s read"
    )
    print(f"{'shape':17} {'kernel':29}     M active        us     gemms floor us % floor   TB/s TFLOP/s")
    for name in names:
        ms = [int(m) for m in args.m.split(",")]
        rows, lost = measure(name, schemes, ms, peers, bandwidth, args.tune)
        result["rows"] += rows
        if args.out:  # after each shape, so that a run that is cut short leaves what it has
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "moe.json").write_text(json.dumps(result, indent=1))
            for file, text in pack_entries(result, SHAPES).items():
                (args.out / file).write_text(text)
        if lost:
            break
    if args.out:
        plot(result, args.out / "moe.png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AssertionError as error:
        print(f"wrong result: {error}", file=sys.stderr)
        sys.exit(1)
