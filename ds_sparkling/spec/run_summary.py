"""What a finished run of the main job leaves in its directory: ``summary.json``, whole or not there."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ds_sparkling.errors import SparklingError
from ds_sparkling.files import whole_file

NAME = "summary.json"


@dataclass(frozen=True)
class RunSummary:
    """The outcome of a run.

    Attributes:
        variant: which run of its config it is, a value of :class:`~ds_sparkling.job.variants.Variant`.
        validation_loss: at the end.
        steps: optimizer steps done.
        tokens: tokens trained on.
        flops: training compute, 6 x active parameters x tokens (Eq. 29).
        seconds: training time, with validations, growths and checkpoints, without starting and stopped times.
        parameters: at the end.
        active_parameters: of them, those a token passes through.
        validations: (tokens, FLOPs, validation loss) of every validation; two at the same tokens stand before and after
            a growth. Summaries of version 0.1 have none.
    """

    variant: str
    validation_loss: float
    steps: int
    tokens: int
    flops: float
    seconds: float
    parameters: int
    active_parameters: int
    validations: list[tuple[int, float, float]] = field(default_factory=list)

    def write(self, directory: Path) -> None:
        """Write the file into the run's directory, by a rename.

        Raises:
            SparklingError: if it can't be written.
        """
        with whole_file(directory / NAME) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n")


def read_summary(directory: Path) -> RunSummary | None:
    """The summary in a run's directory; None if there is none.

    Raises:
        SparklingError: if the file isn't a summary.
    """
    path = directory / NAME
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SparklingError(f"{path} can't be read: {error}") from None
    if isinstance(found, dict):
        found = {"validations": [], **found}
    wanted = {entry.name: str(entry.type) for entry in fields(RunSummary)}
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
    fits = isinstance(found, dict) and found.keys() == wanted.keys()
    if not fits or not all(isinstance(found[name], kinds.get(kind, (list,))) for name, kind in wanted.items()):
        raise SparklingError(
            f"{path} isn't a run's summary: it must hold {', '.join(wanted)}; finish the run anew, or remove the file"
        )
    return RunSummary(**{**found, "validations": [tuple(point) for point in found["validations"]]})
