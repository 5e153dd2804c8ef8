"""One process of the comparison in rivals.py: a rank with SGLang's real classes over shared pools, or one end of a plain socket.

Prefill and decode ranks of every engine map the same two pools, so that all of them move the same memory and one machine
holds them. What a page holds is a function of its buffer and its number; a decode rank compares whole pages with that.
"""

from __future__ import annotations

import importlib
import mmap
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import rank_process  # noqa: E402
import numpy as np  # noqa: E402
from pools import UNTOUCHED, Pool, Shape  # noqa: E402

FAILED, SUCCESS = 0, 4
# How often a scheduler's loop asks for a request's state.
POLL_S = 0.001
# Longest that one request may take.
PATIENCE_S = 100.0
# Places of the noise at which a page can begin.
STARTS = 1 << 18
# Ranges of one call (`UIO_MAXIOV`).
RANGES = 1024


class SharedPool(Pool):
    """The pool of one side, in a file that the parent made."""

    def __init__(self, shape: Shape, is_prefill: bool, path: str) -> None:
        super().__init__(Shape(**{**shape.__dict__, "pages": 1}), is_prefill)
        self.shape = shape
        item = shape.page_size * (shape.latent_bytes or shape.rank_heads * shape.head_bytes)
        file = os.open(path, os.O_RDWR)
        self.memory = mmap.mmap(file, len(self.keys) * shape.pages * item)
        os.close(file)
        self.kv = list(np.frombuffer(self.memory, np.uint8).reshape(len(self.keys), shape.pages, item))
        # The same in words, which compare faster.
        self.pages = np.frombuffer(self.memory, np.uint64).reshape(len(self.keys), shape.pages, item // 8)
        # As long as a page and some more, so that each page can begin at its own place of it.
        self.noise = np.random.default_rng(5).integers(0, 2**64, item // 8 + STARTS, np.uint64)

    def page(self, buffer: int, page: int) -> np.ndarray:
        """What a page of the source holds."""
        start = (buffer * 7919 + page * 104_729) % STARTS
        return self.noise[start : start + self.pages.shape[2]]

    def fill(self) -> None:
        for buffer in range(len(self.keys)):
            for page in range(self.shape.pages):
                self.pages[buffer, page] = self.page(buffer, page)

    def poison(self) -> None:
        np.frombuffer(self.memory, np.uint8)[:] = UNTOUCHED

    def differing(self, source: list[int], target: list[int]) -> int:
        """How many pages of a request do not hold what their source holds, or were written without being asked for."""
        wrong = 0
        untouched = np.full(self.pages.shape[2] * 8, UNTOUCHED, np.uint8).view(np.uint64)
        others = np.setdiff1d(np.arange(self.shape.pages), target)
        for buffer in range(len(self.keys)):
            wrong += sum(
                not np.array_equal(self.pages[buffer, to], self.page(buffer, number)) for number, to in zip(source, target)
            )
            wrong += sum(not np.array_equal(self.pages[buffer, other], untouched) for other in others)
        return wrong


class Asked:
    """What both kinds of processes answer to."""

    pool: SharedPool

    def fill(self) -> None:
        self.pool.fill()

    def poison(self) -> None:
        self.pool.poison()

    def differing(self, source: list[int], target: list[int]) -> dict[str, Any]:
        return {"pages": self.pool.differing(source, target)}


class TimedRank(rank_process.Rank, Asked):
    """A rank of an engine."""

    def make_pool(self, setup: dict[str, Any]) -> SharedPool:
        return SharedPool(self.shape, self.is_prefill, setup["pool"])

    def _kv_args(self, setup: dict[str, Any]) -> Any:
        args = super()._kv_args(setup)
        if setup["backend"] == "nixl":
            # NIXL would take its build for CUDA 0 from the stand-ins for torch and cuda-python.
            importlib.import_module("nixl_meta_utils").detect_cuda_major = lambda: None
            # SGLang's own field: without it NIXL takes every buffer for GPU memory.
            args.kv_data_mem_kinds = ["DRAM"] * len(args.kv_data_ptrs)
        return args

    def go(self, room: int, pages: list[int], slot: int) -> dict[str, Any]:
        """Prefill: sends a whole request in one chunk and polls until it is over."""
        self.pool.write_aux(room, slot)
        indices = np.array(pages, dtype=np.int32)
        cpu, started = time.process_time(), time.monotonic()
        self.requests[room].send(indices, None)
        sent = time.monotonic()
        state = self._over(room)
        return {"state": state, "started": started, "send_s": sent - started, "cpu_s": time.process_time() - cpu}

    def arrive(self, room: int, slot: int) -> dict[str, Any]:
        """Decode: polls until it is over."""
        cpu = time.process_time()
        state = self._over(room)
        ended = time.monotonic()
        return {"state": state, "ended": ended, "cpu_s": time.process_time() - cpu,
                "aux": bool(self.pool.aux[-1][slot].view(np.uint64)[0] == room)}  # fmt: skip

    def _over(self, room: int) -> int:
        poller = self.requests[room]
        deadline = time.monotonic() + PATIENCE_S
        while (state := int(poller.poll())) not in (FAILED, SUCCESS) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return state


class Plain(Asked):
    """One end of plain TCP connections: whole ranges from the pages to the sockets and from the sockets to the pages."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self.is_prefill = setup["role"] == "prefill"
        self.pool = SharedPool(Shape(**setup["shape"]), self.is_prefill, setup["pool"])
        self.listener: socket.socket | None = None
        self.sockets: list[socket.socket] = []
        self.work: list[list[memoryview]] = []
        if self.is_prefill:
            self.listener = socket.create_server(("127.0.0.1", setup["port"]))
        else:
            self.sockets = [socket.create_connection(("127.0.0.1", setup["port"]), 10) for _ in range(setup["connections"])]

    def accept(self, connections: int) -> None:
        assert self.listener is not None
        self.sockets = [self.listener.accept()[0] for _ in range(connections)]
        for connection in self.sockets:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def prepare(self, source: list[int], target: list[int]) -> None:
        """Works out this side's ranges, those that touch on both sides merged, shared out over the connections."""
        item = self.pool.kv[0].shape[1]
        runs: list[list[int]] = []
        for place, (here, there) in enumerate(zip(source, target)):
            if runs and source[place - 1] + 1 == here and target[place - 1] + 1 == there:
                runs[-1][1] += 1
            else:
                runs.append([here if self.is_prefill else there, 1])
        ranges = [
            memoryview(buffer.reshape(-1))[first * item : (first + count) * item] for buffer in self.pool.kv for first, count in runs
        ]  # fmt: skip
        each = -(-len(ranges) // len(self.sockets))
        self.work = [ranges[at * each : (at + 1) * each] for at in range(len(self.sockets))]

    def go(self) -> dict[str, Any]:
        return self._move(_send)

    def arrive(self) -> dict[str, Any]:
        return self._move(_receive)

    def _move(self, move: Any) -> dict[str, Any]:
        threads = [threading.Thread(target=move, args=pair) for pair in zip(self.sockets[1:], self.work[1:])]
        cpu, started = time.process_time(), time.monotonic()
        for thread in threads:
            thread.start()
        move(self.sockets[0], self.work[0])
        for thread in threads:
            thread.join()
        return {"started": started, "ended": time.monotonic(), "cpu_s": time.process_time() - cpu}


def _advance(ranges: list[memoryview], at: int, done: int) -> int:
    while done:
        if done < len(ranges[at]):
            ranges[at] = ranges[at][done:]
            return at
        done -= len(ranges[at])
        at += 1
    return at


def _send(connection: socket.socket, ranges: list[memoryview]) -> None:
    at = 0
    while at < len(ranges):
        at = _advance(ranges, at, connection.sendmsg(ranges[at : at + RANGES]))
    assert connection.recv(1) == b"."


def _receive(connection: socket.socket, ranges: list[memoryview]) -> None:
    at = 0
    while at < len(ranges):
        got = connection.recvmsg_into(ranges[at : at + RANGES])[0]
        assert got, "the other end has closed"
        at = _advance(ranges, at, got)
    connection.sendall(b".")


def make(setup: dict[str, Any]) -> Any:
    if setup["role"] == "registry":
        return rank_process.Registry(setup)
    return Plain(setup) if setup["backend"] == "plain" else TimedRank(setup)


if __name__ == "__main__":
    rank_process.serve(make)
