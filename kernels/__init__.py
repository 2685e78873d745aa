"""Kernel sources and their manifests: HIP code objects and Triton bodies. Kernels import nothing of this package."""
