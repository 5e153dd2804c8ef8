"""Pages: who has which, and how a pool of them is described to kvtransfer."""

from __future__ import annotations

import threading
from typing import Sequence

import kvtransfer as kvt
import numpy as np

from .settings import Settings

# Rows of metadata that travel beside the pages, one per live request.
SLOTS = 64
# A row: the first token, the room, the prompt's length; the rest is room for more.
ROW_WORDS = 8


class PageBook:
    """The free pages of a pool. Hands them out in random order, as a pool looks after hours of serving."""

    def __init__(self, pages: int, seed: int) -> None:
        self._free = [int(page) for page in np.random.default_rng(seed).permutation(pages)]
        self._changed = threading.Condition()

    def take(self, count: int, timeout: float) -> np.ndarray:
        """`count` pages as 32-bit integers, which go to `Transfer.push` without being copied; waits for others' pages."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._free) >= count, timeout):
                raise TimeoutError(f"{count} pages were not free within {timeout} s: {len(self._free)} are")
            taken, self._free = self._free[:count], self._free[count:]
        return np.array(taken, np.int32)

    def give(self, pages: Sequence[int] | np.ndarray) -> None:
        """Gives pages back. Nothing may read or write them any more: no transfer, and no kernel that was only launched."""
        with self._changed:
            self._free.extend(int(page) for page in pages)
            self._changed.notify_all()


class Rows:
    """The metadata rows, in host memory on both sides."""

    def __init__(self) -> None:
        self.words = np.zeros((SLOTS, ROW_WORDS), np.int64)
        self.free = PageBook(SLOTS, 0)

    def write(self, slot: int, token: int, room: int, length: int) -> None:
        """Prefill: what decode must know besides the pages."""
        self.words[slot, :3] = (token, room, length)

    def read(self, slot: int, room: int, length: int) -> int:
        """Decode: the first token. Raises if the row is another request's."""
        token, told_room, told_length = (int(word) for word in self.words[slot, :3])
        if (told_room, told_length) != (room, length):
            raise ValueError(f"room {room} of {length} tokens got the row of room {told_room} with {told_length} tokens")
        return token


def layout(settings: Settings, addresses: Sequence[int], dtype: str, item_bytes: int, gpu: int | None, rows: Rows) -> kvt.Layout:
    """A pool as kvtransfer sees it: all K layers, then all V layers, an item being one page of one layer; then the rows.

    `addresses` are those of the buffers in that order, `item_bytes` the bytes of one page of one layer. With `gpu` they are
    device addresses (`Tensor.data_ptr()`), and kvtransfer moves them without a copy of ours through host memory.
    """
    memory, device = (kvt.Memory.HOST, 0) if gpu is None else (kvt.Memory.CUDA, gpu)
    length = settings.pages * item_bytes
    kv = [kvt.Entry(address, length, item_bytes, memory=memory, device=device) for address in addresses]
    row_bytes = rows.words[0].nbytes
    aux = kvt.Entry(rows.words.ctypes.data, rows.words.nbytes, row_bytes)
    return kvt.Layout(
        page_size=settings.page_size,
        kv_dtype=dtype,
        components=[kvt.Component(kvt.Kind.KV, kv), kvt.Component(kvt.Kind.AUX, [aux])],
        total_kv_heads=settings.shape.kv_heads,
        rank_kv_heads=settings.shape.kv_heads,
        layers=(0, settings.shape.layers),
    )


def engine_config(path: str, copy_percent: int) -> dict[str, object]:
    """What `--path` means to an engine. Both sides must say the same; `Engine.info()` tells what came of it."""
    same_host = {"auto": "auto", "shm": "ring", "tcp": "off"}[path]
    return {"same_host": same_host, "gpu": {"multiprocessors_percent": copy_percent}}
