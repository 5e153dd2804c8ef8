"""The torch model's twin without torch: a small transformer of numpy over the same pages, for tests on any machine.

It is no Qwen3 (no MLP, positions added once), but it has what matters here: keys and values of
several heads and layers in scattered pages, computed in chunks, each token depending on all before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .settings import Settings, pages_of


@dataclass
class Sequence:
    """See `torch_model.Sequence`."""

    slots: np.ndarray
    length: int


class NumpyStep:
    """A step that is done when it is made."""

    def __init__(self, token: int) -> None:
        self.tokens = np.array([token])

    def wait(self) -> None:
        """Nothing is launched here that could be waited for."""

    def token(self) -> int:
        return int(self.tokens[0])


class NumpyModel:
    """See `model.Model`."""

    dtype = "float32"

    def __init__(self, settings: Settings) -> None:
        self._settings, shape = settings, settings.shape
        draw = np.random.default_rng(settings.seed)

        def weights(*size: int) -> np.ndarray:
            drawn: np.ndarray = (draw.standard_normal(size) / np.sqrt(size[0])).astype(np.float32)
            return drawn

        query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._embedding = weights(shape.vocab, shape.hidden) * np.sqrt(shape.vocab).astype(np.float32)
        sizes = {"q": (shape.hidden, query), "k": (shape.hidden, kv), "v": (shape.hidden, kv), "o": (query, shape.hidden)}
        # Queries and keys twice as large make attention peaky, so that a lost page shows.
        scales = {"q": 2, "k": 2, "v": 1, "o": 1}
        self._layers = [{name: weights(*size) * scales[name] for name, size in sizes.items()} for _ in range(shape.layers)]
        self._head = weights(shape.hidden, shape.vocab)
        size = (2, shape.layers, settings.pages, settings.page_size, shape.kv_heads, shape.head_dim)
        self._pool = np.full(size, np.nan, np.float32)
        self.item_bytes = self._pool[0, 0, 0].nbytes
        self.name = f"the numpy twin on numpy {np.__version__}"

    def addresses(self) -> list[int]:
        return [self._pool[part, layer].ctypes.data for part in (0, 1) for layer in range(self._settings.shape.layers)]

    def weights_sum(self) -> int:
        every = [self._embedding, self._head, *(weight for layer in self._layers for weight in layer.values())]
        return sum(_bits(weight) for weight in every)

    def warm_up(self) -> None:
        pages = np.arange(pages_of(2, self._settings.page_size), dtype=np.int32)
        self.extend(self.sequence(pages), np.zeros(2, np.int64))
        self.poison(pages)

    def tokens(self, numbers: np.ndarray) -> np.ndarray:
        return np.asarray(numbers, np.int64)

    def sequence(self, pages: np.ndarray, length: int = 0) -> Sequence:
        page_size = self._settings.page_size
        return Sequence((pages.astype(np.int64)[:, None] * page_size + np.arange(page_size)).reshape(-1), length)

    def extend(self, sequence: Sequence, tokens: np.ndarray) -> NumpyStep:
        start, end = sequence.length, sequence.length + len(tokens)
        places = np.arange(start, end)
        later = np.arange(end)[None, :] > places[:, None]
        turns = 0.37 ** np.arange(1, self._settings.shape.hidden + 1)
        hidden = self._embedding[tokens] + np.cos(places[:, None] * turns).astype(np.float32)
        for number, layer in enumerate(self._layers):
            hidden = hidden + self._attend(number, layer, _normed(hidden), sequence.slots, start, end, later)
        sequence.length = end
        return NumpyStep(int(np.argmax(_normed(hidden[-1]) @ self._head)))

    def digest(self, pages: np.ndarray, length: int) -> int:
        slots, total = self.sequence(pages).slots[:length], 0
        for part in self._pool.reshape(-1, *self._pool.shape[2:]):
            total = (total * 31 + _bits(part.reshape(-1, *part.shape[2:])[slots])) % 2**61
        return total

    def poison(self, pages: np.ndarray) -> None:
        self._pool[:, :, pages] = np.nan

    def lose(self, page: int) -> None:
        self._pool[:, :, page] = 0.0

    def _attend(
        self, number: int, layer: dict[str, Any], hidden: np.ndarray, slots: np.ndarray, start: int, end: int, later: np.ndarray
    ) -> np.ndarray:
        shape = self._settings.shape
        gathered = []
        for part, name in ((0, "k"), (1, "v")):
            pool = self._pool[part, number].reshape(-1, shape.kv_heads, shape.head_dim)
            pool[slots[start:end]] = (hidden @ layer[name]).reshape(-1, shape.kv_heads, shape.head_dim)
            gathered.append(np.repeat(pool[slots[:end]], shape.heads // shape.kv_heads, axis=1))
        keys, values = gathered
        query = (hidden @ layer["q"]).reshape(-1, shape.heads, shape.head_dim)
        scores = np.einsum("thd,shd->hts", query, keys) / np.sqrt(shape.head_dim).astype(np.float32)
        scores = np.where(later[None], np.float32(-np.inf), scores)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), values)
        out: np.ndarray = mixed.reshape(len(hidden), -1) @ layer["o"]
        return out


def _normed(hidden: np.ndarray) -> np.ndarray:
    out: np.ndarray = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + np.float32(1e-6))
    return out


def _bits(values: np.ndarray) -> int:
    """See `torch_model._bits`."""
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(-1).astype(np.uint64)
    return int((bits * np.arange(1, 2 * len(bits), 2, dtype=np.uint64)).sum()) % 2**61
