"""What a rank's KV memory looks like, as the library wants to be told. Plain data; nothing here touches the memory.

The vocabulary is SGLang's `KVArgs`: a component is a group of buffers that share one list of item numbers, an entry is one
buffer, an item is one page (or slot) of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Memory(Enum):
    """Where a buffer lives."""

    HOST = 0
    CUDA = 1


class Kind(Enum):
    """What a component is for. Components travel in this order."""

    KV = 0
    STATE = 1
    AUX = 2
    MEMORY = 3
    """Only written and read by address (`Engine.write`)."""


@dataclass(frozen=True)
class Entry:
    """One buffer: `length` bytes at `address`, items of `item_length` bytes back to back."""

    address: int
    length: int
    item_length: int
    layer_id: int | None = None
    """Global layer number where the pool names its layers; `None` pairs by position."""
    memory: Memory = Memory.HOST
    device: int = 0
    """GPU number for `Memory.CUDA`."""


@dataclass(frozen=True)
class Slice:
    """How one tensor of a "mamba" state is spread over tensor-parallel ranks."""

    dim: int
    """Channels on this rank; 0 where every rank holds the whole tensor."""
    rows: int = 1
    """Rows in front of the channels."""
    groups: tuple[int, ...] = ()
    """Channels of the whole model's sub-blocks where each is sharded by itself."""


@dataclass(frozen=True)
class Component:
    """Buffers that share one list of items."""

    kind: Kind
    entries: list[Entry]
    name: str = ""
    """SGLang's `StateType` value for `Kind.STATE`."""
    draft_entries: int = 0
    """How many trailing entries belong to a draft model (`Kind.KV` only)."""
    slices: tuple[Slice, ...] = ()
    """One per entry of a "mamba" state; without them it cannot be cut anew for another tensor-parallel size."""
    page_layout: str = ""
    """A state's page layout where it is not the layout's own."""


@dataclass(frozen=True)
class Layout:
    """Everything a peer must know of this rank's memory."""

    page_size: int
    """Tokens per page."""
    kv_dtype: str
    components: list[Component]
    """KV first, then states, aux last."""
    total_kv_heads: int | None = None
    """KV heads of the whole model; `None` for a latent cache (MLA)."""
    rank_kv_heads: int | None = None
    """KV heads on this rank; `None` for a latent cache (MLA)."""
    kv_layout: str = "nhd"
    tp: tuple[int, int] = (0, 1)
    """Rank and size of the (attention) tensor-parallel group."""
    pp: tuple[int, int] = (0, 1)
    """Rank and size of the pipeline."""
    layers: tuple[int, int] = field(default=(0, 1))
    """First and one past the last global layer of this rank, draft layers not counted."""
    compression_ratios: tuple[int, ...] = ()
    """DeepSeek-V4: the compression ratio of every layer of the whole model; its buffers are grouped by it."""
