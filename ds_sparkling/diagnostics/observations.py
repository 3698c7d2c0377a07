"""What a run's diagnostics remember from one engine to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_sparkling.diagnostics.alarms import ExpertAlarm, LossAlarm, TwinAlarm


@dataclass
class Observations:
    """Travels over growths with the run, and begins anew when the process does, but for what the checkpoint has.

    Attributes:
        ratios: RMS(out) / RMS(in) of every block when it was last measured.
        ratios_before: the same as of just before the latest growth; empty before the first.
        losses, twins, experts: the alarms.
    """

    ratios: dict[str, float] = field(default_factory=dict)
    ratios_before: dict[str, float] = field(default_factory=dict)
    losses: LossAlarm = field(default_factory=LossAlarm)
    twins: TwinAlarm = field(default_factory=TwinAlarm)
    experts: ExpertAlarm = field(default_factory=ExpertAlarm)

    def grown(self) -> None:
        """A growth has just happened."""
        self.ratios_before = dict(self.ratios)
