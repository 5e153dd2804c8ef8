"""A Qwen3 of PyTorch over a paged KV cache.

The layers come from `transformers` or from `plain_qwen3.py`; both call `TorchModel.attend`, which writes a step's keys and
values into pages and attends over all pages so far. Pages are gathered into one piece for PyTorch's own attention: a paged
kernel would be faster and is not what this example is about.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import ContextManager

import numpy as np
import torch
import torch.nn.functional as F

from .settings import Settings, pages_of

# Peaky attention: with weights of 1 every token attends to all others alike, and a lost page would hardly show.
QK_NORM = 2.0


@dataclass
class Sequence:
    """Where a sequence's tokens lie: token i in slot `slots[i]` of the pool, a slot being one token's place."""

    slots: torch.Tensor
    length: int


@dataclass(frozen=True)
class Span:
    """The step that is being launched."""

    new: torch.Tensor
    """Slots of its own tokens."""
    all: torch.Tensor
    """Slots of everything up to its last token."""
    mask: torch.Tensor | None


class TorchStep:
    """See `model.Step`."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self._event: torch.cuda.Event | None = None
        self._host = tokens
        if tokens.is_cuda:
            # The token's way to the host is part of the step, before the event. Asking for it later would queue behind
            # whatever was launched meanwhile.
            self._host = torch.empty(1, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)
            # Of the model's device: a thread that never chose one is on device 0, whatever its tensors are on.
            self._event.record(torch.cuda.current_stream(tokens.device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def token(self) -> int:
        return int(self._host[0])


class TorchModel:
    """See `model.Model`."""

    dtype = "bfloat16"

    def __init__(self, settings: Settings, gpu: int) -> None:
        self._settings, shape = settings, settings.shape
        self._device = torch.device("cuda", gpu) if settings.device == "cuda" else torch.device("cpu")
        if settings.device == "cuda":
            # cuBLAS is repeatable only with memory of a fixed size; read when its first handle is made.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.cuda.set_device(self._device)
            # cuDNN compiles a plan per shape, and a paged cache makes a new shape of nearly every step.
            torch.backends.cuda.enable_cudnn_sdp(False)
        else:
            # Sums on a CPU are split by threads; with one the order is the same in every process.
            torch.set_num_threads(1)
        self._span: Span | None = None
        if settings.model == "transformers":
            from .transformers_qwen3 import make
        else:
            from .plain_qwen3 import make
        with torch.device(self._device):
            self._network, version = make(shape, self.attend)
        self._draw_weights()
        self.name = f"{version} on torch {torch.__version__}, {_device_name(self._device)}"
        # [K or V, layer, page, token of the page, head, element]: each [K or V, layer] is one buffer of pages.
        size = (2, shape.layers, settings.pages, settings.page_size, shape.kv_heads, shape.head_dim)
        self._pool = torch.full(size, float("nan"), dtype=torch.bfloat16, device=self._device)
        self.item_bytes = self._pool[0, 0, 0].nbytes

    def addresses(self) -> list[int]:
        layers = range(self._settings.shape.layers)
        return [self._pool[part, layer].data_ptr() for part in (0, 1) for layer in layers]

    def weights_sum(self) -> int:
        return sum(_bits(weight.detach()) for _, weight in self._network.named_parameters())

    @torch.inference_mode()
    def warm_up(self) -> None:
        # At the largest sizes that will occur: PyTorch then has the memory for all smaller ones, and asks CUDA for none later.
        settings = self._settings
        count = min(settings.chunk, settings.longest - 1)
        pages = np.arange(pages_of(settings.longest, settings.page_size), dtype=np.int32)
        sequence = self.sequence(pages, settings.longest - count - 1)
        step = self.extend(sequence, self.tokens(np.zeros(count, np.int64)))
        self.extend(sequence, step.tokens).wait()
        self.poison(pages)

    def tokens(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(numbers, np.int64)).to(self._device)

    def sequence(self, pages: np.ndarray, length: int = 0) -> Sequence:
        page_size = self._settings.page_size
        slots = pages.astype(np.int64)[:, None] * page_size + np.arange(page_size)
        return Sequence(torch.from_numpy(slots.reshape(-1)).to(self._device), length)

    @torch.inference_mode()
    def extend(self, sequence: Sequence, tokens: torch.Tensor) -> TorchStep:
        with self._on_device():
            return self._extend(sequence, tokens)

    def _extend(self, sequence: Sequence, tokens: torch.Tensor) -> TorchStep:
        start, end = sequence.length, sequence.length + len(tokens)
        positions = torch.arange(start, end, device=self._device)
        mask = None
        if len(tokens) > 1:
            later = torch.arange(end, device=self._device)[None, :] > positions[:, None]
            mask = torch.zeros(later.shape, dtype=torch.bfloat16, device=self._device).masked_fill_(later, float("-inf"))
        self._span = Span(sequence.slots[start:end], sequence.slots[:end], mask)
        logits = self._network(tokens[None], positions[None])
        sequence.length = end
        return TorchStep(logits[0, -1].argmax(dim=-1, keepdim=True))

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """One layer's attention of the step that is being launched; tensors are [1, heads, tokens, head_dim]."""
        span, heads = self._span, self._settings.shape
        assert span is not None, "extend made it"
        pairs = []
        for part, new in ((0, key), (1, value)):
            slots = self._pool[part, layer].view(-1, heads.kv_heads, heads.head_dim)
            slots[span.new] = new[0].transpose(0, 1)
            everything = slots.index_select(0, span.all).transpose(0, 1)
            pairs.append(everything.repeat_interleave(heads.heads // heads.kv_heads, dim=0)[None])
        return F.scaled_dot_product_attention(query, *pairs, attn_mask=span.mask)

    @torch.inference_mode()
    def digest(self, pages: np.ndarray, length: int) -> int:
        slots = self.sequence(pages).slots[:length]
        total = 0
        with self._on_device():
            for part in self._pool.flatten(0, 1):
                total = (total * 31 + _bits(part.flatten(0, 1).index_select(0, slots))) % 2**61
        return total

    @torch.inference_mode()
    def poison(self, pages: np.ndarray) -> None:
        self._fill(pages, float("nan"))

    @torch.inference_mode()
    def lose(self, page: int) -> None:
        self._fill(np.array([page]), 0.0)

    def _fill(self, pages: np.ndarray, number: float) -> None:
        where = torch.from_numpy(pages.astype(np.int64)).to(self._device)
        with self._on_device():
            for part in self._pool.flatten(0, 1):
                part.index_fill_(0, where, number)
        if self._pool.is_cuda:
            torch.cuda.current_stream(self._device).synchronize()

    def _on_device(self) -> ContextManager[object]:
        """The current device is a thread's own; every thread that launches kernels must choose."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    @torch.no_grad()
    def _draw_weights(self) -> None:
        """In the order of their names, so that both networks get the same."""
        draw = torch.Generator(self._device).manual_seed(self._settings.seed)
        for name, weight in sorted(self._network.named_parameters()):
            if "norm" in name:
                weight.fill_(QK_NORM if "q_norm" in name or "k_norm" in name else 1.0)
            else:
                weight.normal_(0.0, 1.0 if "embed" in name else weight.shape[1] ** -0.5, generator=draw)


def _bits(values: torch.Tensor) -> int:
    """A sum over the bits of 16-bit values that depends on their places; wraps, and is exact."""
    bits = values.contiguous().view(torch.int16).flatten()
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    return int((bits * places).sum()) % 2**61


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
