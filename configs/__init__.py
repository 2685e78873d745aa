"""Data: model cards (`models/`) and tuned packs (`packs/`)."""
