"""The plan of a growth in words: a few lines, and a table with one row per kind of parameter."""

from __future__ import annotations

from ds_sparkling.growth.plan import GrowthPlan, ParamPlan, Shape, roles_in_words
from ds_sparkling.growth.tables import GrowthTables
from ds_sparkling.text_tables import text_table


def plan_in_words(plan: GrowthPlan, *, fraction: float | None = None) -> str:
    """The plan as a few lines and a table with one row per kind of parameter.

    Args:
        plan: of a growth.
        fraction: share of the token budget spent before the growth, to tell the compute saved.
    """
    total = plan.parameters()
    grown = [f"{g.axis} {g.before} -> {g.after}" for g in plan.growths]
    grown += [f"{len({*longer.sources})} -> {len(longer.sources)} {longer.path}" for longer in plan.layers]
    widths = ", ".join(grown) or "unchanged widths"
    lines = [
        f"growth {plan.number}: {widths}",
        f"  parameters        {total[0]:>15,} -> {total[1]:>15,}",
    ]
    if plan.active_share is not None:
        active = plan.parameters(active=True)
        lines.append(f"  active per token  {active[0]:>15,} -> {active[1]:>15,}")
    if fraction is not None:
        saved = f"{plan.compute_saved(fraction):.1%} of the wide model's for as many tokens, to another loss"
        lines.append(f"  compute saved     {saved}")
    if plan.layers:
        lines.append(f"  new layers        {plan.strategy.layers.meaning}")
    if plan.growths:
        lines.append(f"  new units         {plan.strategy.units_meaning}")
        lines.append(f"  rescaled by       {plan.strategy.scaling.value}: the factors below")
    lines.append(f"  optimizer state   {plan.strategy.optimizer_state.value}: {plan.strategy.optimizer_state.meaning}")
    lines.append(f"  re-warm-up        {plan.strategy.rewarmup.meaning}")
    return "\n".join(lines + _table(plan))


def _table(plan: GrowthPlan) -> list[str]:
    rows: dict[tuple[str, ...], tuple[int, int]] = {}
    tables = GrowthTables(plan)
    for param in plan.params:
        rescaled = param.axes.head_gain and param.axes.axes & tables.growths.keys()
        if not (param.grows or rescaled or tables.multiplier(param.axes) != 1.0):
            continue
        roles = roles_in_words(param.axes, tables.growths)
        before = _shape(param.before) if param.made is None else f"new: {param.made.value}"
        kind = (before, _shape(param.after), roles, _factor(param, tables))
        count, new = rows.get(kind, (0, 0))
        rows[kind] = count + 1, new + param.new_elements
    unchanged = sum(not param.grows for param in plan.params)
    header = ("tensors", "before", "after", "grows along", "factor", "new elements")
    body = [(str(count), *kind, f"{new:,}") for kind, (count, new) in rows.items()]
    table = text_table([header, *body], left=range(len(header)), indent="  ")
    buffers = sum(buffer.grows for buffer in plan.buffers)
    followers = [f"  {buffers} buffers grow along, new entries as their sources'"] if buffers else []
    return [*table, f"  {unchanged} tensors keep their shape", *followers]


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _factor(param: ParamPlan, tables: GrowthTables) -> str:
    product = 1 / tables.multiplier(param.axes)
    for dim in param.axes.dims:
        factor = tables.weight_scale(dim, param.axes.head_gain)
        if not isinstance(factor, float):
            return "per part" if dim.parts else "per unit"
        product *= factor
    return f"{product:.6g}"
