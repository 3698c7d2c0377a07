"""A finished run of the main job leaves a summary in its directory: ``summary.json``, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from ds_sparkling.errors import SparklingError
from ds_sparkling.files import whole_file
from ds_sparkling.spec.checked import Checked, Integer, Measured, Number, Text, checked
from ds_sparkling.spec.json_files import load_json

NAME = "summary.json"


@checked(kw_only=True)
class RunSummary(Checked):
    """The outcome of a run."""

    ERROR = SparklingError

    variant: Text = Field(description="Which run of its config it is, as job.variants.Variant has it.")
    validation_loss: Measured = Field(description="At the end.")
    steps: Integer = Field(description="Optimizer steps done.")
    tokens: Integer = Field(description="Tokens trained on.")
    flops: Number = Field(description="Training compute, 6 x active parameters x tokens (Eq. 29).")
    seconds: Number = Field(
        description="Training time, with validations, growths and checkpoints, without starting and stopped times."
    )
    parameters: Integer = Field(description="At the end.")
    active_parameters: Integer = Field(description="Of the parameters at the end, those a token passes through.")
    validations: list[tuple[Integer, Number, Measured]] = Field(
        default_factory=list,
        description="(tokens, FLOPs, validation loss) of every validation. Two at the same tokens stand before and "
        "after a growth. Summaries of version 0.1 have none.",
    )

    def write(self, directory: Path) -> None:
        """Write the file into the run's directory, by a rename.

        Raises:
            SparklingError: if it can't be written.
        """
        with whole_file(directory / NAME) as part:
            part.write_text(json.dumps(self.to_dict(), indent=2) + "\n")


def read_summary(directory: Path) -> RunSummary | None:
    """The summary in a run's directory; None if there is none.

    Raises:
        SparklingError: if the file isn't a summary.
    """
    path = directory / NAME
    try:
        return RunSummary.from_dict(load_json(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SparklingError(f"{path} can't be read: {error}") from None
    except SparklingError as error:
        raise SparklingError(
            f"{path} isn't a run's summary: {error}; finish the run anew, or remove the file"
        ) from None
