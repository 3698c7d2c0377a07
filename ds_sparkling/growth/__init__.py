"""The growth maths: shapes and tensors in, tensors out. Knows torch, but no model, no engine and no file."""

from ds_sparkling.growth.births import birth_stages, births_of_piece
from ds_sparkling.growth.plan import GrowthPlan, ParamPlan, count_parameters, make_plan
from ds_sparkling.growth.widen import Widener

__all__ = ["GrowthPlan", "ParamPlan", "Widener", "birth_stages", "births_of_piece", "count_parameters", "make_plan"]
