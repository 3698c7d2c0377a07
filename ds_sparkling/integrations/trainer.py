"""Growth inside ``transformers.Trainer``.

    trainer = Trainer(model=build_model(**recorded_widths(resume)), args=arguments, ...)
    trainer.add_callback(SparklingCallback(trainer, build_model, checkpoint=resume))
    trainer.train(resume_from_checkpoint=resume)

How the engine gets into the Trainer: the Trainer makes it through ``trainer.accelerator.prepare``, loads a checkpoint
into it at once, and from then on holds it in a local variable of its training loop as well as in attributes of its own
and of accelerate. So the engine is adopted inside ``prepare``, and grown in place: every one of these goes on holding
the same object. That relies on nothing but ``accelerator.prepare``, ``model_wrapped`` and the callback's events, which
are public and the same in all supported versions; a subclass would have to follow the private methods around the loop,
which are not.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

import ds_sparkling
from ds_sparkling.discovery.build import BuildModel
from ds_sparkling.discovery.forward import Inputs
from ds_sparkling.engine.notices import notice_end
from ds_sparkling.errors import ConfigError, UnsupportedError
from ds_sparkling.integrations.accelerate import growing

logger = logging.getLogger(__name__)

_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


class SparklingCallback(TrainerCallback):
    """Grows the Trainer's model at the steps planned in the ``"sparkling"`` block of its DeepSpeed config.

    Where a growth is due after a step, that step's evaluation and logging see the model as it was, and the Trainer is
    asked for a checkpoint (unless ``checkpoint_before_growth`` is false); then, before the next step, the model grows.
    The best model so far is forgotten at a growth: its weights don't fit into the grown model any more.

    Args:
        trainer: the Trainer that the callback is going to be added to.
        build_model: ``build_model(**widths) -> nn.Module``; the Trainer's model must be what it makes.
        checkpoint: what ``trainer.train(resume_from_checkpoint=...)`` is going to get, if anything; the model has to be
            built at the widths recorded there. Nothing is saved there but by the Trainer.
        optimizer: makes anew, at a growth, an optimizer that isn't in the DeepSpeed JSON; as for
            :func:`ds_sparkling.adopt`.
        model_parameters: makes its groups anew; as for :func:`ds_sparkling.adopt`.
        inputs: to try growths with; as for :func:`ds_sparkling.adopt`.

    Raises:
        ConfigError: if ``checkpoint`` isn't a path.
        UnsupportedError: if the Trainer's arguments change the model in a way that a growth would lose.
    """

    def __init__(
        self,
        trainer: Any,
        build_model: BuildModel,
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        optimizer: Callable[..., Any] | None = None,
        model_parameters: Callable[[Any], Any] | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        if isinstance(checkpoint, bool):
            raise ConfigError(
                "checkpoint must be a path; the latest is transformers.trainer_utils.get_last_checkpoint(output_dir)"
            )
        for name in ("neftune_noise_alpha", "use_liger_kernel"):
            if getattr(trainer.args, name, None):
                raise UnsupportedError(f"{name}: what it changes in the model would be lost at a growth")
        self.trainer = trainer
        self._tokens: dict[str, Any] = {}
        growing(
            trainer.accelerator,
            build_model,
            checkpoint=checkpoint,
            optimizer=optimizer,
            model_parameters=model_parameters,
            inputs=inputs,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self.trainer.model_wrapped
        growths = len(engine.sparkling.record.growths)
        ds_sparkling.grow_if_due(engine)
        if len(engine.sparkling.record.growths) == growths:
            return
        if state.best_model_checkpoint is not None and state.is_world_process_zero:
            logger.warning("the best model so far, %s, doesn't fit the grown one", state.best_model_checkpoint)
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._set_up(engine.module)

    def _set_up(self, model: Any) -> None:
        """Do to the grown model what the Trainer does to a model before it trains."""
        if self.trainer.args.gradient_checkpointing:
            settings = self.trainer.args.gradient_checkpointing_kwargs
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        for name, value in self._tokens.items():
            setattr(model.config, name, value)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            notice_end(self.trainer.model_wrapped.sparkling, state.max_steps, "the Trainer")
        # The Trainer has aligned them with its tokenizer's.
        config = self.trainer.model.config
        self._tokens = {name: getattr(config, name) for name in _TOKENS if hasattr(config, name)}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.trainer.model_wrapped.sparkling
        if run.due(self.trainer.model_wrapped.global_steps) and run.config.checkpoint_before_growth:
            control.should_save = True
