"""What can go wrong, by whose hand: the caller's (inputs, settings), the model's nature, or ours."""

from __future__ import annotations


class TokenCacheError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(TokenCacheError, ValueError):
    """A setting is outside its range or does not fit the model."""


class InputError(TokenCacheError, ValueError):
    """A call of the transformed model has inputs it cannot serve."""


class UnsupportedModelError(TokenCacheError):
    """The user's model cannot be transformed: names the block, the reason and the remedy."""

    def __init__(self, where: str, reason: str, remedy: str) -> None:
        self.where, self.reason, self.remedy = where, reason, remedy
        super().__init__(f"{where}: {reason}. {remedy}")


class InvariantError(TokenCacheError):
    """A pass produced a program that is not what it promised: a bug of this package, not of the caller."""


class ExportError(TokenCacheError):
    """An engine, a package or the disk refuses what was to be exported."""


class BundleError(TokenCacheError):
    """A bundle is not what its manifest says, or does not fit this machine or call."""
