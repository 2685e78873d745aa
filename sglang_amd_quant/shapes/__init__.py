"""Every GEMM of a model, from its config.json and TP x EP. No torch."""
