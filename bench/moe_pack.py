"""Pack entries (docs/packs.md) from what `bench.moe --tune` has measured."""

from __future__ import annotations

from collections.abc import Mapping

import bench.source_tree  # noqa: F401

# isort: split
from bench.moe_problem import Shape
from sglang_amd_quant.selection.pack_csv import COLUMNS
from sglang_amd_quant.selection.specs import kernel

MODELS = {
    "gpt-oss-120b-tp1": "gpt-oss",
    "gpt-oss-120b-tp8": "gpt-oss",
    "qwen3-30b-a3b": "qwen3-30b-a3b",
    "minimax-m3-tp4": "minimax-m3",
}


def pack_entries(result: Mapping, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """File name -> CSV text: the fastest pair of configs of one block_m, of each scheme, shape and M that was searched.

    A parameter that the registered kernel does not list is none that a pack may state: such configs are passed over.
    """
    files: dict[str, list[str]] = {}
    for row in result["rows"]:
        if not row.get("timings"):
            continue
        scheme, shape = row["kernel"].removeprefix("ours "), shapes[row["shape"]]
        name = f"triton_hopper_{row['x_format']}"
        space = kernel(name).space
        known = [t for t in row["timings"] if t["run"] == 1 or "run" in space]
        pairs = []
        for block_m in {t["block_m"] for t in known}:
            best = [
                min((t for t in known if t["block_m"] == block_m and t["gemm"] == g), key=lambda t: t["us"])
                for g in ("gate_up", "down")
            ]
            pairs.append((best[0]["us"] + best[1]["us"], block_m, best))
        _, _, best = min(pairs)
        errors = [e for k, e in result["errors"].items() if k.startswith(f"{row['shape']} {scheme} ")]
        for timing in best:
            n, k = (2 * shape.inter, shape.hidden) if timing["gemm"] == "gate_up" else (shape.hidden, shape.inter)
            entry = {
                "arch": "sm_90", "cu_num": 132, "op": f"moe_{timing['gemm']}", "scheme": scheme, "N": n, "K": k,
                "E": shape.experts, "top_k": shape.top_k, "tp": shape.tp, "ep": 1, "M": row["M"],
                "layout": f"hopper_{row['x_format']}", "kernel": name, "block_m": timing["block_m"],
                "block_n": timing["block_n"], "block_k": timing["block_k"], "num_warps": timing["num_warps"],
                "num_stages": timing["num_stages"],
                "params": ";".join(f"{p}={timing[p]}" for p in ("group_m", "run") if p in space),
                "us": f"{timing['us']:.1f}", "err": f"{max(e[timing['gemm']] for e in errors):.1e}" if errors else "",
                "device": result["device"], "versions": f"torch {result['torch']}; triton {result['triton']}",
                "date": result["date"], "source": "measured",
            }  # fmt: skip
            file = f"{scheme}-{MODELS[row['shape']]}.csv"
            files.setdefault(file, []).append(",".join(str(entry.get(c, "")) for c in COLUMNS))
    head = ["# amd-mx pack 1", ",".join(COLUMNS)]
    return {file: "\n".join(head + lines) + "\n" for file, lines in files.items()}
