"""Every GEMM of a model, from its config.json and TP x EP. No torch."""

from sglang_amd_quant.shapes.facts import ModelFacts, cards, load
from sglang_amd_quant.shapes.planner import Gemm, plan

__all__ = ["Gemm", "ModelFacts", "cards", "load", "plan"]
