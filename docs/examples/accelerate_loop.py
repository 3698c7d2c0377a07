"""Widen a Hugging Face mixture of experts in the middle of a training loop on accelerate.

    deepspeed --num_gpus 2 docs/examples/accelerate_loop.py --deepspeed docs/examples/zero3.json --output runs/steps

``accelerate launch --use_deepspeed --num_processes 2`` starts it just as well. Growth is planned in the JSON.
``--resume runs/steps/step-30`` goes on from there, with the widths the model had.
"""

from __future__ import annotations

import argparse
import os

from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import DummyOptim, DummyScheduler, set_seed
from deepspeed.accelerator import get_accelerator

from ds_sparkling import HuggingFaceFactory, grow_if_due, recorded_widths
from ds_sparkling.integrations import growing
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
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Widen a mixture of experts in the middle of a loop on accelerate.")
    parser.add_argument("--deepspeed", required=True, metavar="FILE", help="DeepSpeed JSON with a 'sparkling' block")
    parser.add_argument("--output", required=True, metavar="DIR", help="where checkpoints go")
    parser.add_argument("--resume", metavar="DIR", help="the checkpoint to go on from")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps in all")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    return parser.parse_args()


def main() -> None:
    args = parse()
    backend = InitProcessGroupKwargs(backend=get_accelerator().communication_backend_name())
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=args.deepspeed),  # from here on, models are made for ZeRO-3
        kwargs_handlers=[backend],
    )
    set_seed(0)
    build_model = HuggingFaceFactory(MODEL)
    growing(accelerator, build_model, checkpoint=args.resume)

    model = build_model(**recorded_widths(args.resume))
    optimizer = DummyOptim(model.parameters())
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, DummyScheduler(optimizer))
    if args.resume:
        accelerator.load_state(args.resume)

    corpus = Corpus.standard_library()
    ranks = accelerator.num_processes
    while (step := model.global_steps) < args.steps:
        grow_if_due(model)
        batch = corpus.batch(step, size=4 * ranks, length=64, seed=0, rank=accelerator.process_index, ranks=ranks)
        ids = batch["input_ids"].to(accelerator.device)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step + 1}: loss {loss.item():.9f}, learning rate {scheduler.get_last_lr()[0]:.3g}")
        if (step + 1) % args.every == 0:
            accelerator.save_state(os.path.join(args.output, f"step-{step + 1}"))
    accelerator.end_training()


if __name__ == "__main__":
    main()
