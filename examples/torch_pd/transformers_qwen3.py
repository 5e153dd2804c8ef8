"""transformers' Qwen3 with our attention in it, through its own `AttentionInterface`."""

from __future__ import annotations

from typing import Any, Callable

import torch
import transformers
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from .settings import Shape

NAME = "torch_pd"


class Network(torch.nn.Module):
    """Tokens and their positions in; logits of the last token out."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.inner = Qwen3ForCausalLM(config)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # No cache of transformers': the pages are ours, and so is the mask, which it makes only for attention that it knows.
        return self.inner(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1).logits

    def named_parameters(self, *arguments: Any, **keywords: Any) -> Any:
        return self.inner.named_parameters(*arguments, **keywords)


def make(shape: Shape, attend: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> tuple[Network, str]:
    """The model on the current default device, its weights still to be drawn; and its name."""

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_mask: Any, **_more: Any
    ) -> tuple[torch.Tensor, None]:
        return attend(module.layer_idx, query, key, value).transpose(1, 2), None

    AttentionInterface.register(NAME, attention)
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    config._attn_implementation = NAME
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        network = Network(config)
    finally:
        torch.set_default_dtype(before)
    return network.eval(), f"transformers {transformers.__version__}'s Qwen3"
