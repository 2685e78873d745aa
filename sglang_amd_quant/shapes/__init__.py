"""Every GEMM of a model, from its config.json and TP x EP. No torch."""

from sglang_amd_quant.shapes.facts import ModelFacts, cards, load
from sglang_amd_quant.shapes.planner import Gemm, plan
from sglang_amd_quant.shapes.roofline import BANDWIDTH_TBPS, floor_us, limits

__all__ = ["BANDWIDTH_TBPS", "Gemm", "ModelFacts", "cards", "floor_us", "limits", "load", "plan"]
