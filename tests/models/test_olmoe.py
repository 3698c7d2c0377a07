"""The reference model against loops over tokens, heads and experts written from the equations."""

from __future__ import annotations

import cmath
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_sparkling.models.olmoe import Attention, MoE, OlmoeConfig, OlmoeForCausalLM, _rotary, load_balancing_loss


def tiny(**changes: Any) -> OlmoeConfig:
    sizes = {
        "vocab_size": 11,
        "hidden_size": 8,
        "moe_intermediate_size": 5,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    return OlmoeConfig(**{**sizes, **changes})


def trained(module: nn.Module) -> Any:
    """Double precision and weights so large that every part shows in the output."""
    torch.manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for name, param in module.named_parameters():
            param.normal_(1.0, 0.3) if "norm" in name else param.normal_(0.0, 0.7)
    return module


TOKENS = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))


# -- experts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True])
def test_a_moe_block_is_a_loop_over_tokens_and_their_experts(normalised: bool) -> None:
    moe = trained(MoE(tiny(norm_topk_prob=normalised)))
    x = torch.randn(2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(18, 8, dtype=torch.float64)
    for n, token in enumerate(x.view(18, 8)):
        logits = [float(row @ token) for row in moe.gate.weight.detach()]
        total = sum(math.exp(logit) for logit in logits)
        probabilities = [math.exp(logit) / total for logit in logits]
        chosen = sorted(range(4), key=lambda e: -probabilities[e])[:2]
        share = sum(probabilities[e] for e in chosen) if normalised else 1.0
        for e in chosen:
            gate, up = moe.experts.gate_up_proj[e][:5] @ token, moe.experts.gate_up_proj[e][5:] @ token
            hidden = gate / (1 + (-gate).exp()) * up
            expected[n] += probabilities[e] / share * (moe.experts.down_proj[e] @ hidden).detach()
    # The router works in fp32.
    torch.testing.assert_close(moe(x).view(18, 8), expected, rtol=1e-5, atol=1e-5)


def test_an_expert_nobody_chose_gets_a_zero_gradient_and_not_none() -> None:
    """Every rank must reduce the same gradients, whichever experts its tokens chose."""
    moe = trained(MoE(tiny(num_experts=8)))
    moe(torch.ones(1, 1, 8, dtype=torch.float64)).sum().backward()
    used = moe.experts.down_proj.grad.flatten(1).any(1)
    assert int(used.sum()) == 2


# -- attention -----------------------------------------------------------------------------------------------------


def test_attention_is_a_loop_over_heads_and_earlier_tokens() -> None:
    """Grouped-query attention; rotary positions as complex numbers; q and k normed per head before the rotation."""
    config = tiny(rope_theta=100.0, rms_norm_eps=0.1)
    attention = trained(Attention(config))
    x = torch.randn(1, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def heads(projection: nn.Linear, norm: nn.RMSNorm | None) -> list[list[Tensor]]:
        """[token][head] -> the head's vector."""
        rows = (x[0] @ projection.weight.T).detach()
        vectors = [list(row.split(6)) for row in rows]
        if norm is None:
            return vectors
        gain = norm.weight.detach()
        return [[v / (v.square().mean() + 0.1).sqrt() * gain for v in row] for row in vectors]

    def rotated(v: Tensor, position: int) -> list[complex]:
        """Entry i and i + D/2 are one complex number, turned by position x theta^(-2i/D)."""
        return [complex(v[i], v[i + 3]) * cmath.exp(1j * position * 100.0 ** (-2 * i / 6)) for i in range(3)]

    q, k = heads(attention.q_proj, attention.q_norm), heads(attention.k_proj, attention.k_norm)
    v = heads(attention.v_proj, None)
    rows = []
    for t in range(5):
        out = []
        for head in range(4):
            group = head // 2
            query = rotated(q[t][head], t)
            scores = [
                sum((a * b.conjugate()).real for a, b in zip(query, rotated(k[s][group], s), strict=True))
                / math.sqrt(6)
                for s in range(t + 1)
            ]
            total = sum(map(math.exp, scores))
            weighted = [math.exp(score) / total * v[s][group] for s, score in enumerate(scores)]
            out.append(torch.stack(weighted).sum(0))
        rows.append(attention.o_proj.weight.detach() @ torch.cat(out))
    found = attention(x, _rotary(5, config, x))
    # The angles are made in fp32.
    torch.testing.assert_close(found[0], torch.stack(rows), rtol=1e-5, atol=1e-5)


# -- the whole model -----------------------------------------------------------------------------------------------


def test_a_later_token_does_not_change_earlier_logits() -> None:
    model = trained(OlmoeForCausalLM(tiny()))
    before = model(TOKENS)
    for position in range(1, 7):
        changed = TOKENS.clone()
        changed[:, position] = (changed[:, position] + 1) % 11
        after = model(changed)
        # To rounding: an expert multiplies its tokens as one matrix, whose row count the change can alter.
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(after[:, position:], before[:, position:], rtol=1e-3, atol=1e-3)


def test_sequences_of_a_batch_do_not_mix() -> None:
    model = trained(OlmoeForCausalLM(tiny()))
    alone = torch.cat([model(sequence[None]) for sequence in TOKENS])
    torch.testing.assert_close(alone, model(TOKENS), rtol=1e-9, atol=1e-9)


def test_tied_weights_are_one_parameter() -> None:
    model = OlmoeForCausalLM(tiny())
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    untied = OlmoeForCausalLM(tiny(tie_word_embeddings=False))
    assert untied.lm_head.weight is not untied.embed_tokens.weight
    assert "lm_head.weight" in dict(untied.named_parameters())


def test_labels_are_scored_where_they_stand() -> None:
    """The caller shifts: label t belongs to the logits at t."""
    model = trained(OlmoeForCausalLM(tiny())).eval()
    labels = TOKENS.flip(1)
    log_probabilities = model(TOKENS).detach().float().log_softmax(-1)
    picked = [float(log_probabilities[b, t, labels[b, t]]) for b in range(3) for t in range(7)]
    assert model(TOKENS, labels).item() == pytest.approx(-sum(picked) / 21, rel=1e-5)


def test_the_balancing_loss_is_added_in_training_only() -> None:
    model = trained(OlmoeForCausalLM(tiny(router_aux_loss_coef=0.5)))
    logits: list[Tensor] = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda _m, _a, out: logits.append(out)) for layer in model.layers]
    model.eval()
    evaluated = model(TOKENS, TOKENS)
    for hook in hooks:
        hook.remove()
    assert len(logits) == 2
    model.train()
    trained_loss = model(TOKENS, TOKENS)
    assert (trained_loss - evaluated).item() == pytest.approx(0.5 * load_balancing_loss(logits, 2).item(), rel=1e-4)
    model.config = replace(model.config, router_aux_loss_coef=0.0)
    assert model(TOKENS, TOKENS).item() == pytest.approx(evaluated.item(), rel=1e-6)


def test_forward_leaves_no_hooks_behind_even_when_it_fails() -> None:
    model = trained(OlmoeForCausalLM(tiny()))
    model(TOKENS)
    handle = model.layers[1].register_forward_pre_hook(lambda _module, _args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(TOKENS)
    handle.remove()
    assert not any(layer.router._forward_hooks for layer in model.layers)


def test_the_routers_place_in_autoeps_block_is_found() -> None:
    """AutoEP puts the router's linear map into ``mlp.router.gate``."""
    model = OlmoeForCausalLM(tiny())
    layer: Any = model.layers[0]
    assert layer.router is layer.mlp.gate
    block = nn.Module()
    block.router = nn.Module()
    block.router.gate = nn.Linear(8, 4)
    layer.mlp = block
    assert layer.router is block.router.gate


def test_weights_are_drawn_at_the_papers_std() -> None:
    torch.manual_seed(0)
    model = OlmoeForCausalLM(tiny(hidden_size=128, moe_intermediate_size=64, vocab_size=500))
    for name, param in model.named_parameters():
        if "norm" in name:
            assert torch.equal(param, torch.ones_like(param))
        else:
            assert param.std().item() == pytest.approx(0.02, rel=0.1), name
            assert "bias" not in name


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, r"num_attention_heads \(4\).*\(3\)"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, r"num_experts_per_tok \(3\).*\(2\)"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tiny(**changes)


# -- the load-balancing loss ---------------------------------------------------------------------------------------


def test_even_load_costs_1() -> None:
    """Four tokens, each preferring two other experts, so that load and mean probability are even."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(4, 1)
    logits = torch.stack([row.roll(shift) for shift, row in enumerate(logits)])
    for top_k in (1, 2, 3, 4):
        assert float(load_balancing_loss([logits], top_k)) == pytest.approx(1.0)
        assert float(load_balancing_loss([logits.view(2, 2, 4), 5 * logits], top_k)) == pytest.approx(1.0)


def test_all_tokens_on_one_expert_cost_as_much_as_there_are_experts() -> None:
    logits = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(5, 1)
    assert float(load_balancing_loss([logits], 1)) == pytest.approx(4.0)


def test_the_loss_is_the_mean_over_layers_of_counts_times_probabilities() -> None:
    generator = torch.Generator().manual_seed(4)
    layers = [torch.randn(2, 9, 4, generator=generator) for _ in range(3)]
    expected = []
    for layer in layers:
        rows = [row.softmax(0).tolist() for row in layer.view(18, 4)]
        chosen = [e for row in rows for e in sorted(range(4), key=lambda e: -row[e])[:2]]
        shares = [chosen.count(e) / len(chosen) for e in range(4)]
        means = [sum(row[e] for row in rows) / 18 for e in range(4)]
        expected.append(4 * sum(share * mean for share, mean in zip(shares, means, strict=True)))
    assert float(load_balancing_loss(layers, 2)) == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_the_loss_pushes_the_router_towards_even_load() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(5, 1).requires_grad_()
    load_balancing_loss([logits], 1).backward()
    assert logits.grad is not None
    assert bool((logits.grad[:, 0] > 0).all())
    assert bool((logits.grad[:, 1:] < 0).all())
    assert F.one_hot(logits.argmax(-1), 4)[:, 0].all()
