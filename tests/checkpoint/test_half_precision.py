"""fp16 checkpoints, with their dynamic loss scale: made from bf16 ones, as fp16 doesn't train on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_files
import tiny
from distributed import Workers
from tiny import Case

WIDE = {"hidden_size": 13, "moe_intermediate_size": 11}


def save_as_fp16(case: Case, directory: str) -> None:
    """Train in bf16, and save what an fp16 run would."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    engine = tiny.initialize(case)
    tiny.train(engine, 2)
    engine.save_checkpoint(directory)
    torch.distributed.barrier()
    if engine.global_rank:
        return
    scaler = DynamicLossScaler(2**12, 1000, 1, 2, False, dtype=torch.float16)
    scaler.cur_iter = 7
    for path in sorted((Path(directory) / "global_step2").glob("*.pt")):
        content = torch.load(path, weights_only=False)
        if "optimizer_state_dict" in content:
            content["optimizer_state_dict"].update(loss_scaler=scaler, dynamic_loss_scale=True)
        content.get("ds_config", {}).pop("bf16", None)
        torch.save(halved(content), path.with_name(path.name.removeprefix("bf16_")))
        if path.name.startswith("bf16_"):
            path.unlink()


def halved(content: Any) -> Any:
    if isinstance(content, torch.Tensor):
        return content.half() if content.dtype is torch.bfloat16 else content
    if isinstance(content, dict):
        return type(content)((key, halved(value)) for key, value in content.items())
    return [halved(value) for value in content] if isinstance(content, list) else content


@pytest.mark.parametrize("case", [Case(2, 3, 2, bf16=True), Case(2, 2, 2, bf16=True, frozen=True)], ids=str)
def test_fp16_grows_and_keeps_its_loss_scale(case: Case, workers: Callable[[int], Workers], tmp_path: Path) -> None:
    workers(2).run(save_as_fp16, case, str(tmp_path / "saved"))
    if case.stage < 3:  # the rounded masters are others in fp16
        round_masters(tmp_path / "saved/global_step2")
    options: dict[str, Any] = {"config": "olmoe_factory:build_tied", "world_size": 4, "expert_parallel": 2}
    checkpoint_files.run(tmp_path / "saved", tmp_path / "wide", WIDE, **options)
    for rank in range(4):
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        optimizer = torch.load(tmp_path / "wide/global_step2" / name, weights_only=False)["optimizer_state_dict"]
        scaler = optimizer["loss_scaler"]
        assert (type(scaler).__name__, scaler.cur_scale, scaler.cur_iter) == ("DynamicLossScaler", 2**12, 7)
        assert scaler.dtype is torch.float16
    if case.stage < 3:
        model = torch.load(tmp_path / "wide/global_step2/mp_rank_00_model_states.pt", weights_only=False)["module"]
        assert {tensor.dtype for tensor in model.values()} == {torch.float16}
        source = checkpoint_files.open_checkpoint(tmp_path / "wide/global_step2")
        for name, param in source.layout.params.items():
            if name in model and param.trained:
                master = source.elements(name, "weight", 0, param.numel).view(param.shape)
                assert torch.equal(model[name], master.half()), name


def round_masters(checkpoint: Path) -> None:
    """Make the module's weights the masters, rounded to fp16."""
    source = checkpoint_files.open_checkpoint(checkpoint)
    model = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)
    for name, tensor in model["module"].items():
        param = source.layout.params.get({"lm_head.weight": "embed_tokens.weight"}.get(name, name))
        if param is not None and param.trained:
            tensor.copy_(source.elements(param.name, "weight", 0, param.numel).view(param.shape))
    torch.save(model, checkpoint / "mp_rank_00_model_states.pt")
