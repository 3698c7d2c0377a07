"""Width growth in the middle of training (SPARKLING, arXiv:2602.02472) for models trained with DeepSpeed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds_sparkling.check.proof import prove_function
    from ds_sparkling.check.report import check_growth
    from ds_sparkling.record import recorded_widths
    from ds_sparkling.zero.adopt import adopt
    from ds_sparkling.zero.engine import grow, grow_if_due, initialize, rebuild

__all__ = [
    "adopt",
    "check_growth",
    "grow",
    "grow_if_due",
    "initialize",
    "prove_function",
    "rebuild",
    "recorded_widths",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # DeepSpeed is imported when the engine room is first asked for, so that growth maths and tools start without it.
    if name == "check_growth":
        from ds_sparkling.check import report

        return report.check_growth
    if name == "prove_function":
        from ds_sparkling.check import proof

        return proof.prove_function
    if name == "recorded_widths":
        from ds_sparkling.record import recorded_widths

        return recorded_widths
    if name == "adopt":
        from ds_sparkling.zero.adopt import adopt

        return adopt
    if name in __all__:
        from ds_sparkling.zero import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
