"""MX quantization backend for SGLang on AMD GPUs: MXFP4, MXFP8, W4A8 and W4A16.

Importing this package imports neither torch nor sglang; the subpackages that need them do.
"""

__version__ = "0.1.0"
