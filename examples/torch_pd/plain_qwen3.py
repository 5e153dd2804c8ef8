"""Qwen3 in PyTorch alone, for machines without transformers. Parameters have the names that transformers gives them."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .settings import Shape

THETA = 1e6
EPSILON = 1e-6

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Norm(nn.Module):
    """RMS norm, computed in 32 bits."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        wide = values.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(values.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normed heads and rotated positions; `attend` does the rest."""

    def __init__(self, shape: Shape, layer: int, attend: Attend) -> None:
        super().__init__()
        self._layer, self._attend, self._head_dim = layer, attend, shape.head_dim
        query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, query, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden, bias=False)
        self.q_norm, self.k_norm = Norm(shape.head_dim), Norm(shape.head_dim)

    def forward(self, hidden: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        heads = (*hidden.shape[:-1], -1, self._head_dim)
        query = _rotated(self.q_norm(self.q_proj(hidden).view(heads)).transpose(1, 2), angles)
        key = _rotated(self.k_norm(self.k_proj(hidden).view(heads)).transpose(1, 2), angles)
        value = self.v_proj(hidden).view(heads).transpose(1, 2)
        mixed = self._attend(self._layer, query, key, value).transpose(1, 2)
        return self.o_proj(mixed.reshape(*hidden.shape[:-1], -1))


class Mlp(nn.Module):
    """Gated, with SiLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape, layer: int, attend: Attend) -> None:
        super().__init__()
        self.self_attn = Attention(shape, layer, attend)
        self.mlp = Mlp(shape)
        self.input_layernorm, self.post_attention_layernorm = Norm(shape.hidden), Norm(shape.hidden)

    def forward(self, hidden: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), angles)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Body(nn.Module):
    """Everything below the head."""

    def __init__(self, shape: Shape, attend: Attend) -> None:
        super().__init__()
        self._head_dim = shape.head_dim
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, layer, attend) for layer in range(shape.layers))
        self.norm = Norm(shape.hidden)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(tokens)
        exponents = torch.arange(0, self._head_dim, 2, device=tokens.device, dtype=torch.float32) / self._head_dim
        turns = positions[..., None].float() * (1.0 / THETA**exponents)
        turns = torch.cat((turns, turns), dim=-1)[:, None]
        angles = (turns.cos().to(hidden.dtype), turns.sin().to(hidden.dtype))
        for layer in self.layers:
            hidden = layer(hidden, angles)
        return self.norm(hidden)


class Network(nn.Module):
    """Tokens and their positions in; logits of the last token out."""

    def __init__(self, shape: Shape, attend: Attend) -> None:
        super().__init__()
        self.model = Body(shape, attend)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model(tokens, positions)[:, -1:])


def make(shape: Shape, attend: Attend) -> tuple[Network, str]:
    """The model on the current default device, its weights still to be drawn; and its name."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        network = Network(shape, attend)
    finally:
        torch.set_default_dtype(before)
    return network.eval(), "the example's own Qwen3"


def _rotated(values: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = angles
    left, right = values.chunk(2, dim=-1)
    return values * cos + torch.cat((-right, left), dim=-1) * sin
