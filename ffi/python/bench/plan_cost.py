"""What it costs to turn page lists into writes: SGLang's own expansion and ours, in one process, without a wire.

Theirs is the real code of SGLang's Mooncake backend (`_send_kvcache_generic` with `group_concurrent_contiguous`, and
`send_kvcache_slice` for unequal tensor-parallel sizes) over an engine that counts what it is given and does nothing. Ours is
two engines without a wire: a whole push until Success on the sending side, hand-over, acknowledgements and threads included,
and beside it how soon push() is back, which waits without the GIL. Both take the same page lists in turns, round by round.

    KVTRANSFER_LIBRARY=.../libkvtransfer.so python plan_cost.py [--rounds N] [--json FILE]

A last table counts the operations of one request between unequal tensor-parallel sizes over each real path.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import stand_ins  # noqa: E402

stand_ins.install()

import numpy as np  # noqa: E402
from kvtransfer.engine import Engine, Source  # noqa: E402
from kvtransfer.layout import Component, Entry, Kind, Layout  # noqa: E402

# Virtual memory without pages behind it: nothing of it is touched.
NO_RESERVE = 0x4000
# Longest that anything here may take.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Case:
    """A request of one model, with no two pages that touch on both sides."""

    name: str
    layers: int
    page_size: int
    tokens: int
    goal_ms: float
    heads: int = 0
    """KV heads; 0: a latent cache."""
    head_bytes: int = 256
    latent_bytes: int = 1152
    decode_tp: int = 1

    @property
    def buffers(self) -> int:
        return self.layers * (2 if self.heads else 1)

    @property
    def pages(self) -> int:
        return self.tokens // self.page_size

    @property
    def pool_pages(self) -> int:
        return 2 * self.pages + 1

    def item_bytes(self, tp: int) -> int:
        token = self.heads // tp * self.head_bytes if self.heads else self.latent_bytes
        return self.page_size * token

    def lists(self) -> tuple[np.ndarray, np.ndarray]:
        """Source and target pages in random order, every other page of the target's pool."""
        random = np.random.default_rng(7)
        source = random.permutation(self.pages).astype(np.int32)
        return source, (random.permutation(self.pages) * 2 + 1).astype(np.int32)


CASES = (
    Case("MLA, 61 layers, page 64, 128K tokens", 61, 64, 131_072, 4.0),
    Case("MHA, 80 layers K+V, page 64, 128K tokens", 80, 64, 131_072, 10.0, heads=8),
    Case("MHA, 80 layers K+V, page 1, 8K tokens", 80, 1, 8_192, 30.0, heads=8),
    Case("MHA, 80 layers K+V, page 64, TP 1 to 2, 8K tokens, one peer", 80, 64, 8_192, 15.0, heads=8, decode_tp=2),
)
# The same cut with small heads, so that its bytes fit: 8192 tokens of 160 buffers are 1 310 720 slices to each peer.
CUT = Case("TP 1 to 2", 80, 64, 8_192, 0.0, heads=8, head_bytes=64, decode_tp=2)


class Counting:
    """The engine under SGLang's manager: counts blocks and calls."""

    def __init__(self) -> None:
        self.blocks = self.calls = 0

    def batch_transfer_sync(self, _session: str, sources: list[int], _targets: list[int], _lengths: list[int]) -> int:
        self.blocks += len(sources)
        self.calls += 1
        return 0


class Theirs:
    """SGLang's real manager without its constructor: only what the expansion reads is set."""

    def __init__(self, case: Case) -> None:
        from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager

        self.case = case
        self.engine = Counting()
        item = case.item_bytes(1)
        self.pointers = [2**44 + at * item * case.pool_pages for at in range(case.buffers)]
        manager = object.__new__(MooncakeKVManager)
        manager.__dict__.update(
            engine=self.engine, is_mla_backend=not case.heads, is_hybrid_mla_backend=False, pp_size=1, attn_tp_size=1,
            enable_custom_mem_pool=False, custom_mem_pool_type=None, max_transfer_batch_indices=0,
            enable_deferred_decode_kv_release=True, state_strides_validated=set(),
            kv_args=SimpleNamespace(
                kv_data_ptrs=self.pointers, kv_item_lens=[item] * case.buffers, kv_layer_ids=[], page_size=case.page_size,
                prefill_start_layer=0, total_kv_head_num=case.heads, kv_head_num=case.heads, engine_rank=0,
                mla_compression_ratios=None, num_draft_entries=0,
            ),
        )  # fmt: skip
        self.manager = manager
        # As a transfer worker's on a host of 16 cores: 4 threads over 4 queues.
        self.executor = ThreadPoolExecutor(1)

    def run(self, source: np.ndarray, target: np.ndarray) -> float:
        case, manager = self.case, self.manager
        started = time.perf_counter()
        if case.decode_tp == 1:
            status = manager._send_kvcache_generic(
                mooncake_session_id="peer", src_data_ptrs=self.pointers, dst_data_ptrs=self.pointers,
                item_lens=manager.kv_args.kv_item_lens, prefill_data_indices=source, dst_data_indices=target,
                executor=self.executor, src_layer_ids=[], dst_layer_ids=[],
            )  # fmt: skip
        else:
            status = manager.send_kvcache_slice(
                "peer", source, self.pointers, target, 0, case.decode_tp, case.item_bytes(case.decode_tp), self.executor, []
            )
        taken = time.perf_counter() - started
        assert status == 0
        return taken


class Ours:
    """Two engines in this process."""

    def __init__(self, case: Case, stack: ExitStack, **config: Any) -> None:
        self.case = case
        self.rooms = 0
        common = {"same_host": "off", **config}
        self.memories: list[mmap.mmap] = []
        self.sender = stack.enter_context(Engine(self._layout(1), {"listen": "127.0.0.1:0", **common}))
        self.receiver = stack.enter_context(Engine(self._layout(case.decode_tp), common))
        self.peer = self.receiver.connect(f"127.0.0.1:{self.sender.listen_port}", PATIENCE_S)

    def _layout(self, tp: int) -> Layout:
        case = self.case
        item = case.item_bytes(tp)
        length = item * case.pool_pages
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        entries = []
        memory = mmap.mmap(-1, length * case.buffers, flags=flags)
        self.memories.append(memory)
        base = np.frombuffer(memory, np.uint8).ctypes.data
        for at in range(case.buffers):
            entries.append(Entry(base + at * length, length, item))
        return Layout(
            page_size=case.page_size,
            kv_dtype="bfloat16",
            components=[Component(Kind.KV, entries)],
            total_kv_heads=case.heads or None,
            rank_kv_heads=case.heads // tp if case.heads else None,
            tp=(0, tp),
            layers=(0, case.layers),
        )

    def run(self, source: np.ndarray, target: np.ndarray) -> tuple[float, float]:
        """Seconds until Success, and until push() was back."""
        self.rooms += 1
        with (
            self.receiver.receive(self.rooms, [Source(self.peer)], [target], PATIENCE_S) as receiving,
            self.sender.send(self.rooms, PATIENCE_S) as sending,
        ):
            assert sending.wait_ready(PATIENCE_S)
            started = time.perf_counter()
            sending.push([source], last=True)
            pushed = time.perf_counter()
            sending.result(PATIENCE_S)
            taken = time.perf_counter() - started
            receiving.result(PATIENCE_S)
        return taken, pushed - started


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Both, in turns. The slowest of theirs takes seconds, so it runs less often."""
    source, target = case.lists()
    with ExitStack() as stack:
        ours = Ours(case, stack, null_wire=True)
        theirs = Theirs(case)
        ours.run(source, target)
        before = ours.sender.info()["counters"]["null_wire"]
        first = theirs.run(source, target)
        theirs.engine.blocks = theirs.engine.calls = 0
        enough = max(2, min(rounds, int(6 / first)))
        their_times, our_times, pushes = [], [], []
        for at in range(rounds):
            gc.collect()
            if at < enough:
                their_times.append(theirs.run(source, target))
            taken, pushed = ours.run(source, target)
            our_times.append(taken)
            pushes.append(pushed)
        after = ours.sender.info()["counters"]["null_wire"]
    return {
        "case": case.name,
        "goal_ms": case.goal_ms,
        "theirs_ms": median(their_times) * 1e3,
        "ours_ms": median(our_times) * 1e3,
        "ours_worst_ms": max(our_times) * 1e3,
        "push_us": median(pushes) * 1e6,
        "their_blocks": theirs.engine.blocks // enough,
        "their_calls": theirs.engine.calls // enough,
        "our_blocks": (after["blocks"] - before["blocks"]) // rounds,
        "our_writes": (after["wire_operations"] - before["wire_operations"]) // rounds,
        "reached": median(our_times) * 1e3 <= case.goal_ms,
    }


class Calls:
    """The system calls of this process while the block runs, counted by strace."""

    NAMES = ("sendmsg", "recvmsg", "recvfrom", "process_vm_readv")

    def __enter__(self) -> Calls:
        self.file = tempfile.NamedTemporaryFile("r", suffix=".strace")
        trace = ["strace", "-f", "-c", "-o", self.file.name, "-e", f"trace={','.join(self.NAMES)}", "-p", str(os.getpid())]
        self.strace = subprocess.Popen(trace, stderr=subprocess.PIPE)
        assert self.strace.stderr is not None
        # It says so once per thread; the first line means that all that existed are attached.
        line = self.strace.stderr.readline()
        assert b"attached" in line, line
        return self

    def __exit__(self, *_exc: object) -> None:
        self.strace.send_signal(signal.SIGINT)
        self.strace.communicate(timeout=PATIENCE_S)
        lines = [line.split() for line in self.file.read().splitlines()]
        self.counts = {line[-1]: int(line[3]) for line in lines if line and line[-1] in self.NAMES}
        self.file.close()


def operations(path: str, cut: Case) -> dict[str, Any]:
    """What one request to one of two decode ranks is made of on a real path."""
    source, target = cut.lists()
    with ExitStack() as stack:
        ours = Ours(cut, stack, same_host=path)
        before = sum(rail["batches_total"] for rail in ours.sender.info()["rails"])
        with Calls() as calls:
            ours.run(source, target)
        # What became of it is known a moment later.
        batches = sum(rail["batches_total"] for rail in ours.sender.info()["rails"]) - before
    return {"path": {"off": "tcp"}.get(path, path), "slices": cut.tokens * cut.buffers, "batches": batches, **calls.counts}


def count_operations() -> list[dict[str, Any]]:
    rows = [operations(path, CUT) for path in ("off", "pull", "ring")]
    print("\n| TP 1 to 2, one peer | slices: theirs, a write each | batches | send calls | receive calls | copies between processes |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        receives = row.get("recvmsg", 0) + row.get("recvfrom", 0)
        print(f"| {row['path']} | {row['slices']} | {row['batches']} | {row.get('sendmsg', 0)} | {receives} "
              f"| {row.get('process_vm_readv', 0)} |", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="one object per line")
    chosen = parser.parse_args()
    found = []
    print("| request, fully fragmented | theirs ms | ours ms (worst) | goal ms | push() us | their blocks (calls) | our writes |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        row = measure(case, chosen.rounds)
        found.append(row)
        print(
            f"| {row['case']} | {row['theirs_ms']:.0f} | {row['ours_ms']:.2f} ({row['ours_worst_ms']:.2f}) | {row['goal_ms']:.0f} "
            f"| {row['push_us']:.0f} | {row['their_blocks']} ({row['their_calls']}) | {row['our_writes']} |",
            flush=True,
        )
    found += count_operations()
    if chosen.json:
        chosen.json.write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
