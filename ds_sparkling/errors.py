"""The errors a user can cause, one kind per place where the mistake lies.

All of them derive from :class:`SparklingError`, say what was found and what was expected, and name the way out.
"""

from __future__ import annotations


class SparklingError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(SparklingError, ValueError):
    """A key or value of the ``"sparkling"`` block (or of the surrounding JSON) is wrong."""


class PlanError(SparklingError, ValueError):
    """The requested growth doesn't fit the model: widths, shapes, roles or an unmatched parameter."""


class UnsupportedError(SparklingError, NotImplementedError):
    """DeepSpeed cannot combine this setting with growth, or this package doesn't support it yet."""


class GrowthError(SparklingError, RuntimeError):
    """A growth was asked for at the wrong moment, twice, or failed on at least one rank."""


class CheckpointError(SparklingError, RuntimeError):
    """A checkpoint's growth record is missing, damaged, or contradicts the engine."""
