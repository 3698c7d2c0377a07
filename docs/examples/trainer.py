"""Widen a Hugging Face mixture of experts in the middle of its training by ``transformers.Trainer``.

    deepspeed --num_gpus 2 docs/examples/trainer.py --deepspeed docs/examples/trainer.json --output runs/trainer

Growth is planned in the JSON. ``--resume runs/trainer/checkpoint-30`` goes on from there, with the widths it had.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from ds_sparkling import HuggingFaceFactory, recorded_widths
from ds_sparkling.integrations import SparklingCallback
from ds_sparkling.models.text import Corpus

MODEL = {
    "model_type": "qwen3_moe",
    "vocab_size": 256,  # bytes
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "use_cache": False,
}


class Windows(Dataset):
    """Bytes, cut into windows of ``length``."""

    def __init__(self, tokens: Any, length: int = 64) -> None:
        self.windows = torch.tensor(tokens[: len(tokens) // length * length], dtype=torch.long).view(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Widen a mixture of experts in the middle of a transformers.Trainer.")
    parser.add_argument("--deepspeed", required=True, metavar="FILE", help="DeepSpeed JSON with a 'sparkling' block")
    parser.add_argument("--output", required=True, metavar="DIR", help="where checkpoints and the model go")
    parser.add_argument("--resume", metavar="DIR", help="the Trainer's checkpoint to go on from")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps in all")
    parser.add_argument("--accumulation", type=int, default=1, help="micro batches per step")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations and checkpoints")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    return parser.parse_args()


def main() -> None:
    args = parse()
    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # accelerate starts DeepSpeed on several CPU processes only when told so in advance
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    arguments = TrainingArguments(  # before the model: from here on, models are made for this DeepSpeed config
        output_dir=args.output,
        deepspeed=args.deepspeed,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=5e-3,
        warmup_steps=3,
        weight_decay=0.1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=args.every,
        save_strategy="steps",
        save_steps=args.every,
        load_best_model_at_end=True,
        report_to="none",
        accelerator_config={"use_configured_state": on_cpu},
    )
    set_seed(0)
    corpus = Corpus.standard_library()
    build_model = HuggingFaceFactory(MODEL)

    trainer = Trainer(
        model=build_model(**recorded_widths(args.resume)),
        args=arguments,
        train_dataset=Windows(corpus.train[:100_000]),
        eval_dataset=Windows(corpus.validation[:4096]),
    )
    trainer.add_callback(SparklingCallback(trainer, build_model, checkpoint=args.resume))
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
