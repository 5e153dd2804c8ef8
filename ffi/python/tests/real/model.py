"""A small model with random weights whose answers depend on the whole KV cache: `model.py FOLDER`.

Qwen3's architecture, two layers. Random weights would make attention nearly uniform, and the greedy tokens would hardly depend on any one
key; norms of 2 on queries and keys make it peaky, so that a page that is lost, late or in the wrong place changes the tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, VOCABULARY = 2, 256, 8, 4, 64, 2048
INNER = 3 * HIDDEN
# Bytes of KV per token: keys and values in bfloat16.
KV_BYTES = LAYERS * 2 * KV_HEADS * HEAD * 2

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "head_dim": HEAD, "hidden_act": "silu", "hidden_size": HIDDEN, "initializer_range": 0.02,
    "intermediate_size": INNER, "max_position_embeddings": 32768, "max_window_layers": LAYERS, "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e6,
    "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": VOCABULARY,
}  # fmt: skip


def weights() -> dict[str, torch.Tensor]:
    """Every parameter, the same on every machine."""
    dice = torch.Generator().manual_seed(20)

    def noise(rows: int, columns: int, spread: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=dice) * spread).to(torch.bfloat16)

    def norm(width: int, value: float = 1.0) -> torch.Tensor:
        return torch.full((width,), value, dtype=torch.bfloat16)

    made = {"model.embed_tokens.weight": noise(VOCABULARY, HIDDEN, 0.05), "model.norm.weight": norm(HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        made |= {
            at + "input_layernorm.weight": norm(HIDDEN),
            at + "post_attention_layernorm.weight": norm(HIDDEN),
            at + "self_attn.q_norm.weight": norm(HEAD, 2.0),
            at + "self_attn.k_norm.weight": norm(HEAD, 2.0),
            at + "self_attn.q_proj.weight": noise(HEADS * HEAD, HIDDEN, HIDDEN**-0.5),
            at + "self_attn.k_proj.weight": noise(KV_HEADS * HEAD, HIDDEN, HIDDEN**-0.5),
            at + "self_attn.v_proj.weight": noise(KV_HEADS * HEAD, HIDDEN, HIDDEN**-0.5),
            at + "self_attn.o_proj.weight": noise(HIDDEN, HEADS * HEAD, (HEADS * HEAD) ** -0.5),
            at + "mlp.gate_proj.weight": noise(INNER, HIDDEN, HIDDEN**-0.5),
            at + "mlp.up_proj.weight": noise(INNER, HIDDEN, HIDDEN**-0.5),
            at + "mlp.down_proj.weight": noise(HIDDEN, INNER, INNER**-0.5 / 2),
        }
    return made


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}))
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
