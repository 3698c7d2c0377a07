"""The growth maths: shapes and tensors in, tensors out. Knows torch, but no model, no engine and no file."""

from ds_sparkling.growth.births import Block, birth_blocks
from ds_sparkling.growth.plan import GrowthPlan, ParamPlan, Shares, count_parameters, make_plan
from ds_sparkling.growth.tables import GrowthTables
from ds_sparkling.growth.widen import Widener, grown_buffer

__all__ = [
    "Block",
    "GrowthPlan",
    "GrowthTables",
    "ParamPlan",
    "Shares",
    "Widener",
    "birth_blocks",
    "count_parameters",
    "grown_buffer",
    "make_plan",
]
