"""Errors whose message is one line: what (with its shape or place), why, and what to do about it."""

from __future__ import annotations


class AmdMxError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: the thing at fault, with its shape, file or layer name.
        reason: why it cannot be used.
        remedy: what the reader can do about it.
    """

    def __init__(self, what: str, reason: str, remedy: str) -> None:
        self.what, self.reason, self.remedy = what, reason, remedy
        line = f"{what}: {reason}; {remedy}"
        super().__init__("\\n".join(line.splitlines()))  # a file may hold names of several lines

    def __reduce__(self) -> tuple[type[AmdMxError], tuple[str, str, str]]:
        return type(self), (self.what, self.reason, self.remedy)


class ShapeError(AmdMxError, ValueError):
    """A tensor or problem whose shape breaks a contract."""


class SchemeError(AmdMxError, ValueError):
    """An unknown scheme, format or rounding mode, or one that does not fit here."""


class RecipeError(AmdMxError, ValueError):
    """A recipe that cannot be read or does not fit the model."""


class CheckpointError(AmdMxError, ValueError):
    """A checkpoint that is truncated, misnamed, wrongly shaped or otherwise not as its config says."""


class UnsupportedError(AmdMxError, RuntimeError):
    """The environment (versions, platform, flags) cannot do what was asked."""
