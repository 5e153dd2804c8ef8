"""`KVTRANSFER_REPLACE_MOONCAKE=1`: this engine under SGLang's own Mooncake manager, behind the backend name `mooncake`.

For deployments that need what SGLang grants by that name only. SGLang's control plane, its index expansion and its messages
stay as they are; only the class that moves blocks by address is replaced. A peer with the real Mooncake cannot be talked to.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Callable, Sequence

from ..engine import Engine
from ..errors import KvtError, UnknownPeerError
from ..layout import Component, Entry, Kind, Layout
from . import options

logger = logging.getLogger("kvtransfer.sglang")

TARGET = "sglang.srt.distributed.device_communicators.mooncake_transfer_engine.MooncakeTransferEngine"
REGISTRATION = "sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager.register_buffer_to_engine"
# Bound of one batch of blocks. SGLang has no number of its own here; a batch is at most one chunk of a request.
WRITE_TIMEOUT = 60.0
PROBE_TIMEOUT = 3.0


class NotSupportedError(RuntimeError):
    """SGLang asked for something of Mooncake's that this engine does not have."""


def install() -> None:
    """Replaces the class, and says so in one line."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(TARGET, BlockEngine, HookType.REPLACE)
    HookRegistry.register(REGISTRATION, registered, HookType.AROUND)
    logger.warning(
        "KVTRANSFER_REPLACE_MOONCAKE=1: the transfer backend named mooncake is kvtransfer in this process; every prefill and "
        "decode server must be set so"
    )


def registered(original: Callable[[Any], None], manager: Any) -> None:
    """The manager's registration, and then our engine: what is wrong with memory or devices shows when the server starts."""
    original(manager)
    manager.engine.start()


class BlockEngine:
    """What SGLang's Mooncake manager asks of its engine.

    Ours must know all memory from its start, and releases differ in whether the manager registers everything at once. So
    buffers are collected until `start`, or until something is asked that needs the engine.
    """

    def __init__(self, hostname: str, gpu_id: int | None = None, ib_device: str | None = None) -> None:
        self.hostname = hostname
        self.gpu_id = gpu_id or 0
        self.ib_device = ib_device
        self._options = options.read_all()
        self._engine: Engine | None = None
        self._known: dict[int, int] = {}
        self._released: set[int] = set()
        self._peers: dict[str, int] = {}
        self._lock = threading.Lock()
        self._starting = threading.Lock()

    def batch_register(self, ptrs: Sequence[int], lengths: Sequence[int]) -> int:
        """Registers buffers. Those of before the start come back after a release; others are refused then."""
        given = {int(ptr): int(length) for ptr, length in zip(ptrs, lengths, strict=True) if length}
        if self._engine is None:
            self._known.update(given)
            return 0
        strange = [ptr for ptr, length in given.items() if self._known.get(ptr, 0) < length]
        if strange:
            raise NotSupportedError(f"buffers that come later cannot be registered ({len(strange)} of them): turn staging buffers off")
        back = [ptr for ptr in given if ptr in self._released]
        if back:
            self._engine.restore_memory(back, [given[ptr] for ptr in back])
            self._released.difference_update(back)
        return 0

    def start(self) -> None:
        """Starts the engine with what was registered. Raises `KvtError` with device, size and fix."""
        self._started()

    def batch_deregister(self, ptrs: Sequence[int]) -> int:
        """Lets go of buffers, for as long as SGLang has no memory behind them."""
        gone = [int(ptr) for ptr in ptrs if int(ptr) in self._known and int(ptr) not in self._released]
        if gone and self._engine is not None:
            self._engine.release_memory(gone, [self._known[ptr] for ptr in gone])
            self._released.update(gone)
        return 0

    def register(self, ptr: int, length: int) -> None:
        """One buffer."""
        self.batch_register([ptr], [length])

    def deregister(self, ptr: int) -> None:
        """One buffer."""
        self.batch_deregister([ptr])

    def get_session_id(self) -> str:
        """Where this rank listens: what the other side passes to `batch_transfer_sync`."""
        host = f"[{self.hostname}]" if ":" in self.hostname else self.hostname
        return f"{host}:{self._started().listen_port}"

    def batch_transfer_sync(self, session: str, srcs: Sequence[int], dsts: Sequence[int], lengths: Sequence[int]) -> int:
        """Writes blocks; 0 once all are there, -1 if they are not and will not be."""
        try:
            self._write(session, srcs, dsts, lengths)
        except (KvtError, ValueError) as error:
            logger.error("%d blocks for %s were not written: %s", len(lengths), session, error)
            return -1
        return 0

    def transfer_sync(self, session: str, src: int, dst: int, length: int) -> int:
        """One block."""
        return self.batch_transfer_sync(session, [src], [dst], [length])

    def send_probe(self, session: str) -> int:
        """0 if the peer answers."""
        try:
            self._started().probe(self._peer(session), PROBE_TIMEOUT)
        except KvtError as error:
            self._forget(session)
            logger.info("no answer from %s: %s", session, error)
            return -1
        return 0

    def get_ib_device(self) -> str | None:
        """What the constructor was given."""
        return self.ib_device

    def get_engine(self) -> Any:
        """Raises: HiCache's Mooncake store and encoder disaggregation want Mooncake's own engine object."""
        raise NotSupportedError("KVTRANSFER_REPLACE_MOONCAKE=1 has no Mooncake engine object: run HiCache and encoders without it")

    def _start(self, buffers: dict[int, int]) -> Engine:
        entries = [Entry(ptr, length, 1) for ptr, length in buffers.items()]
        layout = Layout(page_size=1, kv_dtype="", components=[Component(Kind.MEMORY, entries)], kv_layout="")
        host = f"[{self.hostname}]" if ":" in self.hostname else self.hostname
        config: dict[str, Any] = {
            "listen": f"{host}:0",
            "writable_by_address": True,
            "lanes": self._options["lanes"],
            "same_host": self._options["same_host"],
            "rdma": {
                "usage": self._options["rdma"],
                "devices": self._options["rdma_devices"] or self.ib_device or "",
                "gpu": self.gpu_id,
            },
        }
        if self._options["token"]:
            config["token"] = self._options["token"]
        return Engine(layout, {**config, **self._options["engine"]})

    def _started(self) -> Engine:
        # Several of the manager's threads may be the first to ask.
        with self._starting:
            if self._engine is None:
                if not self._known:
                    raise NotSupportedError("no buffer has been registered yet")
                self._engine = self._start(self._known)
            return self._engine

    def _write(self, session: str, srcs: Sequence[int], dsts: Sequence[int], lengths: Sequence[int]) -> None:
        engine = self._started()
        try:
            engine.write(self._peer(session), srcs, dsts, lengths, WRITE_TIMEOUT)
        except UnknownPeerError:
            # The connection was lost since the last batch. A peer that came back listens elsewhere; this one may be alive.
            self._forget(session)
            engine.write(self._peer(session), srcs, dsts, lengths, WRITE_TIMEOUT)

    def _peer(self, session: str) -> int:
        with self._lock:
            if session not in self._peers:
                self._peers[session] = self._started().connect(session, self._options["connect_timeout"])
            return self._peers[session]

    def _forget(self, session: str) -> None:
        with self._lock:
            self._peers.pop(session, None)
