"""HIP sources, their headers and their manifest."""
