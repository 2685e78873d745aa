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

NOTE = "us: the whole MoE from topk_ids to the sum"
"""One number for both GEMMs: each was chosen by it."""


def pack_entries(result: Mapping, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """File name -> CSV text: the configs of each scheme, shape and M that was searched, or already had its entry."""
    files: dict[str, list[str]] = {}
    for row in result["rows"]:
        if not row.get("configs_timed") and row.get("configs") != "exact":
            continue
        scheme, shape = row["scheme"], shapes[row["shape"]]
        name = f"triton_hopper_{row['x_format']}"
        space = kernel(name).space
        errors = [e for k, e in result["errors"].items() if k.startswith(f"{row['shape']} {scheme} ")]
        peers = [
            r["us"] for r in result["rows"] if (r["shape"], r["M"]) == (row["shape"], row["M"]) and "scheme" not in r
        ]
        for gemm, config in (("gate_up", row["config13"]), ("down", row["config2"])):
            n, k = (2 * shape.inter, shape.hidden) if gemm == "gate_up" else (shape.hidden, shape.inter)
            entry = {
                "arch": "sm_90", "cu_num": 132, "op": f"moe_{gemm}", "scheme": scheme, "N": n, "K": k,
                "E": shape.experts, "top_k": shape.top_k, "tp": shape.tp, "ep": 1, "M": row["M"],
                "layout": f"hopper_{row['x_format']}", "kernel": name, "block_m": config["block_m"],
                "block_n": config["block_n"], "block_k": config["block_k"], "num_warps": config["num_warps"],
                "num_stages": config["num_stages"],
                "params": ";".join(f"{p}={config[p]}" for p in ("group_m", "max_registers") if p in space),
                "us": f"{row['us']:.1f}", "err": f"{max(e[gemm] for e in errors):.1e}" if errors else "",
                "peer_us": f"{min(peers):.1f}" if peers else "", "device": result["device"],
                "versions": f"torch {result['torch']}; triton {result['triton']}", "date": result["date"],
                "source": "measured", "note": NOTE,
            }  # fmt: skip
            file = f"{scheme}-{MODELS[row['shape']]}.csv"
            files.setdefault(file, []).append(",".join(str(entry.get(c, "")) for c in COLUMNS))
    head = ["# amd-mx pack 1", ",".join(COLUMNS)]
    return {file: "\n".join(head + lines) + "\n" for file, lines in files.items()}
