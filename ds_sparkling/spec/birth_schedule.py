"""The learning-rate schedule of what a growth made, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, PlainValidator, model_validator

from ds_sparkling.errors import CheckpointError
from ds_sparkling.spec.checked import Checked, Integer, Number, Switch, checked
from ds_sparkling.spec.strategy import Rewarmup


def _count(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"must be a number of steps, got {value!r}")
    return value


#: Steps as a schedule counts them; torch's take 100.0 as well as 100.
Steps = Annotated[int, PlainValidator(_count)]


@checked()
class CosineBase(Checked):
    """A base schedule in its cosine phase."""

    ERROR = CheckpointError

    remaining: Steps = Field(description="T - t_e, steps until it reaches its end.")
    ends: tuple[Number, ...] = Field(description="eta_min of every parameter group.")
    total: Steps = Field(description="T, steps from its start to its end.")
    warmup: Steps = Field(description="T_w, those of them before the cosine.")

    @model_validator(mode="before")
    @classmethod
    def _of_any_version(cls, data: Any) -> Any:
        """Earlier versions wrote neither the total nor the warm-up."""
        if not isinstance(data, Mapping):
            return data
        return {"total": data.get("remaining"), "warmup": 0, **data}


@checked()
class Birth(Checked):
    """The schedule of the elements that one growth made."""

    ERROR = CheckpointError

    rewarmup: Rewarmup = Field(description="Ratio rho, steps tau_w and scope.")
    starts: tuple[Number, ...] = Field(
        description="eta_e = eta(t_e), the base rate of every parameter group at the growth."
    )
    base: CosineBase | None = Field(
        description="The rest of the base's cosine, if the curve is the paper's. null for a factor on the base rate."
    )
    restart: Switch = Field(description="Whether Adam's bias correction counts from the birth.")
    age: Integer = Field(default=0, description="Steps done since the growth, t - t_e.")

    def older(self) -> Birth:
        """The same one step later."""
        return replace(self, age=self.age + 1)
