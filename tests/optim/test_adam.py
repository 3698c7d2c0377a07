"""The kernel is done without where it can't be built."""

from __future__ import annotations

import pytest
import torch

from ds_sparkling.optim import adam


def test_without_a_library_the_optimizers_own_code_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    param = torch.ones(8)
    param.grad = torch.ones(8)
    optimizer = torch.optim.AdamW([param], fused=True)
    optimizer.step()
    kernel = adam.AdamKernel(optimizer)
    assert kernel.takes(optimizer.param_groups[0], param)
    monkeypatch.setattr(adam, "library", lambda source, without: None)
    assert not kernel.takes(optimizer.param_groups[0], param)
