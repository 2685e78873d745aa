"""Which kernel runs a GEMM problem, and why. No torch, no triton."""
