"""One rank's engine: its memory, its peers, its transfers."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

from . import errors
from ._native import ABI_VERSION, check, ffi, lib, taken
from .layout import Component, Kind, Layout
from .transfer import State, Transfer, as_lists, millis

# How old a batched poll's answer may be: far below a scheduler's loop, far above the cost of asking.
POLL_FRESH = 100e-6


@dataclass(frozen=True)
class Source:
    """A sender that a receiver expects."""

    peer: int
    """From `Engine.connect`."""
    dummy: bool = False
    """True where the peer only concludes and sends no pages."""


class Engine:
    """Starts at construction; ends with `close` or the `with` block. Any thread may use it.

    `config` has the fields of the library's `EngineConfig` by name (ffi/README.md lists them); an unknown one is refused.
    The memory that `layout` names must stay usable until `close` has returned.
    """

    def __init__(self, layout: Layout, config: Mapping[str, Any] | None = None) -> None:
        text = json.dumps(dict(config or {})).encode()
        keep, described = _described(layout)
        place = ffi.new("kvt_engine_t **")
        check(lib.kvt_engine_new(text, len(text), described, place))
        del keep
        self._handle = ffi.gc(place[0], lib.kvt_engine_free)
        self.layout = layout

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def handle(self) -> Any:
        """The library's pointer. Raises `ShutDownError` after `close`."""
        if self._handle is None:
            raise errors.ShutDownError(errors.SHUTDOWN, "the engine is closed")
        return self._handle

    def close(self) -> None:
        """Ends every transfer and connection and joins the threads, within 3 s. Then nothing touches the memory any more."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        # Runs the destructor now; a call in another thread would keep the pointer alive, and must be over by now.
        ffi.release(handle)

    def info(self) -> dict[str, Any]:
        """What it is and does at this moment: addresses, regions, peers with their paths, counters."""
        return dict(json.loads(taken(lambda place: lib.kvt_engine_info_json(self.handle, place, ffi.NULL))))

    @property
    def listen_port(self) -> int:
        """The port that peers connect to; 0 if it only dials."""
        listen = self.info().get("listen")
        return int(listen.rsplit(":", 1)[1]) if listen else 0

    def summary(self) -> str:
        """One line for a log: where it listens, what it serves, how much memory it knows."""
        info = self.info()
        regions = info.get("regions", [])
        size = sum(region.get("len", 0) for region in regions)
        parts = [f"listen={info.get('listen')}", f"regions={len(regions)} ({size / 2**30:.2f} GiB)"]
        parts += [f"{name}={info[name]}" for name in ("telemetry", "metrics", "bootstrap") if info.get(name)]
        return ", ".join(parts)

    def connect(self, address: str, timeout: float) -> int:
        """Connects to a peer's listener ("host:port"), compares layouts and opens the data connections; the peer's number.

        Waits without the GIL. Raises `PeerError` with the sentence that says why not.
        """
        text = address.encode()
        peer = ffi.new("uint64_t *")
        check(lib.kvt_peer_connect(self.handle, text, len(text), millis(timeout), peer))
        return int(peer[0])

    def disconnect(self, peer: int, reason: str) -> None:
        """Ends the connection to a peer; transfers that need it fail with the reason on both sides."""
        text = reason.encode()
        check(lib.kvt_peer_disconnect(self.handle, peer, text, len(text)))

    def send(self, room: int, timeout: float) -> Transfer:
        """Opens the sending side of a room. `timeout` seconds bound the whole transfer. Never waits."""
        request = ffi.new("kvt_send_request_t *", {"room": room, "timeout_ms": millis(timeout)})
        place = ffi.new("kvt_transfer_t **")
        check(lib.kvt_send_open(self.handle, request, place))
        return Transfer(place[0], room)

    def receive(
        self,
        room: int,
        sources: Sequence[Source],
        items: Sequence[Any],
        timeout: float,
        receivers_expected: int = 1,
        prefix_tokens: int = 0,
    ) -> Transfer:
        """Opens the receiving side of a room and grants its pages (lists as in `Transfer.push`) to the senders.

        From now on until the end they may write to those pages. `receivers_expected` is how many receivers each sender must
        wait for, this one included. Never waits.
        """
        keep, lists = as_lists(items)
        given = ffi.new("kvt_source_t[]", [{"peer": source.peer, "dummy": int(source.dummy)} for source in sources])
        request = ffi.new(
            "kvt_receive_request_t *",
            {
                "room": room,
                "timeout_ms": millis(timeout),
                "receivers_expected": receivers_expected,
                "prefix_tokens": prefix_tokens,
                "sources": given,
                "sources_len": len(sources),
                "items": lists,
                "items_len": len(items),
            },
        )
        place = ffi.new("kvt_transfer_t **")
        check(lib.kvt_receive_open(self.handle, request, place))
        del keep
        return Transfer(place[0], room)

    @property
    def can_release_memory(self) -> bool:
        """Whether this library lets go of buffers while it runs. Where not, it still touches none of them without a transfer."""
        return hasattr(lib, "kvt_engine_release_memory")

    def release_memory(self, addresses: Sequence[int], lengths: Sequence[int], timeout: float = 5.0) -> None:
        """Lets go of buffers before they are freed or paused. Waits, without the GIL, up to `timeout` seconds for transfers
        that still use them; raises if there are any then."""
        ranges = _ranges(addresses, lengths)
        check(lib.kvt_engine_release_memory(self.handle, ranges, len(addresses), millis(timeout)))

    def restore_memory(self, addresses: Sequence[int], lengths: Sequence[int]) -> None:
        """Takes buffers back at the same addresses."""
        check(lib.kvt_engine_restore_memory(self.handle, _ranges(addresses, lengths), len(addresses)))

    def write(self, peer: int, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int], timeout: float) -> None:
        """Writes blocks of this rank's buffers into a peer's, by address. Waits without the GIL.

        Returns only when all is delivered, and raises only when nothing can be written any more.
        """
        blocks = ffi.new("kvt_block_t[]", list(zip(sources, targets, lengths, strict=True)))
        check(lib.kvt_engine_write(self.handle, peer, blocks, len(blocks), millis(timeout)))

    def probe(self, peer: int, timeout: float) -> float:
        """Asks a peer for a sign of life; the round trip in seconds. Raises `PeerError` if none comes in time."""
        round_trip = ffi.new("uint64_t *")
        check(lib.kvt_peer_probe(self.handle, peer, millis(timeout), round_trip))
        return int(round_trip[0]) / 1e9


class PollSet:
    """The states of many transfers by one call into the library per sweep.

    A scheduler asks for one request after the other; the first question of a sweep fetches all answers, the others read them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transfers: dict[int, Transfer] = {}
        self._order: list[Transfer] = []
        self._handles: Any = None
        self._states: Any = None
        self._place: dict[int, int] = {}
        self._asked: set[int] = set()
        self._fresh_until = 0.0
        self._is_changed = False

    def add(self, transfer: Transfer) -> None:
        """Takes a transfer in."""
        with self._lock:
            self._transfers[id(transfer)] = transfer
            self._is_changed = True

    def remove(self, transfer: Transfer) -> None:
        """Leaves it out from now on. Call before `Transfer.close`."""
        with self._lock:
            if self._transfers.pop(id(transfer), None) is not None:
                self._is_changed = True

    def state(self, transfer: Transfer) -> State:
        """Where it stood at this sweep's beginning, or stands now if it is not in the set."""
        key = id(transfer)
        with self._lock:
            if key not in self._transfers:
                return transfer.poll()
            if self._is_changed or key in self._asked or time.monotonic() > self._fresh_until:
                self._refresh()
            self._asked.add(key)
            return State(self._states[self._place[key]])

    def _refresh(self) -> None:
        if self._is_changed:
            self._order = list(self._transfers.values())
            self._handles = ffi.new("const kvt_transfer_t *[]", [transfer.handle for transfer in self._order])
            self._states = ffi.new("uint8_t[]", len(self._order))
            self._place = {id(transfer): place for place, transfer in enumerate(self._order)}
            self._is_changed = False
        check(lib.kvt_transfer_poll_many(self._handles, len(self._order), self._states))
        self._asked.clear()
        self._fresh_until = time.monotonic() + POLL_FRESH


def _ranges(addresses: Sequence[int], lengths: Sequence[int]) -> Any:
    return ffi.new("kvt_range_t[]", list(zip(addresses, lengths, strict=True)))


def _described(layout: Layout) -> tuple[list[Any], Any]:
    """The layout as the library takes it, and what must be kept alive during the call."""
    keep: list[Any] = []

    def text(value: str) -> dict[str, Any]:
        data = ffi.from_buffer("char[]", value.encode())
        keep.append(data)
        return {"data": data, "len": len(data)}

    def slices(part: Component) -> Any:
        groups = [ffi.new("uint32_t[]", list(cut.groups)) for cut in part.slices]
        made = ffi.new(
            "kvt_slice_t[]",
            [
                {"dim": cut.dim, "rows": cut.rows, "groups": group, "groups_len": len(cut.groups)}
                for cut, group in zip(part.slices, groups)
            ],
        )
        keep.extend([made, *groups])
        return made

    components = ffi.new("kvt_component_t[]", len(layout.components))
    for place, part in enumerate(layout.components):
        entries = ffi.new(
            "kvt_entry_t[]",
            [
                {
                    "address": entry.address,
                    "len": entry.length,
                    "item_len": entry.item_length,
                    "layer_id": -1 if entry.layer_id is None else entry.layer_id,
                    "memory": entry.memory.value,
                    "device": entry.device,
                }
                for entry in part.entries
            ],
        )
        keep.append(entries)
        described = components[place]
        described.kind = part.kind.value
        described.draft_entries = part.draft_entries
        described.name = text(part.name if part.kind is Kind.STATE else "")
        described.entries = entries
        described.entries_len = len(part.entries)
        described.slices = slices(part)
        described.slices_len = len(part.slices)
        described.page_layout = text(part.page_layout)
    ratios = ffi.new("uint32_t[]", list(layout.compression_ratios))
    keep.extend([components, ratios])
    heads = layout.total_kv_heads is not None
    given = ffi.new(
        "kvt_layout_t *",
        {
            "abi_version": ABI_VERSION,
            "page_size": layout.page_size,
            "kv_dtype": text(layout.kv_dtype),
            "kv_layout": text(layout.kv_layout),
            "attention": 0 if heads else 1,
            "total_kv_heads": layout.total_kv_heads or 0,
            "rank_kv_heads": layout.rank_kv_heads or 0,
            "tp_rank": layout.tp[0],
            "tp_size": layout.tp[1],
            "pp_rank": layout.pp[0],
            "pp_size": layout.pp[1],
            "first_layer": layout.layers[0],
            "end_layer": layout.layers[1],
            "components": components,
            "components_len": len(layout.components),
            "compression_ratios": ratios if layout.compression_ratios else ffi.NULL,
            "compression_ratios_len": len(layout.compression_ratios),
        },
    )
    return keep, given
