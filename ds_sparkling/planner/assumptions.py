"""Assume what neither config nor command line tells. Imports no torch, so that the command's help is quick."""

from __future__ import annotations

from dataclasses import dataclass

from ds_sparkling.errors import ConfigError

#: Ranks, where the command line doesn't say.
DEFAULT_RANKS = 8


@dataclass(frozen=True)
class Assumptions:
    """What no config tells, and what the pause is made of.

    Attributes:
        bandwidth: that a rank receives with, in GB/s (1e9 bytes).
        write_bandwidth: that a rank writes a checkpoint with, in GB/s.
        engine_start: seconds that DeepSpeed takes to construct the wide engine, its broadcast apart.
    """

    bandwidth: float = 25.0
    write_bandwidth: float = 1.0
    engine_start: float = 30.0

    def __post_init__(self) -> None:
        if not (self.bandwidth > 0 and self.write_bandwidth > 0 and self.engine_start >= 0):
            raise ConfigError(
                "--bandwidth and --write-bandwidth must be positive and --engine-start not negative, got "
                f"{self.bandwidth}, {self.write_bandwidth} and {self.engine_start}"
            )
