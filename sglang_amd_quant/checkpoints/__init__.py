"""Checkpoint formats, one file each: read, validate, stream and write."""
