"""The reference model: an OLMoE-style mixture-of-experts language model as in the paper's App. D.

Pre-norm RMSNorm, per-head q/k norm, rotary positions, grouped-query attention, SwiGLU experts behind a top-k softmax
router, load-balancing loss; the hidden width is decoupled from heads x head_dim. Plain torch. DeepSpeed's AutoEP
rewrites the MoE blocks when the JSON config names them (see ``configs/``).

Shape suffixes: B batch, T tokens, N = B x T, H hidden_size, I moe_intermediate_size, E experts, K experts per token,
V vocabulary, A attention heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ds_sparkling.spec.checked import Checked, Integer, Number, Switch, Text, checked

_INIT_STD = 0.02


@checked(kw_only=True)
class OlmoeConfig(Checked):
    """Sizes of the model; the defaults are the paper's 0.5B/2.5B (450M active, 2.56B total parameters)."""

    vocab_size: Integer = Field(default=50304, ge=1, description="Tokens that the model knows.")
    hidden_size: Integer = Field(default=1024, ge=1, description="Width of the residual stream.")
    moe_intermediate_size: Integer = Field(default=512, ge=1, description="Inner width of one expert.")
    num_hidden_layers: Integer = Field(default=24, ge=1, description="Decoder layers.")
    num_attention_heads: Integer = Field(default=16, ge=1, description="Query heads of a layer.")
    num_key_value_heads: Integer = Field(
        default=4, ge=1, description="Key/value heads of a layer, shared by query heads."
    )
    head_dim: Integer = Field(default=96, ge=1, description="Width of one head.")
    num_experts: Integer = Field(default=64, ge=1, description="Experts of a layer.")
    num_experts_per_tok: Integer = Field(default=8, ge=1, description="Experts that one token passes through.")
    norm_topk_prob: Switch = Field(
        default=False, description="Whether the chosen experts' probabilities are scaled to sum to one."
    )
    router_aux_loss_coef: Number = Field(default=0.01, description="Weight of the load-balancing loss.")
    rope_theta: Number = Field(default=10000.0, gt=0, description="Base of the rotary frequencies.")
    rms_norm_eps: Number = Field(default=1e-6, ge=0, description="Added to the mean square in norms.")
    tie_word_embeddings: Switch = Field(
        default=True, description="Whether the output head shares the embedding's weights."
    )
    hidden_act: Text = Field(default="silu", description="Activation of the experts, which AutoEP reads.")

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{{path}}: num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"{{path}}: num_experts_per_tok ({self.num_experts_per_tok}) exceeds num_experts ({self.num_experts})"
            )
        if self.head_dim % 2:
            raise ValueError(f"{{path}}.head_dim must be even, for rotary positions turn pairs; got {self.head_dim}")


class Linear(nn.Linear):
    """A linear map without bias, initialised in its constructor so that ``zero.Init`` can partition it at once."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=_INIT_STD)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=_INIT_STD)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and per-head q/k norm."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.config = config
        heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(config.hidden_size, heads * head_dim)
        self.k_proj = Linear(config.hidden_size, groups * head_dim)
        self.v_proj = Linear(config.hidden_size, groups * head_dim)
        self.o_proj = Linear(heads * head_dim, config.hidden_size)
        self.q_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)

    def forward(self, x_BTH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        batch, tokens, _ = x_BTH.shape
        head_dim = self.config.head_dim
        q_BTAD = self.q_norm(self.q_proj(x_BTH).view(batch, tokens, -1, head_dim))
        k_BTGD = self.k_norm(self.k_proj(x_BTH).view(batch, tokens, -1, head_dim))
        v_BTGD = self.v_proj(x_BTH).view(batch, tokens, -1, head_dim)
        out_BATD = F.scaled_dot_product_attention(
            _rotate(q_BTAD, rotary).transpose(1, 2),
            _rotate(k_BTGD, rotary).transpose(1, 2),
            v_BTGD.transpose(1, 2),
            is_causal=True,
            enable_gqa=True,
        )
        return self.o_proj(out_BATD.transpose(1, 2).reshape(batch, tokens, -1))


class Experts(nn.Module):
    """All experts' SwiGLU weights, stacked; gate and up fused in one tensor, gate first."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        nn.init.normal_(self.gate_up_proj, std=_INIT_STD)
        nn.init.normal_(self.down_proj, std=_INIT_STD)

    def forward(self, x_NH: Tensor, weight_NK: Tensor, expert_NK: Tensor) -> Tensor:
        order = expert_NK.flatten().argsort(stable=True)
        loads = expert_NK.flatten().bincount(minlength=self.down_proj.shape[0]).tolist()
        token = order // expert_NK.shape[1]
        outputs = []
        for x, gate_up, down in zip(x_NH[token].split(loads), self.gate_up_proj, self.down_proj, strict=True):
            gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, down))
        y = torch.cat(outputs)
        y = y * weight_NK.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x_NH).index_add(0, token, y)


class MoE(nn.Module):
    """Top-k softmax routing over :class:`Experts`; what AutoEP replaces by its expert-parallel layer."""

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Linear(config.hidden_size, config.num_experts)
        self.experts = Experts(config)

    def forward(self, x_BTH: Tensor) -> Tensor:
        x_NH = x_BTH.flatten(0, 1)
        probabilities_NE = self.gate(x_NH).float().softmax(-1)
        weight_NK, expert_NK = probabilities_NE.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        return self.experts(x_NH, weight_NK, expert_NK).view_as(x_BTH)


class DecoderLayer(nn.Module):
    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MoE(config)

    @property
    def router(self) -> nn.Module:
        """The linear map that makes the router's logits, in the plain block and in AutoEP's."""
        gate = getattr(self.mlp, "router", self.mlp).gate
        assert isinstance(gate, nn.Module)
        return gate

    def forward(self, x_BTH: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x_BTH = x_BTH + self.self_attn(self.input_layernorm(x_BTH), rotary)
        return x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))


class OlmoeForCausalLM(nn.Module):
    """The language model.

    ``forward(input_ids)`` gives logits [B, T, V]; with ``labels`` it gives the mean cross-entropy of ``labels[t]``
    given ``input_ids[..t]`` (the caller shifts), in training mode plus the load-balancing loss.
    """

    def __init__(self, config: OlmoeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        x_BTH = self.embed_tokens(input_ids)
        rotary = _rotary(input_ids.shape[1], self.config, x_BTH)
        router_logits: list[Tensor] = []
        hooks = [
            layer.router.register_forward_hook(lambda _module, _args, logits: router_logits.append(logits))
            for layer in self.layers
            if isinstance(layer, DecoderLayer)
        ]
        try:
            for layer in self.layers:
                x_BTH = layer(x_BTH, rotary)
        finally:
            for hook in hooks:
                hook.remove()
        logits_BTV = self.lm_head(self.norm(x_BTH))
        if labels is None:
            return logits_BTV
        loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels.flatten())
        if self.training and self.config.router_aux_loss_coef:
            loss = loss + self.config.router_aux_loss_coef * load_balancing_loss(
                router_logits, self.config.num_experts_per_tok
            )
        return loss


def olmoe_factory(config: OlmoeConfig) -> Callable[..., OlmoeForCausalLM]:
    """What builds the model of ``config`` with other widths."""

    def build_model(**widths: int) -> OlmoeForCausalLM:
        return OlmoeForCausalLM(OlmoeConfig(**{**asdict(config), **widths}))

    return build_model


def load_balancing_loss(router_logits: list[Tensor], top_k: int) -> Tensor:
    """Mean over layers of E * sum_e f_e P_e (Fedus et al. 2021, Eq. 4-6); 1 when the load is even.

    f_e is the share of the N x K assignments that expert e gets, P_e its mean router probability.
    """
    losses = []
    for logits in router_logits:
        probabilities_NE = logits.flatten(0, -2).float().softmax(-1)
        experts = probabilities_NE.shape[-1]
        chosen_NK = probabilities_NE.topk(top_k, dim=-1).indices
        share_E = F.one_hot(chosen_NK, experts).float().mean((0, 1))
        losses.append(experts * (share_E * probabilities_NE.mean(0)).sum())
    return torch.stack(losses).mean()


def _rotary(tokens: int, config: OlmoeConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [1, T, 1, D] each, made in fp32."""
    exponent = torch.arange(0, config.head_dim, 2, device=like.device).float() / config.head_dim
    angle = torch.arange(tokens, device=like.device).float()[:, None] * config.rope_theta**-exponent
    angle = torch.cat((angle, angle), dim=-1)[None, :, None]
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x_BTAD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x_BTAD.chunk(2, dim=-1)
    return x_BTAD * rotary[0] + torch.cat((-second, first), dim=-1) * rotary[1]
