"""What SGLang calls: linear and fused MoE, and their torch reference."""
