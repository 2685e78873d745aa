"""The only part that imports sglang: plugin, quantization config, linear and fused-MoE methods, CPU platform."""
