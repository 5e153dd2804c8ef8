"""Which prefill ranks a decode rank talks to, and connecting to them off the scheduler's thread.

A request names its prefill server (the bootstrap address); the server's registry says where each rank listens; the engine
connects to those once and keeps them. All of that waits for other hosts, so it runs on a few threads of its own, and what
it found is kept until a peer is lost.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Callable

from ..engine import Engine, Source
from ..errors import KvtError

logger = logging.getLogger("kvtransfer.sglang")

# Threads that look up and connect. A black-holed prefill server holds one of them for its timeout, so a few more keep the
# requests of the others going.
CONNECTORS = 8


@dataclass(frozen=True)
class Target:
    """One prefill rank of a request, by its place in the prefill server."""

    dp: int
    cp: int
    tp: int
    pp: int
    dummy: bool


@dataclass(frozen=True)
class Group:
    """The prefill ranks of a kind of request, connected."""

    rows: list[dict[str, Any]]
    """What the registry said of each, with SGLang's `pp_rank` and `is_dummy` added."""
    sources: list[Source]


class PeerSetupError(Exception):
    """A prefill rank could not be found or reached; the sentence becomes the request's failure."""


class Peers:
    """The connected prefill ranks, by prefill server and place."""

    def __init__(
        self, engine: Engine, fetch_row: Callable[[str, Target], dict[str, Any] | str], connect_timeout: float
    ) -> None:
        self._engine = engine
        self._fetch_row = fetch_row
        self._timeout = connect_timeout
        self._lock = threading.Lock()
        self._groups: dict[tuple[str, tuple[Target, ...]], Group] = {}
        self._connected: dict[str, int] = {}
        self._dialling: dict[str, threading.Lock] = {}
        self._pool = ThreadPoolExecutor(CONNECTORS, thread_name_prefix="kvt-connect")

    def known(self, server: str, targets: tuple[Target, ...]) -> Group | None:
        """The group, if it is connected already. Never waits."""
        with self._lock:
            return self._groups.get((server, targets))

    def submit(self, job: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Runs something that waits for other hosts on one of the connecting threads."""
        return self._pool.submit(job, *arguments)

    def connect(self, server: str, targets: tuple[Target, ...]) -> Group:
        """Looks the ranks up and connects to those that are not connected. Waits; raises `PeerSetupError`."""
        group = self.known(server, targets)
        if group is not None:
            return group
        rows, sources = [], []
        for target in targets:
            row = self._fetch_row(server, target)
            if isinstance(row, str):
                raise PeerSetupError(row)
            address = _host_port(str(row["rank_ip"]), int(row["rank_port"]))
            rows.append({**row, "pp_rank": target.pp, "is_dummy": target.dummy})
            sources.append(Source(self._dial(address), target.dummy))
        group = Group(rows, sources)
        with self._lock:
            self._groups[(server, targets)] = group
        return group

    def forget(self, server: str) -> None:
        """Drops what is known of a server whose rank was lost: the next request looks it up again.

        Its ranks that are still connected stay so: requests to other data-parallel ranks of the same server go on.
        """
        try:
            alive = {peer["peer"] for peer in self._engine.info()["peers"]}
        except KvtError as error:
            logger.debug("the engine has no peers any more: %s", error)
            alive = set()
        with self._lock:
            for key in [key for key in self._groups if key[0] == server]:
                del self._groups[key]
            for address in [address for address, peer in self._connected.items() if peer not in alive]:
                del self._connected[address]
                self._dialling.pop(address, None)

    def close(self) -> None:
        """Lets the threads end; jobs that wait for other hosts are left to their timeouts."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _dial(self, address: str) -> int:
        # Two requests for one new peer must make one connection.
        with self._lock:
            dialling = self._dialling.setdefault(address, threading.Lock())
        with dialling:
            with self._lock:
                peer = self._connected.get(address)
            if peer is not None:
                return peer
            try:
                peer = self._engine.connect(address, self._timeout)
            except KvtError as error:
                raise PeerSetupError(f"Could not connect to the prefill rank at {address}: {error.text}") from error
            with self._lock:
                self._connected[address] = peer
            return peer


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
