"""Widen a Hugging Face mixture of experts in the middle of a training loop of one's own.

    deepspeed --num_gpus 2 docs/examples/training_loop.py --deepspeed docs/examples/zero3.json --output runs/loop

Growth is planned in the JSON. A second start with more ``--steps`` goes on from the last checkpoint, with the widths
the model had. Afterwards, ``python tools/expand_zero_ckpt.py runs/loop exported --format hf`` makes a directory for
``from_pretrained``.
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
from deepspeed import comm as dist

import ds_sparkling
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
    parser = argparse.ArgumentParser(description="Widen a mixture of experts in the middle of a plain training loop.")
    parser.add_argument("--deepspeed", required=True, metavar="FILE", help="DeepSpeed JSON with a 'sparkling' block")
    parser.add_argument("--output", required=True, metavar="DIR", help="for checkpoints; one in there is gone on from")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps in all")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    return parser.parse_args()


def main() -> None:
    args = parse()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    engine = ds_sparkling.initialize(ds_sparkling.HuggingFaceFactory(MODEL), args.deepspeed, checkpoint=args.output)
    engine.load_checkpoint(args.output)

    corpus = Corpus.standard_library()
    size, rank, ranks = engine.train_batch_size(), dist.get_rank(), dist.get_world_size()
    while (step := engine.global_steps) < args.steps:
        engine = ds_sparkling.grow_if_due(engine)
        batch = corpus.batch(step, size=size, length=64, seed=0, rank=rank, ranks=ranks)
        ids = batch["input_ids"].to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.9f}, learning rate {engine.get_lr()[0]:.3g}")
        if (step + 1) % args.every == 0:
            engine.save_checkpoint(args.output)
            if rank == 0:
                engine.module.config.save_pretrained(args.output)  # the present widths, for the export
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
