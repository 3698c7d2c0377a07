"""Show what only TensorBoard can: a page of the curves that matter, and the run's settings."""

from __future__ import annotations

import json
import logging
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from ds_sparkling.engine.growing_run import GrowingRun, run_of
from ds_sparkling.spec.config import BLOCK

logger = logging.getLogger(__name__)

#: Page of the custom scalars' dashboard -> chart -> patterns of the tags in it.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "Growth": {
        "loss": ["Multiline", ["^Train/loss$", "^Train/Samples/train_loss$", "^Validation/loss$"]],
        "loss by compute [GFLOPs]": ["Multiline", ["^By_compute/.*"]],
        "learning rate by birth": ["Multiline", ["^lr/birth_.*"]],
        "update RMS": ["Multiline", ["^update_rms/.*"]],
        "twins: cosine with the source unit": ["Multiline", ["^twins/(cosine|cosine_max|gradient_cosine)$"]],
        "blocks: RMS(out) / RMS(in) over that before the growth": ["Multiline", ["^activation_drift/.*"]],
        "blocks: RMS(out) / RMS(in)": ["Multiline", ["^activation_ratio/.*"]],
        "effective rank": ["Multiline", ["^effective_rank/.*"]],
        "router entropy [nats]": ["Multiline", ["^router/entropy/.*"]],
        "expert load, largest and smallest": ["Multiline", ["^router/load_(max|min)/.*"]],
    }
}

#: The setting that is looked for first.
_FIRST = "optimizer.params.lr"
#: Blocks of a DeepSpeed config that are no settings of the training, and may hold keys to services.
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")


def writer_of(engine: DeepSpeedEngine) -> Any:
    """The engine's ``SummaryWriter``; None on other ranks and without TensorBoard."""
    return getattr(getattr(engine.monitor, "tb_monitor", None), "summary_writer", None)


def introduce_run(engine: DeepSpeedEngine) -> None:
    """Write the layout, and for a run's first engine its settings, which go into the run's own file.

    What of the settings TensorBoard can't hold is left out with a warning: it is no reason to end the training.
    """
    writer, run = writer_of(engine), run_of(engine)
    if writer is None:
        return
    writer.add_custom_scalars(LAYOUT)
    if run.plan is None:
        left_out = []
        for name, write in (("Run/config, its text", _write_config), ("its hyperparameters", _write_settings)):
            try:
                write(writer, run)
            except Exception as error:  # cycles, keys that are tuples, integers without end, half characters
                left_out.append(f"{name} ({type(error).__name__}: {str(error)[:200]})")
        if left_out:
            logger.warning(
                "TensorBoard can't hold what the DeepSpeed config says, so it lacks %s; the training isn't touched",
                " and ".join(left_out),
            )
    writer.flush()


def _write_config(writer: Any, run: GrowingRun) -> None:
    config = {key: value for key, value in run.ds_config.items() if key not in _MONITORS}
    writer.add_text("Run/config", f"```\n{json.dumps(config, indent=1, default=str)}\n```", 0)


def _write_settings(writer: Any, run: GrowingRun) -> None:
    """``SummaryWriter.add_hparams`` would make a run of its own for them."""
    from torch.utils.tensorboard.summary import hparams

    metrics = {"Train/loss": None, "Validation/loss": None}
    for summary in hparams(settings(run), metrics)[:2]:  # the third one says that the run is over
        writer.file_writer.add_summary(summary)


def settings(run: GrowingRun) -> dict[str, int | float | str | bool]:
    """The numbers and words of the DeepSpeed config by their paths, the learning rate first, as TensorBoard keeps their
    order; the growths' strategy in full, and the widths that the run starts with. Lists become their JSON."""
    found: dict[str, int | float | str | bool] = {}

    def put(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                put(f"{path}.{key}" if path else str(key), inner)
        elif isinstance(value, (bool, int, float, str)):
            found[path] = value
        elif isinstance(value, (list, tuple)):
            found[path] = json.dumps(value, default=str)

    config = {key: value for key, value in run.ds_config.items() if key not in _MONITORS}
    put("", {**config, BLOCK: {**config.get(BLOCK, {}), **run.config.strategy.to_dict()}})
    put("widths", run.record.initial_widths)
    return {key: found[key] for key in sorted(found, key=lambda key: key != _FIRST)}


def write_by_compute(engine: DeepSpeedEngine, name: str, value: float) -> None:
    """A scalar over the training compute so far, in GFLOPs; other monitors than TensorBoard have one x for all."""
    writer, spent = writer_of(engine), run_of(engine).spent
    if writer is not None and spent is not None and spent.flops:
        writer.add_scalar(f"By_compute/{name}", value, int(spent.flops / 1e9))


def close_writer(engine: DeepSpeedEngine) -> None:
    """Close the engine's TensorBoard file; the grown engine opens the next one in the same directory."""
    writer = writer_of(engine)
    if writer is not None:
        writer.close()
