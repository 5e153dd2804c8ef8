"""The KV memory of a test rank, and what must be in it: every byte is a function of what it stands for.

A prefill rank writes its share of a request's logical cache into the pages it was given; a decode rank computes the same
values for its own share and compares, and checks that nothing else of its memory was touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# What memory that nobody may write to holds.
UNTOUCHED = 0xEE


@dataclass(frozen=True)
class Shape:
    """A made-up model, and one rank's share of it."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    layers: int = 4
    heads: int = 8
    head_bytes: int = 32
    latent_bytes: int = 0
    """Above 0: a latent cache (MLA) of so many bytes per token."""
    page_size: int = 16
    pages: int = 64
    slots: int = 8
    aux_rows: int = 3
    drafts: int = 0
    """Buffers of a draft model at the end of the KV list."""
    named_layers: bool = False
    states: tuple[tuple[str, int, int], ...] = ()
    """State components: SGLang's name, buffers, bytes of an item."""

    @property
    def rank_heads(self) -> int:
        return max(1, self.heads // self.tp_size)

    @property
    def first_head(self) -> int:
        return self.tp_rank * self.heads // self.tp_size

    @property
    def rank_layers(self) -> range:
        each = self.layers // self.pp_size
        return range(self.pp_rank * each, (self.pp_rank + 1) * each)


def logical(room: int, layer: int, part: int, tokens: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The bytes of some tokens (rows) and byte columns of one layer's K (part 0), V (1) or latent (2) of a request."""
    mixed = (
        tokens[:, None].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        + columns[None, :].astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        + np.uint64((room * 31 + layer * 7 + part * 3 + 1) * 0x165667B19E3779F9 & (2**64 - 1))
    )
    mixed ^= mixed >> np.uint64(29)
    return (mixed & np.uint64(0xFF)).astype(np.uint8)


class Pool:
    """Buffers of one rank."""

    def __init__(self, shape: Shape, is_prefill: bool) -> None:
        self.shape = shape
        fill = 0 if is_prefill else UNTOUCHED
        row = shape.latent_bytes or shape.rank_heads * shape.head_bytes
        parts = [2] if shape.latent_bytes else [0, 1]
        self.keys = [(layer, part) for part in parts for layer in shape.rank_layers]
        self.keys += [(1000 + draft, 3) for draft in range(shape.drafts)]
        self.kv = [np.full((shape.pages, shape.page_size, row), fill, np.uint8) for _ in self.keys]
        self.states = [
            [np.full((shape.pages, size), fill, np.uint8) for _ in range(count)] for _, count, size in shape.states
        ]
        # The last row holds the room number, as MetadataBuffers has it; 0 means that nothing has arrived.
        self.aux = [np.zeros((shape.slots, 64), np.uint8) for _ in range(shape.aux_rows)]

    def fill_kv_args(self, args: Any) -> None:
        """Tells SGLang's KVArgs of the buffers."""
        args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = _infos(self.kv)
        args.num_draft_entries = self.shape.drafts
        args.kv_layer_ids = [layer for layer, _ in self.keys] if self.shape.named_layers else []
        args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = _infos(self.aux)
        infos = [_infos(buffers) for buffers in self.states]
        args.state_data_ptrs = [info[0] for info in infos]
        args.state_data_lens = [info[1] for info in infos]
        args.state_item_lens = [info[2] for info in infos]
        args.state_layer_ids = [[] for _ in infos]
        args.state_dim_per_tensor = [[] for _ in infos]
        args.state_slice_outer_counts = [[] for _ in infos]
        args.state_conv_shard_groups = [[] for _ in infos]
        args.page_size = self.shape.page_size

    def write(self, room: int, pages: list[int], first_token: int) -> None:
        """Prefill: computes the tokens of those pages, in order, from `first_token` on."""
        for place, page in enumerate(pages):
            tokens = np.arange(self.shape.page_size) + first_token + place * self.shape.page_size
            for (layer, part), buffer in zip(self.keys, self.kv):
                buffer[page] = logical(room, layer, part, tokens, self._columns(part))

    def write_states(self, room: int, items: list[list[int] | None]) -> None:
        """Prefill: fills the state items of a request."""
        for component, (buffers, numbers) in enumerate(zip(self.states, items)):
            for place, number in enumerate(numbers or []):
                for at, buffer in enumerate(buffers):
                    buffer[number] = self._state(room, component, at, place, buffer.shape[1])

    def write_aux(self, room: int, slot: int) -> None:
        """Prefill: fills a metadata row; the room number is its last entry."""
        for at, buffer in enumerate(self.aux[:-1]):
            buffer[slot] = (room + at * 13 + np.arange(64)) & 0xFF
        self.aux[-1][slot] = np.full(8, room, np.uint64).view(np.uint8)

    def wrong(self, room: int, pages: list[int], first_token: int, states: list[list[int] | None], slot: int | None) -> list[str]:
        """Decode: what of a request's bytes is not what it must be."""
        found = []
        for place, page in enumerate(pages):
            tokens = np.arange(self.shape.page_size) + first_token + place * self.shape.page_size
            for (layer, part), buffer in zip(self.keys, self.kv):
                bad = int((buffer[page] != logical(room, layer, part, tokens, self._columns(part))).sum())
                if bad:
                    found.append(f"page {page} of layer {layer} part {part}: {bad} bytes")
        for component, (buffers, numbers) in enumerate(zip(self.states, states)):
            for place, number in enumerate(numbers or []):
                for at, buffer in enumerate(buffers):
                    if (buffer[number] != self._state(room, component, at, place, buffer.shape[1])).any():
                        found.append(f"state {component} buffer {at} item {number}")
        if slot is not None:
            for at, buffer in enumerate(self.aux[:-1]):
                if (buffer[slot] != ((room + at * 13 + np.arange(64)) & 0xFF)).any():
                    found.append(f"aux row {at}")
            if self.aux[-1][slot].view(np.uint64)[0] != room:
                found.append(f"aux room is {self.aux[-1][slot].view(np.uint64)[0]}")
        return found[:20]

    def touched(self, pages: list[int]) -> list[str]:
        """Decode: pages outside of `pages` that somebody wrote to."""
        rest = np.setdiff1d(np.arange(self.shape.pages), np.array(pages, dtype=np.int64))
        return [
            f"layer {layer} part {part}: {int((buffer[rest] != UNTOUCHED).sum())} bytes of foreign pages"
            for (layer, part), buffer in zip(self.keys, self.kv)
            if (buffer[rest] != UNTOUCHED).any()
        ]

    def wipe(self, pages: list[int]) -> None:
        """Makes pages untouched again, for the next request of the test."""
        for buffer in self.kv:
            buffer[pages] = UNTOUCHED

    def _columns(self, part: int) -> np.ndarray:
        if self.shape.latent_bytes:
            return np.arange(self.shape.latent_bytes)
        row = self.shape.rank_heads * self.shape.head_bytes
        return np.arange(row) + self.shape.first_head * self.shape.head_bytes

    @staticmethod
    def _state(room: int, component: int, at: int, place: int, size: int) -> np.ndarray:
        return ((room * 5 + component * 11 + at * 17 + place * 29 + np.arange(size)) & 0xFF).astype(np.uint8)


def _infos(buffers: list[np.ndarray]) -> tuple[list[int], list[int], list[int]]:
    return (
        [buffer.ctypes.data for buffer in buffers],
        [buffer.nbytes for buffer in buffers],
        [buffer[0].nbytes for buffer in buffers],
    )
