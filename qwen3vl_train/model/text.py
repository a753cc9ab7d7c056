"""The decoder.

T packed tokens, D hidden, N query heads, K key/value heads, H head dim, F MLP width, V vocabulary, M visual rows.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3vl_train.arch import TextArch
from qwen3vl_train.model.activation_checkpointing import Checkpointing, run_block
from qwen3vl_train.model.attention import Attention
from qwen3vl_train.model.new_rows import TokenEmbedding, TokenHead
from qwen3vl_train.model.rope import Rope, apply_rope, mrope_cos_sin


class Qwen3VLTextRMSNorm(nn.Module):
    """Root-mean-square norm in float32; the weight multiplies after the cast back (Zhang & Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Qwen3VLTextAttention(nn.Module):
    """Grouped-query attention with a norm on every query and key head, causal inside each sequence."""

    def __init__(self, arch: TextArch, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, arch.head_dim
        self.q_proj = nn.Linear(arch.hidden_size, arch.q_size, bias=False)
        self.k_proj = nn.Linear(arch.hidden_size, arch.kv_size, bias=False)
        self.v_proj = nn.Linear(arch.hidden_size, arch.kv_size, bias=False)
        self.o_proj = nn.Linear(arch.q_size, arch.hidden_size, bias=False)
        self.q_norm = Qwen3VLTextRMSNorm(arch.head_dim, arch.rms_norm_eps)
        self.k_norm = Qwen3VLTextRMSNorm(arch.head_dim, arch.rms_norm_eps)

    def forward(self, x_TD: Tensor, rope: Rope, attention: Attention) -> Tensor:
        q_TNH = apply_rope(self.q_norm(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))), *rope)
        k_TKH = apply_rope(self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))), *rope)
        v_TKH = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(attention.attend(self.layer, q_TNH, k_TKH, v_TKH).flatten(1))


class Qwen3VLTextMLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, arch: TextArch) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=False)
        self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=False)
        self.down_proj = nn.Linear(arch.intermediate_size, arch.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Qwen3VLTextDecoderLayer(nn.Module):
    """One layer. Its activation checkpointing, set from outside, runs inside of it, so that sharding may wrap it."""

    def __init__(self, arch: TextArch, layer: int) -> None:
        super().__init__()
        self.checkpointing: Checkpointing = "none"
        self.self_attn = Qwen3VLTextAttention(arch, layer)
        self.mlp = Qwen3VLTextMLP(arch)
        self.input_layernorm = Qwen3VLTextRMSNorm(arch.hidden_size, arch.rms_norm_eps)
        self.post_attention_layernorm = Qwen3VLTextRMSNorm(arch.hidden_size, arch.rms_norm_eps)

    def forward(self, x_TD: Tensor, rope: Rope, attention: Attention) -> Tensor:
        return run_block(self.checkpointing, self._forward, x_TD, rope, attention)

    def _forward(self, x_TD: Tensor, rope: Rope, attention: Attention) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, attention)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Qwen3VLTextModel(nn.Module):
    """Embedding, decoder layers with DeepStack, final norm."""

    def __init__(self, arch: TextArch) -> None:
        super().__init__()
        self.arch = arch
        self.embed_tokens = TokenEmbedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList([Qwen3VLTextDecoderLayer(arch, layer) for layer in range(arch.num_hidden_layers)])
        self.norm = Qwen3VLTextRMSNorm(arch.hidden_size, arch.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        positions: Tensor,
        attention: Attention,
        *,
        deepstack_visual_embeds: Sequence[Tensor] = (),
        visual_rows: Tensor | None = None,
    ) -> Tensor:
        """Return the normed hidden states (T, D) of a packed row. inputs_embeds is (T, D), positions (3, T).

        deepstack_visual_embeds: (M, D) each; feature k is added after layer k to the tokens visual_rows, (M,) int64.

        Raises ValueError where DeepStack features do not fit visual_rows: visual tokens are never simply at the front.
        """
        cos_TH, sin_TH = mrope_cos_sin(positions, self.arch.head_dim, self.arch.rope_theta, self.arch.mrope_section)
        rope = (cos_TH.to(inputs_embeds.dtype), sin_TH.to(inputs_embeds.dtype))
        num_rows = 0 if visual_rows is None else visual_rows.numel()
        if any(features.shape[0] != num_rows for features in deepstack_visual_embeds):
            raise ValueError(
                f"text model: DeepStack has {deepstack_visual_embeds[0].shape[0]} rows for {num_rows} visual_rows; "
                "pass the row of each one's token"
            )
        x_TD = inputs_embeds
        for number, layer in enumerate(self.layers):
            x_TD = layer(x_TD, rope, attention)
            if number < len(deepstack_visual_embeds):
                assert visual_rows is not None
                x_TD = x_TD.index_add(0, visual_rows, deepstack_visual_embeds[number].to(x_TD.dtype))
        return self.norm(x_TD)


class Qwen3VLTextForCausalLM(nn.Module):
    """The decoder with its head; a tied head is the embedding's own parameter."""

    def __init__(self, arch: TextArch, *, tie_word_embeddings: bool) -> None:
        super().__init__()
        self.model = Qwen3VLTextModel(arch)
        self.lm_head = TokenHead(arch.hidden_size, arch.vocab_size)
        self.is_tied = tie_word_embeddings
        if tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def add_new_rows(self, ids: Sequence[int]) -> None:
        """Let the rows of these tokens train apart from the embedding and, where it is not tied, the head."""
        self.model.embed_tokens.add_new_rows(ids)
        if not self.is_tied:
            self.lm_head.add_new_rows(ids)

    def head_weight(self) -> Tensor:
        """Return the head's weight (V, D) as the loss multiplies by it."""
        return self.model.embed_tokens.table() if self.is_tied else self.lm_head.table()

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of normed hidden states (..., D)."""
        return F.linear(hidden, self.head_weight())
