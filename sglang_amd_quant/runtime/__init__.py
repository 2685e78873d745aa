"""Devices: what is here, and loading and launching code objects on it."""
