"""Observations are what a run's diagnostics remember from one engine to the next."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from ds_sparkling.errors import CheckpointError
from ds_sparkling.files import whole_file
from ds_sparkling.monitoring.alarms import ExpertAlarm, LossAlarm, TwinAlarm
from ds_sparkling.spec.checked import Checked, Measured, checked
from ds_sparkling.spec.json_files import load_json
from ds_sparkling.spec.record import Spent

logger = logging.getLogger(__name__)

FILE_NAME = "ds_sparkling_diagnostics.json"


@checked()
class _Ratios(Checked):
    """The file's contents: RMS(out) / RMS(in) of blocks, by name."""

    ERROR = CheckpointError

    ratios: dict[str, Measured] = Field(description="When they were last measured.")
    ratios_before: dict[str, Measured] = Field(description="Just before the latest growth.")


@dataclass(kw_only=True)
class Observations:
    """Travels over growths with the run. A checkpoint has the ratios, and its growth record what has been spent; alarms
    begin anew when the process does.

    Attributes:
        ratios: RMS(out) / RMS(in) of every block when it was last measured.
        ratios_before: the same as of just before the latest growth; empty before the first.
        spent: tokens and compute so far; None if nobody knows.
        losses, twins, experts: the alarms.
        unseen_losses: (step, loss) that no alarm has looked at yet.
    """

    ratios: dict[str, float] = field(default_factory=dict)
    ratios_before: dict[str, float] = field(default_factory=dict)
    spent: Spent | None = field(default_factory=Spent)
    losses: LossAlarm = field(default_factory=LossAlarm)
    twins: TwinAlarm = field(default_factory=TwinAlarm)
    experts: ExpertAlarm = field(default_factory=ExpertAlarm)
    unseen_losses: list[tuple[int, Tensor]] = field(default_factory=list)

    def grown(self) -> None:
        """A growth has just happened."""
        self.ratios_before = dict(self.ratios)

    def look_at_losses(self) -> None:
        """Show the losses that weren't looked at yet to their alarm; waits for the device."""
        unseen, self.unseen_losses = self.unseen_losses, []
        losses = torch.stack([loss for _, loss in unseen]).tolist() if unseen else []
        for (step, _), loss in zip(unseen, losses, strict=True):
            message = self.losses.see(step, loss)
            if message is not None:
                logger.warning("%s", message)

    def write(self, checkpoint: Path) -> None:
        """Write the ratios, if any were measured, into the checkpoint directory (DIR/TAG), by a rename.

        Raises:
            SparklingError: if the file system refuses.
        """
        if not self.ratios:
            return
        with whole_file(checkpoint / FILE_NAME) as part:
            part.write_text(json.dumps(_Ratios(self.ratios, self.ratios_before).to_dict(), indent=1))

    def read(self, checkpoint: Path) -> None:
        """Take the ratios over from a checkpoint directory; none are known if it has none.

        Raises:
            CheckpointError: if what is there can't be read.
        """
        path = checkpoint / FILE_NAME
        try:
            found = _Ratios.from_dict(load_json(path))
        except FileNotFoundError:
            found = _Ratios({}, {})
        except (OSError, ValueError, CheckpointError) as error:
            raise CheckpointError(
                f"{path} can't be read ({error}); remove it to go on without activation_drift until the next growth"
            ) from error
        self.ratios, self.ratios_before = found.ratios, found.ratios_before
