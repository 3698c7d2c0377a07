"""What a growth leaves in the monitors: a marker on the x-axis, and the plan as text in TensorBoard."""

from __future__ import annotations

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.growth import GrowthPlan


def mark_growth(engine: DeepSpeedEngine, plan: GrowthPlan, text: str) -> None:
    """Write the growth's scalars and its plan at the engine's present sample count."""
    samples = engine.global_samples
    total, active = plan.parameters(), plan.parameters(active=True)
    engine.monitor.write_events(
        [
            ("Growth/stage", plan.stage, samples),
            ("Growth/parameters", total[1], samples),
            ("Growth/active_parameters", active[1], samples),
            *((f"Growth/{growth.axis}", growth.after, samples) for growth in plan.growths),
        ]
    )
    writer = _tensorboard(engine)
    if writer is not None:
        writer.add_text("Growth/plan", f"```\n{text}\n```", samples)
        writer.flush()


def close_monitors(engine: DeepSpeedEngine) -> None:
    """Close the engine's TensorBoard file; the grown engine opens the next one in the same directory."""
    writer = _tensorboard(engine)
    if writer is not None:
        writer.close()


def _tensorboard(engine: DeepSpeedEngine):  # type: ignore[no-untyped-def]  # SummaryWriter is an optional import
    return getattr(getattr(engine.monitor, "tb_monitor", None), "summary_writer", None)
