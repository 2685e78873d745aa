"""Number formats in torch, on any device: the reference for every kernel."""
