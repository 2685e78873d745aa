"""The `amd-mx` command."""
